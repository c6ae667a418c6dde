"""The stand-in for Prefect Server, asked by Prefect's own code: rules whose absence other tests would not notice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pendulum
import pytest
from prefect import Client, Flow
from prefect.agent import Agent
from prefect.cli.build_register import register_internal
from prefect.engine.state import Cancelled, Failed, Running, Submitted, Success, TimedOut, TriggerFailed
from prefect.exceptions import ClientError
from prefect.utilities.configuration import set_temporary_config
from requests import HTTPError

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


def test_an_agent_gets_25_runs_at_once(api: PrefectAPI, flow_id: str) -> None:
    for _ in range(26):
        api.create_flow_run(flow_id, parameters={"how": "fail"})
    assert len(Agent()._get_ready_flow_runs()) == 25


def test_a_run_is_submitted_once_in_30_seconds(api: PrefectAPI, flow_id: str) -> None:
    run = api.flow_runs[api.create_flow_run(flow_id, parameters={"how": "fail"})]
    Client().set_flow_run_state(run.id, Submitted())
    with pytest.raises(ClientError, match="already been submitted"):
        Client().set_flow_run_state(run.id, Submitted())
    run.states[-1].timestamp -= timedelta(seconds=31)
    Client().set_flow_run_state(run.id, Submitted())


def test_a_new_version_cancels_the_old_ones_scheduled_runs(api: PrefectAPI, flow_id: str, tmp_path: Path) -> None:
    scheduled, submitted = (api.flow_runs[api.create_flow_run(flow_id, parameters={"how": "fail"})] for _ in range(2))
    Client().set_flow_run_state(submitted.id, Submitted())
    (tmp_path / "flow.py").write_text(FLOW.replace('"how"', '"way"'))
    register_internal("demo", paths=[str(tmp_path / "flow.py")], modules=[], json_paths=[])
    assert [flow.archived for flow in api.flows.values()] == [True, False]
    assert (scheduled.state, set(scheduled.task_states.values())) == ("Cancelled", {"Cancelled"})
    assert submitted.state == "Submitted"


def test_a_restart_resets_what_did_not_succeed(api: PrefectAPI, flow_id: str) -> None:
    run = api.flow_runs[api.create_flow_run(flow_id, parameters={"how": "fail"})]
    [end, how] = run.task_runs
    Client().set_task_run_state(how.id, Success())
    for state in (Failed(), TimedOut(), TriggerFailed(), Cancelled()):
        Client().set_task_run_state(end.id, state)
        api.restart(run.id)
        assert (end.state, how.state, run.state) == ("Pending", "Success", "Scheduled")
        assert end.message
        assert run.message


def test_lazarus_reschedules_a_run_three_times(api: PrefectAPI, flow_id: str) -> None:
    run = api.flow_runs[api.create_flow_run(flow_id, parameters={"how": "fail"})]
    api.lazarus(run.id)
    assert len(run.states) == 2, "a run that is Scheduled is the Agents'"
    for expected in ("Scheduled", "Scheduled", "Scheduled", "Failed"):
        Client().set_flow_run_state(run.id, Running())
        api.lazarus(run.id)
        assert run.state == expected


def test_a_task_without_heartbeat_is_the_zombie_killers_and_not_lazaruss(api: PrefectAPI, flow_id: str) -> None:
    run = api.flow_runs[api.create_flow_run(flow_id, parameters={"how": "fail"})]
    [end, how] = run.task_runs
    Client().set_flow_run_state(run.id, Running())
    Client().set_task_run_state(end.id, Running())
    how.task.max_retries = 1
    Client().set_task_run_state(how.id, Running())
    api.lazarus(run.id)
    assert run.state == "Running"
    api.kill_zombies(run.id)
    assert (end.state, how.state, run.state) == ("Failed", "Retrying", "Running")
    Client().set_task_run_state(how.id, Running())
    api.kill_zombies(run.id)
    assert how.state == "Failed"


@pytest.mark.parametrize("text", ["\0", "a\0b", "\\\0"])
def test_nul_is_refused_everywhere(api: PrefectAPI, flow_id: str, text: str) -> None:
    run = api.flow_runs[api.create_flow_run(flow_id, parameters={"how": "fail"})]
    log = {"flow_run_id": run.id, "level": "INFO", "message": text}
    for refused in (
        lambda: Client().write_run_logs([log]),
        lambda: Client().set_flow_run_state(run.id, Failed(text)),
        lambda: Client().create_flow_run(flow_id=flow_id, parameters={"how": text}),
        lambda: Client().register(Flow(text), project_name="demo", build=False, no_url=True),
    ):
        with pytest.raises(ClientError, match="Unicode"):
            refused()
    log["message"] = r"\0 \u0000 \\u0000"
    Client().write_run_logs([log])
    assert [entry.message for entry in run.logs] == [log["message"]]


def test_a_body_of_more_than_5_mb_is_refused(api: PrefectAPI, flow_id: str) -> None:
    run = api.flow_runs[api.create_flow_run(flow_id, parameters={"how": "fail"})]
    log = {"flow_run_id": run.id, "level": "INFO", "message": "x" * 5_000_000}
    Client().write_run_logs([log])
    with pytest.raises(HTTPError, match="413"):
        Client().write_run_logs([{**log, "message": "x" * 5_300_000}])
    assert len(run.logs) == 1


@pytest.mark.parametrize("wrong", [{"level": "NOTICE"}, {"task_run_id": "1"}, {"flow_run_id": "1"}], ids=str)
def test_a_log_that_is_none_is_refused(api: PrefectAPI, flow_id: str, wrong: dict[str, str]) -> None:
    run = api.flow_runs[api.create_flow_run(flow_id, parameters={"how": "fail"})]
    with pytest.raises(ClientError, match="invalid input"):
        Client().write_run_logs([{"flow_run_id": run.id, "level": "INFO", "message": "one", **wrong}])


@pytest.mark.parametrize("query", ['flow_run_by_pk(id: "1") { id }', 'flow_run(where: {id: {_in: ["1"]}}) { id }'])
def test_ids_are_uuids(api: PrefectAPI, flow_id: str, query: str) -> None:
    api.create_flow_run(flow_id, parameters={"how": "fail"})
    with pytest.raises(ClientError, match="uuid"):
        Client().graphql(f"query {{ {query} }}")


@pytest.mark.parametrize(
    "query", ["flow { colour }", "task_tag_limit { id }", "flow(where: { name: { _like: 1 } }) { id }"]
)
def test_what_it_does_not_understand_is_an_error(api: PrefectAPI, flow_id: str, query: str) -> None:
    with pytest.raises(ClientError):
        Client().graphql(f"query {{ {query} }}")
    assert len(api.errors) == 1
    api.errors.clear()
