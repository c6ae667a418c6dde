"""How runs end: causes, restarts, lost pods, SIGTERM. The API is a stand-in, and so is the Docker daemon."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prefect
import pytest
from prefect import Client, Flow, Task, task
from prefect.engine.cloud import CloudFlowRunner
from prefect.engine.state import Failed, Running, Success, TriggerFailed
from prefect.storage import Local
from prefect.utilities.configuration import set_temporary_config
from prefect.utilities.storage import extract_flow_from_file

from flows import states
from flows.settings import PROJECT
from flows.states import all_successful_or_first_failure, handle_pod_lifecycle
from tests.support.fake_docker import ID, FakeDocker, frame
from tests.support.prefect_api import FlowRun, PrefectAPI
from tests.support.waiting import wait_for

NAMES = ("PullImage", "CreateContainer", "StartContainer", "WaitOnContainer", "GetContainerLogs")
ALL_REQUESTS = ["POST /images/create", "POST /containers/create", "POST /containers/start", "POST /containers/wait"]

pytestmark = pytest.mark.filterwarnings("ignore:No result handler")


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setattr("flows.output.FLUSH_SECONDS", 0.05)
    for name in ("no_proxy", "NO_PROXY"):  # set first, so that monkeypatch restores what connect() sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def fake() -> Iterator[FakeDocker]:
    with FakeDocker() as fake:
        yield fake


@pytest.fixture
def api() -> Iterator[PrefectAPI]:
    settings = {"backend": "server", "cloud.check_cancellation_interval": 0.1, "cloud.send_flow_run_logs": False}
    with PrefectAPI() as api, set_temporary_config({**settings, "cloud.api": api.url}):
        Client().create_project("demo")
        yield api
    assert api.errors == []


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]


def submitted(flow: Flow, api: PrefectAPI, **parameters: Any) -> FlowRun:
    flow_id = Client().register(flow, project_name="demo", build=False, no_url=True)
    return api.flow_runs[api.create_flow_run(flow_id, parameters=parameters)]


def execute(flow: Flow, run: FlowRun, fake: FakeDocker) -> None:
    """Run a flow as the process in the pod does, on a daemon of its own."""
    for name in NAMES:
        flow.get_tasks(name)[0].docker_server_url = fake.url
    with prefect.context(flow_run_id=run.id):
        CloudFlowRunner(flow=flow).run()


# ----------------------------------------------------------------------------------------------- causes


def test_a_failure_names_its_cause_once(
    flow: Flow, fake: FakeDocker, api: PrefectAPI, caplog: pytest.LogCaptureFixture
) -> None:
    run = submitted(flow, api, image="app:1")
    fake.pull = [{"error": "manifest not found"}]
    execute(flow, run, fake)
    assert run.message == "Pulling app:1: manifest not found"
    assert len([line for line in lines(caplog) if "not found" in line]) == 1


@pytest.mark.parametrize("reference", ["after", "mapped"])
def test_a_failed_child_of_a_mapped_task_fails_what_comes_after_it(reference: str) -> None:
    @task
    def mapped(number: int) -> int:
        if number:
            raise prefect.engine.signals.FAIL(f"number {number} failed")
        return number

    after = Task("after", trigger=all_successful_or_first_failure)
    with Flow("mapped", terminal_state_handler=states.fail_with_cause) as flow:
        children = mapped.map([0, 1, 0])
        after = after(upstream_tasks=[children])
    flow.set_reference_tasks([after if reference == "after" else children])
    state = flow.run()
    assert (type(state), state.message) == (Failed, "number 1 failed")
    assert type(state.result[after]) is TriggerFailed


def test_a_task_after_a_mapped_one_runs_if_all_children_succeeded() -> None:
    after = Task("after", trigger=all_successful_or_first_failure)
    with Flow("mapped") as flow:
        after = after(upstream_tasks=[task(lambda number: number, name="mapped").map([1, 2])])
    assert type(flow.run().result[after]) is Success


# ---------------------------------------------------------------------------------------------- restart


def test_a_restarted_run_runs_again_from_the_pull(
    flow: Flow, fake: FakeDocker, api: PrefectAPI, caplog: pytest.LogCaptureFixture
) -> None:
    run = submitted(flow, api, image="app:1")
    fake.result = {"StatusCode": 3}
    execute(flow, run, fake)
    assert (run.state, run.task_states["PullImage-1"]) == ("Failed", "Success")
    assert "exited with code 3" in run.message

    api.restart(run.id)
    assert run.task_states["PullImage-1"] == "Success"
    with FakeDocker() as second:
        execute(flow, run, second)
        assert [request for request, _ in second.requests if request.startswith("POST")] == ALL_REQUESTS
    assert run.state == "Success", str(run)
    assert set(run.task_states.values()) == {"Success"}
    assert len([line for line in lines(caplog) if "The run was restarted" in line]) == 1


def test_a_run_that_is_retrying_goes_on(
    flow: Flow, fake: FakeDocker, api: PrefectAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry, also in a new pod, is no restart: nothing is reset."""
    monkeypatch.setattr("flows.pull.PULL_RETRY_SECONDS", (0.1,))
    run = submitted(flow, api, image="app:1")
    fake.pull = iter([{"error": "received unexpected HTTP status: 503 Service Unavailable"}])
    execute(flow, run, fake)
    assert run.state == "Success", str(run)
    pull = next(task_run for task_run in run.task_runs if task_run.task.slug == "PullImage-1")
    assert [entry.state for entry in pull.states] == ["Pending", "Running", "Retrying", "Running", "Success"]


def test_a_run_that_was_cancelled_stays_cancelled(flow: Flow, fake: FakeDocker, api: PrefectAPI) -> None:
    run = submitted(flow, api, image="app:1")
    api.cancel(run.id)
    execute(flow, run, fake)
    assert run.state == "Cancelled"
    assert fake.requests == []


@pytest.mark.parametrize(("restarted", "request_number"), [(False, 2), (False, 3), (True, 2), (True, 3), (True, 8)])
def test_a_run_that_is_cancelled_while_it_starts_stays_cancelled(
    flow: Flow, fake: FakeDocker, api: PrefectAPI, restarted: bool, request_number: int
) -> None:
    """The first request reads the run, and the next ones are the state handler's."""
    run = submitted(flow, api, image="app:1")
    if restarted:
        fake.result = {"StatusCode": 3}
        execute(flow, run, fake)
        api.restart(run.id)
        fake.requests.clear()
    answer, count = api.answer, 0

    def cancel_before(*request: Any) -> Any:
        nonlocal count
        if (count := count + 1) == request_number:
            api.cancel(run.id)
        return answer(*request)

    api.answer = cancel_before  # type: ignore[method-assign]
    execute(flow, run, fake)
    assert run.state == "Cancelled", str(run)
    assert fake.requests == []


# -------------------------------------------------------------------------------------------- lost pods


def test_a_run_whose_pod_was_lost_does_not_run_its_container_again(
    flow: Flow, fake: FakeDocker, api: PrefectAPI
) -> None:
    run = submitted(flow, api, image="app:1")
    Client().set_flow_run_state(run.id, Running())
    for task_run in run.task_runs:
        Client().set_task_run_state(task_run.id, Running())
        if task_run.task.slug == "WaitOnContainer-1":
            break
        Client().set_task_run_state(task_run.id, Success())
    api.kill_zombies(run.id)
    api.lazarus(run.id)
    execute(flow, run, fake)
    assert run.state == "Failed", str(run)
    assert run.message == states.LOST
    assert fake.requests == []

    api.restart(run.id)  # and if it is asked for, it does
    execute(flow, run, fake)
    assert run.state == "Success", str(run)


def test_a_run_whose_pod_never_came_is_started_by_lazarus(flow: Flow, fake: FakeDocker, api: PrefectAPI) -> None:
    run = submitted(flow, api, image="app:1")
    Client().set_flow_run_state(run.id, prefect.engine.state.Submitted())
    api.lazarus(run.id)
    execute(flow, run, fake)
    assert run.state == "Success", str(run)


# ---------------------------------------------------------------------------------------------- SIGTERM

OWN = """
import multiprocessing, os, signal, time
from prefect import Flow, task
from prefect.executors import LocalDaskExecutor
from flows.states import handle_pod_lifecycle, fail_with_cause

def sigterm_at(state):
    def handler(flow, old, new):
        if type(new).__name__ == state:
            os.kill(os.getpid(), signal.SIGTERM)
    return handler

def flow_of(run, *handlers, **options):
    with Flow("own", state_handlers=[handle_pod_lifecycle, *handlers], terminal_state_handler=fail_with_cause) as flow:
        task(run, name="run", **options)()
    return flow
"""
SIDECAR = "from flows.docker_sidecar import flow\n"
THREADS, PROCESSES = (f"flow.executor = LocalDaskExecutor('{name}')\n" for name in ("threads", "processes"))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "flow.py"


@contextmanager
def process(script: Path, code: str, api: PrefectAPI, fake: FakeDocker) -> Iterator[tuple[FlowRun, Any]]:
    """A run of a flow, in a process as an Agent starts it."""
    script.write_text(OWN + code)
    flow = extract_flow_from_file(str(script))
    flow.storage = Local(path=str(script), stored_as_script=True)
    flow.storage.add_flow(flow)
    run = submitted(flow, api)
    environment = {
        "DOCKER_HOST": fake.url,
        "PYTHONPATH": str(PROJECT),
        "PREFECT__CONTEXT__FLOW_RUN_ID": run.id,
        "PREFECT__ENGINE__FLOW_RUNNER__DEFAULT_CLASS": "prefect.engine.cloud.CloudFlowRunner",
        "PREFECT__CLOUD__HEARTBEAT_MODE": "thread",
    }
    command = [sys.executable, "-m", "prefect", "execute", "flow-run"]
    with subprocess.Popen(command, env={**os.environ, **api.env, **environment}) as started:
        try:
            yield run, started
            started.wait(60)
        finally:
            started.kill()


def assert_ended_by_sigterm(run: FlowRun) -> None:
    assert (run.state, run.message) == ("Failed", states.SIGTERM_CAUSE), str(run)
    assert set(run.task_states.values()) <= {"Success", "Failed", "Mapped"}, str(run)


@pytest.mark.parametrize("executor", ["", THREADS, PROCESSES], ids=["local", "threads", "processes"])
@pytest.mark.parametrize("task_name", ["PullImage", "WaitOnContainer"])
def test_sigterm_during_a_task(script: Path, api: PrefectAPI, fake: FakeDocker, executor: str, task_name: str) -> None:
    waits = task_name == "WaitOnContainer"
    if waits:
        fake.exited.clear()
    else:
        fake.pull = [fake.closing.wait]
    with process(script, SIDECAR + executor, api, fake) as (run, started):
        asked = "POST /containers/wait" if waits else "POST /images/create"
        wait_for(lambda: fake.asked(asked), f"{task_name} runs", lambda: run)
        started.terminate()
        wait_for(lambda: run.state == "Failed", "it is Failed before Kubernetes sends SIGKILL", lambda: run, 30)
    assert_ended_by_sigterm(run)
    assert len(fake.asked("POST /containers/stop")) == waits


@pytest.mark.parametrize(
    "code",
    [
        "flow = flow_of(lambda: time.sleep(60))",
        "flow = flow_of(lambda: time.sleep(60), max_retries=3, retry_delay=__import__('datetime').timedelta(0))",
        "with flow_of(lambda: None) as flow: task(lambda _: time.sleep(60), name='mapped').map([1, 2])",
    ],
    ids=["plain", "retried", "mapped"],
)
def test_sigterm_during_a_task_in_python(script: Path, api: PrefectAPI, fake: FakeDocker, code: str) -> None:
    name = "mapped-1[0]" if "mapped" in code else "run-1"
    with process(script, code, api, fake) as (run, started):
        wait_for(lambda: run.task_states.get(name) == "Running", "the task runs", lambda: run)
        started.terminate()
    assert_ended_by_sigterm(run)


def test_sigterm_before_the_first_task(script: Path, api: PrefectAPI, fake: FakeDocker) -> None:
    with process(script, "flow = flow_of(lambda: None, sigterm_at('Running'))", api, fake) as (run, _):
        pass
    assert_ended_by_sigterm(run)


def test_sigterm_when_all_is_done_changes_nothing(script: Path, api: PrefectAPI, fake: FakeDocker) -> None:
    with process(script, "flow = flow_of(lambda: None, sigterm_at('Success'))", api, fake) as (run, started):
        pass
    assert (run.state, started.returncode) == ("Success", 0), str(run)


def test_sigterm_to_a_run_that_is_being_cancelled(script: Path, api: PrefectAPI, fake: FakeDocker) -> None:
    """Prefect looks every 15 s whether a run is cancelled."""
    with process(script, "flow = flow_of(lambda: time.sleep(60))", api, fake) as (run, started):
        wait_for(lambda: run.task_states["run-1"] == "Running", "the task runs", lambda: run)
        api.cancel(run.id)
        started.terminate()
    assert (run.state, run.task_states["run-1"]) == ("Cancelled", "Cancelled"), str(run)


def test_sigterm_to_a_process_that_a_task_has_forked(script: Path, api: PrefectAPI, fake: FakeDocker) -> None:
    code = """
def child(up):
    up.set()
    time.sleep(60)

def run():
    fork = multiprocessing.get_context("fork")
    up = fork.Event()
    process = fork.Process(target=child, args=[up])
    process.start()
    up.wait()
    process.terminate()
    process.join()
    assert process.exitcode == -signal.SIGTERM

flow = flow_of(run)
"""
    with process(script, code, api, fake) as (run, _):
        pass
    assert (run.state, run.task_states["run-1"]) == ("Success", "Success"), str(run)


def test_sigterm_to_a_run_on_this_machine(fake: FakeDocker) -> None:
    """The container is stopped, as after Ctrl-C."""
    fake.exited.clear()
    environment = {**os.environ, "DOCKER_HOST": fake.url}
    command = [sys.executable, "-c", SIDECAR + "flow.run()"]
    with subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True) as started:
        wait_for(lambda: fake.asked("POST /containers/wait"), "the container runs")
        started.terminate()
        _, error = started.communicate(timeout=60)
    assert "KeyboardInterrupt" in error
    assert fake.asked("POST /containers/stop")


def test_a_second_sigterm_to_a_process_of_a_pool(fake: FakeDocker) -> None:
    """A pool answers each one by SystemExit. What the container writes at its end is in the logs all the same."""
    code = f"""
from prefect.executors.dask import _multiprocessing_pool_initializer
from flows.tasks import WaitOnContainer
_multiprocessing_pool_initializer()
WaitOnContainer(container_id="{ID}", docker_server_url="{fake.url}").run()
"""
    fake.exited.clear()
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as started:
        fake.streams = [[frame(1, b"up\n"), fake.exited.wait, started.terminate, frame(1, b"saving\n")]]
        wait_for(lambda: fake.asked("POST /containers/wait"), "the container runs")
        started.terminate()
        output, _ = started.communicate(timeout=60)
    assert "saving" in output
    assert started.returncode == 0


@pytest.mark.parametrize("own", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None], ids=["default", "ignored", "own"])
def test_a_programs_own_handler_stays(own: Any) -> None:
    seen = []
    with Flow("own", state_handlers=[handle_pod_lifecycle]) as flow:
        task(lambda: seen.append(signal.getsignal(signal.SIGTERM)), name="look")()
    signal.signal(signal.SIGTERM, own)
    assert flow.run().is_successful()
    assert (seen == [own]) == (own != signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) == own


def test_a_run_in_a_thread() -> None:
    with Flow("own", state_handlers=[handle_pod_lifecycle]) as flow:
        task(lambda: None, name="run")()
    ended = []
    thread = threading.Thread(target=lambda: ended.append(flow.run()))
    thread.start()
    thread.join()
    assert ended[0].is_successful()
