"""The job templates, as they are and as the Agent fills them in: what users rely on, and valid for Kubernetes."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
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
# SC2016: a script within the script has variables of its own. SC2115: `set -u`, and the variable is never empty.
# SC3045: the image's sh is busybox's.
SHELLCHECK = [Path(sys.executable).with_name("shellcheck"), "--shell=sh", "--exclude=SC2016,SC2115,SC3045", "-"]


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def containers(job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flow's and the daemon's, wherever the latter is."""
    flow, *others = pod(job)["containers"]
    [daemon] = [*others, *pod(job).get("initContainers", [])]
    return flow, daemon


def env(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def words(container: dict[str, Any]) -> str:
    return " ".join([*container.get("command", []), *container.get("args", [])])


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
    for job in (template, rendered):
        if template is NATIVE and int(version.split(".")[1]) < 28:
            with pytest.raises(kubernetes_validate.ValidationError, match="'restartPolicy' was unexpected"):
                kubernetes_validate.validate(job, version, strict=True)
        else:
            validated = kubernetes_validate.validate(json.loads(json.dumps(job)), version, strict=True)
            assert version.startswith(f"{validated}.")


@TEMPLATES
def test_the_agent_fills_in_the_flow_and_leaves_the_daemon(template: dict[str, Any], rendered: dict[str, Any]) -> None:
    assert re.fullmatch("prefect-docker-job-[0-9a-f]{8}", rendered["metadata"]["name"])
    (flow, daemon), (before, daemon_before) = containers(rendered), containers(template)
    assert flow["image"] == "gcr.io/dev/docker-on-k8s-flow:0.1.0"
    assert flow["args"] == ["prefect", "execute", "flow-run"]
    assert flow.get("command") == before.get("command")
    assert env(flow).items() >= {**env(before), "PREFECT__CONTEXT__FLOW_RUN_ID": "run-1"}.items()
    assert daemon == daemon_before
    assert pod(rendered)["volumes"] == pod(template)["volumes"]


@TEMPLATES
def test_what_users_rely_on(template: dict[str, Any]) -> None:
    flow, daemon = containers(template)
    assert template["metadata"]["name"] == "prefect-docker-job"
    assert template["spec"]["backoffLimit"] == 0
    assert pod(template)["restartPolicy"] == "Never"
    assert pod(template)["automountServiceAccountToken"] is False
    assert [flow["name"], daemon["name"]] == ["flow-container", "dind-daemon"]
    assert re.fullmatch(r"docker:\d+\.\d+\.\d+-dind", daemon["image"])
    assert set(daemon["resources"]["limits"]) == {"memory", "ephemeral-storage"}
    assert daemon["resources"]["requests"] == {"cpu": "20m", "memory": "512Mi"}
    for container in (flow, daemon):
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


@TEMPLATES
def test_least_privilege(template: dict[str, Any]) -> None:
    flow, daemon = containers(template)
    assert flow["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert daemon["securityContext"] == {"privileged": True}
    assert not {"hostNetwork", "hostPID", "hostIPC", "securityContext"} & pod(template).keys()
    assert not any("hostPath" in volume for volume in pod(template)["volumes"])


@TEMPLATES
def test_nobody_outside_the_pod_reaches_the_daemon(template: dict[str, Any]) -> None:
    """The image's entrypoint adds a host of its own, unless its first argument is dockerd."""
    flow, daemon = containers(template)
    hosts = re.findall(r"(?:--host|-H)[= ]([^\s\"']+)", words(daemon))
    assert hosts == ["unix:///run/dind/docker.sock" if template is NATIVE else "tcp://127.0.0.1:2375"]
    assert re.search(r"(?:^|dockerd-entrypoint\.sh )dockerd --host=", words(daemon))
    assert "ports" not in daemon
    assert env(daemon)["DOCKER_TLS_CERTDIR"] == ""
    assert env(daemon)["DOCKER_HOST"] == hosts[0]
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
    credentials = volumes.pop("registry-credentials")["secret"]
    assert (credentials["secretName"], credentials["optional"]) == ("docker-sidecar", True)
    assert credentials["items"] == [{"key": ".dockerconfigjson", "path": "config.json"}]
    assert all(volume == {"emptyDir": {}} for volume in volumes.values())
    assert env(containers(template)[0])["DOCKER_CONFIG"] == "/docker-config"


def test_the_native_daemon_is_a_sidecar_without_a_script() -> None:
    _, daemon = containers(NATIVE)
    assert daemon["restartPolicy"] == "Always"
    assert "command" not in daemon
    assert f"--group={containers(NATIVE)[0]['securityContext']['runAsGroup']}" in daemon["args"]


def test_the_templates_agree_on_what_they_share() -> None:
    def common(job: dict[str, Any]) -> dict[str, Any]:
        job = copy.deepcopy(job)
        flow, daemon = containers(job)
        del pod(job)["containers"]
        pod(job).pop("initContainers", None)
        for container in (flow, daemon):
            for key in ("command", "args", "lifecycle", "restartPolicy"):
                container.pop(key, None)
            container["volumeMounts"] = [m for m in container["volumeMounts"] if m["name"] not in ("alive", "socket")]
            container["env"] = [variable for variable in container["env"] if variable["name"] != "DOCKER_HOST"]
        pod(job)["volumes"] = [v for v in pod(job)["volumes"] if v["name"] not in ("alive", "socket")]
        return {"job": job, "flow": flow, "daemon": daemon}

    assert common(DOCKER) == common(NATIVE)


@pytest.mark.parametrize("container", containers(DOCKER), ids=["flow", "daemon"])
def test_shell_scripts(container: dict[str, Any]) -> None:
    *_, options, script, name = container["command"]
    assert (options, name) == ("-euc", container["name"])
    result = subprocess.run(SHELLCHECK, input=script, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_scripts_of_docker_sidecar_are_short() -> None:
    lines = [line for container in containers(DOCKER) for line in container["command"][-2].splitlines()]
    assert len(lines) <= 20
    assert not any("$$" in line for line in lines), "Kubernetes makes $ of it"
