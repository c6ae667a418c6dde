"""This process and its flow run: who has the run, how the API is asked, and an early end.

Prefect Server lets any process write the states of a run, and a run may have two pods: its service
Lazarus reschedules a run whose pod waits for a node, and the Agent then makes a second Job.
"""

import atexit
import multiprocessing
import os
import signal
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import docker
import pendulum
import prefect
import psutil
from prefect.client.client import FlowRunInfoResult
from prefect.engine.cloud import flow_runner, task_runner
from prefect.engine.signals import ENDRUN, FAIL
from prefect.engine.state import (
    Cancelled,
    Cancelling,
    Failed,
    Pending,
    Queued,
    Running,
    Scheduled,
    State,
)
from prefect.exceptions import ClientError
from prefect.utilities import logging as prefect_logging

from flows.daemon import ERRORS, connect
from flows.messages import abbreviated

DEFAULT_DOCKER = "tcp://localhost:2375"  # the daemon of a pod, unless DOCKER_HOST names another
LABEL = "prefect.flow-run-id"  # the label of a container that names its flow run
SIGTERM_CAUSE = (
    "The flow's process got SIGTERM: pod deleted or evicted, node drained, "
    "or activeDeadlineSeconds passed"
)
API_PATIENCE_SECONDS = 60  # how long a request is repeated that the API answers with an error
LOOKS = 2  # so often a run has to be found gone, finished or another's before it is given up
DUE_SECONDS = 3  # an Agent makes a pod for a task that has been due for so long
CERTAIN_SECONDS = 300  # for so long nobody else gets a run that was taken: Lazarus waits 10 minutes
CLAIM_SECONDS = 10  # after so long a claim is in the history, under the time that it was written
DAEMON_PATIENCE_SECONDS = 5  # how long a daemon may take to name the run's containers
STOP_GRACE_SECONDS = 5  # between SIGTERM and SIGKILL for a container that is stopped
TASKS_GRACE_SECONDS = 6  # how long interrupted tasks have to stop their containers themselves
UPLOAD_SECONDS = 2  # how long the last lines may take after that
END_SECONDS = 16  # an early end is cut off then, within the 20 s that it may take under load

# How Prefect Server refuses a request. Any other error says that a part of the server is down.
_REFUSALS = (
    "400 Client Error",
    "State update failed",
    "State payload is too large",
    "Invalid ",
    "invalid input syntax",
    "unsupported Unicode escape sequence",
)
_RUNNING_IN = "Running in "  # the start of the message of each claim


def new_claim() -> Running:
    """A state by which a process takes a run: no other one has its message."""
    return Running(f"{_RUNNING_IN}{socket.gethostname()} ({uuid.uuid4()})")


def certain_until() -> float:
    """Until when nobody else gets a run that is taken now, by the monotonic clock."""
    return time.monotonic() + CERTAIN_SECONDS


def is_claim(state: State) -> bool:
    """Whether a process has taken a run by this state."""
    return state.is_running() and str(state.message).startswith(_RUNNING_IN)


def first_claim(history: list[State]) -> State | None:
    """The first claim since a run was scheduled or restarted for the last time."""
    first = None
    for state in history:
        if isinstance(state, Scheduled | Queued):
            first = None
        elif first is None and is_claim(state):
            first = state
    return first


def task_run_states(client: prefect.Client, run_id: str) -> dict[str, State]:
    """The states of a run's tasks by their ids, those of mapped ones too."""
    where = f'where: {{ flow_run_id: {{ _eq: "{run_id}" }} }}'
    query = f"query {{ task_run({where}) {{ id serialized_state }} }}"
    task_runs = client.graphql(query).data.task_run
    return {each.id: state_of(each.serialized_state) for each in task_runs}


def state_of(serialized: dict[str, Any] | None) -> State:
    """A state that the API has stored. A mapped task that has just been made has none yet."""
    if serialized is None:
        return Pending()
    return State.deserialize(serialized)


def _stop(client: docker.APIClient, container: dict[str, Any]) -> None:
    """Stop a container. One that has not been started is removed: its start may be on the way."""
    with suppress(*ERRORS):  # it may have ended
        if container["State"] == "created":
            client.remove_container(container["Id"], v=True, force=True)
        else:
            client.stop(container["Id"], timeout=STOP_GRACE_SECONDS)


@dataclass
class Run:
    """The run that this process has."""

    id: str
    docker_server_urls: set[str]
    in_pod: bool = True  # or elsewhere, with the API as its backend
    claim: State = field(default_factory=new_claim)
    certain_until: float = field(default_factory=certain_until)
    over: threading.Event = field(default_factory=threading.Event)
    is_taken: bool = False  # by this process, so that its containers are this process's
    is_given_up: bool = False  # it is gone, finished, or another process has taken it
    is_ending_early: bool = False
    early_end: State | None = None  # what the API is told if the run does not come to its end

    def is_ours(self, state: State) -> bool:
        """Whether nobody has ended the run, or taken it, by this state."""
        if is_claim(state):
            return state.message == self.claim.message
        return not state.is_finished()

    def stop_containers(self) -> None:
        """Stop those of its containers that run, and if the run ends early, that will run.

        A daemon that does not answer is passed over.
        """
        if not self.is_taken:
            return
        states = ["running", "paused", "restarting"]
        if self.is_ending_early:
            states.append("created")
        ours = {"label": f"{LABEL}={self.id}", "status": states}
        for url in self.docker_server_urls:
            with suppress(Exception):
                client = connect(url)
                client.timeout = DAEMON_PATIENCE_SECONDS
                found = client.containers(all=True, filters=ours)
                stops = [threading.Thread(target=_stop, args=[client, each]) for each in found]
                for stop in stops:
                    stop.start()
                for stop in stops:
                    stop.join()

    def report(self, end: State) -> None:
        """Write the end of the run and of its unfinished tasks, if the run is still ours."""
        client = RunClient()
        state = client.get_flow_run_state(self.id)
        if not self.is_ours(state):
            return
        if isinstance(state, Cancelling):
            end = Cancelled(state.message)
        client.set_flow_run_state(self.id, end)
        for task_run_id, task_state in task_run_states(client, self.id).items():
            if not task_state.is_finished():
                client.set_task_run_state(task_run_id, end)

    def start_report(self, end: State) -> threading.Thread:
        """Report in a thread. This process waits for it, as long as _end lets it."""
        thread = threading.Thread(target=self.report, args=[end])
        thread.start()
        return thread

    def end_early(self, end: State | None) -> None:
        """Let all that runs end, and this process too: its main thread may not heed an interrupt.

        In a pod the process has ended after END_SECONDS. If the run has not come to its end until
        then, the API is told of the end that is given.
        """
        if not self.is_ending_early:
            self.is_ending_early = True
            self.early_end = end
            threading.Thread(target=self._end, daemon=True).start()

    def at_exit(self) -> None:
        """Let the containers end with the process, and tell the API of an early end.

        An interrupt may come when Prefect's runner no longer expects one. Then it reports nothing.
        """
        self.stop_containers()
        if self.in_pod and self.early_end is not None:
            with suppress(Exception):  # an API that is down
                self.report(self.early_end)

    def _end(self) -> None:
        end = self.early_end
        hard_end = time.monotonic() + END_SECONDS
        self.over.wait(1)  # in a pod, tini sends SIGTERM to the processes of a pool as well
        for child in multiprocessing.active_children():  # of LocalDaskExecutor("processes")
            child.terminate()
        self.over.wait(TASKS_GRACE_SECONDS)
        threading.Thread(target=self._stop_until, args=[hard_end], daemon=True).start()
        if not self.in_pod:
            return
        time.sleep(max(0, hard_end - time.monotonic()))
        if end is not None and not self.over.is_set():
            self.start_report(end).join(1)
        # the last lines, which an exit of this kind would not upload
        upload = threading.Thread(target=prefect_logging.LOG_MANAGER.stop, daemon=True)
        upload.start()
        upload.join(UPLOAD_SECONDS)
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(1 if isinstance(end, Failed) else 0)

    def _stop_until(self, hard_end: float) -> None:
        """Stop containers until the run is over, and once more. DaskExecutor waits for them."""
        is_over = False
        while not is_over and time.monotonic() < hard_end:
            is_over = self.over.wait(1)
            self.stop_containers()


class RunClient(prefect.Client):
    """The client of Prefect's runners for runs, with what they need beyond Prefect's.

    A request is repeated for a minute if the API answers it with an error of its own: if GraphQL,
    Hasura or PostgreSQL is down, Apollo answers HTTP 200 with errors, and Prefect repeats only
    what fails with another status. A run is left alone if another process has it. And a run that
    has gone, or was ended or taken by others, is given up.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._runner_thread = threading.get_ident()
        self._last_info: FlowRunInfoResult | None = None
        self._strange_looks = 0

    def graphql(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the API; see Prefect's method."""
        deadline = time.monotonic() + API_PATIENCE_SECONDS
        while True:
            try:
                return super().graphql(*args, **kwargs)
            except ClientError as error:
                is_refusal = any(words in str(error) for words in _REFUSALS)
                if is_refusal or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def get_flow_run_info(self, flow_run_id: str) -> FlowRunInfoResult:
        """What a runner starts with, and what it looks at every 15 s, in a thread, for a cancel."""
        if threading.get_ident() == self._runner_thread:
            self._last_info = self._at_start(flow_run_id)
        else:
            self._last_info = self._look(flow_run_id)
        return self._last_info

    def _at_start(self, flow_run_id: str) -> FlowRunInfoResult:
        """Leave a run that is Running, unless the Agent made this pod for one of its tasks."""
        info = super().get_flow_run_info(flow_run_id)
        if not info.state.is_running():
            return info
        if not self._has_a_due_task(flow_run_id):
            prefect.context.logger.info("Another process runs this flow run; this one ends")
            raise ENDRUN(info.state)
        if not is_claim(info.state):
            return info
        return self._take_over(flow_run_id)

    def _take_over(self, flow_run_id: str) -> FlowRunInfoResult:
        """Take a run from a process that may still be there, late for its own retry.

        That process finds this one's claim before it starts a container. What it has started until
        then is in the states of the tasks when this one goes on.
        """
        urls = {os.environ.get("DOCKER_HOST") or DEFAULT_DOCKER}
        run = begin(flow_run_id, urls)
        self.set_flow_run_state(flow_run_id, run.claim)
        time.sleep(CLAIM_SECONDS)
        info = super().get_flow_run_info(flow_run_id)
        if not run.is_ours(info.state):
            raise ENDRUN(info.state)
        run.is_taken = True
        return info

    def _has_a_due_task(self, flow_run_id: str) -> bool:
        """Whether a retry, or a resume after a pause, is due."""
        latest = pendulum.now("utc") - timedelta(seconds=DUE_SECONDS)
        for state in task_run_states(self, flow_run_id).values():
            if state.is_submitted():
                return True
            if isinstance(state, Scheduled) and state.start_time and state.start_time <= latest:
                return True
        return False

    def _look(self, flow_run_id: str) -> FlowRunInfoResult:
        """Answer "Cancelling" for a run that is given up: Prefect then ends what runs.

        An error is never handed on: Prefect would ask again at once, for as long as it lasts.
        """
        assert self._last_info is not None
        try:
            info = super().get_flow_run_info(flow_run_id)
        except Exception as error:
            if "Flow run ID not found" not in str(error):
                return self._last_info
            info = self._last_info
            state: State = Failed("It was deleted")
        else:
            state = info.state
        run = _current
        if run is None:
            return info
        if isinstance(state, Cancelling):
            run.end_early(Cancelled(state.message))
            return info
        if run.is_ours(state):
            self._strange_looks = 0
            return info
        self._strange_looks += 1
        if self._strange_looks < LOOKS:
            return self._last_info
        prefect.context.logger.warning(f"This process gives the run up: {state.message}")
        run.is_given_up = True
        run.is_taken = run.is_taken and not state.is_running()
        run.end_early(None)
        return info._replace(state=Cancelling("The run is given up"))


# The runners make their clients by this name.
flow_runner.Client = task_runner.Client = RunClient  # type: ignore[attr-defined]
_current: Run | None = None  # a process has one run
_is_forking = False


def begin(run_id: str, docker_server_urls: set[str]) -> Run:
    """Begin with a run. SIGTERM ends it, and its containers end with this process."""
    global _current
    in_pod = bool(prefect.context.get("running_with_backend"))
    if _current is not None:
        atexit.unregister(_current.at_exit)
    _current = Run(run_id, docker_server_urls, in_pod)
    atexit.register(_current.at_exit)
    _repeat_uploads()
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # a program keeps a handler of its own
        _set_sigterm(_end_on_sigterm)
        _let_sigterm_wake_the_main_thread(_current)
    return _current


def _repeat_uploads() -> None:
    """Let the upload of the last lines be repeated: at the exit Prefect's LogManager tries once."""
    manager = prefect_logging.LOG_MANAGER
    if manager.client is not None:
        manager.client = RunClient()


def finish() -> Run | None:
    """The run has come to its end. In a pod the process has to report that before it ends."""
    if _current is not None:
        _current.over.set()
        if signal.getsignal(signal.SIGTERM) is _end_on_sigterm:
            _set_sigterm(signal.SIG_IGN if _current.in_pod else signal.SIG_DFL)
    return _current


def end_if_taken() -> None:
    """End this process without a word if another one has the run. Ask the API only if it may be.

    Lazarus takes a run from a process that has not reached the API for ten minutes.
    """
    run = _current
    if run is None or not run.in_pod or time.monotonic() < run.certain_until:
        return
    try:
        state = RunClient().get_flow_run_state(run.id)
    except Exception as error:
        cause = f"Prefect's API does not say which process has this run: {error}"
        raise FAIL(abbreviated(cause, 500)) from None
    if not run.is_ours(state):
        prefect.context.logger.warning("Another process has this run; this one ends")
        raise SystemExit


def expect_others() -> None:
    """Note that a task will be due again: an Agent may make another process for it."""
    if _current is not None:
        _current.certain_until = 0


def _set_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # no other one may
        signal.signal(signal.SIGTERM, handler)


def _end_on_sigterm(number: int, _: object) -> None:
    """Handle SIGTERM. Prefect's runners make no state of an interruption, so a thread does."""
    assert _current is not None
    signal.signal(number, signal.SIG_IGN if _current.in_pod else signal.SIG_DFL)  # one is enough
    cause = Failed(SIGTERM_CAUSE)
    if _current.in_pod:
        _current.start_report(cause)
    _current.end_early(cause)
    # Python ignores what is raised while a process forks, and logging's lock would stay locked.
    if not _is_forking:
        raise KeyboardInterrupt


def _let_sigterm_wake_the_main_thread(run: Run) -> None:
    """Have a thread look whether the main thread heeds a SIGTERM.

    Python runs a handler in the main thread, between two instructions. If the signal comes just
    before the main thread begins to wait for a lock, or if the kernel hands it to another thread,
    the main thread goes on waiting. But each signal also writes its number to a file at once.
    """
    if threading.current_thread() is not threading.main_thread():  # no other one may
        return
    before = signal.set_wakeup_fd(-1)
    if before != -1:  # an event loop has one
        signal.set_wakeup_fd(before)
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    wake = threading.Thread(target=_wake_main_thread, args=[run, receiver, sender], daemon=True)
    wake.start()


def _wake_main_thread(run: Run, receiver: socket.socket, sender: socket.socket) -> None:
    """Send SIGTERM to the main thread until it heeds it. The signals need ``sender`` open."""
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    while True:
        numbers = receiver.recv(64)
        time.sleep(1)
        is_ending = run.is_ending_early or run.over.is_set()
        is_ours = signal.getsignal(signal.SIGTERM) is _end_on_sigterm
        if signal.SIGTERM in numbers and is_ours and not is_ending:
            signal.pthread_kill(main_thread, signal.SIGTERM)


def _before_fork() -> None:
    global _is_forking
    _is_forking = True


def _after_fork() -> None:
    global _is_forking
    _is_forking = False


def _leave_all_to_the_parent() -> None:
    _after_fork()
    if _current is not None:
        _current.is_taken = False  # so that the end of the child stops no container
        _current.early_end = None
    if signal.getsignal(signal.SIGTERM) is _end_on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)


# A process that a task forks is ended by SIGTERM as usual.
os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork,
    after_in_child=_leave_all_to_the_parent,
)
