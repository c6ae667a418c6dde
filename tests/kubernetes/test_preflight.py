"""`make preflight` on a real cluster: all is fine, then one thing at a time is not."""

from __future__ import annotations

import base64
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
    assert {line.split()[0] for line in said.splitlines()} == {"fine"}, said
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
    assert said.count("not checked ") == said.count("because of the namespace") == 4


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
        # row 19: what the API refuses of a Job, and not of a pod
        pytest.param(f"{POD}.restartPolicy", "Always", "restartPolicy", id="row_19_restart_policy"),
        pytest.param("metadata.namespace", "default", "namespace", id="row_19_namespace"),
        pytest.param("metadata.name", "My_Job", "My_Job", id="row_19_name"),
        pytest.param(f"{POD}.containers.0.securityContext", "restricted", "SecurityContext", id="row_22_true_reason"),
        # row 24: what is no daemon
        pytest.param(f"{POD}.containers.1.securityContext", "privileged", "SecurityContext", id="row_24_context"),
        pytest.param(f"{POD}.containers.1.args", 5, "args", id="row_24_args"),
        pytest.param(f"{POD}.containers.0.gpu", {}, 'unknown field "spec.template.spec.containers[0]', id="typo"),
    ],
)
def test_what_the_api_server_refuses(preflight: Preflight, tmp_path: Path, path: str, value: Any, seen: str) -> None:
    part: Any = (template := load_job_template("docker_sidecar"))
    *keys, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in keys:
        part = part[key]
    part[last] = value
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(template))
    wrong, said = preflight(JOB_TEMPLATE=str(tmp_path / "own.yaml"))
    assert wrong == {"Job"}, said
    assert seen in said
    assert "→ correct the template (JOB_TEMPLATE)" in said


@pytest.mark.parametrize("options", [["--host=unix:///var/run/docker.sock"], ["--host=tcp://localhost:2375"]])
def test_row_23_what_is_not_understood_is_not_judged(preflight: Preflight, tmp_path: Path, options: list[str]) -> None:
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
