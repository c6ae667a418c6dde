"""How a run begins and ends, and its tasks: triggers and state handlers."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import prefect
from pendulum.parser import parse as parse_time
from prefect.core.parameter import Parameter
from prefect.engine import signals
from prefect.engine.state import (
    Cancelled,
    Cancelling,
    Failed,
    Mapped,
    Pending,
    Queued,
    Resume,
    Running,
    Scheduled,
    Skipped,
    State,
    TriggerFailed,
)
from prefect.tasks.docker import CreateContainer, PullImage

from flows import runs
from flows.messages import abbreviated
from flows.runs import CLAIM_SECONDS, Run, RunClient, first_claim, is_claim, state_of
from flows.runs import SIGTERM_CAUSE as SIGTERM_CAUSE

LOST = (
    "The run's pod was lost, and nobody knows what its container has done. "
    "Restart the run to run all tasks again"
)
_START_NO_CONTAINER = (Parameter, PullImage, CreateContainer)


def all_successful_or_first_failure(upstream_states: Mapping[Any, State]) -> bool:
    """Trigger: run if all upstream tasks succeeded; else fail with the first failure's message."""
    for upstream in upstream_states.values():
        states = upstream.map_states if isinstance(upstream, Mapped) else [upstream]
        for state in states:
            if not state.is_successful():
                raise signals.TRIGGERFAIL(state.message)
    return True


def fail_with_cause(flow: prefect.Flow, state: State, reference_states: set[State]) -> State | None:
    """Terminal state handler: the message of a failed run is its cause."""
    if not state.is_failed():
        return None
    causes = {str(reference.message) for reference in reference_states if reference.is_failed()}
    return Failed(abbreviated("; ".join(sorted(causes)), 1000), result=state.result)


def handle_pod_lifecycle(flow: prefect.Flow, old: State, new: State) -> State | None:
    """State handler of the flow, whose containers end with its process.

    A run has one process: all others leave it alone. SIGTERM stops the run's containers and makes
    it Failed. In a restarted run all tasks run again, also those that had succeeded. A run that
    Prefect Server's Lazarus reschedules is Failed if its lost pod may have started a container.
    """
    if new.is_finished():
        _end_run(old)
    if not new.is_running():
        return None
    urls = {task.docker_server_url for task in flow.tasks if hasattr(task, "docker_server_url")}
    run = runs.begin(prefect.context.flow_run_id, urls)
    if not run.in_pod:
        run.is_taken = True
        return None
    client = RunClient()
    history = _take_run(client, run)
    record = _read(client, run.id)
    if _is_lost(flow, history, record):
        return Failed(LOST)
    if _is_restarted(record):
        new = _restart(client, record, old)
        record = _read(client, run.id)
    else:
        new = run.claim
    return _cancelled(run, record.state) or new


def _leave(state: State, reason: str) -> signals.ENDRUN:
    """The signal for a process to have no part in a run. Prefect's runner then writes no state."""
    prefect.context.logger.info(f"This process does not run the flow: {reason}")
    return signals.ENDRUN(state)


def _end_run(old: State) -> None:
    """Note the end of the run. What was given up is not reported: it is another's, or gone."""
    run = runs.finish()
    if run is not None and run.is_given_up:
        raise _leave(old, "it was given up")


@dataclass
class _TaskRun:
    id: str
    slug: str
    state: State


@dataclass
class _Record:
    """What the API has of a run: its states, the oldest first, and those of its tasks."""

    state: State
    history: list[State]
    task_runs: list[_TaskRun]


def _read(client: RunClient, run_id: str) -> _Record:
    what = "states { timestamp serialized_state } task_runs { id serialized_state task { slug } }"
    query = f'query {{ flow_run_by_pk(id: "{run_id}") {{ serialized_state {what} }} }}'
    found = client.graphql(query).data.flow_run_by_pk
    if found is None:
        raise _leave(Pending(), "it was deleted")
    entries = sorted(found.states, key=lambda entry: parse_time(entry.timestamp))
    return _Record(
        state=state_of(found.serialized_state),
        history=[state_of(entry.serialized_state) for entry in entries],
        task_runs=[
            _TaskRun(each.id, each.task.slug, state_of(each.serialized_state))
            for each in found.task_runs
        ],
    )


def _take_run(client: RunClient, run: Run) -> list[State]:
    """Take a run for this process, or leave it to another one; return its states until then.

    If another process may be on its way, this one writes its claim, and the first claim in the
    history has the run. A claim that is written is in the history after CLAIM_SECONDS at the
    latest, so whoever finds its own claim first then is the only one.
    """
    record = _read(client, run.id)
    if record.state.is_running() or record.state.is_finished():
        raise _leave(record.state, f"it is {type(record.state).__name__}")
    if _processes_on_their_way(record.history) > 1:
        client.set_flow_run_state(run.id, run.claim)
        _leave_to_an_earlier_claim(client, run)
        time.sleep(CLAIM_SECONDS)
        _leave_to_an_earlier_claim(client, run)
    run.is_taken = True
    return record.history


def _leave_to_an_earlier_claim(client: RunClient, run: Run) -> None:
    """Leave a run that another process claimed before. The first claim stands again."""
    record = _read(client, run.id)
    first = first_claim(record.history)
    if first is None:
        raise _leave(record.state, f"it is {type(record.state).__name__}")
    if is_claim(record.state) and record.state.message != first.message:
        client.set_flow_run_state(run.id, Running(first.message))
    if first.message != run.claim.message:
        raise _leave(record.state, "another process has it")


def _processes_on_their_way(history: list[State]) -> int:
    """How many processes may be made for a run, and have not begun, this one among them.

    A process that has claimed a restarted run makes it Queued, and then begins once more.
    """
    number = 0
    was_claimed = False
    for state in history:
        if isinstance(state, Scheduled) or (isinstance(state, Queued) and was_claimed):
            number += 1
        elif number and (state.is_running() or state.message == LOST):
            number -= 1
        was_claimed = is_claim(state)
    return number


def _is_lost(flow: prefect.Flow, history: list[State], record: _Record) -> bool:
    """Whether a process that was lost, since a person started the run, may have run a container."""
    return _lazarus_came_after_a_process(history) and _may_have_started_a_container(flow, record)


def _lazarus_came_after_a_process(history: list[State]) -> bool:
    """Whether a process had the run when Lazarus rescheduled it, since a person started it."""
    had_a_process = False
    is_rescheduled = False
    for state in history:
        if isinstance(state, Scheduled):
            is_rescheduled = "Lazarus" in str(state.message)
            if not is_rescheduled:  # a person has started it
                had_a_process = False
        elif state.is_running():
            had_a_process = True
    return had_a_process and is_rescheduled


def _may_have_started_a_container(flow: prefect.Flow, record: _Record) -> bool:
    """Whether a task may have started a container, by what the tasks are and how far they came."""
    tasks = {slug: task for task, slug in flow.slugs.items()}
    for task_run in record.task_runs:
        if isinstance(tasks.get(task_run.slug), _START_NO_CONTAINER):
            continue
        if isinstance(task_run.state, TriggerFailed | Skipped):  # it has not run
            continue
        if task_run.state.is_running() or task_run.state.is_finished():
            return True
    return False


def _is_restarted(record: _Record) -> bool:
    """Whether tasks have run before. A resume after a pause is no restart."""
    states = [task_run.state for task_run in record.task_runs]
    if any(isinstance(getattr(state, "state", state), Resume) for state in states):
        return False
    return any(state.is_running() or state.is_finished() for state in states)


def _restart(client: RunClient, record: _Record, old: State) -> Queued:
    """Let all tasks run again: those that had succeeded have left nothing on the new daemon."""
    prefect.context.logger.info(
        "The run was restarted and has a new Docker daemon: all tasks run again"
    )
    for task_run in record.task_runs:
        client.set_task_run_state(task_run.id, Pending("The run was restarted"))
    return Queued("The run was restarted", state=old)  # Prefect reads the tasks' states again


def _cancelled(run: Run, state: State) -> State | None:
    """Leave a run that was cancelled, or taken, while this process was taking it."""
    if isinstance(state, Cancelling):
        return Cancelled(state.message)
    if not run.is_ours(state):
        raise _leave(state, f"it is {type(state).__name__}")
    return None
