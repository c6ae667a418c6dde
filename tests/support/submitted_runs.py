"""Flow runs on the cluster, from their submission to the end of their Jobs."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from flows.states import SIGTERM_CAUSE
from tests.support.namespaces import Namespace, RunningPod
from tests.support.prefect_api import FlowRun, PrefectAPI
from tests.support.waiting import wait_for

AGENT_LABELS = ["docker-sidecar"]
HEARTBEAT = 60  # seconds between two looks that the Agent takes at its Jobs
# A command that goes on until SIGTERM, and has something to save then.
FOREVER = ["sh", "-c", "trap 'echo saving; exit' TERM; echo up; sleep 600 & wait"]


@dataclass
class SubmittedRun:
    """A flow run, from its submission to the end of its Job. Waiting for too long is a failure."""

    namespace: Namespace
    record: FlowRun

    @property
    def selector(self) -> str:
        """What selects the Job and the pod of this run."""
        return f"prefect.io/flow_run_id={self.record.id}"

    def seen(self) -> str:
        return f"{self.record}\n{self.namespace.report()}"

    def wait(self, condition: Callable[[], Any], what: str, timeout: float) -> Any:
        return wait_for(condition, what, self.seen, timeout)

    def reaches(self, *states: str, timeout: float = 180) -> FlowRun:
        """Wait until the run is in one of these states."""
        what = f"the run is {' or '.join(states)}"
        self.wait(lambda: self.record.state in states, what, timeout)
        return self.record

    def succeeds(self, *logged: str, timeout: float = 180) -> None:
        """Wait until the run is a success, and has logged some texts."""
        record = self.reaches("Success", "Failed", timeout=timeout)
        assert record.state == "Success", self.seen()
        for text in logged:
            self.logged(text)

    def fails(self, timeout: float = 180) -> str:
        """Wait until the run has failed, and return its message."""
        record = self.reaches("Success", "Failed", "Cancelled", timeout=timeout)
        assert record.state == "Failed", self.seen()
        return str(record.message)

    def ends_by_sigterm(self) -> None:
        """Wait until the run has failed, with the cause, in the 30 s that Kubernetes gives."""
        assert self.fails(timeout=30) == SIGTERM_CAUSE, self.seen()
        self.wait(self._tasks_are_finished, "no task is unfinished", 30)

    def _tasks_are_finished(self) -> bool:
        return set(self.record.task_states.values()) <= {"Success", "Failed"}

    def saves(self) -> None:
        """Wait until the container, which is told to end, has saved what it had."""
        self.logged("saving", 30)

    def job_ends(self, timeout: float = 60) -> tuple[str, datetime]:
        """Wait until the Job has ended; how, and when that was seen."""
        ended = self.wait(
            lambda: self.namespace.job_ended(self.record.id), "its Job has ended", timeout
        )
        how, seen = ended
        return how, seen

    def logs(self) -> str:
        """What Prefect shows as the run's logs."""
        return "\n".join(str(log.message) for log in self.record.logs)

    def logged(self, text: str, timeout: float = 20) -> None:
        """Wait until a text is in the run's logs: they are sent every 5 s, and at the end."""
        self.wait(lambda: text in self.logs(), f"the run logs {text!r}", timeout)

    def pods(self) -> list[Any]:
        return self.namespace.pods(self.selector)

    def container_writes(self, text: str) -> RunningPod:
        """Wait until a line of the container is in the run's logs, and return the pod."""

        def written_or_failed() -> bool:
            return text in self.logs().splitlines() or self.record.state == "Failed"

        self.wait(written_or_failed, f"the run logs the line {text!r}", 180)
        assert text in self.logs().splitlines(), self.seen()
        return self.namespace.pod(self.selector)


# Submits a run of the flow on a job template; see the fixture `submit`.
Submit = Callable[..., SubmittedRun]


def start(
    api: PrefectAPI, namespace: Namespace, flow_id: str | None = None, **options: Any
) -> SubmittedRun:
    """Create a run, by default of the registered flow as it is."""
    registered = next(iter(api.flows))
    run_id = api.create_flow_run(flow_id or registered, **options)
    return SubmittedRun(namespace, api.flow_runs[run_id])
