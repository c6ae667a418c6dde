"""From `prefect register` to a finished Job, on a real cluster with a real Agent."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import docker
import pytest
import yaml

from flows.settings import load_job_template
from scripts import cluster
from tests.kubernetes.conftest import FOREVER, Namespace, Readme, Run, Submit, Template, daemon_of, edited
from tests.support.prefect_api import PrefectAPI

HEARTBEAT = 60  # seconds between two looks that the Agent takes at its Jobs
ASKS = """
trap 'echo saving; exit' TERM
echo from the container >/workspace/out
nslookup kubernetes.default.svc.cluster.local
echo up
until [ -e /workspace/in ]; do sleep 0.2; done
cat /workspace/in
sleep 600 & wait
"""
KILL_THE_FLOW = """
import os, signal
for process in filter(str.isdigit, os.listdir("/proc")):
    if open(f"/proc/{process}/comm").read() == "prefect\\n":
        os.kill(int(process), signal.SIGKILL)
"""


def with_argument(template: Template, argument: str) -> Template:
    """The job template with one more argument for dockerd."""
    daemon = daemon_of(template)
    if "args" in daemon:
        daemon["args"].append(argument)
        return template
    return edited(template, "--host=tcp://127.0.0.1:2375", f"--host=tcp://127.0.0.1:2375 {argument}")


def answers(namespace: Namespace, pod: str, container: str, address: str) -> str:
    """What a connection to port 2375 of an address meets, from a container that has Python."""
    script = f"import socket; socket.create_connection(('{address}', 2375), 5); print('open')"
    return namespace.execute(pod, container, "python", "-c", script).strip().splitlines()[-1]


# What all templates promise


def test_a_run_in_progress(
    submit: Submit,
    template: Template,
    template_name: str,
    namespace: Namespace,
    agent: str,
    engine: docker.DockerClient,
    readme: Readme,
    api: PrefectAPI,
) -> None:
    """One run is asked all that the functions below are named for, and is cancelled then."""
    is_sandbox = template_name == "gvisor_sidecar"
    limits = {"mem_limit": "64m", "memswap_limit": "64m", "cpu_quota": 50_000} if is_sandbox else {}
    run = submit(template, command=["sh", "-c", ASKS], host_config={"binds": ["/workspace:/workspace"], **limits})
    pod = run.container_writes("up")
    run.wait(lambda: run.record.heartbeats, "a heartbeat", 60)
    assert_the_flow_has_few_rights(namespace, pod, is_sandbox)
    assert_nobody_else_reaches_the_daemon(namespace, pod, template_name, agent, engine)
    assert_the_daemon_is_the_one_that_the_template_names(namespace, pod)
    run.logged("10.96.0.1")  # a Service by its name
    if is_sandbox:  # which has no such limits; Docker's words for that are in the run's logs
        run.logged("memory limit capabilities")
        run.logged("CPU period/quota discarded")
    kinds = [line.split()[1][:4] for line in readme("kubectl get jobs,pods").splitlines() if run.record.id in line]
    assert sorted(kinds) == ["job.", "pod/"], "what would be left over"
    assert_files_go_from_the_container_to_the_flow_and_back(namespace, pod, run)

    api.cancel(run.record.id)
    run.reaches("Cancelled", timeout=30)
    run.job_ends(30)
    run.logged("saving")


def assert_the_flow_has_few_rights(namespace: Namespace, pod: str, is_sandbox: bool) -> None:
    script = "cat /proc/1/status; grep ' / ' /proc/mounts; ls /var/run/secrets"
    said = namespace.execute(pod, "flow-container", "sh", "-c", script)
    for words in (
        "Uid:\t1000\t",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t0" if is_sandbox else "Seccomp:\t2",  # the sandbox has a filter of its own
    ):
        assert words in said, said
    assert re.search(r" / \w+ ro,", said), "a root that is read-only"
    assert "kubernetes.io" not in said, "no token of a service account"


def assert_nobody_else_reaches_the_daemon(
    namespace: Namespace, pod: str, template_name: str, agent: str, engine: docker.DockerClient
) -> None:
    address = namespace.core.read_namespaced_pod(pod, namespace.name).status.pod_ip
    own = answers(namespace, pod, "flow-container", "127.0.0.1")
    assert own == "open" if template_name == "docker_sidecar" else "refused" in own, "a socket, and no port"
    assert "refused" in answers(namespace, pod, "flow-container", address), "not even to the pod's own address"
    assert "refused" in answers(namespace, agent, "agent", address)
    status, output = engine.containers.get(cluster.NODE).exec_run(["bash", "-c", f"</dev/tcp/{address}/2375"])
    assert (status, b"refused" in output) == (1, True), output


def assert_the_daemon_is_the_one_that_the_template_names(namespace: Namespace, pod: str) -> None:
    ask = "docker version --format '{{.Server.APIVersion}}'; docker info --format '{{.DriverStatus}}'"
    version, store = namespace.execute(pod, "dind-daemon", "sh", "-c", ask).split(maxsplit=1)
    assert [int(part) for part in version.split(".")] >= [1, 50]
    assert "io.containerd.snapshotter" in store


def assert_files_go_from_the_container_to_the_flow_and_back(namespace: Namespace, pod: str, run: Run) -> None:
    assert namespace.execute(pod, "flow-container", "cat", "/workspace/out") == "from the container\n"
    namespace.execute(pod, "flow-container", "sh", "-c", "echo from the flow >/workspace/in")
    run.container_writes("from the flow")


def test_container_exits_3_and_the_run_is_restarted(
    submit: Submit, template: Template, template_name: str, api: PrefectAPI
) -> None:
    """Row 2: what the UI's button does. The new pod's daemon has no containers, so everything runs again."""
    run = submit(template, command=["sh", "-c", "echo ran in $HOSTNAME; exit 3"])
    assert "exited with code 3" in run.fails()
    assert run.job_ends()[0] == "Complete", "the flow did its work, so the Job did"
    run.logged("Flow run FAILED")
    assert run.logs().count("ran in ") == 1
    if template_name in ("docker_sidecar", "kept_layers"):  # an empty store, and one that the first run has used
        api.restart(run.record.id)
        run.wait(lambda: run.logs().count("ran in ") == 2, "the container has run again", 120)
        run.wait(lambda: "exited with code 3" in (run.record.message or ""), "it has failed again", 30)


@pytest.mark.timeout(700)
def test_flows_that_die(submit: Submit, templates: list[str], namespace: Namespace) -> None:
    """By SIGKILL, and out of memory; the Agent finds all of them at its next look."""
    starved = [submit(load_job_template(name), memory="48Mi", command="true") for name in templates[:1]]
    killed = [
        # in gVisor only the sum of the pod's limits holds, so the flow runs with as little
        submit(load_job_template(name), memory="48Mi" if name == "gvisor_sidecar" else None, command=FOREVER)
        for name in templates
    ]
    for run in killed:
        namespace.execute(run.container_writes("up"), "flow-container", "python", "-c", KILL_THE_FLOW)
    for run in (*starved, *killed):
        assert run.job_ends(180)[0] == "Failed"
        run.reaches("Failed", timeout=2 * HEARTBEAT)
    for run in killed:
        assert "Kubernetes Error" in run.record.message
    for run in starved:
        run.logged("Reason: OOMKilled")


@pytest.mark.timeout(700)
def test_daemons_that_cannot_start(submit: Submit, templates: list[str]) -> None:
    runs = {
        name: submit(with_argument(load_job_template(name), "--storage-driver=nonsense"), command="true")
        for name in templates
    }
    # refused before dockerd starts: the hook of kept_layers gives up, so that the flow starts and says what is wrong
    runs["refused"] = submit(with_argument(load_job_template("kept_layers"), "--mtu=many"), command="true")
    for run in runs.values():
        message = run.fails(timeout=120)
        assert "does not answer" in message or "did not answer" in message
        assert "dind-daemon" in message, "where dockerd's own words are"
        run.job_ends(60)
    # the Agent copies the messages of containers, not of init containers
    runs["docker_sidecar"].logged("nonsense", 2 * HEARTBEAT)


def test_daemon_killed_during_the_run(
    submit: Submit, template: Template, template_name: str, namespace: Namespace
) -> None:
    run = submit(template, command=FOREVER)
    pod = run.container_writes("up")
    namespace.execute(pod, "dind-daemon", "sh", "-c", "kill -9 $(pidof dockerd)")
    message = run.fails(timeout=60)
    assert "does not answer" in message or message.startswith("Container "), message
    # Kubernetes restarts a native sidecar, which then ends well
    assert run.job_ends()[0] == ("Failed" if template_name == "docker_sidecar" else "Complete")


@pytest.mark.timeout(700)
def test_containers_that_cannot_start(submit: Submit, small_image: str) -> None:
    """With docker_sidecar. No lock is taken without flock in the image; the Agent does not look at init containers."""
    runs = []
    for command in (["/no/such/program"], ["sh", "-euc", "no-such-flock 9"]):
        template = load_job_template("docker_sidecar")
        template["spec"]["template"]["spec"]["containers"][0]["command"] = command
        runs.append(submit(template, command="true"))
    no_image = edited(load_job_template("docker_sidecar"), daemon_of(template)["image"], f"{small_image}-not")
    last = submit(no_image, command="true")
    for run in runs:
        assert run.job_ends(150)[0] == "Failed"
        run.reaches("Failed", timeout=2 * HEARTBEAT)
    last.reaches("Failed", timeout=60 + 2 * HEARTBEAT)
    last.job_ends(2 * HEARTBEAT)


# What does not depend on the template


def test_the_pages(
    readme: Readme, flow_id: str, agent: str, api: PrefectAPI, namespace: Namespace, small_image: str
) -> None:
    """After what the fixtures have run of them, in the order of README.md."""
    said = readme("make preflight NAMESPACE=flows")
    assert "wrong" not in said, said
    said = readme("prefect run", {"alpine:3": small_image})
    assert "Flow run succeeded" in said
    run = Run(namespace, next(reversed(api.flow_runs.values())))
    assert run.record.state == "Success", run.seen()
    assert agent in readme("KUBECONFIG=.kube/config kubectl get pods")


def test_runs_of_all_templates_at_once(
    submit: Submit, api: PrefectAPI, flow_id: str, namespace: Namespace, templates: list[str]
) -> None:
    """And one of the flow as it was registered, with its defaults."""
    runs = {f"a run of {name}": submit(load_job_template(name), command=f"echo a run of {name}") for name in templates}
    runs["Beginning Flow run for 'empty'"] = Run(namespace, api.flow_runs[api.create_flow_run(flow_id)])
    for text, run in runs.items():
        run.succeeds(text, timeout=240)
        assert run.job_ends()[0] == "Complete"
        assert not [other for other in runs if other != text and other in run.logs()]
    for run in runs.values():
        run.wait(lambda run=run: not namespace.pods(run.record.id), "the Agent has deleted the Job", 2 * HEARTBEAT)
        run.wait(lambda run=run: namespace.jobs[run.record.id][-1][1] == "DELETED", "the Job is gone", 10)


@pytest.mark.timeout(500)
def test_the_published_template_is_found_out(
    submit: Submit, namespace: Namespace, agent: str, small_image: str
) -> None:
    template = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
    # the one addition: where its daemon finds images on a machine without Docker Hub
    registry = small_image.partition("/")[0]
    template["spec"]["template"]["spec"]["containers"][1]["args"] = [f"--insecure-registry={registry}"]
    run = submit(template, command="echo hello")
    run.succeeds(timeout=240)
    [pod] = namespace.pods(run.record.id)
    assert answers(namespace, agent, "agent", pod.status.pod_ip) == "open"
    with pytest.raises(AssertionError, match="its Job has ended"):
        run.job_ends(60)
    [pod] = namespace.pods(run.record.id)
    states = {status.name: status.state for status in pod.status.container_statuses}
    assert states["flow-container"].terminated
    assert states["dind-daemon"].running


@pytest.mark.timeout(600)
def test_a_hungry_container_takes_its_pod_not_the_node(submit: Submit, templates: list[str]) -> None:
    """Of kept_layers only the store is another than native_sidecar's."""
    runs = {}
    for name in set(templates) - {"kept_layers"}:
        template = load_job_template(name)
        daemon_of(template)["resources"]["limits"]["memory"] = "512Mi"
        runs[name] = submit(template, command=["sh", "-c", "echo up; x=eight888; while :; do x=$x$x; done"])
    for name, run in runs.items():
        message = run.fails(timeout=240)
        if name == "gvisor_sidecar":  # the sandbox is one process, so the flow ends too, and the Agent says so
            run.logged("Reason: OOMKilled")
        else:
            run.logged("up")
            # the container, or dockerd itself: they are out of memory together
            assert "exited with code 137" in message or "does not answer" in message, run.seen()
        run.job_ends()
    submit(command="echo the node is well").succeeds()


def test_container_out_of_its_own_memory(submit: Submit) -> None:
    eat = ["sh", "-c", "x=eight888; while :; do x=$x$x; done"]
    run = submit(command=eat, host_config={"mem_limit": "32m", "memswap_limit": "32m"})
    assert "exited with code 137, killed because it exceeded its memory limit (OOMKilled)" in run.fails()
    assert run.job_ends()[0] == "Complete"
