"""From `prefect register` to a finished Job, on a real cluster with a real Agent."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from flows.settings import load_job_template
from scripts import cluster
from tests.kubernetes.conftest import Namespace, Run
from tests.support.prefect_api import PrefectAPI
from tests.support.waiting import wait_for

Submit = Callable[..., Run]
FOREVER = ["sh", "-c", "echo up; while :; do sleep 0.1; done"]
KILL_THE_FLOW = """
import os, signal
for process in filter(str.isdigit, os.listdir("/proc")):
    if open(f"/proc/{process}/comm").read() == "prefect\\n":
        os.kill(int(process), signal.SIGKILL)
"""
HEARTBEAT = 60  # seconds between two looks that the Agent takes at its Jobs


def edited(old: str, new: str) -> dict[str, Any]:
    """The job template with one change."""
    template = json.dumps(load_job_template("docker_sidecar"))
    assert old in template
    return dict(json.loads(template.replace(old, new)))


def test_from_register_to_a_finished_job(
    prefect: Callable[..., str],
    flow_id: str,
    agent: str,
    api: PrefectAPI,
    namespace: Namespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    submitted = datetime.now(timezone.utc)
    prefect("run", "--id", flow_id)
    run = Run(namespace, next(reversed(api.flow_runs.values())))
    record = run.reaches("Success", "Failed")
    assert record.state == "Success", run.seen()
    run.logged("Beginning Flow run for 'empty'")
    ended, at = run.job_ends()
    assert ended == "Complete"
    times = {state.state: state.timestamp for state in record.states}
    figures = {
        "submitted → running": times["Running"] - submitted,
        "running → finished": times["Success"] - times["Running"],
        "finished → Job complete": at - times["Success"],
    }
    with capsys.disabled():
        print("\n" + ", ".join(f"{name}: {span.total_seconds():.1f} s" for name, span in figures.items()))
    assert figures["finished → Job complete"].total_seconds() < 15
    run.wait(lambda: not namespace.pods(record.id), "the Agent has deleted the Job and its pod", 2 * HEARTBEAT)
    run.wait(lambda: namespace.jobs[record.id][-1][1] == "DELETED", "the Job is gone", 10)


def test_the_readme(
    readme: Callable[..., str], flow_id: str, agent: str, api: PrefectAPI, namespace: Namespace, small_image: str
) -> None:
    """After what the fixtures have run of it, in the order of the page."""
    said = readme("make preflight NAMESPACE")
    assert "wrong" not in said, said
    readme("prefect run", {"alpine:3": small_image})
    run = Run(namespace, next(reversed(api.flow_runs.values())))
    assert run.reaches("Success", "Failed").state == "Success", run.seen()
    run.logged("hi")
    assert agent in readme("KUBECONFIG=.kube/config kubectl get pods")


def test_another_image_and_command_without_registering_again(
    prefect: Callable[..., str], flow_id: str, agent: str, api: PrefectAPI, namespace: Namespace, small_image: str
) -> None:
    parameters = {"image": small_image, "command": "sh -c 'echo hello from $WHO'", "environment": {"WHO": "a run"}}
    options = [f"--param={name}={json.dumps(value)}" for name, value in parameters.items()]
    prefect("run", "--id", flow_id, *options)
    run = Run(namespace, next(reversed(api.flow_runs.values())))
    assert run.reaches("Success", "Failed").state == "Success", run.seen()
    run.logged("hello from a run")


def test_container_exits_3(submit: Submit) -> None:
    run = submit(command=["sh", "-c", "echo boom; exit 3"])
    record = run.reaches("Failed", "Success")
    assert record.state == "Failed"
    assert "exited with code 3" in record.message
    run.logged("boom")
    assert run.job_ends()[0] == "Complete", "the flow did its work, so the Job did"


def test_faulty_parameter(submit: Submit) -> None:
    run = submit(command="true", time_limit="1h")
    assert run.reaches("Failed", "Success").message.startswith("time_limit is '1h'; give a number of seconds")
    assert run.job_ends()[0] == "Complete"


def test_image_that_does_not_exist(submit: Submit, small_image: str) -> None:
    run = submit(image=f"{small_image}-not", command="true")
    record = run.reaches("Failed", "Success")
    assert f"Pulling {small_image}-not: manifest for {small_image}-not not found" in record.message
    run.job_ends()
    run.logged("Flow run FAILED")
    assert len([log for log in record.logs if "manifest unknown" in str(log.message)]) == 1, "one error"


def test_flow_process_killed(submit: Submit, namespace: Namespace) -> None:
    run = submit(command=FOREVER)
    pod = run.container_writes("up")
    namespace.execute(pod, "flow-container", "python", "-c", KILL_THE_FLOW)
    assert run.job_ends()[0] == "Failed"
    record = run.reaches("Failed", timeout=2 * HEARTBEAT)
    assert "Kubernetes Error" in record.message


def test_flow_out_of_memory(submit: Submit) -> None:
    run = submit(memory="48Mi", command="true")
    assert run.job_ends(180)[0] == "Failed"
    run.reaches("Failed", timeout=2 * HEARTBEAT)
    run.logged("Reason: OOMKilled")


def test_daemon_that_cannot_start(submit: Submit) -> None:
    run = submit(edited("--host=tcp://127.0.0.1:2375", "--storage-driver=nonsense"), command="true")
    run.job_ends(60)
    run.reaches("Failed", timeout=2 * HEARTBEAT)
    run.logged("flow-container: the Docker daemon did not start, dind-daemon says why")
    run.logged("nonsense")  # the daemon's last words


def test_daemon_killed_during_the_run(submit: Submit, namespace: Namespace) -> None:
    run = submit(command=FOREVER)
    pod = run.container_writes("up")
    namespace.execute(pod, "dind-daemon", "sh", "-c", "kill -9 $(pidof dockerd)")
    record = run.reaches("Failed", timeout=30)
    assert "the Docker daemon at tcp://localhost:2375 does not answer" in record.message
    assert run.job_ends()[0] == "Failed"


def test_inner_container_out_of_memory(submit: Submit, namespace: Namespace) -> None:
    eat = "echo up; until [ -e /eat ]; do sleep 0.1; done; x=eight888; while :; do x=$x$x; done"
    run = submit(command=["sh", "-c", eat])
    pod = run.container_writes("up")
    limit = "c=$(docker ps -q); docker update --memory 32m --memory-swap 32m $c; docker exec $c touch /eat"
    namespace.execute(pod, "dind-daemon", "sh", "-c", limit)
    record = run.reaches("Failed", "Success")
    assert "exited with code 137, killed because it exceeded its memory limit (OOMKilled)" in record.message
    run.job_ends()


def test_cancelled_from_the_api(submit: Submit, api: PrefectAPI) -> None:
    run = submit(command=FOREVER)
    run.container_writes("up")
    api.cancel(run.record.id)
    run.reaches("Cancelled", timeout=30)
    run.job_ends(30)
    run.logged("stopping it (SIGTERM")


def test_job_deleted_in_mid_run(submit: Submit, namespace: Namespace) -> None:
    run = submit(command=FOREVER)
    run.container_writes("up")
    [*_, (_, _, job)] = namespace.jobs[run.record.id]
    namespace.batch.delete_namespaced_job(job.metadata.name, namespace.name, propagation_policy="Background")

    def ended() -> bool:
        statuses = [status for pod in namespace.pods(run.record.id) for status in pod.status.container_statuses]
        return not any(status.state.running for status in statuses)  # kubelet may call an ended one "waiting"

    run.wait(ended, "nothing of the pod runs any more", 15)
    # kubelet may miss that, and finds out when it looks at all its pods, once a minute
    run.wait(lambda: not namespace.pods(run.record.id), "the pod is gone", 120)
    assert "was stopped because the flow's process got SIGTERM" in run.reaches("Failed", timeout=5).message


def answers(namespace: Namespace, pod: str, container: str, address: str) -> str:
    """What a connection to port 2375 of an address meets, from a container that has Python."""
    script = f"import socket; socket.create_connection(('{address}', 2375), 5); print('open')"
    return namespace.execute(pod, container, "python", "-c", script).strip().splitlines()[-1]


def test_port_is_closed_to_all_but_the_flow(
    submit: Submit, namespace: Namespace, agent: str, engine: docker.DockerClient
) -> None:
    run = submit(command=FOREVER)
    pod = run.container_writes("up")
    address = namespace.core.read_namespaced_pod(pod, namespace.name).status.pod_ip
    assert answers(namespace, pod, "flow-container", "127.0.0.1") == "open"
    assert "refused" in answers(namespace, pod, "flow-container", address), "not even to the pod's own address"
    assert "refused" in answers(namespace, agent, "agent", address)
    node = engine.containers.get(cluster.NODE)
    status, output = node.exec_run(["bash", "-c", f"</dev/tcp/{address}/2375"])
    assert (status, b"refused" in output) == (1, True), output


def test_five_runs_at_once(submit: Submit, namespace: Namespace) -> None:
    runs = [submit(command=f"echo run number {number}") for number in range(5)]
    for number, run in enumerate(runs):
        assert run.reaches("Success", "Failed", timeout=240).state == "Success", run.seen()
        run.logged(f"run number {number}")
        assert run.job_ends()[0] == "Complete"
    for run in runs:
        run.wait(lambda run=run: not namespace.pods(run.record.id), "the pod is gone", 2 * HEARTBEAT)


def test_the_published_template_is_found_out(
    submit: Submit, namespace: Namespace, agent: str, small_image: str
) -> None:
    template = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
    # the one addition: where its daemon finds images on a machine without Docker Hub
    registry = small_image.partition("/")[0]
    template["spec"]["template"]["spec"]["containers"][1]["args"] = [f"--insecure-registry={registry}"]
    run = submit(template, command="echo hello")
    assert run.reaches("Success", "Failed", timeout=240).state == "Success", run.seen()
    [pod] = namespace.pods(run.record.id)
    assert answers(namespace, agent, "agent", pod.status.pod_ip) == "open"
    started = time.monotonic()
    wait_for(lambda: time.monotonic() - started > 60 or namespace.job_ended(run.record.id), "60 s", run.seen, 70)
    assert namespace.job_ended(run.record.id) is None, "its Job never ends"
    [pod] = namespace.pods(run.record.id)
    states = {status.name: status.state for status in pod.status.container_statuses}
    assert states["flow-container"].terminated
    assert states["dind-daemon"].running
