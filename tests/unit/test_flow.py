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
from prefect.engine.state import Failed, Pending, Skipped, TriggerFailed
from prefect.tasks import docker as prefect_docker
from prefect.triggers import always_run
from prefect.utilities.storage import extract_flow_from_file

from flows import states, tasks
from flows.parameters import validate_parameters
from flows.settings import JOB_TEMPLATES, PROJECT

SCRIPT = PROJECT / "flows" / "docker_sidecar.py"
TASKS = ("PullImage", "CreateContainer", "StartContainer", "WaitOnContainer", "GetContainerLogs")
PARAMETERS = ("image", "command", "environment", "host_config", "extra_docker_kwargs", "time_limit")


def test_tasks_and_parameters(flow: Flow) -> None:
    assert flow.name == "Docker sidecar example"
    assert sorted(task.name for task in flow.tasks) == sorted([*TASKS, *PARAMETERS])
    for name in TASKS:
        (task,) = flow.get_tasks(name)
        assert type(task) is getattr(tasks, name)
        assert isinstance(task, getattr(prefect_docker, name))
        assert task.docker_server_url == os.environ["DOCKER_HOST"]
        assert task.trigger is (always_run if name == "GetContainerLogs" else states.all_successful_or_first_failure)
    assert {task.name for task in flow.reference_tasks()} == {"WaitOnContainer", "GetContainerLogs"}
    assert {parameter.name: (parameter.default, parameter.required) for parameter in flow.parameters()} == {
        "image": ("prefecthq/prefect:1.4.1", False),
        "command": ('''python -c "from prefect import Flow; f = Flow('empty'); f.run()"''', False),
        "environment": (None, False),
        "host_config": (None, False),
        "extra_docker_kwargs": (None, False),
        "time_limit": (None, False),
    }


@pytest.mark.parametrize("value", [None, ""])
def test_the_default_daemon_is_the_recipes(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("DOCKER_HOST")
    if value is not None:
        monkeypatch.setenv("DOCKER_HOST", value)
    flow = extract_flow_from_file(str(SCRIPT))
    assert {flow.get_tasks(name)[0].docker_server_url for name in TASKS} == {"tcp://localhost:2375"}


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


HINT = """--param command='["sh","-c","echo one"]'"""


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"image": "Prefect:1"}, ["image is 'Prefect:1'; give an image reference (name, name:tag, …)"]),
        ({"image": None}, ["image is None; give an image reference"]),
        ({"command": "sh -c 'echo"}, ['command is "sh -c \'echo": No closing quotation', HINT]),
        ({"command": ["sleep", 1]}, ["command is ['sleep', 1]; give a string, a list of words or null", HINT]),
        *(({"time_limit": value}, [f"time_limit is {value!r}; give the seconds"]) for value in (0, -1, "1h", True)),
        ({"host_config": "1g"}, ["host_config is '1g'", """--param host_config='{"mem_limit":"1g"}'"""]),
        ({"host_config": {"memory": "1g"}}, ["{'memory': '1g'}: got an unexpected keyword argument 'memory'; give a"]),
        ({"host_config": {"privileged": True, "mem_limit": "much"}}, ["'mem_limit': 'much'}: The specified value"]),
        ({"host_config": {"binds": 5}}, ["{'binds': 5}: "]),
        ({"host_config": {"version": "1.41"}}, ["'version'"]),
        ({"host_config": {"network_mode": "host", "port_bindings": {"80/tcp": 80}}}, ["network_mode", "port_bindings"]),
    ],
    ids=str,
)
def test_invalid_parameters_fail_before_anything_starts(
    flow: Flow, parameters: dict[str, Any], says: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    state = flow.run(parameters=parameters)
    assert type(state) is Failed
    assert state.message.startswith(next(iter(parameters)))
    assert all(words in state.message for words in says), state.message
    assert {type(result) for result in state.result.values()} == {Pending}, "no task has started"
    assert [record.getMessage() for record in caplog.records].count(state.message) == 1, "one error"


@pytest.mark.parametrize(
    "parameters",
    [
        {"command": None, "environment": None, "host_config": None, "time_limit": None},
        {"command": ["true"], "environment": {"A": 1, "B": True, "C": 1.5, "D": None, "E": ""}, "time_limit": 0.5},
        {"command": "[ 1 = 1 ]", "host_config": {}},
        {"host_config": {"privileged": True, "binds": ["/workspace:/workspace"], "mem_limit": "1g", "shm_size": 65536}},
        {"host_config": {"device_requests": [{"Driver": "nvidia", "Count": -1, "Capabilities": [["gpu"]]}]}},
        {"host_config": {"auto_remove": True, "ulimits": [{"Name": "nofile", "Soft": 1024}], "nano_cpus": 10**9}},
    ],
    ids=str,
)
def test_valid_parameters(parameters: dict[str, Any]) -> None:
    assert validate_parameters(parameters) is None


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"B": {"c": "hunter2"}}, "'B'"),
        ({"B": ["hunter2"]}, "'B'"),
        ({"B": "hunter2\0"}, "'B'"),
        ({"": "hunter2"}, "''"),
        ({"K=hunter2": "hunter2"}, "'K'"),
        ({"K\0": "hunter2"}, "K"),
    ],
    ids=str,
)
def test_what_docker_cannot_hold_is_named_without_its_value(environment: dict[str, Any], named: str) -> None:
    fault = validate_parameters({"environment": environment})
    assert fault is not None
    assert fault.startswith("environment")
    assert named in fault
    assert "hunter2" not in fault


@pytest.mark.parametrize("environment", ["PASSWORD=hunter2", 5, True], ids=str)
def test_no_value_of_an_environment_is_shown(environment: Any) -> None:
    fault = validate_parameters({"environment": environment})
    assert fault is not None
    assert "hunter2" not in fault
    assert """--param environment='{"NAME":"value"}'""" in fault


@pytest.mark.parametrize(
    "parameters",
    [
        {"command": "sh -c 'echo " + "x" * 200_000},
        {"command": [*["x"] * 100_000, 1]},
        {"image": "X" * 200_000},
        {"environment": {"x" * 100_000 + "=": "y"}},
        {"environment": {"x" * 100_000: []}},
        {"host_config": {"x" * 100_000: 1}},
        {"host_config": {"mem_limit": "x" * 100_000}},
        {"host_config": "x" * 100_000},
        {"time_limit": "x" * 100_000},
    ],
    ids=lambda parameters: next(iter(parameters)),
)
def test_messages_are_short(parameters: dict[str, Any]) -> None:
    fault = validate_parameters(parameters)
    assert fault is not None
    assert len(fault) < 500


@pytest.mark.parametrize("command", [True, 5, "['sh','-c','x']", '["sh", "-c", "x"]', ["sh", True], {"a": 1}], ids=str)
def test_the_message_says_how_to_write_a_command(command: Any) -> None:
    assert HINT in str(validate_parameters({"command": command}))


def test_without_a_daemon_the_run_fails_with_that_cause(
    flow: Flow, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flows.daemon.DAEMON_SECONDS", 0.2)
    state = flow.run()
    states = {task.name: result for task, result in state.result.items()}
    cause = states["PullImage"].message
    assert os.environ["DOCKER_HOST"] in cause
    assert "Connection refused" in cause
    assert [type(states[name]) for name in TASKS] == [Failed, TriggerFailed, TriggerFailed, TriggerFailed, Skipped]
    assert states["GetContainerLogs"].message == "No container was created, so there are no logs"
    assert type(state) is Failed
    assert state.message == cause
    assert len([record for record in caplog.records if "refused" in record.getMessage()]) <= 2, "an error, and no retry"
