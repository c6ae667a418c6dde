"""Pods that end before their run does: deleted, evicted, drained, out of time, out of disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import docker
import kubernetes.client
import pytest

from flows.settings import load_job_template
from flows.states import SIGTERM_CAUSE
from scripts import cluster
from tests.conftest import PREFECT, container
from tests.kubernetes.conftest import Namespace, Run, daemon_of
from tests.support.waiting import wait_for

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
    template["spec"]["activeDeadlineSeconds"] = 30
    run = submit(template, command=SAVES)
    run.container_writes("listening")
    run.reaches("Failed", "Success", "Cancelled", timeout=60)
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


def test_a_pod_that_is_deleted_during_the_pull(
    submit: Submit, template: dict[str, Any], namespace: Namespace, silent_registry: str
) -> None:
    run = submit(template, image=f"{silent_registry}/none:1")
    delete(namespace, run.container_writes(f"Pulling {silent_registry}/none:1"))
    record = run.reaches("Failed", "Success", "Cancelled", timeout=30)
    assert (record.state, record.message) == ("Failed", SIGTERM_CAUSE), run.seen()


def test_a_node_that_is_drained(submit: Submit, template: dict[str, Any], engine: docker.DockerClient) -> None:
    """Only of this run's pod: other tests use the node."""
    run = submit(template, command=SAVES)
    run.container_writes("listening")
    kubectl = ["kubectl", "--kubeconfig=/etc/kubernetes/admin.conf"]
    node = engine.containers.get(cluster.NODE)
    try:
        drain = [*kubectl, "drain", cluster.NODE, f"--pod-selector=prefect.io/flow_run_id={run.record.id}"]
        status, output = node.exec_run([*drain, "--delete-emptydir-data", "--timeout=60s"])
        assert status == 0, output.decode()
    finally:
        node.exec_run([*kubectl, "uncordon", cluster.NODE])
    assert_ended_by_sigterm(run)


def test_a_pod_that_is_evicted_for_its_disk(submit: Submit, namespace: Namespace) -> None:
    """kubelet looks at the disk once a minute, and gives an evicted pod no time to save."""
    template = load_job_template("native_sidecar")
    daemon_of(template)["resources"]["limits"]["ephemeral-storage"] = "1Gi"
    fill = "dd if=/dev/zero of=/full bs=1M count=1200; echo full; while :; do sleep 0.1; done"
    run = submit(template, command=["sh", "-c", fill])
    run.reaches("Failed", "Success", timeout=240)
    assert run.record.state == "Failed", run.seen()
    assert run.job_ends(120)[0] == "Failed"
    [pod] = namespace.pods(run.record.id)
    assert pod.status.reason == "Evicted", pod.status
