"""From `prefect register` to the end of a Job: what does not depend on the job template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
import yaml

from flows.settings import load_job_template
from scripts import cluster
from tests.conftest import PREFECT, container
from tests.kubernetes.conftest import FOREVER, HEARTBEAT, Namespace, Readme, Run, Submit, daemon_of, edited, kubectl
from tests.support.prefect_api import PrefectAPI
from tests.support.waiting import wait_for


def test_the_pages(readme: Readme, agent: Pod, api: PrefectAPI, namespace: Namespace, small_image: str) -> None:
    """After what the fixtures have run of them, in the order of README.md."""
    said = readme("make preflight NAMESPACE=flows")
    assert "wrong" not in said, said
    said = readme("prefect run", {"alpine:3": small_image})
    assert "Flow run succeeded" in said
    run = Run(namespace, next(reversed(api.flow_runs.values())))
    assert run.record.state == "Success", run.seen()
    assert agent.name in readme("KUBECONFIG=.kube/config kubectl get pods")


def test_runs_of_all_templates_at_once(
    submit: Submit, api: PrefectAPI, namespace: Namespace, templates: list[str]
) -> None:
    """And one of the flow as it was registered, with its defaults."""
    runs = {f"a run of {name}": submit(load_job_template(name), command=f"echo a run of {name}") for name in templates}
    runs["Beginning Flow run for 'empty'"] = start(api, namespace)
    for text, run in runs.items():
        run.succeeds(text, timeout=240)
        assert run.job_ends()[0] == "Complete"
        assert not [other for other in runs if other != text and other in run.logs()]
    for run in runs.values():
        run.wait(lambda run=run: not run.pods(), "the Agent has deleted the Job", 2 * HEARTBEAT)
        run.wait(lambda run=run: namespace.jobs[run.record.id][-1][1] == "DELETED", "the Job is gone", 10)


@pytest.mark.timeout(500)
def test_the_published_template_is_found_out(submit: Submit, agent: Pod, small_image: str) -> None:
    template = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
    # the one addition: where its daemon finds images on a machine without Docker Hub
    registry = small_image.partition("/")[0]
    template["spec"]["template"]["spec"]["containers"][1]["args"] = [f"--insecure-registry={registry}"]
    run = submit(template, command="echo hello")
    run.succeeds(timeout=240)
    [pod] = run.pods()
    assert agent.asks("agent", pod.status.pod_ip) == "open"
    with pytest.raises(AssertionError, match="its Job has ended"):
        run.job_ends(60)
    [pod] = run.pods()
    states = {status.name: status.state for status in pod.status.container_statuses}
    assert states["flow-container"].terminated
    assert states["dind-daemon"].running


def test_container_out_of_its_own_memory(submit: Submit) -> None:
    eat = ["sh", "-c", "x=eight888; while :; do x=$x$x; done"]
    run = submit(command=eat, host_config={"mem_limit": "32m", "memswap_limit": "32m"})
    assert "exited with code 137, killed because it exceeded its memory limit (OOMKilled)" in run.fails()
    assert run.job_ends()[0] == "Complete"


# Pods that end before their run does: Kubernetes does the same with the pod of each template


def test_a_job_that_is_out_of_time(submit: Submit) -> None:
    template = load_job_template("native_sidecar")
    template["spec"]["activeDeadlineSeconds"] = 30
    run = submit(template, command=FOREVER)
    run.container_writes("up")
    run.reaches("Failed", "Success", "Cancelled", timeout=60)
    run.ends_by_sigterm()


def test_a_node_that_is_drained(submit: Submit) -> None:
    """By evictions. Only of this run's pod: other tests use the node."""
    run = submit(load_job_template("native_sidecar"), command=FOREVER)
    run.container_writes("up")
    selector = f"--pod-selector={run.selector}"
    try:
        kubectl(f"drain {cluster.NODE} {selector} --delete-emptydir-data --timeout=60s")
    finally:
        kubectl(f"uncordon {cluster.NODE}")
    run.ends_by_sigterm()


@pytest.fixture
def silent_registry(engine: docker.DockerClient) -> Iterator[str]:
    """The address of a registry that takes connections, and never answers."""
    listen = (
        "import socket, time; s = socket.create_server(('', 5000)); print('listening', flush=True); time.sleep(300)"
    )
    with container(engine, PREFECT, ["python", "-c", listen], network=cluster.NETWORK) as found:
        wait_for(lambda: b"listening" in found.logs(), "it listens", found.logs)
        yield found.attrs["NetworkSettings"]["Networks"][cluster.NETWORK]["IPAddress"] + ":5000"


def test_a_pod_that_is_deleted_during_the_pull(submit: Submit, silent_registry: str) -> None:
    run = submit(load_job_template("native_sidecar"), image=f"{silent_registry}/none:1")
    pod = run.container_writes(f"Pulling {silent_registry}/none:1")
    kubectl(f"delete pod {pod.name} --wait=false")
    run.ends_by_sigterm(saves=False)


@pytest.mark.timeout(600)
def test_a_pod_that_is_evicted_for_its_disk(submit: Submit) -> None:
    """kubelet looks at the disk once a minute, and gives an evicted pod no time to save."""
    template = load_job_template("native_sidecar")
    daemon_of(template)["resources"]["limits"]["ephemeral-storage"] = "1Gi"
    run = submit(template, command=["sh", "-c", "dd if=/dev/zero of=/full bs=1M count=1200; echo full; sleep 600"])
    run.fails(timeout=240)
    assert run.job_ends(120)[0] == "Failed"
    [pod] = run.pods()
    assert pod.status.reason == "Evicted", pod.status
