"""The stand-in for Prefect Server, asked by the real CLI, agents and runners of Prefect."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pendulum
import pytest
from prefect import Client, Flow, Parameter
from prefect.agent import Agent
from prefect.cli.build_register import register_internal
from prefect.engine.state import Running, Success
from prefect.exceptions import ClientError
from prefect.utilities.configuration import set_temporary_config

from tests.support.prefect_api import PrefectAPI, select
from tests.support.waiting import wait_for

FLOWS = """
import signal
import prefect
from prefect import Flow, Parameter, task
from prefect.run_configs import UniversalRun
from prefect.storage import Local

@task
def greet(name):
    prefect.context.get("logger").info("hello %s", name)
    return [1, 2]

@task
def double(number):
    return 2 * number

@task
def fail():
    raise RuntimeError("no luck")

@task
def pause():
    signal.pause()

def here():
    return Local(path=__file__, stored_as_script=True, add_default_labels=False)

with Flow("hello", storage=here(), run_config=UniversalRun(labels=["here"])) as hello:
    double.map(greet(Parameter("name", required=True)))
with Flow("broken", storage=here()) as broken:
    double(fail())
with Flow("slow", storage=here()) as slow:
    pause()
"""


@pytest.fixture
def api() -> Iterator[PrefectAPI]:
    with PrefectAPI() as api:
        yield api
    assert api.errors == []


@pytest.fixture
def client(api: PrefectAPI) -> Iterator[Client]:
    with set_temporary_config({"backend": "server", "cloud.api": api.url}):
        yield Client()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "flows.py"
    path.write_text(FLOWS)
    return path


@pytest.fixture
def flow_ids(api: PrefectAPI, client: Client, script: Path) -> dict[str, str]:
    """The flows of the script by name, registered by the CLI's own code."""
    client.create_project("demo")
    register_internal("demo", paths=[str(script)], modules=[], json_paths=[])
    return {flow.name: flow.id for flow in api.flows.values()}


class Cli:
    """The `prefect` command, pointed at the API and at nothing else."""

    def __init__(self, api: PrefectAPI, home: Path) -> None:
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            **api.env,
            "PREFECT__CLOUD__CHECK_CANCELLATION_INTERVAL": "0.1",
            "PREFECT__CLOUD__HEARTBEAT_MODE": "thread",  # a process would outlive a flow that a test kills
        }

    @contextmanager
    def start(self, *args: str, **env: str) -> Iterator[subprocess.Popen[str]]:
        """Start the command, and end it with the `with` statement if it has not ended by then."""
        command = [sys.executable, "-m", "prefect", *args]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, env={**self.env, **env}, **pipes) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, *args: str, **env: str) -> str:
        with self.start(*args, **env) as process:
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        return output

    def execute(self, flow_run_id: str) -> AbstractContextManager[subprocess.Popen[str]]:
        """Run a flow as the process does that an agent starts for it."""
        context = {
            "PREFECT__CONTEXT__FLOW_RUN_ID": flow_run_id,
            "PREFECT__ENGINE__FLOW_RUNNER__DEFAULT_CLASS": "prefect.engine.cloud.CloudFlowRunner",
        }
        return self.start("execute", "flow-run", **context)


@pytest.fixture
def cli(api: PrefectAPI, tmp_path: Path) -> Cli:
    return Cli(api, tmp_path)


def test_cli_registers_an_unchanged_flow_once(api: PrefectAPI, cli: Cli, script: Path) -> None:
    assert "demo created" in cli.run("create", "project", "demo")
    register = ["register", "--project", "demo", "--path", str(script), "--name", "hello"]
    assert "1 registered" in cli.run(*register)
    assert "0 registered, 1 skipped" in cli.run(*register)
    (flow,) = api.flows.values()
    assert (flow.name, flow.version, flow.project.name) == ("hello", 1, "demo")
    assert {task.slug for task in flow.tasks} == {"name", "greet-1", "double-1"}


def test_a_new_version_takes_the_place_of_the_old(
    api: PrefectAPI, client: Client, flow_ids: dict[str, str], script: Path
) -> None:
    client.create_project("demo")  # is there already, which the client takes for done
    register_internal("demo", paths=[str(script)], modules=[], json_paths=[], names=["slow"], force=True)
    old, new = (flow for flow in api.flows.values() if flow.name == "slow")
    assert (old.version, old.archived, new.version, new.archived) == (1, True, 2, False)
    with pytest.raises(ClientError, match="is archived"):
        client.create_flow_run(flow_id=old.id)


def test_a_flow_that_registers_itself(api: PrefectAPI, client: Client, flow_ids: dict[str, str]) -> None:
    flow = Flow("own", tasks=[Parameter("first", default=1)])
    first, again = (str(flow.register("demo", build=False, idempotency_key="same")) for _ in range(2))
    assert first == again
    assert [task.slug for task in api.flows[first].tasks] == ["first"]


def test_agent_runs_what_the_cli_creates_and_watches(api: PrefectAPI, cli: Cli, flow_ids: dict[str, str]) -> None:
    with cli.start("agent", "local", "start", "--label", "here", "--no-hostname-label"):
        output = cli.run("run", "--name", "hello", "--param", "name=Marvin", "--watch")
    assert "| INFO    | hello Marvin" in output
    assert "Entered state <Running>: Running flow." in output
    assert "Flow run succeeded!" in output
    (run,) = api.flow_runs.values()
    assert [entry.state for entry in run.states] == [
        "Pending",
        "Scheduled",
        "Submitted",
        "Running",
        "Success",
    ]
    assert run.task_states == {
        "name": "Success",
        "greet-1": "Success",
        "double-1": "Mapped",
        "double-1[0]": "Success",
        "double-1[1]": "Success",
    }
    assert ("INFO", "prefect.greet", "hello Marvin") in [log[1:] for log in run.logs]
    assert run.heartbeats > 0


def test_failing_flow(api: PrefectAPI, cli: Cli, flow_ids: dict[str, str]) -> None:
    run_id = api.create_flow_run(flow_ids["broken"])
    with cli.execute(run_id) as process:
        process.communicate(timeout=60)
    run = api.flow_runs[run_id]
    assert (run.state, run.message) == ("Failed", "Some reference tasks failed.")
    assert run.task_states == {"fail-1": "Failed", "double-1": "TriggerFailed"}
    assert any(log.level == "ERROR" and "RuntimeError: no luck" in str(log.message) for log in run.logs)


def test_flow_that_cannot_be_loaded(api: PrefectAPI, cli: Cli, flow_ids: dict[str, str], script: Path) -> None:
    run_id = api.create_flow_run(flow_ids["slow"])
    script.unlink()
    with cli.execute(run_id) as process:
        process.communicate(timeout=60)
    run = api.flow_runs[run_id]
    assert run.state == "Failed"
    assert "Failed to load and execute flow run" in str(run.message)
    assert run.message in [log.message for log in run.logs]


def test_cancel_in_mid_run(api: PrefectAPI, cli: Cli, flow_ids: dict[str, str]) -> None:
    run_id = api.create_flow_run(flow_ids["slow"])
    run = api.flow_runs[run_id]
    with cli.execute(run_id) as process:
        wait_for(lambda: run.task_states["pause-1"] == "Running", "task is running", lambda: run)
        api.cancel(run_id)
        wait_for(lambda: run.state == "Cancelled", "run is cancelled", lambda: run)
        process.communicate(timeout=30)
    assert [entry.state for entry in run.states][-3:] == ["Running", "Cancelling", "Cancelled"]
    assert run.task_states == {"pause-1": "Cancelled"}


def test_cancel_before_the_run(api: PrefectAPI, client: Client, flow_ids: dict[str, str]) -> None:
    run_id = client.create_flow_run(flow_id=flow_ids["slow"])
    assert str(client.cancel_flow_run(run_id)) == "Cancelled"  # not the bool that its signature says
    assert api.flow_runs[run_id].task_states == {"pause-1": "Cancelled"}


def test_a_run_tells_what_it_has_been_through(api: PrefectAPI, client: Client, flow_ids: dict[str, str]) -> None:
    run_id = api.create_flow_run(flow_ids["slow"])
    client.write_run_logs([{"flow_run_id": run_id, "name": "me", "message": "hi", "level": "INFO"}])
    first, *lines = str(api.flow_runs[run_id]).splitlines()
    assert first == "flow run slow-1 {'pause-1': 'Pending'}"
    assert [line.partition(" ")[2] for line in lines] == [
        "Pending: Flow run created",
        "Scheduled: Flow run scheduled.",
        "INFO: hi",
    ]


def test_create_flow_run(api: PrefectAPI, client: Client, flow_ids: dict[str, str]) -> None:
    with pytest.raises(ClientError, match=r"Required parameters were not supplied: \{'name'\}"):
        client.create_flow_run(flow_id=flow_ids["hello"])
    run_id = client.create_flow_run(flow_id=flow_ids["hello"], parameters={"name": 1}, idempotency_key="k")
    assert client.create_flow_run(flow_id=flow_ids["hello"], idempotency_key="k") == run_id
    run = api.flow_runs[run_id]
    assert (run.parameters, run.labels) == ({"name": 1}, ["here"])
    assert client.get_flow_run_info(run_id).parameters == {"name": 1}


@pytest.mark.parametrize(
    ("query", "variables", "message"),
    [
        ("query { flow { colour } }", None, "400 Client Error"),
        ("query { task_tag_limit { id } }", None, "400 Client Error"),
        ("query { flow", None, "400 Client Error"),
        ('query { flow(where: { name: { _like: "s%" } }) { id } }', None, "operator _like"),
        ('query { flow(where: { id: { _eq: "" }, name: { _like: "s%" } }) { id } }', None, "operator _like"),
        ('query { flow(where: { colour: { _eq: "red" } }) { id } }', None, "colour"),
        (
            "mutation($input: create_project_input!) { create_project(input: $input) { id } }",
            {"input": {"name": "other", "description": None, "tenant_id": "", "colour": "red"}},
            "colour",
        ),
    ],
)
def test_what_it_does_not_understand_is_an_error(
    api: PrefectAPI, client: Client, flow_ids: dict[str, str], query: str, variables: Any, message: str
) -> None:
    with pytest.raises(ClientError, match=message):
        client.graphql(query, variables=variables)
    assert [query in error for error in api.errors] == [True]
    api.errors.clear()


ROWS = [
    SimpleNamespace(id=1, size=5, name="b", parts=[], time=datetime(2024, 1, 1, tzinfo=timezone.utc)),
    SimpleNamespace(id=2, size=7, name="a", parts=[SimpleNamespace(size=1), SimpleNamespace(size=2)], time=None),
    SimpleNamespace(id=3, size=None, name="b", parts=[SimpleNamespace(size=3)], time=None),
]


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        ({}, [1, 2, 3]),
        ({"name": {"_eq": "b"}, "id": {"_neq": 1}}, [3]),
        ({"_and": {"name": {"_eq": "b"}, "id": {"_neq": 1}}}, [3]),
        ({"_and": [{"name": {"_eq": "b"}}, {}, {"id": {"_neq": 1}}]}, [3]),
        ({"_or": [{"id": {"_eq": 1}}, {"name": {"_eq": "a"}}]}, [1, 2]),
        ({"id": {"_in": [1, 3]}}, [1, 3]),
        ({"id": {"_nin": [1, 3]}}, [2]),
        ({"size": {"_neq": 5}}, [2]),
        ({"size": {"_is_null": True}}, [3]),
        ({"size": {"_is_null": False}}, [1, 2]),
        ({"size": {"_gt": 5}}, [2]),
        ({"size": {"_gte": 5, "_lte": 6}}, [1]),
        ({"parts": {"size": {"_eq": 2}}}, [2]),
        ({"time": {"_lte": "2024-01-01T01:00:00+01:00"}}, [1]),
        ({"time": {"_gt": "2023-12-31T23:59:59"}}, [1]),
    ],
)
def test_filters(where: dict[str, Any], ids: list[int]) -> None:
    assert [row.id for row in select(ROWS, where)] == ids


def test_order_and_limit() -> None:
    assert [row.id for row in select(ROWS, order_by={"name": "asc", "id": "desc"})] == [2, 3, 1]
    assert [row.id for row in select(ROWS, order_by={"id": "desc"}, limit=2)] == [3, 2]


def test_versions_count_only_where_they_are_locked(api: PrefectAPI, client: Client, flow_ids: dict[str, str]) -> None:
    run_id = client.create_flow_run(flow_id=flow_ids["slow"])
    run = api.flow_runs[run_id]
    assert run.version == 1
    client.set_flow_run_state(run_id, Running(), version=7)
    run.flow.settings["version_locking_enabled"] = True
    client.set_flow_run_state(run_id, Running(), version=2)
    with pytest.raises(ClientError, match="State update failed"):
        client.set_flow_run_state(run_id, Success(), version=2)
    assert (run.state, run.version) == ("Running", 3)
    client.set_flow_run_state(run_id, Success())
    assert run.state == "Success"


def test_a_task_runs_only_in_a_running_flow(api: PrefectAPI, client: Client, flow_ids: dict[str, str]) -> None:
    run_id = client.create_flow_run(flow_id=flow_ids["slow"])
    (task_run,) = api.flow_runs[run_id].task_runs
    with pytest.raises(ClientError, match="its flow run is not running"):
        client.set_task_run_state(task_run.id, Running())
    client.set_flow_run_state(run_id, Running())
    client.set_task_run_state(task_run.id, Running())
    assert client.get_task_run_state(task_run.id).is_running()


def test_queue(api: PrefectAPI, client: Client, flow_ids: dict[str, str]) -> None:
    def create(*labels: str, hours: int = 0) -> str:
        time = pendulum.now("UTC").add(hours=hours)
        run_id = client.create_flow_run(flow_ids["slow"], labels=list(labels), scheduled_start_time=time)
        return str(run_id)

    def ready(*labels: str) -> set[str]:
        return set(Agent(labels=list(labels))._get_ready_flow_runs())

    plain, x, xy, later = create(), create("x"), create("x", "y"), create("x", hours=1)
    assert ready() == {plain}
    assert ready("x") == {x}
    assert ready("x", "y", "z") == {x, xy}
    agent = Agent(labels=["x"])
    taken, _ = agent._get_flow_run_metadata([later, x, "unknown"])
    agent._mark_flow_as_submitted(taken)
    assert api.flow_runs[x].state == "Submitted"
    assert ready("x") == set()


def test_foreground() -> None:
    command = [sys.executable, "-m", "tests.support.prefect_api", "--port", "0"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "export PREFECT__BACKEND=server\n"
            url = process.stdout.readline().strip().partition("=")[2]
            assert Client(api_server=url).graphql("query { hello }").data.hello
        finally:
            process.terminate()
