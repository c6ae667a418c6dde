"""From `prefect register` to a finished Job, on a real cluster with a real Agent."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from flows.settings import load_job_template
from flows.states import SIGTERM_CAUSE
from scripts import cluster
from tests.kubernetes.conftest import Namespace, Run, daemon_of
from tests.support.prefect_api import PrefectAPI
from tests.support.waiting import wait_for

Submit = Callable[..., Run]
Template = dict[str, Any]
FOREVER = ["sh", "-c", "echo up; while :; do sleep 0.1; done"]
KILL_THE_FLOW = """
import os, signal
for process in filter(str.isdigit, os.listdir("/proc")):
    if open(f"/proc/{process}/comm").read() == "prefect\\n":
        os.kill(int(process), signal.SIGKILL)
"""
HEARTBEAT = 60  # seconds between two looks that the Agent takes at its Jobs


def edited(template: Template, old: str, new: str) -> Template:
    """The job template with one change."""
    text = json.dumps(template)
    assert old in text
    return dict(json.loads(text.replace(old, new)))


def with_argument(template: Template, argument: str) -> Template:
    """The job template with one more argument for dockerd."""
    daemon = daemon_of(template)
    if "args" in daemon:
        daemon["args"].append(argument)
        return template
    return edited(template, "--host=tcp://127.0.0.1:2375", f"--host=tcp://127.0.0.1:2375 {argument}")


# What both templates promise


def test_container_exits_3(submit: Submit, template: Template) -> None:
    run = submit(template, command=["sh", "-c", "echo boom; exit 3"])
    record = run.reaches("Failed", "Success")
    assert record.state == "Failed"
    assert "exited with code 3" in record.message
    run.logged("boom")
    assert run.job_ends()[0] == "Complete", "the flow did its work, so the Job did"


def test_image_that_does_not_exist(submit: Submit, template: Template, small_image: str) -> None:
    run = submit(template, image=f"{small_image}-not", command="true")
    record = run.reaches("Failed", "Success")
    assert f"Pulling {small_image}-not: " in record.message
    assert "not found" in record.message
    run.job_ends()
    run.logged("Flow run FAILED")
    assert len([log for log in record.logs if "not found" in str(log.message)]) == 1, "one error"


def test_flow_that_dies(submit: Submit, template: Template, template_name: str, namespace: Namespace) -> None:
    """By SIGKILL, and out of memory; the Agent finds both at its next look."""
    starved = [submit(template, memory="48Mi", command="true")]
    if template_name == "gvisor_sidecar":  # where only the sum of the pod's limits holds
        assert starved.pop().reaches("Success", "Failed").state == "Success"
    killed = submit(template, command=FOREVER)
    namespace.execute(killed.container_writes("up"), "flow-container", "python", "-c", KILL_THE_FLOW)
    for run in (*starved, killed):
        assert run.job_ends(180)[0] == "Failed"
        run.reaches("Failed", timeout=2 * HEARTBEAT)
    assert "Kubernetes Error" in killed.record.message
    for run in starved:
        run.logged("Reason: OOMKilled")


def test_daemon_that_cannot_start(submit: Submit, template: Template, template_name: str) -> None:
    run = submit(with_argument(template, "--storage-driver=nonsense"), command="true")
    record = run.reaches("Failed", "Success", timeout=100)
    assert "does not answer" in record.message or "did not answer" in record.message
    assert "dind-daemon" in record.message, "where dockerd's own words are"
    run.job_ends(60)
    if template_name == "docker_sidecar":  # the Agent copies the messages of containers, not of init containers
        run.logged("nonsense", 2 * HEARTBEAT)


def test_daemon_killed_during_the_run(
    submit: Submit, template: Template, template_name: str, namespace: Namespace
) -> None:
    run = submit(template, command=FOREVER)
    pod = run.container_writes("up")
    namespace.execute(pod, "dind-daemon", "sh", "-c", "kill -9 $(pidof dockerd)")
    record = run.reaches("Failed", timeout=60)
    assert "does not answer" in record.message or record.message.startswith("Container "), record.message
    # Kubernetes restarts a native sidecar, which then ends well
    assert run.job_ends()[0] == ("Failed" if template_name == "docker_sidecar" else "Complete")


@pytest.mark.parametrize("command", [["/no/such/program"], ["sh", "-euc", "no-such-flock 9"]], ids=["start", "lock"])
def test_a_flow_that_cannot_start(submit: Submit, command: list[str]) -> None:
    """With docker_sidecar no lock is taken, as without flock in the image or on another architecture."""
    template = load_job_template("docker_sidecar")
    template["spec"]["template"]["spec"]["containers"][0]["command"] = command
    run = submit(template, command="true")
    assert run.job_ends(150)[0] == "Failed"
    run.reaches("Failed", timeout=2 * HEARTBEAT)


def test_container_out_of_its_own_memory(submit: Submit, template: Template, template_name: str) -> None:
    eat, limits = ["sh", "-c", "x=eight888; while :; do x=$x$x; done"], {"mem_limit": "32m", "memswap_limit": "32m"}
    if template_name == "gvisor_sidecar":  # which has no such limits; Docker's words for that are in the run's logs
        run = submit(template, command="true", host_config={**limits, "cpu_quota": 50_000})
        run.logged("memory limit capabilities", timeout=180)
        run.logged("CPU period/quota discarded")
        return
    run = submit(template, command=eat, host_config=limits)
    record = run.reaches("Failed", "Success")
    assert "exited with code 137, killed because it exceeded its memory limit (OOMKilled)" in record.message
    assert run.job_ends()[0] == "Complete"


def test_cancelled_from_the_api(submit: Submit, template: Template, api: PrefectAPI) -> None:
    run = submit(template, command=["sh", "-c", "trap 'echo saving; exit' TERM; echo up; while :; do sleep 0.1; done"])
    run.container_writes("up")
    api.cancel(run.record.id)
    run.reaches("Cancelled", timeout=30)
    run.job_ends(30)
    run.logged("saving")


def test_job_deleted_in_mid_run(submit: Submit, template: Template, namespace: Namespace) -> None:
    run = submit(template, command=FOREVER)
    run.container_writes("up")
    [*_, (_, _, job)] = namespace.jobs[run.record.id]
    namespace.batch.delete_namespaced_job(job.metadata.name, namespace.name, propagation_policy="Background")

    def ended() -> bool:
        statuses = [status for pod in namespace.pods(run.record.id) for status in pod.status.container_statuses]
        return not any(status.state.running for status in statuses)  # kubelet may call an ended one "waiting"

    run.wait(ended, "nothing of the pod runs any more", 20)
    # kubelet may miss that, and finds out when it looks at all its pods, once a minute
    run.wait(lambda: not namespace.pods(run.record.id), "the pod is gone", 120)
    assert run.reaches("Failed", timeout=5).message == SIGTERM_CAUSE


def answers(namespace: Namespace, pod: str, container: str, address: str) -> str:
    """What a connection to port 2375 of an address meets, from a container that has Python."""
    script = f"import socket; socket.create_connection(('{address}', 2375), 5); print('open')"
    return namespace.execute(pod, container, "python", "-c", script).strip().splitlines()[-1]


def test_nobody_else_reaches_the_daemon(
    submit: Submit,
    template: Template,
    template_name: str,
    namespace: Namespace,
    agent: str,
    engine: docker.DockerClient,
) -> None:
    run = submit(template, command=FOREVER)
    pod = run.container_writes("up")
    address = namespace.core.read_namespaced_pod(pod, namespace.name).status.pod_ip
    own = answers(namespace, pod, "flow-container", "127.0.0.1")
    assert own == "open" if template_name == "docker_sidecar" else "refused" in own, "a socket, and no port"
    assert "refused" in answers(namespace, pod, "flow-container", address), "not even to the pod's own address"
    assert "refused" in answers(namespace, agent, "agent", address)
    status, output = engine.containers.get(cluster.NODE).exec_run(["bash", "-c", f"</dev/tcp/{address}/2375"])
    assert (status, b"refused" in output) == (1, True), output


def test_the_flow_has_few_rights(submit: Submit, template: Template, template_name: str, namespace: Namespace) -> None:
    run = submit(template, command=FOREVER)
    pod = run.container_writes("up")
    script = "cat /proc/1/status; grep ' / ' /proc/mounts; ls /var/run/secrets"
    said = namespace.execute(pod, "flow-container", "sh", "-c", script)
    for words in (
        "Uid:\t1000\t",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t0" if template_name == "gvisor_sidecar" else "Seccomp:\t2",  # the sandbox has a filter of its own
    ):
        assert words in said, said
    assert re.search(r" / \w+ ro,", said), "a root that is read-only"
    assert "kubernetes.io" not in said, "no token of a service account"


def test_versions_and_cluster_dns(submit: Submit, template: Template, namespace: Namespace) -> None:
    """The sidecar is the Docker that the template names, and its containers find the cluster's Services by name."""
    find = "nslookup kubernetes.default.svc.cluster.local"
    run = submit(template, command=["sh", "-c", f"echo up; {find}; while :; do sleep 0.1; done"])
    pod = run.container_writes("up")
    ask = "docker version --format '{{.Server.APIVersion}}'; docker info --format '{{.DriverStatus}}'"
    version, store = namespace.execute(pod, "dind-daemon", "sh", "-c", ask).split(maxsplit=1)
    assert [int(part) for part in version.split(".")] >= [1, 50]
    assert "io.containerd.snapshotter" in store
    run.logged("10.96.0.1")


def test_a_failed_run_is_restarted(submit: Submit, template: Template, api: PrefectAPI) -> None:
    """Row 2: what the UI's button does. The new pod's daemon is empty, so everything runs again."""
    run = submit(template, command=["sh", "-c", "echo ran in $HOSTNAME; exit 3"])
    assert "exited with code 3" in run.reaches("Failed", "Success").message
    run.job_ends()
    run.logged("Flow run FAILED")
    api.restart(run.record.id)
    run.wait(lambda: run.logs().count("ran in ") == 2, "the container has run again", 120)
    run.wait(
        lambda: run.record.state == "Failed" and "exited with code 3" in run.record.message, "it has failed again", 30
    )


def test_an_agent_behind_a_proxy(submit: Submit, template: Template) -> None:
    """Row 1: the Agent's NO_PROXY takes the place of the template's."""
    [flow] = template["spec"]["template"]["spec"]["containers"][:1]
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "172.16.0.0/12"}
    flow["env"] += [{"name": name, "value": value} for name, value in proxy.items()]
    run = submit(template, command="echo not through the proxy")
    assert run.reaches("Success", "Failed").state == "Success", run.seen()


# What does not depend on the template


def test_the_pages(
    readme: Callable[..., str], flow_id: str, agent: str, api: PrefectAPI, namespace: Namespace, small_image: str
) -> None:
    """After what the fixtures have run of them, in the order of README.md."""
    said = readme("make preflight NAMESPACE=flows")
    assert "wrong" not in said, said
    said = readme("prefect run", {"alpine:3": small_image})
    assert "Flow run succeeded" in said
    run = Run(namespace, next(reversed(api.flow_runs.values())))
    assert run.record.state == "Success", run.seen()
    assert agent in readme("KUBECONFIG=.kube/config kubectl get pods")


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
    run.wait(lambda: not namespace.pods(record.id), "the Agent has deleted the Job and its pod", 2 * HEARTBEAT)
    run.wait(lambda: namespace.jobs[record.id][-1][1] == "DELETED", "the Job is gone", 10)


def test_invalid_parameter(submit: Submit) -> None:
    run = submit(command="true", time_limit="1h")
    assert "time_limit" in run.reaches("Failed", "Success").message
    assert run.job_ends()[0] == "Complete"


def test_daemon_image_that_cannot_be_pulled(submit: Submit, small_image: str) -> None:
    """By design not with native_sidecar: the Agent does not look at init containers, and the run stays Submitted."""
    template = load_job_template("docker_sidecar")
    run = submit(edited(template, daemon_of(template)["image"], f"{small_image}-not"), command="true")
    run.reaches("Failed", timeout=60 + 2 * HEARTBEAT)
    run.job_ends(2 * HEARTBEAT)


def test_five_runs_at_once(submit: Submit, namespace: Namespace) -> None:
    runs = [
        submit(load_job_template(["docker_sidecar", "native_sidecar"][number % 2]), command=f"echo run number {number}")
        for number in range(5)
    ]
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
