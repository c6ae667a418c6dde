"""The job template, as it is and as the Agent fills it in: valid everywhere, and what the recipe says."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
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

from flows.settings import JOB_TEMPLATES, load_job_template

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
# SC3045: the image's sh is busybox's, which has `read -t`. SC2094: both ends of a FIFO, not a file.
# SC2329: a trap calls the function.
EXCLUDED = "SC3045,SC2094,SC2329"


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    return job["spec"]["template"]["spec"]["containers"]


TEMPLATE = load_job_template("docker_sidecar")
NATIVE = load_job_template("native_sidecar")
SCRIPTS = {
    f"{container['name']} {key}": container[key]
    for path in JOB_TEMPLATES.glob("*.yaml")
    for container in containers(load_job_template(path.stem))
    for key in ("command", "args")
    if key in container
}

Render = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def render(flow: Flow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Render:
    """The Job that the real Agent makes of a run of the flow; it talks to no cluster until it creates it."""
    monkeypatch.setattr("prefect.utilities.kubernetes.get_kubernetes_client", lambda *_, **__: None)

    def generate(template: dict[str, Any]) -> dict[str, Any]:
        flow_run = {
            "id": "run-1",
            "run_config": KubernetesRun(job_template=copy.deepcopy(template)).serialize(),
            "flow": GraphQLResult(id="flow-1", core_version="1.4.1", storage=flow.storage.serialize()),
        }
        # no API key of a developer's, neither from the environment nor from a file: the Agent would have it checked
        with set_temporary_config({"cloud.api_key": None, "home_dir": str(tmp_path)}):
            return KubernetesAgent().generate_job_spec(GraphQLResult(flow_run))

    return generate


@pytest.fixture
def job(flow: Flow, render: Render) -> dict[str, Any]:
    return render(flow.run_config.job_template)


VERSIONS = sorted({version.removesuffix("-strict") for version in all_versions()})


def validate(job: dict[str, Any], version: str) -> None:
    validated = kubernetes_validate.validate(json.loads(json.dumps(job)), version, strict=True)
    assert version.startswith(f"{validated}.")


@pytest.mark.parametrize("version", VERSIONS)
def test_valid_in_every_kubernetes_version(version: str, job: dict[str, Any]) -> None:
    validate(TEMPLATE, version)
    validate(job, version)


def test_the_agent_fills_in_the_first_container_alone(job: dict[str, Any]) -> None:
    assert re.fullmatch("prefect-docker-job-[0-9a-f]{8}", job["metadata"]["name"])
    (flow_container, daemon), (template, template_daemon) = containers(job), containers(TEMPLATE)
    assert flow_container["image"] == "gcr.io/dev/docker-on-k8s-flow:0.1.0"
    assert flow_container["command"] == template["command"]
    assert flow_container["args"] == ["prefect", "execute", "flow-run"]
    assert {"name": "PREFECT__CONTEXT__FLOW_RUN_ID", "value": "run-1"} in flow_container["env"]
    assert {"name": "DOCKER_HOST", "value": "tcp://localhost:2375"} in flow_container["env"]
    assert daemon == template_daemon
    assert job["spec"]["template"]["spec"]["volumes"] == TEMPLATE["spec"]["template"]["spec"]["volumes"]


def test_what_the_recipe_says() -> None:
    pod = TEMPLATE["spec"]["template"]["spec"]
    flow_container, daemon = containers(TEMPLATE)
    assert TEMPLATE["metadata"]["name"] == "prefect-docker-job"
    assert pod["restartPolicy"] == "Never"
    assert [flow_container["name"], daemon["name"]] == ["flow-container", "dind-daemon"]
    assert {"name": "DOCKER_HOST", "value": "tcp://localhost:2375"} in flow_container["env"]
    assert {"name": "DOCKER_TLS_CERTDIR", "value": ""} in daemon["env"]
    assert daemon["resources"]["requests"] == {"cpu": "20m", "memory": "512Mi"}
    assert {"name": "docker-graph-store", "mountPath": "/var/lib/docker"} in daemon["volumeMounts"]
    assert {"name": "docker-graph-store", "emptyDir": {}} in pod["volumes"]


def test_what_the_recipe_lacks() -> None:
    flow_container, daemon = containers(TEMPLATE)
    assert TEMPLATE["spec"]["backoffLimit"] == 0
    assert re.fullmatch(r"docker:\d+\.\d+\.\d+-dind", daemon["image"])
    assert daemon["securityContext"] == {"privileged": True}
    assert flow_container["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert TEMPLATE["spec"]["template"]["spec"]["automountServiceAccountToken"] is False
    assert set(daemon["resources"]["limits"]) == {"memory", "ephemeral-storage"}
    for key in ("hostNetwork", "hostPID", "hostIPC", "securityContext"):
        assert key not in TEMPLATE["spec"]["template"]["spec"]
    assert re.findall(r"(?:--host|-H)[= ](\S+)", daemon["args"][2]) == ["tcp://127.0.0.1:2375"]
    assert "ports" not in daemon
    for container in (flow_container, daemon):
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


@pytest.mark.parametrize("arguments", SCRIPTS.values(), ids=SCRIPTS)
def test_shell_scripts(arguments: list[str]) -> None:
    shell, options, script, _ = arguments
    assert (shell, options) == ("sh", "-euc")
    command = [SHELLCHECK, "--shell=sh", f"--exclude={EXCLUDED}", "-"]
    result = subprocess.run(command, input=script, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_native_template_is_valid_from_1_29_on(version: str, render: Render) -> None:
    """1.28 knows the field, too, but a cluster of it only if told to; so the template asks for 1.29."""
    for candidate in (NATIVE, render(NATIVE)):
        if int(version.split(".")[1]) >= 28:
            validate(candidate, version)
        else:
            with pytest.raises(kubernetes_validate.ValidationError, match="'restartPolicy' was unexpected"):
                validate(candidate, version)


def test_the_agent_keeps_the_native_sidecar(render: Render) -> None:
    pod = render(NATIVE)["spec"]["template"]["spec"]
    assert pod["initContainers"] == NATIVE["spec"]["template"]["spec"]["initContainers"]
    assert [container["name"] for container in pod["containers"]] == ["flow-container"]
    assert pod["containers"][0]["args"] == ["prefect", "execute", "flow-run"]


def test_the_templates_do_not_drift_apart() -> None:
    """But for the gate, and what takes its place, they are the same."""
    ours, native = (copy.deepcopy(job["spec"]["template"]["spec"]) for job in (TEMPLATE, NATIVE))
    (flow_container, daemon), (native_flow_container,) = ours.pop("containers"), native.pop("containers")
    (native_daemon,) = native.pop("initContainers")

    gate = {"name": "gate", "mountPath": "/gate"}
    ours["volumes"].remove({"name": "gate", "emptyDir": {}})
    for container in (flow_container, daemon):
        container["volumeMounts"].remove(gate)
        del container["command"]
    del daemon["args"]
    for key, value in {"restartPolicy": "Always", "args": ["dockerd", "--host=tcp://127.0.0.1:2375"]}.items():
        assert native_daemon.pop(key) == value
    del native_daemon["startupProbe"]
    for mount in (*daemon["volumeMounts"], *native_daemon["volumeMounts"]):
        if mount["name"] == "daemon-config":
            del mount["mountPath"]  # dockerd finds it at /etc/docker by itself, a script has to look first

    assert (flow_container, daemon, ours) == (native_flow_container, native_daemon, native)
    assert {k: v for k, v in TEMPLATE["spec"].items() if k != "template"} == {
        k: v for k, v in NATIVE["spec"].items() if k != "template"
    }
