"""Pods that end before their run does: deleted, evicted, out of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kubernetes.client
import pytest

from flows.states import SIGTERM_CAUSE
from tests.kubernetes.conftest import Namespace, Run

Submit = Callable[..., Run]
SAVES = ["sh", "-c", "trap 'echo saving; exit' TERM; echo listening; while :; do sleep 0.1; done"]


def delete(namespace: Namespace, pod: str) -> None:
    namespace.core.delete_namespaced_pod(pod, namespace.name)


def evict(namespace: Namespace, pod: str) -> None:
    metadata = kubernetes.client.V1ObjectMeta(name=pod, namespace=namespace.name)
    namespace.core.create_namespaced_pod_eviction(pod, namespace.name, kubernetes.client.V1Eviction(metadata=metadata))


def assert_ended_by_sigterm(run: Run) -> None:
    """Failed within the 30 s that Kubernetes gives, with the cause; and the container had the time to save."""
    record = run.reaches("Failed", "Success", "Cancelled", timeout=30)
    assert (record.state, record.message) == ("Failed", SIGTERM_CAUSE), run.seen()
    run.wait(lambda: set(record.task_states.values()) <= {"Success", "Failed"}, "no task is left unfinished", 30)
    run.logged("saving", 30)


@pytest.mark.parametrize("end", [delete, evict])
def test_a_pod_that_is_taken_away(
    submit: Submit, template: dict[str, Any], namespace: Namespace, end: Callable[[Namespace, str], None]
) -> None:
    run = submit(template, command=SAVES)
    end(namespace, run.container_writes("listening"))
    assert_ended_by_sigterm(run)


def test_a_job_that_is_out_of_time(submit: Submit, template: dict[str, Any]) -> None:
    template["spec"]["activeDeadlineSeconds"] = 20
    run = submit(template, command=SAVES)
    run.container_writes("listening")
    run.reaches("Failed", "Success", "Cancelled", timeout=60)
    assert_ended_by_sigterm(run)


def test_a_pod_that_is_deleted_during_the_pull(submit: Submit, template: dict[str, Any], namespace: Namespace) -> None:
    run = submit(template, image="192.0.2.1/none:1")  # an address that never answers
    delete(namespace, run.container_writes("Pulling 192.0.2.1/none:1"))
    record = run.reaches("Failed", "Success", "Cancelled", timeout=30)
    assert (record.state, record.message) == ("Failed", SIGTERM_CAUSE), run.seen()
