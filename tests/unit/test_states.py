"""How runs end: causes, restarts, lost pods, SIGTERM. API and Docker daemon are stand-ins."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import prefect
import pytest
from prefect import Client, Flow, Parameter, Task, task
from prefect.engine.cloud import CloudFlowRunner
from prefect.engine.state import Failed, Running, State, Submitted, Success, TriggerFailed
from prefect.storage import Local
from prefect.tasks.core.function import FunctionTask
from prefect.triggers import manual_only
from prefect.utilities.configuration import set_temporary_config
from prefect.utilities.storage import extract_flow_from_file

from flows import states
from flows.settings import PROJECT
from flows.states import all_successful_or_first_failure, handle_pod_lifecycle
from tests.support.fake_docker import ID, FakeDocker, frame
from tests.support.prefect_api import APOLLO_ERROR, FlowRun, PrefectAPI
from tests.support.waiting import wait_for

ALL_REQUESTS = [
    "POST /images/create",
    "POST /containers/create",
    "POST /containers/start",
    "POST /containers/wait",
]

pytestmark = pytest.mark.filterwarnings("ignore:No result handler")


@pytest.fixture
def api() -> Iterator[PrefectAPI]:
    settings = {
        "check_cancellation_interval": 0.1,
        "heartbeat_mode": "off",
        "send_flow_run_logs": False,
    }
    with PrefectAPI() as api:
        cloud = {f"cloud.{name}": value for name, value in {"api": api.url, **settings}.items()}
        with set_temporary_config({"backend": "server", **cloud}):
            Client().create_project("demo")
            yield api
    assert api.errors == []


def submitted(flow: Flow, api: PrefectAPI, **parameters: Any) -> FlowRun:
    flow_id = Client().register(flow, project_name="demo", build=False, no_url=True)
    return api.flow_runs[api.create_flow_run(flow_id, parameters=parameters)]


def execute(flow: Flow, run: FlowRun, fake: FakeDocker) -> None:
    """Run a flow as the process in the pod does, on a daemon of its own."""
    docker_tasks: set[Any] = flow.tasks - flow.parameters()
    for each in docker_tasks:
        each.docker_server_url = fake.url
    with prefect.context(flow_run_id=run.id):
        CloudFlowRunner(flow=flow).run()


@pytest.mark.parametrize("reference", ["after", "mapped"])
def test_a_failed_child_of_a_mapped_task_fails_what_comes_after_it(reference: str) -> None:
    @task
    def mapped(number: int) -> None:
        if number:
            raise prefect.engine.signals.FAIL(f"number {number} failed")

    after = Task("after", trigger=all_successful_or_first_failure)
    with Flow("mapped", terminal_state_handler=states.fail_with_cause) as flow:
        children = mapped.map(Parameter("numbers"))
        after = after(upstream_tasks=[children])
    flow.set_reference_tasks([after if reference == "after" else children])
    assert type(flow.run(numbers=[0, 0]).result[after]) is Success
    state = flow.run(numbers=[0, 1, 0])
    assert (type(state), state.message) == (Failed, "number 1 failed")
    assert type(state.result[after]) is TriggerFailed


def test_a_restarted_run_runs_again_from_the_pull(
    flow: Flow,
    fake: FakeDocker,
    api: PrefectAPI,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody else is on the way to it, so nobody waits whether there is an earlier claim."""
    monkeypatch.delattr("flows.states._leave_to_an_earlier_claim")
    run = submitted(flow, api, image="app:1")
    fake.result = {"StatusCode": 3}
    execute(flow, run, fake)
    assert (run.state, run.task_states["PullImage-1"]) == ("Failed", "Success")
    assert "Exited with code 3" in run.message

    api.restart(run.id)
    assert run.task_states["PullImage-1"] == "Success"
    with FakeDocker() as second:
        execute(flow, run, second)
        assert [
            request for request, _ in second.requests if request in ALL_REQUESTS
        ] == ALL_REQUESTS
    assert run.state == "Success", str(run)
    assert set(run.task_states.values()) == {"Success"}
    assert caplog.text.count("The run was restarted") == 1


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
    assert [entry.state for entry in pull.states] == [
        "Pending",
        "Running",
        "Retrying",
        "Running",
        "Success",
    ]


@pytest.mark.parametrize(
    ("restarted", "request_number"),
    [(False, 1), (False, 2), (False, 3), (True, 2), (True, 3), (True, 8)],
)
def test_a_run_that_is_cancelled_while_it_starts_stays_cancelled(
    flow: Flow,
    fake: FakeDocker,
    api: PrefectAPI,
    monkeypatch: pytest.MonkeyPatch,
    restarted: bool,
    request_number: int,
) -> None:
    """The first request reads the run, and the next ones are the state handler's."""
    run = submitted(flow, api, image="app:1")
    if restarted:
        fake.result = {"StatusCode": 3}
        execute(flow, run, fake)
        api.restart(run.id)
        fake.requests.clear()
    answer = api.answer
    numbers = itertools.count(1)

    def cancel_before(*request: Any) -> Any:
        if next(numbers) == request_number:
            api.cancel(run.id)
        return answer(*request)

    monkeypatch.setattr(api, "answer", cancel_before)
    execute(flow, run, fake)
    assert run.state == "Cancelled", str(run)
    assert fake.requests == []


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
    api.lose_heartbeats(run.id)
    execute(flow, run, fake)
    assert (run.state, run.message) == ("Failed", states.LOST), str(run)
    assert fake.requests == []

    api.restart(run.id)  # and if it is asked for, it does
    execute(flow, run, fake)
    assert run.state == "Success", str(run)


def test_a_process_that_finds_the_run_running_leaves_it_alone(
    flow: Flow, fake: FakeDocker, api: PrefectAPI
) -> None:
    run = submitted(flow, api, image="app:1")
    Client().set_flow_run_state(run.id, Running("Running in another pod"))
    states_before = len(run.states)
    execute(flow, run, fake)
    assert len(run.states) == states_before, str(run)
    assert set(run.task_states.values()) == {"Pending"}
    assert fake.requests == []


@pytest.mark.parametrize("when", ["before", "after", "before, and stored late"])
def test_of_two_claims_the_first_one_has_the_run(
    flow: Flow, fake: FakeDocker, api: PrefectAPI, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Both processes have read that the run is free, and one of them is late."""
    monkeypatch.setattr("flows.states.CLAIM_SECONDS", 0.1)
    other = Running("Running in another pod")
    run = submitted(flow, api, image="app:1")
    api.set_state(run.id, Submitted())
    api.lose_heartbeats(run.id)
    number_claimed = len(run.states) + 1  # of states, with this process's claim
    answer = api.answer

    def with_another_claim(request: Any, agent_id: str | None) -> tuple[int, Any]:
        is_claiming = "set_flow_run_states" in request["query"] and run.state == "Scheduled"
        if is_claiming and when == "before":
            api.set_state(run.id, other)
        answered = answer(request, agent_id)
        if is_claiming and when == "after":
            api.set_state(run.id, other)
        is_first_look = "flow_run_by_pk" in request["query"] and len(run.states) == number_claimed
        if is_first_look and when == "before, and stored late":
            run.enter(other)
            late = run.states.pop()
            late.timestamp = run.states[-1].timestamp - timedelta(milliseconds=1)
            run.states.insert(-1, late)
        return answered

    monkeypatch.setattr(api, "answer", with_another_claim)
    execute(flow, run, fake)
    if when != "after":
        assert (run.state, run.message) == ("Running", other.message), str(run)
        assert fake.requests == []
    else:
        assert run.state == "Success", str(run)
        assert len(fake.asked("POST /containers/start")) == 1


def test_a_restarted_run_that_lazarus_reschedules_runs(
    flow: Flow, fake: FakeDocker, api: PrefectAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had waited for a node, so nothing has run since the restart."""
    monkeypatch.setattr("flows.states.CLAIM_SECONDS", 0.1)
    run = submitted(flow, api, image="app:1")
    fake.result = {"StatusCode": 3}
    execute(flow, run, fake)
    assert run.state == "Failed", str(run)
    api.restart(run.id)
    Client().set_flow_run_state(run.id, Submitted())
    api.lose_heartbeats(run.id)
    with FakeDocker() as second:
        execute(flow, run, second)
    assert run.state == "Success", str(run)


def test_a_run_whose_pod_was_lost_during_the_pull_runs_its_container(
    flow: Flow, fake: FakeDocker, api: PrefectAPI
) -> None:
    run = submitted(flow, api, image="app:1")
    Client().set_flow_run_state(run.id, Running())
    [pull] = [each for each in run.task_runs if each.task.slug == "PullImage-1"]
    Client().set_task_run_state(pull.id, Running())
    api.lose_heartbeats(run.id)
    execute(flow, run, fake)
    assert run.state == "Success", str(run)


def test_a_run_whose_pod_never_came_is_started_by_lazarus(
    flow: Flow, fake: FakeDocker, api: PrefectAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.states.CLAIM_SECONDS", 0.1)
    run = submitted(flow, api, image="app:1")
    Client().set_flow_run_state(run.id, Submitted())
    api.lose_heartbeats(run.id)
    execute(flow, run, fake)
    assert run.state == "Success", str(run)


@pytest.mark.parametrize("microsecond", [0, 123450])
def test_a_run_starts_whatever_digits_the_times_of_its_states_have(
    flow: Flow, fake: FakeDocker, api: PrefectAPI, microsecond: int
) -> None:
    """PostgreSQL drops zeros at the end, and Python 3.10 reads three or six digits only."""
    run = submitted(flow, api, image="app:1")
    [scheduled] = run.states
    scheduled.timestamp = scheduled.timestamp.replace(microsecond=microsecond)
    execute(flow, run, fake)
    assert run.state == "Success", str(run)


def test_a_run_that_is_paused_before_its_containers_goes_on_in_another_pod(
    fake: FakeDocker, api: PrefectAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Agent makes a second pod for the task that is resumed."""
    monkeypatch.setattr("flows.runs.CLAIM_SECONDS", 0.1)
    seen = []
    with Flow("paused", state_handlers=[handle_pod_lifecycle]) as flow:
        before = FunctionTask(lambda: seen.append("before"), name="before")()
        approval = Task("approval", trigger=manual_only)(upstream_tasks=[before])
        FunctionTask(lambda: seen.append("after"), name="after")(upstream_tasks=[approval])
    run = submitted(flow, api)
    execute(flow, run, fake)
    assert (run.state, run.task_states["approval-1"]) == ("Running", "Paused"), str(run)

    api.resume(run.id)
    [paused] = [each for each in run.task_runs if each.task.slug == "approval-1"]
    resumed = State.deserialize(paused.serialized_state)
    Client().set_task_run_state(paused.id, Submitted("Submitted for execution", state=resumed))
    execute(flow, run, fake)
    assert run.state == "Success", str(run)
    assert seen == ["before", "after"]


OWN = """
import multiprocessing, os, signal, threading, time
from datetime import timedelta
from prefect import Flow, task
from prefect.executors import LocalDaskExecutor
from flows.states import handle_pod_lifecycle, fail_with_cause

def sigterm_at(state):
    def handler(flow, old, new):
        if type(new).__name__ == state:
            os.kill(os.getpid(), signal.SIGTERM)
    return handler

def flow_of(run, *handlers, **options):
    handlers = [handle_pod_lifecycle, *handlers]
    with Flow("own", state_handlers=handlers, terminal_state_handler=fail_with_cause) as flow:
        task(run, name="run", **options)()
    return flow
"""
RUNNER = "prefect.engine.cloud.CloudFlowRunner"
Process = subprocess.Popen[bytes]
Start = Callable[[str], tuple[FlowRun, Process]]


@pytest.fixture
def start(api: PrefectAPI, fake: FakeDocker, tmp_path: Path) -> Iterator[Start]:
    """Start a run of a flow, in a process as an Agent does."""
    script = tmp_path / "flow.py"
    with ExitStack() as processes:

        def start(code: str) -> tuple[FlowRun, Process]:
            script.write_text(OWN + code)
            flow = extract_flow_from_file(str(script))
            flow.storage = Local(path=str(script), stored_as_script=True)
            flow.storage.add_flow(flow)
            run = submitted(flow, api)
            environment = {
                "DOCKER_HOST": fake.url,
                "PYTHONPATH": str(PROJECT),
                "PREFECT__CONTEXT__FLOW_RUN_ID": run.id,
                "PREFECT__ENGINE__FLOW_RUNNER__DEFAULT_CLASS": RUNNER,
                "PREFECT__CLOUD__HEARTBEAT_MODE": "thread",
            }
            command = [sys.executable, "-m", "prefect", "execute", "flow-run"]
            process = processes.enter_context(
                subprocess.Popen(command, env={**os.environ, **api.env, **environment})
            )
            processes.callback(process.kill)
            return run, process

        yield start


def assert_ended_by_sigterm(run: FlowRun, process: Process) -> None:
    process.wait(60)
    assert (run.state, run.message) == ("Failed", states.SIGTERM_CAUSE), str(run)
    assert set(run.task_states.values()) <= {"Success", "Failed", "Mapped"}, str(run)


@pytest.mark.parametrize("executor", ["threads", "processes"])
@pytest.mark.parametrize("task_name", ["PullImage", "WaitOnContainer"])
def test_sigterm_during_a_task(
    start: Start, fake: FakeDocker, executor: str, task_name: str
) -> None:
    """With Prefect's local executor: tests/kubernetes/test_cluster.py."""
    waits = task_name == "WaitOnContainer"
    if waits:
        fake.exited.clear()
    else:
        fake.pull = [fake.closing.wait]
    run, process = start(
        f"from flows.docker_sidecar import flow\nflow.executor = LocalDaskExecutor('{executor}')"
    )
    asked = "POST /containers/wait" if waits else "POST /images/create"
    wait_for(lambda: fake.asked(asked), f"{task_name} runs", lambda: run, 60)
    process.terminate()

    def is_reported() -> bool:
        return {run.state, *run.task_states.values()} <= {"Success", "Failed"}

    wait_for(is_reported, "all is reported before Kubernetes sends SIGKILL", lambda: run, 30)
    assert_ended_by_sigterm(run, process)
    assert len(fake.asked("POST /containers/stop")) == waits


@pytest.mark.parametrize(
    "code",
    [
        "flow = flow_of(lambda: time.sleep(60))",
        "flow = flow_of(lambda: time.sleep(60), max_retries=3, retry_delay=timedelta(0))",
        "with flow_of(lambda: None) as flow: "
        "task(lambda _: time.sleep(60), name='mapped').map([1, 2])",
    ],
    ids=["plain", "retried", "mapped"],
)
def test_sigterm_during_a_task_in_python(start: Start, code: str) -> None:
    run, process = start(code)
    name = "mapped-1[0]" if "mapped" in code else "run-1"
    wait_for(lambda: run.task_states.get(name) == "Running", "the task runs", lambda: run, 60)
    process.terminate()
    assert_ended_by_sigterm(run, process)


def test_sigterm_that_the_main_thread_sleeps_through(start: Start) -> None:
    """The kernel may hand it to another thread. The main thread waits for a lock meanwhile."""
    run, process = start("""
def run():
    other = lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    threading.Timer(0.5, other).start()
    threading.Event().wait(60)

flow = flow_of(run)
""")
    assert_ended_by_sigterm(run, process)


def test_sigterm_before_the_first_task(start: Start) -> None:
    assert_ended_by_sigterm(*start("flow = flow_of(lambda: None, sigterm_at('Running'))"))


def test_sigterm_to_a_run_that_is_being_cancelled(start: Start, api: PrefectAPI) -> None:
    """Prefect looks every 15 s whether a run is cancelled."""
    run, process = start("flow = flow_of(lambda: time.sleep(60))")
    wait_for(lambda: run.task_states["run-1"] == "Running", "the task runs", lambda: run, 60)
    api.cancel(run.id)
    process.terminate()
    process.wait(60)
    assert (run.state, run.task_states["run-1"]) == ("Cancelled", "Cancelled"), str(run)


def test_sigterm_that_does_not_end_the_run(start: Start) -> None:
    """To a process that a task has forked, and when all is done."""
    run, process = start("""
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

flow = flow_of(run, sigterm_at("Success"))
""")
    assert (process.wait(60), run.state, run.task_states["run-1"]) == (0, "Success", "Success"), (
        str(run)
    )


def test_the_last_lines_are_uploaded_again_if_the_api_answers_with_errors(
    start: Start, api: PrefectAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the exit of the process, where Prefect's LogManager tries once."""
    answer = api.answer
    run, process = start("flow = flow_of(lambda: None)")
    refused: list[Any] = []

    def refuse_two_uploads(request: Any, agent_id: str | None) -> tuple[int, Any]:
        is_upload = "write_run_logs" in request["query"]
        if is_upload and run.state == "Success" and len(refused) < 2:
            refused.append(request)
            return 200, {"data": None, "errors": [{"message": APOLLO_ERROR}]}
        return answer(request, agent_id)

    monkeypatch.setattr(api, "answer", refuse_two_uploads)
    assert process.wait(90) == 0, str(run)
    assert len(refused) == 2
    logged = [str(log.message) for log in run.logs]
    assert len([line for line in logged if "Flow run SUCCESS" in line]) == 1, str(run)


def test_a_second_sigterm_to_a_process_of_a_pool(fake: FakeDocker) -> None:
    """A pool answers each by SystemExit. What the container writes at its end is logged."""
    code = f"""
from prefect.executors.dask import _multiprocessing_pool_initializer
from flows.tasks import WaitOnContainer
_multiprocessing_pool_initializer()
WaitOnContainer(container_id="{ID}", docker_server_url="{fake.url}").run()
"""
    fake.exited.clear()
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        fake.streams = [
            [frame(1, b"up\n"), fake.exited.wait, process.terminate, frame(1, b"saving\n")]
        ]
        wait_for(lambda: fake.asked("POST /containers/wait"), "the container runs")
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert "saving" in output
    assert process.returncode == 0


@pytest.mark.parametrize(
    "own", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None], ids=["default", "ignored", "own"]
)
def test_a_programs_own_handler_stays(own: Any) -> None:
    seen = []
    with Flow("own", state_handlers=[handle_pod_lifecycle]) as flow:
        FunctionTask(lambda: seen.append(signal.getsignal(signal.SIGTERM)), name="look")()
    signal.signal(signal.SIGTERM, own)
    assert flow.run().is_successful()
    assert (seen == [own]) == (own != signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) == own

    with ThreadPoolExecutor() as pool:  # a thread may set no handler
        assert pool.submit(flow.run).result().is_successful()
