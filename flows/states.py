"""How a run and its tasks end: triggers and state handlers, which tell the cause of a failure once."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

import prefect
from prefect.engine import signals
from prefect.engine.state import Cancelled, Cancelling, Failed, Mapped, Pending, Queued, State

from flows.daemon import abbreviated

SIGTERM_CAUSE = "The flow's process got SIGTERM: pod deleted or evicted, node drained, or activeDeadlineSeconds passed"
LOST = "The run's pod was lost, and nobody knows what its container has done. Restart the run to run all tasks again"


def all_successful_or_first_failure(upstream_states: Mapping[Any, State]) -> bool:
    """Trigger: run if all upstream tasks succeeded. Otherwise fail with the first failure's message."""
    for upstream in upstream_states.values():
        for state in upstream.map_states if isinstance(upstream, Mapped) else [upstream]:
            if not state.is_successful():
                raise signals.TRIGGERFAIL(state.message)
    return True


def fail_with_cause(flow: prefect.Flow, state: State, reference_states: set[State]) -> State | None:
    """Terminal state handler: a failed run's message is its cause, not "some reference tasks failed"."""
    causes = sorted(
        {str(reference.message) for reference in reference_states if reference.is_failed()}
    )
    return (
        Failed(abbreviated("; ".join(causes), 1000), result=state.result)
        if state.is_failed()
        else None
    )


def handle_pod_lifecycle(flow: prefect.Flow, old: State, new: State) -> State | None:
    """State handler of the flow, whose containers end with its pod.

    SIGTERM, which ends a pod, stops the container and makes the run Failed. In a restarted run all tasks run again,
    also those that had succeeded. A run that Prefect Server's Lazarus reschedules, because its pod was lost, is Failed.
    """
    in_pod, handler = prefect.context.get("running_with_backend"), signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        if (
            new.is_running() and handler == signal.SIG_DFL
        ):  # a program that has a handler of its own keeps it
            signal.signal(signal.SIGTERM, _end_run)
        elif (
            new.is_finished() and handler is _end_run
        ):  # in a pod the process has to report the state before it ends
            signal.signal(signal.SIGTERM, signal.SIG_IGN if in_pod else signal.SIG_DFL)
    if not in_pod or not new.is_running():
        return None
    client, run_id = prefect.Client(), prefect.context.flow_run_id
    tasks = _task_states(client, run_id)
    begun = any(state.is_finished() for state in tasks.values())
    if begun and "Lazarus" in (old.message or ""):
        new = Failed(LOST)
    elif begun:
        prefect.context.logger.info(
            "The run was restarted and has a new Docker daemon: all tasks run again"
        )
        for task_run_id in tasks:
            client.set_task_run_state(task_run_id, Pending("The run was restarted"))
        new = Queued(
            "The run was restarted", state=old
        )  # Prefect then reads the tasks' states again, and goes on
    current = client.get_flow_run_state(run_id)  # the run may have been cancelled meanwhile
    return current if current.is_finished() else new


def _task_states(
    client: prefect.Client, run_id: str
) -> dict[str, State]:  # get_flow_run_info leaves mapped ones out
    query = f'query {{ task_run(where: {{ flow_run_id: {{ _eq: "{run_id}" }} }}) {{ id serialized_state }} }}'
    return {
        run.id: State.deserialize(run.serialized_state)
        for run in client.graphql(query).data.task_run
    }


def _end_run(number: int, _: object) -> None:
    """Handle SIGTERM. Prefect's runners make no state of an interruption, so a thread does."""
    in_pod = prefect.context.get("running_with_backend")
    signal.signal(number, signal.SIG_IGN if in_pod else signal.SIG_DFL)  # one is enough
    if in_pod:
        threading.Thread(target=_report, args=[prefect.context.flow_run_id]).start()
    for child in multiprocessing.active_children():  # of LocalDaskExecutor("processes")
        threading.Timer(
            1, child.terminate
        ).start()  # later, because in a pod tini sends it SIGTERM as well
    raise KeyboardInterrupt


def _report(run_id: str) -> None:
    client = prefect.Client()
    state = client.get_flow_run_state(run_id)
    if not state.is_finished():
        end = Cancelled(state.message) if isinstance(state, Cancelling) else Failed(SIGTERM_CAUSE)
        client.set_flow_run_state(run_id, end)
        for task_run_id in [
            key for key, task in _task_states(client, run_id).items() if not task.is_finished()
        ]:
            client.set_task_run_state(task_run_id, end)


# A process that a task forks is ended by SIGTERM as usual.
os.register_at_fork(
    after_in_child=lambda: signal.getsignal(15) is _end_run and signal.signal(15, signal.SIG_DFL)
)
