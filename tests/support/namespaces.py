"""A namespace of the tests' own, its pods, and what happens to its Jobs."""

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import kubernetes.client
import kubernetes.stream
import kubernetes.watch
import urllib3

from tests.support.shell import shell


@dataclass
class JobEvent:
    """What a watch has said of a Job, and when."""

    seen: datetime
    kind: str
    job: Any


@dataclass
class Namespace:
    """A namespace of the tests' own, and what happens in it."""

    api: kubernetes.client.ApiClient
    name: str
    jobs: dict[str, list[JobEvent]] = field(default_factory=dict)  # by the id of the flow run

    def __post_init__(self) -> None:
        self.core = kubernetes.client.CoreV1Api(self.api)
        self.batch = kubernetes.client.BatchV1Api(self.api)
        threading.Thread(target=self._watch_jobs, daemon=True).start()

    def _watch_jobs(self) -> None:
        """Note all events of Jobs, until the cluster is gone."""
        events = kubernetes.watch.Watch().stream(
            self.batch.list_namespaced_job, namespace=self.name
        )
        with suppress(urllib3.exceptions.HTTPError):
            for event in events:
                job = event["object"]
                labels = job.metadata.labels or {}
                seen = JobEvent(datetime.now(timezone.utc), event["type"], job)
                self.jobs.setdefault(labels.get("prefect.io/flow_run_id"), []).append(seen)

    def pods(self, selector: str) -> list[Any]:
        return list(self.core.list_namespaced_pod(self.name, label_selector=selector).items)

    def pod(self, selector: str) -> "RunningPod":
        """The one pod that the selector finds."""
        [found] = self.pods(selector)
        return RunningPod(self, found.metadata.name, found.status.pod_ip)

    def job_created(self, run_id: str) -> datetime:
        """When the Job of a run was first seen."""
        return self.jobs[run_id][0].seen

    def job_deleted(self, run_id: str) -> bool:
        return any(event.kind == "DELETED" for event in self.jobs.get(run_id, []))

    def job_ended(self, run_id: str) -> tuple[str, datetime] | None:
        """How a Job ended, Complete, Failed or DELETED, and when that was seen."""
        for event in self.jobs.get(run_id, []):
            if event.kind == "DELETED":
                return event.kind, event.seen
            for condition in event.job.status.conditions or []:
                has_ended = condition.type in ("Complete", "Failed")
                if has_ended and condition.status == "True":
                    return condition.type, event.seen
        return None

    def report(self) -> str:
        """Pods, events and the ends of logs, for a test that gives up."""
        return shell(f"""
            kubectl='kubectl --namespace {self.name}'
            $kubectl describe pods
            $kubectl events
            for pod in $($kubectl get pods --output name); do
                $kubectl logs $pod --all-containers --prefix --tail=15 || true
            done
        """)


@dataclass
class RunningPod:
    """A pod that runs."""

    namespace: Namespace
    name: str
    address: str

    def execute(self, container: str, *command: str) -> str:
        """Run a command in a container, and return what it writes."""
        said = kubernetes.stream.stream(
            self.namespace.core.connect_get_namespaced_pod_exec,
            self.name,
            self.namespace.name,
            container=container,
            command=[*command],
            stderr=True,
            stdout=True,
        )
        return str(said)

    def asks(self, container: str, address: str) -> str:
        """What a connection from a container, by Python, to port 2375 of an address meets."""
        script = f"import socket; socket.create_connection(('{address}', 2375), 5); print('open')"
        said = self.execute(container, "python", "-c", script)
        return said.strip().splitlines()[-1]
