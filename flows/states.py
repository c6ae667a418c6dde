"""How a run and its tasks end: triggers and state handlers, which tell the cause of a failure once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import prefect
from prefect.engine import signals
from prefect.engine.state import Failed, Pending, Queued, State


def all_successful_or_first_failure(upstream_states: Mapping[Any, State]) -> bool:
    """Trigger: run if all upstream tasks succeeded. Otherwise fail with the first failure's message."""
    for state in upstream_states.values():
        if not state.is_successful():
            raise signals.TRIGGERFAIL(state.message)
    return True


def fail_with_cause(flow: prefect.Flow, state: State, reference_states: set[State]) -> State | None:
    """Terminal state handler: a failed run's message is its cause, not "some reference tasks failed"."""
    causes = sorted({str(reference.message) for reference in reference_states if reference.is_failed()})
    return Failed("; ".join(causes), result=state.result) if state.is_failed() else None


def start_over_after_restart(flow: prefect.Flow, old: State, new: State) -> State | None:
    """State handler of the flow: a restarted run runs all of its tasks again.

    Prefect keeps tasks that had succeeded, but the image and the container went with the daemon of the first pod.
    The state Queued makes Prefect read the states of the tasks again, and go on in this process.
    """
    if not new.is_running() or not prefect.context.get("running_with_backend"):
        return None
    client = prefect.Client()
    runs = client.get_flow_run_info(prefect.context.flow_run_id).task_runs
    if not any(run.state.is_finished() for run in runs):
        return None
    prefect.context.logger.info("The run was restarted and has a new Docker daemon: all tasks run again")
    for run in runs:
        client.set_task_run_state(run.id, Pending("The run was restarted"))
    return Queued("The run was restarted", state=old)
