"""The flow: loaded as Prefect loads it, and clear about what went wrong."""

import os
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow
from prefect.cli.build_register import load_flows_from_module, load_flows_from_script
from prefect.engine.state import Failed, Pending, Skipped, TriggerFailed
from prefect.utilities.storage import extract_flow_from_file

from flows.settings import JOB_TEMPLATES, PROJECT

SCRIPT = PROJECT / "flows" / "docker_sidecar.py"
TASKS = ["PullImage", "CreateContainer", "StartContainer", "WaitOnContainer", "GetContainerLogs"]


def daemons_of(flow: Flow) -> set[str]:
    """The URLs of the daemons that the flow's Docker tasks use."""
    tasks: list[Any] = [flow.get_tasks(name)[0] for name in TASKS]
    return {task.docker_server_url for task in tasks}


@pytest.mark.parametrize("value", [None, ""], ids=["not set", "empty"])
def test_the_daemon_is_the_recipes(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("DOCKER_HOST")
    if value is not None:
        monkeypatch.setenv("DOCKER_HOST", value)
    assert daemons_of(extract_flow_from_file(str(SCRIPT))) == {"tcp://localhost:2375"}


def test_the_daemon_is_the_one_of_docker_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///a")
    assert daemons_of(extract_flow_from_file(str(SCRIPT))) == {"unix:///a"}


def test_settings_reach_the_flow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    template = tmp_path / "own.yaml"
    text = (JOB_TEMPLATES / "docker_sidecar.yaml").read_text()
    template.write_text(text.replace("prefect-docker-job", "own"))
    monkeypatch.setenv("FLOW_REGISTRY_URL", "localhost:5000")
    monkeypatch.setenv("FLOW_IMAGE_NAME", "team/flow")
    monkeypatch.setenv("FLOW_IMAGE_TAG", "2")
    monkeypatch.setenv("FLOW_BASE_IMAGE", "python:3.11")
    monkeypatch.setenv("JOB_TEMPLATE", str(template))
    flow: Any = extract_flow_from_file(str(SCRIPT))
    assert flow.storage.name == "localhost:5000/team/flow:2"
    assert flow.storage.build_kwargs["buildargs"] == {"BASE_IMAGE": "python:3.11"}
    assert flow.run_config.job_template["metadata"]["name"] == "own"


def test_the_cli_finds_the_flow_in_the_projects_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    [by_path] = load_flows_from_script("flows/docker_sidecar.py")
    [by_module] = load_flows_from_module("flows.docker_sidecar")
    assert by_path.name == by_module.name == "Docker sidecar example"


def test_the_cli_finds_the_flow_from_another_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    [flow] = load_flows_from_script(str(SCRIPT))
    assert flow.name == "Docker sidecar example"


def test_invalid_parameters_fail_before_anything_starts(flow: Flow) -> None:
    state = flow.run(parameters={"image": "app:1", "time_limit": 0})
    assert type(state) is Failed
    assert state.message.startswith("time_limit is not over 0")
    assert {type(result) for result in state.result.values()} == {Pending}, "no task has started"


def test_without_a_daemon_the_run_fails_with_that_cause(
    flow: Flow, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flows.daemon.DAEMON_SECONDS", 0.2)
    state = flow.run()
    states = {task.name: result for task, result in state.result.items()}
    types = [type(states[name]) for name in TASKS]
    assert types == [Failed, TriggerFailed, TriggerFailed, TriggerFailed, Skipped]
    assert states["GetContainerLogs"].message == "No container was created, so there are no logs"
    assert type(state) is Failed
    assert state.message == states["PullImage"].message
    assert f"{os.environ['DOCKER_HOST']} does not answer (Connection refused)" in state.message
    refusals = [message for message in caplog.messages if "refused" in message]
    assert len(refusals) <= 2, "an error, and no retry"
