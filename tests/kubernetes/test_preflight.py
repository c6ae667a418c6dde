"""`make preflight` on a real cluster, with a real registry: all is fine, then one thing at a time is not."""

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

import docker
import kubernetes.client
import kubernetes.utils
import prefect.agent.kubernetes
import pytest
import requests
import yaml

from flows.settings import PROJECT, load_job_template
from scripts import cluster, sidecar
from tests.conftest import login, private_registry
from tests.kubernetes.conftest import Namespace
from tests.support.prefect_api import PrefectAPI
from tests.support.waiting import wait_for

RBAC = Path(prefect.agent.kubernetes.__path__[0], "rbac.yaml")

Outcome = tuple[int, set[str], str]
Preflight = Callable[..., Outcome]


@pytest.fixture(scope="module")
def project(prefect: Callable[..., str]) -> str:
    prefect("create", "project", "preflight")
    return "preflight"


@pytest.fixture
def preflight(namespace: Namespace, api: PrefectAPI, project: str, tmp_path: Path) -> Preflight:
    """The real command: its exit status, the names of the checks that are wrong, and all that it says."""
    ours = {
        "FLOW_REGISTRY_URL": f"{sidecar.REGISTRY}/",
        "JOB_TEMPLATE": "docker_sidecar",
        "DOCKER_CONFIG": str(tmp_path),
        "NAMESPACE": namespace.name,
        "SERVICE_ACCOUNT": "default",
        "PROJECT": project,
        "KUBECONFIG": str(cluster.KUBECONFIG),
    }

    def run(**environment: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "scripts.preflight"],
            cwd=PROJECT,
            env={**os.environ, **api.env, **ours, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        wrong = {line[13:30].strip() for line in done.stdout.splitlines() if line.startswith("wrong ")}
        return done.returncode, wrong, done.stdout

    return run


@pytest.fixture
def place(namespace: Namespace) -> Iterator[str]:
    """A namespace of a test's own, where the Agent may do what it does."""
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


def test_all_is_fine(preflight: Preflight, namespace: Namespace, agent: str) -> None:
    catalog = f"http://{sidecar.REGISTRY}/v2/_catalog"
    before = requests.get(catalog, timeout=10).json()
    status, wrong, said = preflight(FLOW_IMAGE_NAME="preflight-was-here")
    assert (status, wrong) == (0, set()), said
    assert {line.split()[0] for line in said.splitlines()} == {"fine"}, said
    assert f"system:serviceaccount:{namespace.name}:default may create jobs" in said
    assert "docker-sidecar sets insecure-registries, registry-mirrors" in said
    # and nothing has changed
    assert requests.get(catalog, timeout=10).json() == before
    made = [*namespace.core.list_namespaced_pod(namespace.name).items]
    made += namespace.batch.list_namespaced_job(namespace.name).items
    assert not [thing for thing in made if thing.metadata.name.startswith("preflight-")]


def test_all_is_fine_elsewhere(preflight: Preflight, place: str, namespace: Namespace) -> None:
    """With all that a namespace may have; the tests below take one thing away, or spoil it."""
    logins = base64.b64encode(b'{"auths": {"registry.example.com": {"auth": "bWU6cGFzcw=="}}}').decode()
    secret = {"type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": logins}}
    namespace.core.create_namespaced_secret(place, {"metadata": {"name": "docker-sidecar"}, **secret})
    status, wrong, said = preflight(NAMESPACE=place)
    assert (status, wrong) == (0, set()), said
    assert "docker-sidecar has logins for registry.example.com" in said


def test_no_cluster(preflight: Preflight, tmp_path: Path, engine: docker.DockerClient) -> None:
    config = yaml.safe_load(cluster.KUBECONFIG.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    status, wrong, said = preflight(KUBECONFIG=str(tmp_path / "kubeconfig"))
    assert (status, wrong) == (1, {"cluster"}), said
    assert "Connection refused → start it, or choose another context" in said


def test_no_namespace(preflight: Preflight) -> None:
    status, wrong, said = preflight(NAMESPACE="tests-nowhere")
    assert (status, wrong) == (1, {"namespace"}), said
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
    status, wrong, said = preflight(NAMESPACE=place)
    assert (status, wrong) == (1, {"Agent's rights"}), said
    assert "may not delete jobs, list events → prefect agent kubernetes install --rbac --namespace" in said


def test_an_agent_of_another_name(preflight: Preflight, place: str, namespace: Namespace) -> None:
    status, wrong, said = preflight(NAMESPACE=place, SERVICE_ACCOUNT="agent")
    assert (status, wrong) == (1, {"Agent's rights"}), said
    assert f"kubectl create rolebinding prefect-agent-agent --role=prefect-agent-rbac --serviceaccount={place}:" in said


def test_a_config_map_that_is_not_json(preflight: Preflight, place: str, namespace: Namespace) -> None:
    body = {"metadata": {"name": "docker-sidecar"}, "data": {"daemon.json": "{'mtu': 1400}"}}
    namespace.core.create_namespaced_config_map(place, body)
    status, wrong, said = preflight(NAMESPACE=place)
    assert (status, wrong) == (1, {"ConfigMap"}), said
    assert f"→ kubectl edit configmap docker-sidecar --namespace {place}" in said


def test_a_secret_of_another_type(preflight: Preflight, place: str, namespace: Namespace) -> None:
    body = {"metadata": {"name": "docker-sidecar"}, "stringData": {"config.json": "{}"}}
    namespace.core.create_namespaced_secret(place, body)
    status, wrong, said = preflight(NAMESPACE=place)
    assert (status, wrong) == (1, {"Secret"}), said
    assert f"kubectl create secret docker-registry docker-sidecar --namespace {place}" in said


def test_a_quota(preflight: Preflight, place: str, namespace: Namespace) -> None:
    body = {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    namespace.core.create_namespaced_resource_quota(place, body)
    read = namespace.core.read_namespaced_resource_quota
    wait_for(lambda: read("none", place).status.hard, "the quota is in force")
    status, wrong, said = preflight(NAMESPACE=place)
    assert (status, wrong) == (1, {"admission"}), said
    assert "exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0 → change what namespace" in said


def minor(namespace: Namespace) -> int:
    version = kubernetes.client.VersionApi(namespace.api).get_code()
    return int(version.minor.rstrip("+"))


def test_pod_security(preflight: Preflight, place: str, namespace: Namespace) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "baseline"}
    namespace.core.patch_namespace(place, {"metadata": {"labels": labels}})
    status, wrong, said = preflight(NAMESPACE=place)
    if minor(namespace) < 23:  # the cluster is older than Pod Security, and admits the pod: it was really asked
        assert "admission" not in wrong, said
        return
    assert (status, wrong) == (1, {"admission"}), said
    assert f"→ kubectl label --overwrite namespace {place} pod-security.kubernetes.io/enforce=privileged" in said


def test_a_template_that_is_no_pod(preflight: Preflight, place: str, tmp_path: Path) -> None:
    template = load_job_template("docker_sidecar")
    template["spec"]["template"]["spec"]["volumes"] = []
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(template))
    status, wrong, said = preflight(NAMESPACE=place, JOB_TEMPLATE=str(tmp_path / "own.yaml"))
    assert (status, wrong) == (1, {"admission"}), said
    assert "→ mend the template (JOB_TEMPLATE)" in said


def test_the_template_for_newer_clusters(preflight: Preflight, place: str, namespace: Namespace) -> None:
    status, wrong, said = preflight(NAMESPACE=place, JOB_TEMPLATE="native_sidecar")
    if minor(namespace) < 29:
        assert (status, wrong) == (1, {"admission"}), said
        assert "does not know → JOB_TEMPLATE=docker_sidecar is for any Kubernetes" in said
    else:
        assert (status, wrong) == (0, set()), said


def test_a_project_that_is_not_there(preflight: Preflight, place: str) -> None:
    status, wrong, said = preflight(NAMESPACE=place, PROJECT="not there")
    assert (status, wrong) == (1, {"Prefect project"}), said
    assert "there is no 'not there' → prefect create project 'not there'" in said


@pytest.fixture
def private(engine: docker.DockerClient) -> Iterator[str]:
    """A registry that asks for a password."""
    with private_registry(engine, ports={"5000/tcp": ("127.0.0.1", None)}) as container:
        yield f"127.0.0.1:{container.ports['5000/tcp'][0]['HostPort']}"


def test_a_registry_that_asks_for_a_login(preflight: Preflight, place: str, private: str, tmp_path: Path) -> None:
    def log_in(password: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"auths": {private: login(password)}}))

    def push() -> Outcome:
        return preflight(NAMESPACE=place, FLOW_REGISTRY_URL=private)

    status, wrong, said = push()
    assert (status, wrong) == (1, {"registry"}), said
    assert "does not let push docker-on-k8s-flow without a login: 401 " in said
    assert f"→ docker login {private}" in said
    log_in("wrong")
    status, wrong, said = push()
    assert (status, wrong) == (1, {"registry"}), said
    assert f"as 'user': 401 authentication required → docker login {private}" in said
    log_in("password")
    status, wrong, said = push()
    assert (status, wrong) == (0, set()), said
