"""`make preflight` on a real cluster: all is fine, then one thing at a time is not."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes.client
import kubernetes.utils
import prefect.agent.kubernetes
import pytest
import yaml

from flows.settings import PROJECT, load_job_template
from scripts import cluster
from tests.kubernetes.conftest import Namespace
from tests.support.prefect_api import PrefectAPI
from tests.support.waiting import wait_for

RBAC = Path(prefect.agent.kubernetes.__path__[0], "rbac.yaml")

Preflight = Callable[..., tuple[set[str], str]]


@pytest.fixture(scope="module")
def project(prefect: Callable[..., str]) -> str:
    prefect("create", "project", "preflight")
    return "preflight"


@pytest.fixture
def place(namespace: Namespace) -> Iterator[str]:
    """A namespace of a test's own, where the Agent has its rights."""
    name = f"tests-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "privileged"}
    namespace.core.create_namespace({"metadata": {"name": name, "labels": labels}})
    try:
        for document in yaml.safe_load_all(RBAC.read_text()):
            document["metadata"]["namespace"] = name
            kubernetes.utils.create_from_dict(namespace.api, document)
        accounts = namespace.core.list_namespaced_service_account
        wait_for(lambda: accounts(name).items, f"{name} has a ServiceAccount, without which it admits no pod")
        yield name
    finally:
        namespace.core.delete_namespace(name)


@pytest.fixture
def preflight(place: str, api: PrefectAPI, project: str) -> Preflight:
    """The real command: the names of the checks that are wrong, and all that it says."""
    ours = {"NAMESPACE": place, "SERVICE_ACCOUNT": "default", "PROJECT": project, "KUBECONFIG": str(cluster.KUBECONFIG)}

    def run(**environment: str) -> tuple[set[str], str]:
        command, env = [sys.executable, "-m", "scripts.preflight"], {**os.environ, **api.env, **ours, **environment}
        done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=60)
        wrong = {line[13:30].strip() for line in done.stdout.splitlines() if line.startswith("wrong ")}
        assert done.returncode == bool(wrong), done.stdout
        assert "Traceback" not in done.stderr
        return wrong, done.stdout

    return run


def test_all_is_fine(preflight: Preflight, place: str, namespace: Namespace, template_name: str) -> None:
    """With all that a namespace may have; the tests below take one thing away, or spoil it."""
    wrong, said = preflight(JOB_TEMPLATE=template_name)
    assert not wrong, said
    logins = base64.b64encode(b'{"auths": {"registry.example.com": {"auth": "bWU6cGFzcw=="}}}').decode()
    secret = {"type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": logins}}
    namespace.core.create_namespaced_secret(place, {"metadata": {"name": "docker-sidecar"}, **secret})
    data = {"daemon.json": '{"mtu": 1400}', "ca.crt": "-----BEGIN CERTIFICATE-----\n"}
    namespace.core.create_namespaced_config_map(place, {"metadata": {"name": "docker-sidecar"}, "data": data})
    wrong, said = preflight(JOB_TEMPLATE=template_name)
    assert not wrong, said
    others = [line for line in said.splitlines() if line[13:30].strip() != "Agent"]  # this place has none
    assert {line.split()[0] for line in others} == {"fine"}, said
    assert f"system:serviceaccount:{place}:default may create jobs" in said
    assert "docker-sidecar has logins for registry.example.com" in said
    assert "docker-sidecar sets ca.crt, mtu" in said
    # and nothing was created
    assert not namespace.core.list_namespaced_pod(place).items
    assert not namespace.batch.list_namespaced_job(place).items


def test_no_namespace(preflight: Preflight) -> None:
    wrong, said = preflight(NAMESPACE="tests-nowhere")
    assert wrong == {"namespace"}, said
    assert "there is no 'tests-nowhere' → kubectl create namespace tests-nowhere && kubectl label" in said
    assert said.count("because of the namespace") == 4
    assert said.count("because of the Job") == 1


def test_the_agent_lacks_rights(preflight: Preflight, place: str, namespace: Namespace) -> None:
    rules = [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "list"]}]
    rules.append({"apiGroups": [""], "resources": ["pods"], "verbs": ["*"]})
    rbac = kubernetes.client.RbacAuthorizationV1Api(namespace.api)
    rbac.patch_namespaced_role("prefect-agent-rbac", place, {"rules": rules})
    review: dict[str, Any] = {"user": f"system:serviceaccount:{place}:default"}
    review["resourceAttributes"] = {"namespace": place, "verb": "list", "resource": "events"}
    ask = kubernetes.client.AuthorizationV1Api(namespace.api).create_subject_access_review
    wait_for(lambda: not ask({"spec": review}).status.allowed, "the role has changed")
    wrong, said = preflight()
    assert wrong == {"Agent's rights"}, said
    assert f"may not delete jobs, list events → kubectl create role agent --namespace {place} --verb=create" in said


def test_an_agent_of_another_name(preflight: Preflight, place: str) -> None:
    wrong, said = preflight(SERVICE_ACCOUNT="agent")
    assert wrong == {"Agent's rights"}, said
    assert f"--role=agent --serviceaccount={place}:agent" in said


@pytest.mark.parametrize("content", ["{'mtu': 1400}", "[]"])
def test_the_config_map(preflight: Preflight, place: str, namespace: Namespace, content: str) -> None:
    body = {"metadata": {"name": "docker-sidecar"}, "data": {"daemon.json": content}}
    namespace.core.create_namespaced_config_map(place, body)
    wrong, said = preflight()
    assert wrong == {"ConfigMap"}, said
    assert "the daemon.json of docker-sidecar is not a JSON object" in said
    assert f"→ kubectl edit configmap docker-sidecar --namespace {place}" in said


@pytest.mark.parametrize("option", ["hosts", "data-root", "log-driver"])
def test_a_daemon_json_that_conflicts_with_the_template(
    preflight: Preflight, place: str, namespace: Namespace, template_name: str, option: str
) -> None:
    """dockerd does not start if a flag names what its configuration names."""
    data = {"daemon.json": json.dumps({option: "x", "log-opts": {"max-size": "1m"}, "mtu": 1400})}
    namespace.core.create_namespaced_config_map(place, {"metadata": {"name": "docker-sidecar"}, "data": data})
    wrong, said = preflight(JOB_TEMPLATE=template_name)
    assert wrong == {"ConfigMap"}, said
    assert f"the daemon.json of docker-sidecar sets {option}, which the job template sets" in said


AUTHS = {
    "auth": {"auth": "dTpw"},
    "plain": {"username": "u", "password": "p"},
    "empty": {},
    "half": {"username": "u", "password": ""},
}


@pytest.mark.parametrize(("names", "lost"), [(["auth", "plain"], []), (["auth", "empty", "half"], ["empty", "half"])])
def test_logins(preflight: Preflight, place: str, namespace: Namespace, names: list[str], lost: list[str]) -> None:
    """A login has auth, or a user name and a password. `docker login` with a credential store leaves neither."""
    content = json.dumps({"auths": {f"{name}.example": AUTHS[name] for name in names}})
    body = {"metadata": {"name": "docker-sidecar"}, "stringData": {".dockerconfigjson": content}}
    namespace.core.create_namespaced_secret(place, {**body, "type": "kubernetes.io/dockerconfigjson"})
    wrong, said = preflight()
    assert wrong == ({"Secret"} if lost else set()), said
    shown = f"names {', '.join(f'{name}.example' for name in lost)}, but" if lost else "auth.example, plain.example"
    assert shown in said


def test_a_secret_of_another_type(preflight: Preflight, place: str, namespace: Namespace) -> None:
    body = {"metadata": {"name": "docker-sidecar"}, "stringData": {"config.json": "{}"}}
    namespace.core.create_namespaced_secret(place, body)
    wrong, said = preflight()
    assert wrong == {"Secret"}, said
    assert f"kubectl create secret docker-registry docker-sidecar --namespace {place}" in said


def test_a_quota(preflight: Preflight, place: str, namespace: Namespace) -> None:
    body = {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    namespace.core.create_namespaced_resource_quota(place, body)
    read = namespace.core.read_namespaced_resource_quota
    wait_for(lambda: read("none", place).status.hard, "the quota is in force")
    wrong, said = preflight()
    assert wrong == {"Job"}, said
    assert "exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0 → use another NAMESPACE" in said


def test_pod_security(preflight: Preflight, place: str, namespace: Namespace, template_name: str) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "baseline"}
    namespace.core.patch_namespace(place, {"metadata": {"labels": labels}})
    wrong, said = preflight(JOB_TEMPLATE=template_name)
    assert wrong == {"Job"}, said
    assert 'violates PodSecurity "baseline' in said
    assert f"→ kubectl label --overwrite namespace {place} pod-security.kubernetes.io/enforce=privileged" in said


POD = "spec.template.spec"


@pytest.mark.parametrize(
    ("path", "value", "seen"),
    [
        # what the API refuses of a Job, and not of a pod
        pytest.param(f"{POD}.restartPolicy", "Always", "restartPolicy", id="restart_policy"),
        pytest.param("metadata.namespace", "default", "namespace", id="namespace"),
        pytest.param("metadata.name", "My_Job", "My_Job", id="name"),
        pytest.param(f"{POD}.containers.0.securityContext", "restricted", "SecurityContext", id="context_of_the_flow"),
        # what is no daemon
        pytest.param(f"{POD}.containers.1.securityContext", "privileged", "SecurityContext", id="context"),
        pytest.param(f"{POD}.containers.1.args", 5, "args", id="args"),
        pytest.param(f"{POD}.containers.0.gpu", {}, 'unknown field "spec.template.spec.containers[0]', id="typo"),
    ],
)
def test_what_the_api_server_refuses(preflight: Preflight, tmp_path: Path, path: str, value: Any, seen: str) -> None:
    wrong, said = preflight(JOB_TEMPLATE=changed(tmp_path, {path: value}))
    assert wrong == {"Job"}, said
    assert seen in said
    assert "→ correct the template (JOB_TEMPLATE)" in said


def changed(folder: Path, changes: dict[str, Any]) -> str:
    """The path of a template that is docker_sidecar with other values."""
    template = load_job_template("docker_sidecar")
    for path, value in changes.items():
        part: Any = template
        *keys, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in keys:
            part = part[key]
        part[last] = value
    (folder / "own.yaml").write_text(yaml.safe_dump(template))
    return str(folder / "own.yaml")


@pytest.mark.parametrize("seconds", [0, 5, 119, 120])
def test_a_job_that_goes_too_soon(preflight: Preflight, tmp_path: Path, seconds: int) -> None:
    wrong, said = preflight(JOB_TEMPLATE=changed(tmp_path, {"spec.ttlSecondsAfterFinished": seconds}))
    assert wrong == ({"Job"} if seconds < 120 else set()), said
    assert (f"ttlSecondsAfterFinished is {seconds}" in said) == (seconds < 120)


def test_a_runtime_class_that_is_not_there(preflight: Preflight, tmp_path: Path) -> None:
    wrong, said = preflight(JOB_TEMPLATE=changed(tmp_path, {f"{POD}.runtimeClassName": "not-there"}))
    assert wrong == {"Job"}, said
    assert 'RuntimeClass "not-there" not found → install its runtime, or use another JOB_TEMPLATE' in said


def test_what_the_pod_needs_and_is_not_there(
    preflight: Preflight, place: str, namespace: Namespace, tmp_path: Path
) -> None:
    env = [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "api-key", "key": "token"}}}]
    env += [{"name": "B", "valueFrom": {"configMapKeyRef": {"name": "maybe", "key": "b", "optional": True}}}]
    volumes = [{"name": name, "emptyDir": {}} for name in ("docker-graph-store", "alive", "tmp", "workspace")]
    volumes += [{"name": "daemon-config", "configMap": {"name": "settings"}}]
    volumes += [{"name": "registry-credentials", "persistentVolumeClaim": {"claimName": "data"}}]
    own = changed(tmp_path, {f"{POD}.containers.1.env": env, f"{POD}.volumes": volumes})
    wrong, said = preflight(JOB_TEMPLATE=own)
    assert wrong == {"needed objects"}, said
    assert "secret api-key" in said
    assert "configmap settings" in said
    assert "persistentvolumeclaim data" in said
    assert "maybe" not in said
    namespace.core.create_namespaced_secret(place, {"metadata": {"name": "api-key"}, "stringData": {"other": "x"}})
    namespace.core.create_namespaced_config_map(place, {"metadata": {"name": "settings"}})
    wrong, said = preflight(JOB_TEMPLATE=own)
    assert "cannot start without key token of secret api-key, persistentvolumeclaim data →" in said
    namespace.core.patch_namespaced_secret("api-key", place, {"stringData": {"token": "x"}})
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    namespace.core.create_namespaced_persistent_volume_claim(place, {"metadata": {"name": "data"}, "spec": claim})
    wrong, said = preflight(JOB_TEMPLATE=own)
    assert not wrong, said


@pytest.mark.parametrize("options", [["--host=unix:///var/run/docker.sock"], ["--host=tcp://localhost:2375"]])
def test_what_is_not_understood_is_not_judged(preflight: Preflight, tmp_path: Path, options: list[str]) -> None:
    """Nor is a daemon without privileges, as sysbox runs it."""
    template = load_job_template("docker_sidecar")
    daemon = template["spec"]["template"]["spec"]["containers"][1]
    daemon.update(command=["dockerd", *options], securityContext={})
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(template))
    wrong, said = preflight(JOB_TEMPLATE=str(tmp_path / "own.yaml"))
    assert not wrong, said


def test_an_unknown_project(preflight: Preflight) -> None:
    wrong, said = preflight(PROJECT="not there")
    assert wrong == {"Prefect"}, said
    assert "no project 'not there' → prefect create project \"not there\"" in said
