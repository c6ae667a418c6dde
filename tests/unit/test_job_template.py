"""The job templates, as they are and as the Agent fills them in: what users rely on, and valid for Kubernetes."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from kubernetes_validate.utils import all_versions
from prefect import Flow
from prefect.agent.kubernetes import KubernetesAgent
from prefect.run_configs import KubernetesRun
from prefect.utilities.configuration import set_temporary_config
from prefect.utilities.graphql import GraphQLResult

from flows.settings import load_job_template

DOCKER, NATIVE = load_job_template("docker_sidecar"), load_job_template("native_sidecar")
TEMPLATES = pytest.mark.parametrize("template", [DOCKER, NATIVE], ids=["docker_sidecar", "native_sidecar"])
VERSIONS = sorted({version.removesuffix("-strict") for version in all_versions()})
# SC2016: a script within the script has variables of its own.
SHELLCHECK = [Path(sys.executable).with_name("shellcheck"), "--shell=sh", "--exclude=SC2016", "-"]


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def containers(job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flow's and the daemon's, wherever the latter is."""
    flow, *others = pod(job)["containers"]
    [daemon] = [*others, *pod(job).get("initContainers", [])]
    return flow, daemon


def env(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


@pytest.fixture
def rendered(template: dict[str, Any], flow: Flow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The Job that the real Agent makes of a run of the flow, before it talks to a cluster."""
    monkeypatch.setattr("prefect.utilities.kubernetes.get_kubernetes_client", lambda *_, **__: None)
    flow_run = {
        "id": "run-1",
        "run_config": KubernetesRun(job_template=copy.deepcopy(template)).serialize(),
        "flow": GraphQLResult(id="flow-1", core_version="1.4.1", storage=flow.storage.serialize()),
    }
    # no API key of a developer's, neither from the environment nor from a file: the Agent would have it checked
    with set_temporary_config({"cloud.api_key": None, "home_dir": str(tmp_path)}):
        return KubernetesAgent().generate_job_spec(GraphQLResult(flow_run))


@pytest.mark.parametrize("version", VERSIONS)
@TEMPLATES
def test_valid_for_kubernetes(version: str, template: dict[str, Any], rendered: dict[str, Any]) -> None:
    """native_sidecar from 1.28 on: it knows the field, though only 1.29 and newer use it by default."""
    old = template is NATIVE and int(version.split(".")[1]) < 28
    outcome = pytest.raises(kubernetes_validate.ValidationError, match="'restartPolicy' was") if old else nullcontext()
    for job in (template, rendered):
        with outcome:
            kubernetes_validate.validate(json.loads(json.dumps(job)), version, strict=True)


@TEMPLATES
def test_the_agent_fills_in_the_flow_and_leaves_the_daemon(template: dict[str, Any], rendered: dict[str, Any]) -> None:
    assert re.fullmatch("prefect-docker-job-[0-9a-f]{8}", rendered["metadata"]["name"])
    (flow, daemon), (before, daemon_before) = containers(rendered), containers(template)
    assert flow["image"] == "gcr.io/dev/docker-on-k8s-flow:0.1.0"
    assert flow["args"] == ["prefect", "execute", "flow-run"]
    assert flow.get("command") == before.get("command")
    assert env(flow).items() >= {**env(before), "PREFECT__CONTEXT__FLOW_RUN_ID": "run-1"}.items()
    assert (daemon, pod(rendered)["volumes"]) == (daemon_before, pod(template)["volumes"])


@TEMPLATES
def test_what_users_rely_on(template: dict[str, Any]) -> None:
    flow, daemon = containers(template)
    assert template["metadata"]["name"] == "prefect-docker-job"
    assert template["spec"]["backoffLimit"] == 0
    assert pod(template).items() >= {"restartPolicy": "Never", "automountServiceAccountToken": False}.items()
    assert [flow["name"], daemon["name"]] == ["flow-container", "dind-daemon"]
    assert re.fullmatch(r"docker:\d+\.\d+\.\d+-dind", daemon["image"])
    assert set(daemon["resources"]["limits"]) == {"memory", "ephemeral-storage"}
    assert daemon["resources"]["requests"] == {"cpu": "20m", "memory": "512Mi"}
    assert flow["terminationMessagePolicy"] == daemon["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert daemon.get("restartPolicy") == ("Always" if template is NATIVE else None)


@TEMPLATES
def test_least_privilege(template: dict[str, Any]) -> None:
    flow, daemon = containers(template)
    context = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "allowPrivilegeEscalation": False}
    context |= {"readOnlyRootFilesystem": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert flow["securityContext"] == {**context, "capabilities": {"drop": ["ALL"]}}
    assert daemon["securityContext"] == {"privileged": True}
    assert not {"hostNetwork", "hostPID", "hostIPC", "securityContext"} & pod(template).keys()


@TEMPLATES
def test_nobody_outside_the_pod_reaches_the_daemon(template: dict[str, Any]) -> None:
    """The image's entrypoint adds a host of its own, unless its first argument is dockerd."""
    flow, daemon = containers(template)
    words = " ".join([*daemon.get("command", []), *daemon.get("args", [])])
    hosts = re.findall(r"(?:--host|-H)[= ]([^\s\"']+)", words)
    assert hosts == ["unix:///run/dind/docker.sock" if template is NATIVE else "tcp://127.0.0.1:2375"]
    assert re.search(r"(?:^|dockerd-entrypoint\.sh )dockerd --host=", words)
    assert template is DOCKER or f"--group={flow['securityContext']['runAsGroup']}" in daemon["args"]
    assert "ports" not in daemon
    assert env(daemon).items() >= {"DOCKER_TLS_CERTDIR": "", "DOCKER_HOST": hosts[0]}.items()
    assert env(flow)["DOCKER_HOST"] == hosts[0].replace("127.0.0.1", "localhost")


@TEMPLATES
def test_volumes(template: dict[str, Any]) -> None:
    flow, daemon = ({m["mountPath"]: m["name"] for m in c["volumeMounts"]} for c in containers(template))
    shared = {"/run/dind": "socket"} if template is NATIVE else {"/alive": "alive"}
    shared["/workspace"] = "workspace"  # the same path on both sides, as a bind mount is the daemon's folder
    assert flow == {**shared, "/tmp": "tmp", "/docker-config": "registry-credentials"}
    assert daemon == {**shared, "/var/lib/docker": "docker-graph-store", "/etc/docker": "daemon-config"}
    volumes = {volume.pop("name"): volume for volume in copy.deepcopy(pod(template)["volumes"])}
    assert volumes.keys() == {*flow.values(), *daemon.values()}
    assert volumes.pop("daemon-config") == {"configMap": {"name": "docker-sidecar", "optional": True}}
    items = [{"key": ".dockerconfigjson", "path": "config.json"}]
    credentials = {"secretName": "docker-sidecar", "optional": True, "items": items}
    assert volumes.pop("registry-credentials") == {"secret": credentials}
    assert all(volume == {"emptyDir": {}} for volume in volumes.values())
    assert env(containers(template)[0])["DOCKER_CONFIG"] == "/docker-config"


def test_the_templates_agree_on_what_they_share() -> None:
    for ours, natives in zip(containers(DOCKER), containers(NATIVE)):
        assert all(ours.get(key) == natives.get(key) for key in ("name", "image", "resources"))
        assert env(ours).items() - env(natives).items() <= {("DOCKER_HOST", env(ours)["DOCKER_HOST"])}


@pytest.mark.parametrize("container", containers(DOCKER), ids=["flow", "daemon"])
def test_shell_scripts(container: dict[str, Any]) -> None:
    *_, options, script, name = container["command"]
    assert (options, name) == ("-euc", container["name"])
    assert "$$" not in script, "Kubernetes makes $ of it"
    result = subprocess.run(SHELLCHECK, input=script, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
