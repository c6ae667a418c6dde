"""The job template, as it is and as the Agent fills it in: valid everywhere, and what the recipe says."""

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
from prefect.utilities.configuration import set_temporary_config
from prefect.utilities.graphql import GraphQLResult

from flows.settings import JOB_TEMPLATES, load_job_template

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
# SC3045: the image's sh is busybox's, which has `read -t`. SC2094: both ends of a FIFO, not a file.
EXCLUDED = {"flow-container": "", "dind-daemon": "SC3045,SC2094"}


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    return job["spec"]["template"]["spec"]["containers"]


TEMPLATE = load_job_template("docker_sidecar")
SCRIPTS = [
    c for path in JOB_TEMPLATES.glob("*.yaml") for c in containers(load_job_template(path.stem)) if "command" in c
]


@pytest.fixture
def job(flow: Flow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The Job that the real Agent makes of a run of the flow; it talks to no cluster until it creates it."""
    monkeypatch.setattr("prefect.utilities.kubernetes.get_kubernetes_client", lambda *_, **__: None)
    flow_run = {
        "id": "run-1",
        "run_config": flow.run_config.serialize(),
        "flow": GraphQLResult(id="flow-1", core_version="1.4.1", storage=flow.storage.serialize()),
    }
    # no API key of a developer's, neither from the environment nor from a file: the Agent would have it checked
    with set_temporary_config({"cloud.api_key": None, "home_dir": str(tmp_path)}):
        return KubernetesAgent().generate_job_spec(GraphQLResult(copy.deepcopy(flow_run)))


@pytest.mark.parametrize("version", sorted({version.removesuffix("-strict") for version in all_versions()}))
def test_valid_in_every_kubernetes_version(version: str, job: dict[str, Any]) -> None:
    for candidate in (TEMPLATE, job):
        validated = kubernetes_validate.validate(json.loads(json.dumps(candidate)), version, strict=True)
        assert version.startswith(f"{validated}.")


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
    assert daemon["resources"] == {"requests": {"cpu": "20m", "memory": "512Mi"}}
    assert {"name": "docker-graph-store", "mountPath": "/var/lib/docker"} in daemon["volumeMounts"]
    assert {"name": "docker-graph-store", "emptyDir": {}} in pod["volumes"]


def test_what_the_recipe_lacks() -> None:
    flow_container, daemon = containers(TEMPLATE)
    assert TEMPLATE["spec"]["backoffLimit"] == 0
    assert re.fullmatch(r"docker:\d+\.\d+\.\d+-dind", daemon["image"])
    assert daemon["securityContext"] == {"privileged": True}
    assert "securityContext" not in flow_container
    for key in ("hostNetwork", "hostPID", "hostIPC", "securityContext"):
        assert key not in TEMPLATE["spec"]["template"]["spec"]
    assert re.findall(r"(?:--host|-H)[= ](\S+)", daemon["command"][2]) == ["tcp://127.0.0.1:2375"]
    assert "ports" not in daemon
    for container in (flow_container, daemon):
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


@pytest.mark.parametrize("container", SCRIPTS, ids=[container["name"] for container in SCRIPTS])
def test_shell_scripts(container: dict[str, Any]) -> None:
    shell, options, script, *_ = container["command"]
    assert (shell, options) == ("sh", "-euc")
    command = [SHELLCHECK, "--shell=sh", f"--exclude={EXCLUDED[container['name']]}", "-"]
    result = subprocess.run(command, input=script, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
