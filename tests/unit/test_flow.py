"""The flow: loaded as Prefect loads it, and clear about what went wrong."""

import os
from pathlib import Path

import pytest
from prefect import Flow
from prefect.cli.build_register import load_flows_from_module, load_flows_from_script
from prefect.engine.state import Failed, Pending, Skipped, TriggerFailed
from prefect.utilities.storage import extract_flow_from_file

from flows.settings import JOB_TEMPLATES, PROJECT

SCRIPT = PROJECT / "flows" / "docker_sidecar.py"
TASKS = ("PullImage", "CreateContainer", "StartContainer", "WaitOnContainer", "GetContainerLogs")


@pytest.mark.parametrize(
    ("value", "url"),
    [(None, "tcp://localhost:2375"), ("", "tcp://localhost:2375"), ("unix:///a", "unix:///a")],
)
def test_the_daemon_is_the_recipes_or_docker_hosts(
    monkeypatch: pytest.MonkeyPatch, value: str, url: str
) -> None:
    monkeypatch.delenv("DOCKER_HOST")
    if value is not None:
        monkeypatch.setenv("DOCKER_HOST", value)
    flow = extract_flow_from_file(str(SCRIPT))
    assert {flow.get_tasks(name)[0].docker_server_url for name in TASKS} == {url}


def test_settings_reach_the_flow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    template = tmp_path / "own.yaml"
    template.write_text(
        (JOB_TEMPLATES / "docker_sidecar.yaml").read_text().replace("prefect-docker-job", "own")
    )
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


def test_the_cli_finds_the_flow_from_any_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(PROJECT)
    found = [
        *load_flows_from_script("flows/docker_sidecar.py"),
        *load_flows_from_module("flows.docker_sidecar"),
    ]
    monkeypatch.chdir(tmp_path)
    found += load_flows_from_script(str(SCRIPT))
    assert [flow.name for flow in found] == ["Docker sidecar example"] * 3


def test_invalid_parameters_fail_before_anything_starts(
    flow: Flow, caplog: pytest.LogCaptureFixture
) -> None:
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
    assert [type(states[name]) for name in TASKS] == [
        Failed,
        TriggerFailed,
        TriggerFailed,
        TriggerFailed,
        Skipped,
    ]
    assert states["GetContainerLogs"].message == "No container was created, so there are no logs"
    assert type(state) is Failed
    assert state.message == states["PullImage"].message
    assert f"{os.environ['DOCKER_HOST']} does not answer (Connection refused)" in state.message
    assert len([record for record in caplog.records if "refused" in record.getMessage()]) <= 2, (
        "an error, and no retry"
    )
