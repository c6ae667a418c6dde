"""From `prefect register` to a finished Job, on a real cluster with a real Agent."""

import re
import socket
from functools import partial
from pathlib import Path

import pytest
import yaml

from flows.settings import PROJECT, load_job_template
from scripts import cluster
from tests.support.kubectl import kubectl, on_node
from tests.support.namespaces import Namespace, RunningPod
from tests.support.pages import example
from tests.support.prefect_api import PrefectAPI
from tests.support.readme import readme
from tests.support.submitted_runs import (
    FOREVER,
    HEARTBEAT,
    Submit,
    SubmittedRun,
    start,
)
from tests.support.templates import daemon_of, edited

ASKS = """
trap 'echo saving; exit' TERM
echo from the container >/workspace/out
nslookup kubernetes.default.svc.cluster.local
echo up
until [ -e /workspace/in ]; do sleep 0.2; done
cat /workspace/in
sleep 600 & wait
"""
EAT = ["sh", "-c", "echo up; x=eight888; while :; do x=$x$x; done"]
# all that a container can ask its daemon for
GREEDY = {"privileged": True, "pid_mode": "host", "network_mode": "host", "binds": ["/:/host"]}
LOOK = """
echo "kernel $(cat /proc/sys/kernel/random/boot_id)"
echo "disks $(find /dev -type b | wc -l)"
echo "files $(find /host -xdev -name dockerd-entrypoint.sh -o -xdev -name kubelet)"
echo "processes $(cat /proc/[0-9]*/comm | grep -cx kubelet) $(cat /proc/[0-9]*/comm | grep -cx dockerd)"
echo up; sleep 600
"""
# of each process of a pod: its user namespace and its capabilities there
PROCESSES = """
for process in $(grep -l "pod$0" /proc/[0-9]*/cgroup | cut -d/ -f3); do
    echo $(readlink /proc/$process/ns/user && sed -n 's/^CapEff:.//p' /proc/$process/status)
done 2>/dev/null
"""


# What all templates promise


def test_a_run_in_progress(
    submit: Submit,
    template_name: str,
    agent: RunningPod,
    api: PrefectAPI,
) -> None:
    """One run is asked all that does not end it, and is cancelled then."""
    is_sandbox = template_name == "gvisor_sidecar"
    limits = {"mem_limit": "64m", "memswap_limit": "64m", "cpu_quota": 50_000} if is_sandbox else {}
    run = submit(
        template_name,
        command=["sh", "-c", ASKS],
        host_config={"binds": ["/workspace:/workspace"], **limits},
    )
    pod = run.container_writes("up")
    in_the_flow, in_the_daemon = (
        partial(pod.execute, name, "sh", "-c") for name in ("flow-container", "dind-daemon")
    )
    run.wait(lambda: run.record.heartbeats, "a heartbeat", 60)
    run.logged("10.96.0.1")  # a Service of the cluster by its name
    if is_sandbox:  # which has no such limits; Docker's words for that are in the run's logs
        run.logged("memory limit capabilities")
        run.logged("CPU period/quota discarded")

    # the flow has few rights
    said = in_the_flow("cat /proc/1/status; grep ' / ' /proc/mounts; ls /var/run/secrets")
    seccomp = "Seccomp:\t0" if is_sandbox else "Seccomp:\t2"  # the sandbox has a filter of its own
    for words in (
        "Uid:\t1000\t",
        f"CapEff:\t{'0' * 16}",
        f"CapBnd:\t{'0' * 16}",
        "NoNewPrivs:\t1",
        seccomp,
    ):
        assert words in said, said
    assert re.search(r" / \w+ ro,", said), "a root that is read-only"
    assert "kubernetes.io" not in said, "no token of a service account"

    # nobody else reaches the daemon
    own = pod.asks("flow-container", "127.0.0.1")
    assert own == "open" if template_name == "docker_sidecar" else "refused" in own, (
        "a socket, and no port"
    )
    assert "refused" in pod.asks("flow-container", pod.address), "not even to the pod's own address"
    assert "refused" in agent.asks("agent", pod.address)
    assert "refused" in on_node("bash", "-c", f"! echo 2>&1 >/dev/tcp/{pod.address}/2375")

    # the daemon is the one that the template names
    said = in_the_daemon(
        "docker version --format '{{.Server.APIVersion}}'; docker info --format '{{.DriverStatus}}'"
    )
    assert [int(part) for part in said.split()[0].split(".")] >= [1, 50]
    assert "io.containerd.snapshotter" in said

    # files go from the container to the flow and back
    assert in_the_flow("cat /workspace/out") == "from the container\n"
    in_the_flow("echo from the flow >/workspace/in")
    run.container_writes("from the flow")

    left = [
        line.split()[1][:4]
        for line in readme("kubectl get jobs,pods").splitlines()
        if run.record.id in line
    ]
    assert sorted(left) == ["job.", "pod/"], "what the command for left-overs finds"

    api.cancel(run.record.id)
    run.reaches("Cancelled", timeout=30)
    run.job_ends(30)
    run.logged("saving")


def test_container_exits_3_and_the_run_is_restarted(
    submit: Submit, template_name: str, api: PrefectAPI
) -> None:
    """What the UI's button does. The new pod's daemon has no containers, so everything runs again."""
    run = submit(template_name, command=["sh", "-c", "echo ran in $HOSTNAME; exit 3"])
    assert "exited with code 3" in run.fails()
    assert run.job_ends()[0] == "Complete", "the flow did its work, so the Job did"
    run.logged("Flow run FAILED")
    assert run.logs().count("ran in ") == 1
    if template_name in (
        "docker_sidecar",
        "kept_layers",
    ):  # an empty store, and one that the first run has used
        api.restart(run.record.id)
        run.wait(lambda: run.logs().count("ran in ") == 2, "the container has run again", 120)
        run.wait(
            lambda: "exited with code 3" in (run.record.message or ""), "it has failed again", 30
        )


@pytest.mark.timeout(700)
def test_flows_that_die(submit: Submit, templates: list[str]) -> None:
    """By SIGKILL, and out of memory; the Agent finds all of them at its next look."""
    starved = submit(memory="48Mi", command="true")
    # in gVisor only the sum of the pod's limits holds, so the flow runs with as little
    memory = {"gvisor_sidecar": "48Mi"}
    killed = [submit(name, memory.get(name), command=FOREVER) for name in templates]
    for run in killed:
        kill = "kill -9 $(grep -lx prefect /proc/[0-9]*/comm | cut -d/ -f3)"
        run.container_writes("up").execute("flow-container", "sh", "-c", kill)
    for run in (starved, *killed):
        assert run.job_ends(180)[0] == "Failed"
        run.reaches("Failed", timeout=2 * HEARTBEAT)
        assert run is starved or "Kubernetes Error" in run.record.message
    starved.logged("Reason: OOMKilled")


@pytest.mark.timeout(700)
def test_daemons_that_cannot_start(submit: Submit, templates: list[str]) -> None:
    broken = {
        name: edited(name, "--log-driver=local", "--storage-driver=nonsense") for name in templates
    }
    # refused before dockerd starts: the hook of kept_layers gives up, so that the flow starts and says what is wrong
    broken["refused"] = edited("kept_layers", "--log-driver=local", "--mtu=many")
    runs = {name: submit(template, command="true") for name, template in broken.items()}
    for run in runs.values():
        message = run.fails(timeout=120)
        assert "does not answer" in message or "did not answer" in message
        assert "dind-daemon" in message, "where dockerd's own words are"
        run.job_ends(60)
    # the Agent copies the messages of containers, not of init containers
    runs["docker_sidecar"].logged("nonsense", 2 * HEARTBEAT)


def test_daemon_killed_during_the_run(submit: Submit, template_name: str) -> None:
    run = submit(template_name, command=FOREVER)
    run.container_writes("up").execute("dind-daemon", "sh", "-c", "kill -9 $(pidof dockerd)")
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
    no_image = edited("docker_sidecar", daemon_of(template)["image"], f"{small_image}-not")
    last = submit(no_image, command="true")
    for run in runs:
        assert run.job_ends(150)[0] == "Failed"
        run.reaches("Failed", timeout=2 * HEARTBEAT)
    last.reaches("Failed", timeout=60 + 2 * HEARTBEAT)
    last.job_ends(2 * HEARTBEAT)


def test_a_job_that_is_deleted(submit: Submit, template_name: str) -> None:
    run = submit(template_name, command=FOREVER)
    run.container_writes("up")
    kubectl(f"delete jobs --selector {run.selector} --wait=false")

    def ended() -> bool:
        statuses = [status for pod in run.pods() for status in pod.status.container_statuses]
        return not any(
            status.state.running for status in statuses
        )  # kubelet may call an ended one "waiting"

    run.wait(ended, "nothing of the pod runs any more", 20)
    # kubelet may miss that, and finds out when it looks at all its pods, once a minute
    run.wait(lambda: not run.pods(), "the pod is gone", 120)
    run.ends_by_sigterm()
    run.saves()


@pytest.mark.timeout(600)
def test_hungry_containers_take_their_pod_not_the_node(
    submit: Submit, templates: list[str]
) -> None:
    """Of kept_layers only the store is another than native_sidecar's."""
    runs = {}
    for name in set(templates) - {"kept_layers"}:
        template = load_job_template(name)
        daemon_of(template)["resources"]["limits"]["memory"] = "512Mi"
        runs[name] = submit(template, command=EAT)
    for name, run in runs.items():
        message = run.fails(timeout=240)
        if (
            name == "gvisor_sidecar"
        ):  # the sandbox is one process, so the flow ends too, and the Agent says so
            run.logged("Reason: OOMKilled")
        else:
            run.logged("up")
            # the container, or dockerd itself: they are out of memory together
            assert "exited with code 137" in message or "does not answer" in message, run.seen()
        run.job_ends()
    # the node is well, and a container with a limit of its own dies alone
    run = submit(command=EAT, host_config={"mem_limit": "32m", "memswap_limit": "32m"})
    assert (
        "exited with code 137, killed because it exceeded its memory limit (OOMKilled)"
        in run.fails()
    )
    assert run.job_ends()[0] == "Complete"


# What single templates promise


def test_kept_layers(submit: Submit, store: str) -> None:
    """Two runs have a slot each, a third one a store of its own; after the first one's death its slot is used again."""
    template = edited("kept_layers", "/var/lib/docker-sidecar", store)
    command = daemon_of(template)["command"]
    command[2] = command[2].replace("0 1 2 3 4 5 6 7", "0 1")
    runs = [submit(template, command=FOREVER) for _ in range(2)]
    pods = [run.container_writes("up") for run in runs]
    ask = ["docker", "info", "--format", "{{.DockerRootDir}}"]
    roots = [pod.execute("dind-daemon", *ask).strip() for pod in pods]
    assert set(roots) == {"/store/0", "/store/1"}
    submit(template, command="true").succeeds("Downloaded newer image")

    pods[0].execute("dind-daemon", "docker", "volume", "create", "left")
    kubectl(f"delete pod {pods[0].name} --force --grace-period=0")
    runs[0].job_ends()
    again = submit(template, command=FOREVER)
    pod = again.container_writes("up")
    again.logged("Image is up to date")
    assert pod.execute("dind-daemon", *ask).strip() == roots[0]
    left = "docker ps --all --quiet | wc -l; docker volume ls --quiet | wc -l"
    assert pod.execute("dind-daemon", "sh", "-c", left).split() == ["1", "0"], (
        "only its own container"
    )


def test_configuration_ca_login_and_proxy(
    submit: Submit, private_image: str, template_name: str, store: str, tmp_path: Path
) -> None:
    """By the ConfigMap and the Secret of the pages. What is missing is said by the flow, so one template tells."""
    name, tells = Path(store).name, template_name == "native_sidecar"
    template = edited(
        template_name, "docker-sidecar", name
    )  # another run may have filled the store
    # the Agent's NO_PROXY takes the place of the template's
    proxy = {
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        "NO_PROXY": "172.16.0.0/12",
    }
    env = template["spec"]["template"]["spec"]["containers"][0]["env"]
    env += [{"name": key, "value": value} for key, value in proxy.items()]
    instead = {  # the kubectl of the tests is on the node
        "configmap docker-sidecar": f"configmap {name}",
        "docker-registry docker-sidecar": f"docker-registry {name}",
        '"registry-mirrors": ["https://mirror.example.com"],': "",
        "registry.example.com": private_image.partition("/")[0],
        "--from-file=daemon.json": """--from-literal=daemon.json='{"mtu": 1400}'""",
        "--from-file=company-ca.crt": f"--from-literal=company-ca.crt='{(tmp_path / 'company-ca.crt').read_text()}'",
    }
    run = {"template": template, "image": private_image, "command": "ip link show eth0"}
    if tells:
        readme("kubectl create configmap", instead)
        failed = submit(**run)
        assert "x509" in failed.fails()
        assert not [log for log in failed.record.logs if "retry 1" in str(log.message)]
        kubectl(f"delete configmap {name}")
    readme("kubectl --namespace flows create configmap docker-sidecar", instead)
    if tells:
        assert "Secret docker-sidecar" in submit(**run).fails()
    readme("kubectl create secret docker-registry", instead)
    # gVisor's MTU is without the header's 14
    submit(**run).succeeds("mtu 1386" if template_name == "gvisor_sidecar" else "mtu 1400")


@pytest.mark.parametrize("template_name", ["native_sidecar", "gvisor_sidecar"], indirect=True)
def test_a_container_that_asks_for_everything(submit: Submit, template_name: str) -> None:
    is_sandbox = template_name == "gvisor_sidecar"
    run = submit(template_name, command=["sh", "-c", LOOK], host_config=GREEDY)
    run.container_writes("up")
    [pod] = run.pods()
    privileged = [
        c.security_context.privileged for c in (*pod.spec.containers, *pod.spec.init_containers)
    ]
    assert any(privileged) is not is_sandbox

    logs = run.logs().splitlines()
    kernel = on_node("cat", "/proc/sys/kernel/random/boot_id")
    assert (f"kernel {kernel}" in logs) is not is_sandbox, "the node's"
    assert ("disks 0" in logs) is is_sandbox
    assert "files /host/usr/local/bin/dockerd-entrypoint.sh" in logs, (
        "the files are the daemon's, not the node's"
    )
    assert "processes 0 1" in logs, "so are the processes"

    node = on_node("readlink", "/proc/1/ns/user")
    processes = [
        line.split() for line in on_node("sh", "-c", PROCESSES, pod.metadata.uid).splitlines()
    ]
    assert processes
    rights = {tuple(process) for process in processes} - {
        (node, "0" * 16),
        (),
    }  # one may have ended meanwhile
    assert any(user_namespace == node for user_namespace, _ in rights) is not is_sandbox, processes


def test_the_node_is_configured_as_the_page_says() -> None:
    node = PROJECT / "scripts" / "airgap" / "node"
    assert (node / "runsc.toml").read_text() == example("gvisor-runsc")
    assert (node / "containerd.toml").read_text().endswith(example("gvisor-containerd"))
    assert yaml.safe_load(example("gvisor-runtime-class")) == cluster.GVISOR


# What does not depend on the template


def test_the_pages(
    agent: RunningPod, api: PrefectAPI, namespace: Namespace, small_image: str
) -> None:
    """After what the fixtures have run of them, in the order of README.md."""
    said = readme("make preflight NAMESPACE=flows")
    assert "wrong" not in said, said
    said = readme("prefect run", {"alpine:3": small_image})
    assert "Flow run succeeded" in said
    run = SubmittedRun(namespace, next(reversed(api.flow_runs.values())))
    assert run.record.state == "Success", run.seen()
    assert agent.name in readme("KUBECONFIG=.kube/config kubectl get pods")


def test_runs_of_all_templates_at_once(
    submit: Submit, api: PrefectAPI, namespace: Namespace, templates: list[str]
) -> None:
    """And one of the flow as it was registered, with its defaults."""
    runs = {f"a run of {name}": submit(name, command=f"echo a run of {name}") for name in templates}
    runs["Beginning Flow run for 'empty'"] = start(api, namespace)
    for text, run in runs.items():
        run.succeeds(text, timeout=240)
        assert run.job_ends()[0] == "Complete"
        assert not [other for other in runs if other != text and other in run.logs()]
    for run in runs.values():
        run.wait(lambda run=run: not run.pods(), "the Agent has deleted the Job", 2 * HEARTBEAT)
        run.wait(lambda run=run: namespace.job_deleted(run.record.id), "the Job is gone", 10)


# Pods that end before their run does: Kubernetes does the same with the pod of each template


def test_a_job_that_is_out_of_time(submit: Submit) -> None:
    template = load_job_template("native_sidecar")
    template["spec"]["activeDeadlineSeconds"] = 60
    run = submit(template, command=FOREVER)
    run.container_writes("up")
    run.reaches("Failed", "Success", "Cancelled", timeout=90)
    run.ends_by_sigterm()
    run.saves()


def test_a_node_that_is_drained(submit: Submit) -> None:
    """By evictions. Only of this run's pod: other tests use the node."""
    run = submit("native_sidecar", command=FOREVER)
    run.container_writes("up")
    selector = f"--pod-selector={run.selector}"
    try:
        kubectl(f"drain {cluster.NODE} {selector} --delete-emptydir-data --timeout=120s")
    finally:
        kubectl(f"uncordon {cluster.NODE}")
    run.ends_by_sigterm()
    run.saves()


def test_a_pod_that_is_deleted_during_the_pull(submit: Submit, api: PrefectAPI) -> None:
    """From a registry, in this process, that takes connections, and never answers."""
    host = api.server_address[0]
    with socket.create_server((host, 0)) as silent:
        image = f"{host}:{silent.getsockname()[1]}/none:1"
        run = submit("native_sidecar", image=image)
        pod = run.container_writes(f"Pulling {image}")
        kubectl(f"delete pod {pod.name} --wait=false")
        run.ends_by_sigterm()


@pytest.mark.timeout(600)
def test_a_pod_that_is_evicted_for_its_disk(submit: Submit) -> None:
    """kubelet looks at the disk once a minute, and gives an evicted pod no time to save."""
    template = load_job_template("native_sidecar")
    daemon_of(template)["resources"]["limits"]["ephemeral-storage"] = "1Gi"
    run = submit(
        template,
        command=["sh", "-c", "dd if=/dev/zero of=/full bs=1M count=1200; echo full; sleep 600"],
    )
    run.wait(
        lambda: [pod.status.reason for pod in run.pods()] == ["Evicted"], "the pod is evicted", 240
    )
    run.fails(timeout=120)
    assert run.job_ends(120)[0] == "Failed"
