"""Pods that end before their run does: deleted, drained, out of time, out of disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import docker
import pytest

from flows.settings import load_job_template
from flows.states import SIGTERM_CAUSE
from scripts import cluster
from tests.conftest import PREFECT, container
from tests.kubernetes.conftest import FOREVER, Namespace, Run, Submit, Template, daemon_of
from tests.support.waiting import wait_for

KUBECTL = ["kubectl", "--kubeconfig=/etc/kubernetes/admin.conf"]


def assert_ended_by_sigterm(run: Run, saved: bool = True) -> None:
    """Failed within the 30 s that Kubernetes gives, with the cause; and the container had the time to save."""
    assert run.fails(timeout=30) == SIGTERM_CAUSE, run.seen()
    run.wait(lambda: set(run.record.task_states.values()) <= {"Success", "Failed"}, "no task is left unfinished", 30)
    if saved:
        run.logged("saving", 30)


def test_a_job_that_is_deleted(submit: Submit, template: Template, namespace: Namespace) -> None:
    run = submit(template, command=FOREVER)
    run.container_writes("up")
    run.delete_job()

    def ended() -> bool:
        statuses = [status for pod in namespace.pods(run.record.id) for status in pod.status.container_statuses]
        return not any(status.state.running for status in statuses)  # kubelet may call an ended one "waiting"

    run.wait(ended, "nothing of the pod runs any more", 20)
    # kubelet may miss that, and finds out when it looks at all its pods, once a minute
    run.wait(lambda: not namespace.pods(run.record.id), "the pod is gone", 120)
    assert_ended_by_sigterm(run)


# Kubernetes does the same with the pod of each template


def test_a_job_that_is_out_of_time(submit: Submit) -> None:
    template = load_job_template("native_sidecar")
    template["spec"]["activeDeadlineSeconds"] = 30
    run = submit(template, command=FOREVER)
    run.container_writes("up")
    run.reaches("Failed", "Success", "Cancelled", timeout=60)
    assert_ended_by_sigterm(run)


def test_a_node_that_is_drained(submit: Submit, on_node: Callable[..., str]) -> None:
    """By evictions. Only of this run's pod: other tests use the node."""
    run = submit(load_job_template("native_sidecar"), command=FOREVER)
    run.container_writes("up")
    selector = f"--pod-selector=prefect.io/flow_run_id={run.record.id}"
    try:
        on_node(*KUBECTL, "drain", cluster.NODE, selector, "--delete-emptydir-data", "--timeout=60s")
    finally:
        on_node(*KUBECTL, "uncordon", cluster.NODE)
    assert_ended_by_sigterm(run)


@pytest.fixture
def silent_registry(engine: docker.DockerClient) -> Iterator[str]:
    """The address of a registry that takes connections, and never answers."""
    listen = (
        "import socket, time; s = socket.create_server(('', 5000)); print('listening', flush=True); time.sleep(300)"
    )
    with container(engine, PREFECT, ["python", "-c", listen], network=cluster.NETWORK) as found:
        wait_for(lambda: b"listening" in found.logs(), "it listens", found.logs)
        yield found.attrs["NetworkSettings"]["Networks"][cluster.NETWORK]["IPAddress"] + ":5000"


def test_a_pod_that_is_deleted_during_the_pull(submit: Submit, namespace: Namespace, silent_registry: str) -> None:
    run = submit(load_job_template("native_sidecar"), image=f"{silent_registry}/none:1")
    pod = run.container_writes(f"Pulling {silent_registry}/none:1")
    namespace.core.delete_namespaced_pod(pod, namespace.name)
    assert_ended_by_sigterm(run, saved=False)


@pytest.mark.timeout(600)
def test_a_pod_that_is_evicted_for_its_disk(submit: Submit, namespace: Namespace) -> None:
    """kubelet looks at the disk once a minute, and gives an evicted pod no time to save."""
    template = load_job_template("native_sidecar")
    daemon_of(template)["resources"]["limits"]["ephemeral-storage"] = "1Gi"
    run = submit(template, command=["sh", "-c", "dd if=/dev/zero of=/full bs=1M count=1200; echo full; sleep 600"])
    run.fails(timeout=240)
    assert run.job_ends(120)[0] == "Failed"
    [pod] = namespace.pods(run.record.id)
    assert pod.status.reason == "Evicted", pod.status
