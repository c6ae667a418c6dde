"""From `prefect register` to a finished Job, on a real cluster with a real Agent."""

import re
import socket
from pathlib import Path
from typing import Any

import pytest

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
from tests.support.templates import NO_SUCH_DAEMON, daemon_of, edited

# A command that goes on until SIGTERM, and that a test can talk to.
TALKS = """
trap 'echo saving; exit' TERM
echo from the container >/workspace/out
nslookup kubernetes.default.svc.cluster.local
echo up
until [ -e /workspace/in ]; do sleep 0.2; done
cat /workspace/in
sleep 600 & wait
"""
EAT_MEMORY = ["sh", "-c", "echo up; x=eight888; while :; do x=$x$x; done"]
KILL_THE_FLOW = "kill -9 $(grep -lx prefect /proc/[0-9]*/comm | cut -d/ -f3)"
# All that a container can ask its daemon for.
GREEDY = {"privileged": True, "pid_mode": "host", "network_mode": "host", "binds": ["/:/host"]}
LOOK_AROUND = """
echo "kernel $(cat /proc/sys/kernel/random/boot_id)"
echo "disks $(find /dev -type b | wc -l)"
echo "files $(find /host -xdev -name dockerd-entrypoint.sh -o -xdev -name kubelet)"
echo "kubelets $(cat /proc/[0-9]*/comm | grep -cx kubelet)"
echo "daemons $(cat /proc/[0-9]*/comm | grep -cx dockerd)"
echo up; sleep 600
"""
# Of each process of a pod: its user namespace, and its capabilities there.
RIGHTS = """
for process in $(grep -l "pod$0" /proc/[0-9]*/cgroup | cut -d/ -f3); do
    echo $(readlink /proc/$process/ns/user && sed -n 's/^CapEff:.//p' /proc/$process/status)
done 2>/dev/null
"""


def is_sandbox(template_name: str) -> bool:
    return template_name == "gvisor_sidecar"


# What all templates promise: a run in progress


class RunInProgress:
    """A run of a template, whose container goes on until the test has asked it all."""

    def __init__(self, run: SubmittedRun, template_name: str) -> None:
        self.run = run
        self.template_name = template_name
        self.pod = run.container_writes("up")

    def in_the_flow(self, script: str) -> str:
        return self.pod.execute("flow-container", "sh", "-c", script)

    def in_the_daemon(self, script: str) -> str:
        return self.pod.execute("dind-daemon", "sh", "-c", script)

    def sends_heartbeats(self) -> None:
        self.run.wait(lambda: self.run.record.heartbeats, "a heartbeat", 60)

    def finds_services_by_name(self) -> None:
        self.run.logged("10.96.0.1")

    def warns_of_limits_that_a_sandbox_lacks(self) -> None:
        if is_sandbox(self.template_name):
            self.run.logged("memory limit capabilities")
            self.run.logged("CPU period/quota discarded")

    def flow_has_few_rights(self) -> None:
        status = self.in_the_flow("cat /proc/1/status")
        assert "Uid:\t1000\t" in status
        assert f"CapEff:\t{'0' * 16}" in status
        assert f"CapBnd:\t{'0' * 16}" in status
        assert "NoNewPrivs:\t1" in status
        # A sandbox has a filter of its own.
        assert ("Seccomp:\t0" if is_sandbox(self.template_name) else "Seccomp:\t2") in status

    def flow_has_a_read_only_root(self) -> None:
        mounts = self.in_the_flow("grep ' / ' /proc/mounts")
        assert re.search(r" / \w+ ro,", mounts), mounts

    def flow_has_no_token(self) -> None:
        assert "kubernetes.io" not in self.in_the_flow("ls /var/run/secrets")

    def daemon_has_no_port_but_the_recipes(self) -> None:
        own = self.pod.asks("flow-container", "127.0.0.1")
        if self.template_name == "docker_sidecar":
            assert own == "open"
        else:
            assert "refused" in own

    def nobody_else_reaches_the_daemon(self, agent: RunningPod) -> None:
        assert "refused" in self.pod.asks("flow-container", self.pod.address)
        assert "refused" in agent.asks("agent", self.pod.address)
        from_the_node = f"! echo 2>&1 >/dev/tcp/{self.pod.address}/2375"
        assert "refused" in on_node("bash", "-c", from_the_node)

    def daemon_is_the_one_that_the_template_names(self) -> None:
        version = self.in_the_daemon("docker version --format '{{.Server.APIVersion}}'")
        major, minor = version.strip().split(".")
        assert (int(major), int(minor)) >= (1, 50)
        store = self.in_the_daemon("docker info --format '{{.DriverStatus}}'")
        assert "io.containerd.snapshotter" in store

    def files_go_to_the_flow_and_back(self) -> None:
        assert self.in_the_flow("cat /workspace/out") == "from the container\n"
        self.in_the_flow("echo from the flow >/workspace/in")
        self.run.container_writes("from the flow")

    def is_found_by_the_command_for_leftovers(self) -> None:
        lines = readme("kubectl get jobs,pods").splitlines()
        kinds = [line.split()[1][:4] for line in lines if self.run.record.id in line]
        assert sorted(kinds) == ["job.", "pod/"]

    def can_be_cancelled(self, api: PrefectAPI) -> None:
        api.cancel(self.run.record.id)
        self.run.reaches("Cancelled", timeout=30)
        self.run.job_ends(30)
        self.run.saves()


def test_a_run_in_progress(
    submit: Submit, template_name: str, agent: RunningPod, api: PrefectAPI
) -> None:
    """One run is asked all that does not end it, and is cancelled then."""
    host_config: dict[str, Any] = {"binds": ["/workspace:/workspace"]}
    if is_sandbox(template_name):
        host_config |= {"mem_limit": "64m", "memswap_limit": "64m", "cpu_quota": 50_000}
    submitted = submit(template_name, command=["sh", "-c", TALKS], host_config=host_config)
    run = RunInProgress(submitted, template_name)
    run.sends_heartbeats()
    run.finds_services_by_name()
    run.warns_of_limits_that_a_sandbox_lacks()
    run.flow_has_few_rights()
    run.flow_has_a_read_only_root()
    run.flow_has_no_token()
    run.daemon_has_no_port_but_the_recipes()
    run.nobody_else_reaches_the_daemon(agent)
    run.daemon_is_the_one_that_the_template_names()
    run.files_go_to_the_flow_and_back()
    run.is_found_by_the_command_for_leftovers()
    run.can_be_cancelled(api)


# What all templates promise: the end of a run


def test_a_container_that_exits_3_fails_the_run_and_not_the_job(
    submit: Submit, template_name: str
) -> None:
    run = submit(template_name, command=["sh", "-c", "echo ran; exit 3"])
    assert "Exited with code 3" in run.fails()
    how, _ = run.job_ends()
    assert how == "Complete"
    run.logged("Flow run FAILED")


@pytest.mark.parametrize(
    "template_name",
    ["docker_sidecar", "kept_layers"],
    ids=["on an empty store", "on the store of the first run"],
    indirect=True,
)
def test_a_failed_run_that_is_restarted_runs_its_container_again(
    submit: Submit, template_name: str, api: PrefectAPI
) -> None:
    """What the UI's button does. The new pod's daemon has no containers: all tasks run again."""
    run = submit(template_name, command=["sh", "-c", "echo ran in $HOSTNAME; exit 3"])
    run.fails()
    run.job_ends()
    run.logged("Flow run FAILED")
    assert run.logs().count("ran in ") == 1
    api.restart(run.record.id)
    run.wait(lambda: run.logs().count("ran in ") == 2, "the container has run again", 120)
    run.wait(lambda: "Exited with code 3" in str(run.record.message), "it has failed again", 30)


@pytest.mark.timeout(700)
def test_flows_that_are_killed_are_found_by_the_agent(submit: Submit, templates: list[str]) -> None:
    runs = [submit(name, memory=memory_of_flow(name), command=FOREVER) for name in templates]
    for run in runs:
        run.container_writes("up").execute("flow-container", "sh", "-c", KILL_THE_FLOW)
    for run in runs:
        how, _ = run.job_ends(180)
        assert how == "Failed"
        run.reaches("Failed", timeout=2 * HEARTBEAT)
        assert "Kubernetes Error" in run.record.message


def memory_of_flow(template_name: str) -> str | None:
    """In gVisor only the sum of the pod's limits holds, so the flow runs with as little as this."""
    return "48Mi" if is_sandbox(template_name) else None


@pytest.mark.timeout(700)
def test_a_flow_that_is_out_of_memory_is_found_by_the_agent(submit: Submit) -> None:
    run = submit(memory="48Mi", command="true")
    how, _ = run.job_ends(180)
    assert how == "Failed"
    run.reaches("Failed", timeout=2 * HEARTBEAT)
    run.logged("Reason: OOMKilled")


@pytest.mark.timeout(700)
def test_a_daemon_that_cannot_start_is_the_cause(submit: Submit, templates: list[str]) -> None:
    runs = {}
    for name in templates:
        broken = edited(name, "--log-driver=local", "--storage-driver=nonsense")
        runs[name] = submit(broken, command="true")
    for run in runs.values():
        assert_daemon_is_the_cause(run)
    # The Agent copies the messages of containers, not of init containers.
    runs["docker_sidecar"].logged("nonsense", 2 * HEARTBEAT)


def test_a_configuration_that_dockerd_refuses_lets_the_flow_say_so(submit: Submit) -> None:
    """Also with kept_layers, whose daemon is started again on an empty store."""
    refused = edited("kept_layers", "--log-driver=local", "--mtu=many")
    assert_daemon_is_the_cause(submit(refused, command="true"))


def assert_daemon_is_the_cause(run: SubmittedRun) -> None:
    """The run has failed, and says where dockerd's own words are."""
    message = run.fails(timeout=120)
    assert "does not answer" in message or "did not answer" in message
    assert "dind-daemon" in message
    run.job_ends(60)


def test_a_daemon_that_is_killed_fails_the_run(submit: Submit, template_name: str) -> None:
    run = submit(template_name, command=FOREVER)
    run.container_writes("up").execute("dind-daemon", "sh", "-c", "kill -9 $(pidof dockerd)")
    message = run.fails(timeout=60)
    assert "does not answer" in message or message.startswith("Exited with code "), message
    how, _ = run.job_ends()
    if template_name == "docker_sidecar":
        assert how == "Failed"
    else:
        assert how == "Complete", "Kubernetes restarts a native sidecar, which then ends well"


def test_a_job_that_is_deleted_ends_its_run(submit: Submit, template_name: str) -> None:
    run = submit(template_name, command=FOREVER)
    run.container_writes("up")
    kubectl(f"delete jobs --selector {run.selector} --wait=false")
    run.wait(lambda: not any_container_runs(run), "nothing of the pod runs any more", 20)
    # kubelet may miss that, and finds out when it looks at all its pods, once a minute.
    run.wait(lambda: not run.pods(), "the pod is gone", 120)
    run.ends_by_sigterm()
    run.saves()


def any_container_runs(run: SubmittedRun) -> bool:
    """Whether a container of the run runs. kubelet may call one that has ended "waiting"."""
    statuses = [status for pod in run.pods() for status in pod.status.container_statuses]
    return any(status.state.running for status in statuses)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "template_name", ["docker_sidecar", "native_sidecar"], ids=str, indirect=True
)
def test_a_hungry_container_takes_its_pod_and_not_the_node(
    submit: Submit, template_name: str
) -> None:
    """The container is killed, or dockerd itself: they are out of memory together."""
    run = submit(with_little_memory(template_name), command=EAT_MEMORY)
    message = run.fails(timeout=240)
    run.logged("up")
    assert "Exited with code 137" in message or "does not answer" in message, run.seen()
    run.job_ends()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("template_name", ["gvisor_sidecar"], indirect=True)
def test_a_hungry_container_takes_its_sandbox_and_not_the_node(
    submit: Submit, template_name: str
) -> None:
    """The sandbox is one process, so the flow ends as well, and the Agent says so."""
    run = submit(with_little_memory(template_name), command=EAT_MEMORY)
    run.fails(timeout=240)
    run.logged("Reason: OOMKilled")
    run.job_ends()


def with_little_memory(template_name: str) -> dict[str, Any]:
    template = load_job_template(template_name)
    daemon_of(template)["resources"]["limits"]["memory"] = "512Mi"
    return template


def test_a_hungry_container_with_a_limit_of_its_own_dies_alone(submit: Submit) -> None:
    limits = {"mem_limit": "32m", "memswap_limit": "32m"}
    run = submit(command=EAT_MEMORY, host_config=limits)
    assert run.fails().startswith("Exited with code 137 (OOMKilled): container ")
    how, _ = run.job_ends()
    assert how == "Complete"


# What single templates promise


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    "command",
    [["/no/such/program"], ["sh", "-euc", "no-such-flock 9"]],
    ids=["no such program", "no flock in the image"],
)
def test_a_flow_that_cannot_start_is_found_by_the_agent(submit: Submit, command: list[str]) -> None:
    """With docker_sidecar, whose daemon gives up because nobody takes the lock."""
    template = load_job_template("docker_sidecar")
    template["spec"]["template"]["spec"]["containers"][0]["command"] = command
    run = submit(template, command="true")
    how, _ = run.job_ends(150)
    assert how == "Failed"
    run.reaches("Failed", timeout=2 * HEARTBEAT)


@pytest.mark.timeout(700)
def test_a_daemons_image_that_cannot_be_pulled_is_found_by_the_agent(submit: Submit) -> None:
    """With docker_sidecar: the Agent does not look at init containers."""
    image = daemon_of(load_job_template("docker_sidecar"))["image"]
    run = submit(edited("docker_sidecar", image, NO_SUCH_DAEMON), command="true")
    run.reaches("Failed", timeout=60 + 2 * HEARTBEAT)
    run.job_ends(2 * HEARTBEAT)


class Configured:
    """Runs of a private image, on a template with the ConfigMap and the Secret of the pages."""

    def __init__(self, submit: Submit, template_name: str, name: str, image: str, ca: str) -> None:
        self.submit = submit
        self.image = image
        self.name = name
        # Another run may have filled the store.
        self.template = edited(template_name, "docker-sidecar", name)
        self.instead = {  # the kubectl of the tests is on the node, where these files are not
            "configmap docker-sidecar": f"configmap {name}",
            "docker-registry docker-sidecar": f"docker-registry {name}",
            '"registry-mirrors": ["https://mirror.example.com"],': "",
            "registry.example.com": image.partition("/")[0],
            "--from-file=daemon.json": """--from-literal=daemon.json='{"mtu": 1400}'""",
            "--from-file=company-ca.crt": f"--from-literal=company-ca.crt='{ca}'",
        }

    def put_a_proxy_between(self) -> None:
        """Let the flow have the variables of an Agent, whose NO_PROXY replaces the template's."""
        proxy = {
            "HTTP_PROXY": "http://127.0.0.1:9",
            "http_proxy": "http://127.0.0.1:9",
            "NO_PROXY": "172.16.0.0/12",
        }
        flow = self.template["spec"]["template"]["spec"]["containers"][0]
        flow["env"] += [{"name": key, "value": value} for key, value in proxy.items()]

    def create_config_map_without_a_ca(self) -> None:
        readme("kubectl create configmap", self.instead)

    def create_config_map(self) -> None:
        readme("kubectl --namespace flows create configmap docker-sidecar", self.instead)

    def create_secret(self) -> None:
        readme("kubectl create secret docker-registry docker-sidecar", self.instead)

    def run(self) -> SubmittedRun:
        return self.submit(self.template, image=self.image, command="ip link show eth0")


@pytest.fixture
def configured(
    submit: Submit, private_image: str, template_name: str, store: str, tmp_path: Path
) -> Configured:
    ca = (tmp_path / "company-ca.crt").read_text()
    return Configured(submit, template_name, Path(store).name, private_image, ca)


def test_configuration_ca_login_and_proxy_reach_the_daemon(
    configured: Configured, template_name: str
) -> None:
    configured.put_a_proxy_between()
    configured.create_config_map()
    configured.create_secret()
    # gVisor's MTU is without the header's 14.
    mtu = 1386 if is_sandbox(template_name) else 1400
    configured.run().succeeds(f"mtu {mtu}")


@pytest.mark.parametrize("template_name", ["native_sidecar"], indirect=True)
def test_a_ca_that_is_missing_is_the_cause(configured: Configured) -> None:
    configured.create_config_map_without_a_ca()
    run = configured.run()
    assert "x509" in run.fails()
    assert "retry 1" not in run.logs()


@pytest.mark.parametrize("template_name", ["native_sidecar"], indirect=True)
def test_a_login_that_is_missing_is_the_cause(configured: Configured) -> None:
    configured.create_config_map()
    assert "Secret docker-sidecar" in configured.run().fails()


def greedy_run(submit: Submit, template_name: str) -> SubmittedRun:
    """A run whose container asks for everything, and has looked around."""
    run = submit(template_name, command=["sh", "-c", LOOK_AROUND], host_config=GREEDY)
    run.container_writes("up")
    return run


def assert_sees_what_the_daemon_sees(run: SubmittedRun) -> None:
    """The container has the files and the processes of the daemon, not those of the node."""
    logs = run.logs().splitlines()
    assert "files /host/usr/local/bin/dockerd-entrypoint.sh" in logs
    assert "kubelets 0" in logs
    assert "daemons 1" in logs


def has_privileged_container(pod: Any) -> bool:
    containers = [*pod.spec.containers, *pod.spec.init_containers]
    return any(container.security_context.privileged for container in containers)


def processes_with_rights_on_the_node(pod: Any) -> list[str]:
    """Of the processes of a pod those with capabilities in the node's user namespace."""
    node = on_node("readlink", "/proc/1/ns/user")
    processes = on_node("sh", "-c", RIGHTS, pod.metadata.uid).splitlines()
    assert processes
    without_rights = f"{node} {'0' * 16}"
    return [line for line in processes if line.startswith(node) and line != without_rights]


def kernel_of_the_node() -> str:
    return "kernel " + on_node("cat", "/proc/sys/kernel/random/boot_id")


def test_a_container_that_asks_for_everything_gets_what_the_daemon_has(submit: Submit) -> None:
    run = greedy_run(submit, "native_sidecar")
    assert_sees_what_the_daemon_sees(run)
    assert kernel_of_the_node() in run.logs()
    assert "disks 0" not in run.logs(), "the node's disks are there"
    [pod] = run.pods()
    assert has_privileged_container(pod)
    assert processes_with_rights_on_the_node(pod)


@pytest.mark.parametrize("template_name", ["gvisor_sidecar"], indirect=True)
def test_a_container_that_asks_for_everything_stays_in_its_sandbox(
    submit: Submit, template_name: str
) -> None:
    run = greedy_run(submit, template_name)
    assert_sees_what_the_daemon_sees(run)
    assert kernel_of_the_node() not in run.logs()
    assert "disks 0" in run.logs()
    [pod] = run.pods()
    assert not has_privileged_container(pod)
    assert processes_with_rights_on_the_node(pod) == []


def test_the_node_is_configured_as_the_page_says() -> None:
    node = PROJECT / "scripts" / "airgap" / "node"
    assert (node / "runsc.toml").read_text() == example("gvisor-runsc")
    assert (node / "containerd.toml").read_text().endswith(example("gvisor-containerd"))


# What does not depend on the template


def test_preflight_finds_nothing_wrong_with_what_the_pages_set_up(agent: RunningPod) -> None:
    said = readme("make preflight NAMESPACE=flows")
    assert "wrong" not in said, said
    assert agent.name in readme("KUBECONFIG=.kube/config kubectl get pods")


def test_the_command_of_the_readme_runs_the_flow(
    agent: RunningPod, api: PrefectAPI, namespace: Namespace, small_image: str
) -> None:
    said = readme("prefect run", {"alpine:3": small_image})
    assert "Flow run succeeded" in said
    newest = next(reversed(api.flow_runs.values()))
    run = SubmittedRun(namespace, newest)
    assert run.record.state == "Success", run.seen()


def test_runs_of_all_templates_at_once_keep_their_logs_apart(
    submit: Submit, api: PrefectAPI, namespace: Namespace, templates: list[str]
) -> None:
    runs = {f"a run of {name}": submit(name, command=f"echo a run of {name}") for name in templates}
    # One of the flow as it was registered, with its defaults.
    runs["Beginning Flow run for 'empty'"] = start(api, namespace)
    for text, run in runs.items():
        run.succeeds(text, timeout=240)
        how, _ = run.job_ends()
        assert how == "Complete"
        assert not [other for other in runs if other != text and other in run.logs()]
    for run in runs.values():
        assert_agent_deletes_the_job(run)


def assert_agent_deletes_the_job(run: SubmittedRun) -> None:
    run.wait(lambda: not run.pods(), "the Agent has deleted the Job", 2 * HEARTBEAT)
    run.wait(lambda: run.namespace.job_deleted(run.record.id), "the Job is gone", 10)


# Pods that end before their run does: Kubernetes does the same with the pod of each template


def test_a_job_that_is_out_of_time_fails_its_run(submit: Submit) -> None:
    template = load_job_template("native_sidecar")
    template["spec"]["activeDeadlineSeconds"] = 60
    run = submit(template, command=FOREVER)
    run.container_writes("up")
    run.reaches("Failed", "Success", "Cancelled", timeout=90)
    run.ends_by_sigterm()
    run.saves()


def test_a_node_that_is_drained_fails_its_runs(submit: Submit) -> None:
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


def test_a_pod_that_is_deleted_during_the_pull_fails_its_run(
    submit: Submit, api: PrefectAPI
) -> None:
    """From a registry, in this process, that takes connections, and never answers."""
    host = str(api.server_address[0])
    with socket.create_server((host, 0)) as silent:
        port = silent.getsockname()[1]
        image = f"{host}:{port}/none:1"
        run = submit("native_sidecar", image=image)
        pod = run.container_writes(f"Pulling {image}")
        kubectl(f"delete pod {pod.name} --wait=false")
        run.ends_by_sigterm()


@pytest.mark.timeout(600)
def test_a_pod_that_is_evicted_for_its_disk_fails_its_run(submit: Submit) -> None:
    """kubelet looks at the disk once a minute, and gives an evicted pod no time to save."""
    template = load_job_template("native_sidecar")
    daemon_of(template)["resources"]["limits"]["ephemeral-storage"] = "1Gi"
    fill = "dd if=/dev/zero of=/full bs=1M count=1200; echo full; sleep 600"
    run = submit(template, command=["sh", "-c", fill])
    run.wait(lambda: is_evicted(run), "the pod is evicted", 240)
    run.fails(timeout=120)
    how, _ = run.job_ends(120)
    assert how == "Failed"


def is_evicted(run: SubmittedRun) -> bool:
    return [pod.status.reason for pod in run.pods()] == ["Evicted"]
