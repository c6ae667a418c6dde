"""The job templates, as they are and as the Agent fills them in: valid for Kubernetes, and closed to other pods."""

from __future__ import annotations

import copy
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
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

from flows.settings import JOB_TEMPLATES, load_job_template

NAMES = sorted(path.stem for path in JOB_TEMPLATES.glob("*.yaml"))
SHELL_LINES = {"docker_sidecar": 10, "native_sidecar": 0, "gvisor_sidecar": 10, "kept_layers": 25}  # at most
VERSIONS = sorted({version.removesuffix("-strict") for version in all_versions()})
# SC2016: a script within the script has variables of its own.
SHELLCHECK = [Path(sys.executable).with_name("shellcheck"), "--shell=sh", "--exclude=SC2016", "-"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def template(name: str) -> dict[str, Any]:
    return load_job_template(name)


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def containers(job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flow's and the daemon's, wherever the latter is."""
    flow, *others = pod(job)["containers"]
    [daemon] = [*others, *pod(job).get("initContainers", [])]
    return flow, daemon


def env(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in container["env"]}


def words(container: dict[str, Any]) -> list[str]:
    """All that a container runs: its command, its arguments, its hooks."""
    hooks = [hook["exec"]["command"] for hook in container.get("lifecycle", {}).values()]
    return [*container.get("command", []), *container.get("args", []), *itertools.chain(*hooks)]


def scripts(job: dict[str, Any]) -> Iterator[str]:
    """The text of each shell script: what stands behind -c."""
    for container in containers(job):
        said = words(container)
        yield from (text for option, text in itertools.pairwise(said) if re.fullmatch("-[eu]*c", option))


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
def test_valid_for_kubernetes(version: str, name: str, template: dict[str, Any], rendered: dict[str, Any]) -> None:
    """A sidecar from 1.28 on: it knows the field, though only 1.29 and newer use it by default."""
    old = "initContainers" in pod(template) and int(version.split(".")[1]) < 28
    outcome = pytest.raises(kubernetes_validate.ValidationError, match="'restartPolicy' was") if old else nullcontext()
    for job in (template, rendered):
        with outcome:
            kubernetes_validate.validate(json.loads(json.dumps(job)), version, strict=True)


def test_the_agent_fills_in_the_flow_and_leaves_the_daemon(template: dict[str, Any], rendered: dict[str, Any]) -> None:
    assert re.fullmatch("prefect-docker-job-[0-9a-f]{8}", rendered["metadata"]["name"])
    (flow, daemon), (before, daemon_before) = containers(rendered), containers(template)
    assert flow["image"] == "gcr.io/dev/docker-on-k8s-flow:0.1.0"
    assert flow["args"] == ["prefect", "execute", "flow-run"]
    assert flow.get("command") == before.get("command")
    assert env(flow).items() >= {**env(before), "PREFECT__CONTEXT__FLOW_RUN_ID": "run-1"}.items()
    assert (daemon, pod(rendered)["volumes"]) == (daemon_before, pod(template)["volumes"])


def test_limits(template: dict[str, Any]) -> None:
    """No container can take the node's memory, and none requests the disk that its limit allows."""
    for container in containers(template):
        resources = container["resources"]
        assert "memory" in resources["limits"]
        assert "ephemeral-storage" in resources["requests"] or "ephemeral-storage" not in resources["limits"]


def test_least_privilege(name: str, template: dict[str, Any]) -> None:
    flow, daemon = containers(template)
    context = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "allowPrivilegeEscalation": False}
    context |= {"readOnlyRootFilesystem": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert flow["securityContext"].items() >= {**context, "capabilities": {"drop": ["ALL"]}}.items()
    assert daemon["securityContext"].get("privileged", False) == (name != "gvisor_sidecar")
    assert pod(template)["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod(template).keys()


def test_nobody_outside_the_pod_reaches_the_daemon(template: dict[str, Any]) -> None:
    """The image's entrypoint adds a host of its own, unless its first argument is dockerd."""
    flow, daemon = containers(template)
    said = " ".join(words(daemon))
    [host] = set(re.findall(r"--host[= ]([^\s\"']+)", said))
    assert host in ("unix:///run/dind/docker.sock", "tcp://127.0.0.1:2375")
    assert host.startswith("tcp") or f"--group={flow['securityContext']['runAsGroup']}" in said
    assert re.search(r'(?:^|dockerd-entrypoint\.sh (?:"\$@"\n sh )?)dockerd ', said)
    assert "ports" not in daemon
    assert env(daemon)["DOCKER_TLS_CERTDIR"] == ""
    assert env(flow)["DOCKER_HOST"] == host.replace("127.0.0.1", "localhost")


def test_the_templates_name_one_docker() -> None:
    assert len({containers(load_job_template(name))[1]["image"] for name in NAMES}) == 1


def test_scripts_are_short_and_sound(name: str, template: dict[str, Any]) -> None:
    found = list(scripts(template))
    lines = [line for script in found for line in script.splitlines() if not line.lstrip().startswith("#")]
    assert len(lines) <= SHELL_LINES[name]
    for script in found:
        assert "$$" not in script, "Kubernetes makes $ of it"
        result = subprocess.run(SHELLCHECK, input=script, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
