"""The stand-in for Prefect Server, asked by Prefect's own code: rules whose absence other tests would not notice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pendulum
import pytest
from prefect import Client
from prefect.agent import Agent
from prefect.cli.build_register import register_internal
from prefect.engine.state import Running
from prefect.exceptions import ClientError
from prefect.utilities.configuration import set_temporary_config

from tests.support.prefect_api import FlowRun, PrefectAPI
from tests.support.waiting import wait_for

FLOW = """
import signal
from prefect import Flow, Parameter, task
from prefect.storage import Local
end = task(lambda how: signal.pause() if how == "wait" else [][0], name="end")
with Flow("test", storage=Local(path=__file__, stored_as_script=True, add_default_labels=False)) as flow:
    end(Parameter("how", required=True))
"""


@pytest.fixture
def api() -> Iterator[PrefectAPI]:
    with PrefectAPI() as api, set_temporary_config({"backend": "server", "cloud.api": api.url}):
        yield api
    assert api.errors == []


@pytest.fixture
def flow_id(api: PrefectAPI, tmp_path: Path) -> str:
    Client().create_project("demo")
    (tmp_path / "flow.py").write_text(FLOW)
    for _ in range(2):  # the second time it is unchanged
        register_internal("demo", paths=[str(tmp_path / "flow.py")], modules=[], json_paths=[])
    [flow] = api.flows.values()
    return str(flow.id)


@contextmanager
def execute(api: PrefectAPI, run: FlowRun) -> Iterator[None]:
    """Run a flow as the process does that an Agent starts for it."""
    environment = {
        "PREFECT__CONTEXT__FLOW_RUN_ID": run.id,
        "PREFECT__ENGINE__FLOW_RUNNER__DEFAULT_CLASS": "prefect.engine.cloud.CloudFlowRunner",
        "PREFECT__CLOUD__CHECK_CANCELLATION_INTERVAL": "0.1",
    }
    command = [sys.executable, "-m", "prefect", "execute", "flow-run"]
    with subprocess.Popen(command, env={**os.environ, **api.env, **environment}, stdout=subprocess.DEVNULL) as process:
        try:
            yield
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_a_run_that_fails(api: PrefectAPI, flow_id: str) -> None:
    run = api.flow_runs[api.create_flow_run(flow_id, parameters={"how": "fail"})]
    with execute(api, run):
        pass
    assert [entry.state for entry in run.states] == ["Pending", "Scheduled", "Running", "Failed"]
    assert (run.message, run.task_states["end-1"]) == ("Some reference tasks failed.", "Failed")
    assert any("IndexError" in str(log.message) for log in run.logs)
    assert run.heartbeats > 0


def test_a_run_that_is_cancelled(api: PrefectAPI, flow_id: str) -> None:
    run = api.flow_runs[api.create_flow_run(flow_id, parameters={"how": "wait"})]
    with execute(api, run):
        wait_for(lambda: run.task_states["end-1"] == "Running", "the task runs", lambda: run)
        api.cancel(run.id)
    assert [entry.state for entry in run.states][-3:] == ["Running", "Cancelling", "Cancelled"]
    assert run.task_states["end-1"] == "Cancelled"


def test_a_task_runs_only_in_a_running_flow(api: PrefectAPI, flow_id: str) -> None:
    run = api.flow_runs[api.create_flow_run(flow_id, parameters={"how": "fail"})]
    with pytest.raises(ClientError, match="its flow run is not running"):
        Client().set_task_run_state(run.task_runs[-1].id, Running())
    Client().set_flow_run_state(run.id, Running())
    Client().set_task_run_state(run.task_runs[-1].id, Running())
    assert run.task_runs[-1].state == "Running"


def test_only_a_run_that_can_be_started_is_created(api: PrefectAPI, flow_id: str) -> None:
    with pytest.raises(ClientError, match=r"Required parameters were not supplied: \{'how'\}"):
        Client().create_flow_run(flow_id=flow_id)
    api.flows[flow_id].archived = True
    with pytest.raises(ClientError, match="is archived"):
        Client().create_flow_run(flow_id=flow_id, parameters={"how": "fail"})


def test_an_agent_gets_only_runs_that_are_due_and_its_own(api: PrefectAPI, flow_id: str) -> None:
    def create(*labels: str, hours: int = 0) -> str:
        due = pendulum.now("UTC").add(hours=hours)
        return str(Client().create_flow_run(flow_id, {}, labels=list(labels), scheduled_start_time=due))

    api.flows[flow_id].parameters = []
    plain, labelled, later = create(), create("x"), create("x", hours=1)
    assert Agent()._get_ready_flow_runs() == {plain}
    agent = Agent(labels=["x", "y"])
    assert agent._get_ready_flow_runs() == {labelled}
    taken, _ = agent._get_flow_run_metadata([labelled, later])
    agent._mark_flow_as_submitted(taken)
    assert api.flow_runs[labelled].state == "Submitted"
    assert agent._get_ready_flow_runs() == set()


@pytest.mark.parametrize(
    "query", ["flow { colour }", "task_tag_limit { id }", "flow(where: { name: { _like: 1 } }) { id }"]
)
def test_what_it_does_not_understand_is_an_error(api: PrefectAPI, flow_id: str, query: str) -> None:
    with pytest.raises(ClientError):
        Client().graphql(f"query {{ {query} }}")
    assert len(api.errors) == 1
    api.errors.clear()
