"""The flow: wired as the recipe means it, loaded as Prefect loads it, and clear about what went wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.cli.build_register import load_flows_from_module, load_flows_from_script
from prefect.engine.state import Failed, Pending, Retrying, Skipped, State, TriggerFailed
from prefect.tasks import docker as prefect_docker
from prefect.triggers import always_run
from prefect.utilities.storage import extract_flow_from_file

from flows import tasks
from flows.parameters import fault
from flows.settings import JOB_TEMPLATES, PROJECT

SCRIPT = PROJECT / "flows" / "docker_sidecar.py"
TASKS = ("PullImage", "CreateContainer", "StartContainer", "WaitOnContainer", "GetContainerLogs")


def test_tasks_and_parameters(flow: Flow) -> None:
    assert flow.name == "Docker sidecar example"
    assert sorted(task.name for task in flow.tasks) == sorted([*TASKS, "image", "command", "environment", "time_limit"])
    for name in TASKS:
        (task,) = flow.get_tasks(name)
        assert type(task) is getattr(tasks, name)
        assert isinstance(task, getattr(prefect_docker, name))
        assert task.docker_server_url == "tcp://localhost:2375"
        assert task.trigger is (always_run if name == "GetContainerLogs" else tasks.stop_at_the_cause)
    assert {task.name for task in flow.reference_tasks()} == {"WaitOnContainer", "GetContainerLogs"}
    assert {parameter.name: (parameter.default, parameter.required) for parameter in flow.parameters()} == {
        "image": ("prefecthq/prefect:1.4.1", False),
        "command": ('''python -c "from prefect import Flow; f = Flow('empty'); f.run()"''', False),
        "environment": (None, False),
        "time_limit": (None, False),
    }


def test_edges(flow: Flow) -> None:
    """A key is what a result is handed on as; without one, the upstream task just has to be over."""
    assert {(edge.upstream_task.name, edge.downstream_task.name, edge.key) for edge in flow.edges} == {
        ("image", "PullImage", "repository"),
        ("image", "CreateContainer", "image_name"),
        ("command", "CreateContainer", "command"),
        ("environment", "CreateContainer", "environment"),
        ("time_limit", "WaitOnContainer", "time_limit"),
        ("PullImage", "CreateContainer", None),
        ("CreateContainer", "StartContainer", "container_id"),
        ("CreateContainer", "WaitOnContainer", "container_id"),
        ("StartContainer", "WaitOnContainer", None),
        ("CreateContainer", "GetContainerLogs", "container_id"),
        ("WaitOnContainer", "GetContainerLogs", None),
    }


def test_run_config_and_storage(flow: Flow) -> None:
    assert flow.run_config.job_template == yaml.safe_load((JOB_TEMPLATES / "docker_sidecar.yaml").read_text())
    assert flow.storage.name == "gcr.io/dev/docker-on-k8s-flow:0.1.0"
    assert flow.storage.stored_as_script
    assert Path(flow.storage.dockerfile) == PROJECT / "Dockerfile"
    base_image = {"BASE_IMAGE": "prefecthq/prefect:1.4.1-python3.10"}
    assert flow.storage.build_kwargs == {"buildargs": base_image, "network_mode": "host"}


def test_settings_reach_the_flow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    template = tmp_path / "own.yaml"
    template.write_text((JOB_TEMPLATES / "docker_sidecar.yaml").read_text().replace("prefect-docker-job", "own"))
    for name, value in {
        "FLOW_REGISTRY_URL": "localhost:5000",
        "FLOW_IMAGE_NAME": "team/flow",
        "FLOW_IMAGE_TAG": "2",
        "FLOW_BASE_IMAGE": "python:3.11",
        "JOB_TEMPLATE": str(template),
    }.items():
        monkeypatch.setenv(name, value)
    flow = extract_flow_from_file(str(SCRIPT))
    assert flow.storage.name == "localhost:5000/team/flow:2"
    assert flow.storage.build_kwargs["buildargs"] == {"BASE_IMAGE": "python:3.11"}
    assert flow.run_config.job_template["metadata"]["name"] == "own"


def test_the_flow_can_be_serialized_for_the_api(flow: Flow) -> None:
    flow.storage.add_flow(flow)
    serialized = json.loads(json.dumps(flow.serialize()))
    assert {task["slug"] for task in serialized["tasks"]} >= {f"{name}-1" for name in TASKS}
    assert serialized["run_config"]["job_template"] == flow.run_config.job_template
    assert serialized["storage"]["flows"] == {flow.name: "/opt/docker-sidecar/flows/docker_sidecar.py"}


def test_the_cli_finds_the_flow_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(PROJECT)
    found = [*load_flows_from_script("flows/docker_sidecar.py"), *load_flows_from_module("flows.docker_sidecar")]
    monkeypatch.chdir(tmp_path)
    found += load_flows_from_script(str(SCRIPT))
    assert [flow.name for flow in found] == ["Docker sidecar example"] * 3


def test_the_image_holds_what_the_flow_needs(flow: Flow, tmp_path: Path) -> None:
    """What the Dockerfile copies is laid out as in the image, and the flow loaded from where its storage says."""
    dockerfile = (PROJECT / "Dockerfile").read_text()
    (folder,) = re.findall(r"^WORKDIR (\S+)$", dockerfile, re.M)
    (path,) = re.findall(r"^ENV PYTHONPATH=(\S+)$", dockerfile, re.M)
    assert path == folder
    image = tmp_path / folder.lstrip("/")
    for source, target in re.findall(r"^COPY (\S+) (\S+)$", dockerfile, re.M):
        copy = shutil.copytree if (PROJECT / source).is_dir() else shutil.copy
        image.mkdir(parents=True, exist_ok=True)
        copy(PROJECT / source, image / target)
    load = "import sys; from prefect.utilities.storage import extract_flow_from_file as load; load(sys.argv[1]); "
    command = [sys.executable, "-c", load + "print(sys.modules['flows'].__file__)", f"{tmp_path}{flow.storage.path}"]
    environ = {**os.environ, "PYTHONPATH": str(image)}
    result = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == str(image / "flows" / "__init__.py"), result.stderr


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"image": "Prefect:1"}, "image is 'Prefect:1'; give an image reference (name, name:tag, name@sha256:…)"),
        ({"image": None}, "image is None; give an image reference"),
        ({"command": "sh -c 'echo"}, """command is "sh -c 'echo": No closing quotation; close it"""),
        ({"command": ["sleep", 1]}, "command is ['sleep', 1]; give a string, a list of words, or null"),
        *(
            ({"environment": value}, f"environment is {value!r}; give a mapping of names to values")
            for value in ("A=1", 1, True)
        ),
        *(
            ({"time_limit": value}, f"time_limit is {value!r}; give a number of seconds, or leave it out")
            for value in (0, -1, "1h", True)
        ),
    ],
)
def test_faulty_parameters_are_refused_before_anything_starts(
    flow: Flow, parameters: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = flow.run(parameters=parameters)
    assert type(state) is Failed
    assert state.message.startswith(says)
    assert {type(result) for result in state.result.values()} == {Pending}, "no task has started"
    assert [record.getMessage() for record in caplog.records].count(state.message) == 1, "one error"


@pytest.mark.parametrize("parameters", [{"command": None}, {"command": ["true"], "environment": {"A": 1}}])
def test_parameters_are_taken(parameters: dict[str, Any]) -> None:
    assert fault(parameters) is None


def test_without_a_daemon_the_run_fails_with_that_cause(
    flow: Flow, monkeypatch: pytest.MonkeyPatch, nowhere: int
) -> None:
    url = f"tcp://127.0.0.1:{nowhere}"
    for name in TASKS:
        flow.get_tasks(name)[0].docker_server_url = url
    monkeypatch.setattr(tasks, "PULL_RETRY_SECONDS", (0, 0))
    retries: list[str] = []

    def note(_runner: object, _old: State, new: State) -> None:
        if type(new) is Retrying:
            retries.append(new.message)

    state = flow.run(task_runner_state_handlers=[note])

    states = {task.name: result for task, result in state.result.items()}
    cause = states["PullImage"].message
    assert cause.startswith(f"Pulling prefecthq/prefect:1.4.1: the Docker daemon at {url} does not answer (")
    assert "Connection refused" in cause
    assert "API version" not in cause  # which it is the SDK's habit to look for first
    assert retries == [f"{cause}; retry {attempt} of 2 in 0 s" for attempt in (1, 2)]
    assert [type(states[name]) for name in TASKS] == [Failed, TriggerFailed, TriggerFailed, TriggerFailed, Skipped]
    assert states["GetContainerLogs"].message == "No container was created, so there are no logs"
    assert type(state) is Failed
    assert state.message == cause
