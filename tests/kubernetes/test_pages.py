"""What the pages show for a cluster: own templates, volumes, secrets, policies, other flows."""

import json
import os
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.serialization.schedule import ScheduleSchema

from flows.settings import PROJECT, load_job_template
from scripts import cluster
from scripts.base import DAEMON
from scripts.registry import REGISTRY
from tests.support.background_server import BackgroundServer, QuietHandler
from tests.support.containers import PREFECT_IMAGE
from tests.support.kubectl import NAMESPACE, kubectl, on_node
from tests.support.namespaces import Namespace, RunningPod
from tests.support.pages import example, parameters
from tests.support.prefect_api import FlowRun, PrefectAPI
from tests.support.provided_cluster import SMALL_IMAGE
from tests.support.readme import readme
from tests.support.registries import login
from tests.support.shell import replaced, shell
from tests.support.submitted_runs import (
    FOREVER,
    Submit,
    SubmittedRun,
    start,
)
from tests.support.templates import Template, edited
from tests.support.waiting import wait_for


def patched(patch: str, folder: Path) -> Template:
    """native_sidecar with a patch, by the command of docs/template.md."""
    instead = {  # the tests' kubectl may be on the node, where these files are not
        "--filename job_templates/native_sidecar.yaml": (
            "--filename - <job_templates/native_sidecar.yaml"
        ),
        "--patch-file patch.yaml": f"--patch {shlex.quote(patch)}",
        "job_templates/own.yaml": str(folder / "own.yaml"),
    }
    readme("kubectl patch --local", instead)
    return load_job_template(str(folder / "own.yaml"))


def test_own_template(submit: Submit, tmp_path: Path) -> None:
    """On a node with a label of the test's own."""
    key = f"dedicated-{uuid.uuid4().hex[:8]}"
    template = patched(example("own-template").replace("dedicated:", f"{key}:"), tmp_path)
    run = submit(template, command="echo on my own template")
    run.wait(lambda: "Unschedulable" in str(run.pods()), "no node has the label", 60)
    readme("kubectl label node", {"NODE": cluster.NODE, "dedicated=": f"{key}="})
    try:
        run.succeeds("on my own template")
    finally:
        kubectl(f"label node {cluster.NODE} {key}-")


def test_docker_and_buildkit_in_a_container(submit: Submit, small_image: str) -> None:
    """The image of the daemon has a docker CLI, too."""
    names = {"docker:29-cli": DAEMON, "alpine:3": small_image}
    text = replaced(example("docker-in-a-container"), names)
    run = submit("native_sidecar", **parameters(text))
    run.succeeds("built")


def test_volume_claim(submit: Submit, tmp_path: Path) -> None:
    """On a hostPath volume, for the cluster may have nothing that provides others."""
    name = f"datasets-{uuid.uuid4().hex[:8]}"
    claim = yaml.safe_load(example("volume-claim"))
    claim["spec"]["storageClassName"] = name
    spec = {
        "capacity": claim["spec"]["resources"]["requests"],
        "accessModes": claim["spec"]["accessModes"],
        "storageClassName": name,
        "hostPath": {"path": f"/var/lib/{name}", "type": "DirectoryOrCreate"},
    }
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": spec,
    }
    kubectl("create --filename -", yaml.safe_dump_all([volume, claim]))
    try:
        script = "echo kept >/datasets/file; chown 1000 /datasets; echo up; sleep 600"
        binds = {"binds": ["/datasets:/datasets"]}
        template = patched(example("volume-patch"), tmp_path)
        run = submit(template, command=["sh", "-c", script], host_config=binds)
        pod = run.container_writes("up")
        assert on_node("cat", f"/var/lib/{name}/file") == "kept"
        pod.execute("flow-container", "touch", "/datasets/of-the-flow")
        assert "of-the-flow" in pod.execute("dind-daemon", "ls", "/datasets")
    finally:
        kubectl(f"delete --wait=false pvc/datasets pv/{name}")


def test_a_secret_reaches_the_container_and_nothing_else(submit: Submit, tmp_path: Path) -> None:
    value = f"hunter2-{uuid.uuid4().hex}"
    readme("kubectl --namespace flows create secret generic", {"value='the key'": f"value={value}"})
    template = patched(example("secret-patch"), tmp_path)
    run = submit(template, **parameters(example("secret-parameters")))
    run.succeeds(f"the key has {len(value)} characters")
    run.job_ends()
    record = run.record
    stored = f"{run.logs()} {record.parameters} {record.run_config}"
    for each in (record, *record.task_runs):
        stored += str([state.serialized_state for state in each.states])
    assert value not in stored


# Tries addresses until all give an answer, or none does.
PROBE = """
import socket, sys, time
def reach(address):
    try: socket.create_connection((address, 80), 3).close(); return "open"
    except OSError: return "closed"
while {reach(address) for address in sys.argv[2:]} != {sys.argv[1]}: time.sleep(1)
print("all", sys.argv[1])
"""


def test_network_policy(submit: Submit, agent: RunningPod) -> None:
    """A container reaches neither pods nor Services nor metadata, and the run succeeds."""
    name = f"probe-{uuid.uuid4().hex[:8]}"
    server = "python -m http.server 80"
    kubectl(f"run {name} --image={PREFECT_IMAGE} --port=80 --expose --command -- {server}")
    try:
        kubectl(f"wait pod {name} --for=condition=Ready --timeout=60s")
        where = "{.items[0].status.podIP} {.items[1].spec.clusterIP}"
        addresses = kubectl(f"get pod,service {name} --output jsonpath='{where}'").split()
        # The policy is for runs: the Agent's pod reaches the server.
        probe = ["timeout", "60", "python", "-c", PROBE, "open", *addresses]
        assert "all open" in agent.execute("agent", *probe)
        command = ["python", "-c", PROBE, "closed", *addresses, "169.254.169.254"]
        run = submit("native_sidecar", image=PREFECT_IMAGE, command=command, time_limit=120)
        run.succeeds("all closed")
    finally:
        kubectl(f"delete --now --ignore-not-found pod/{name} service/{name}")


RENEW_LOGIN = PROJECT / "deploy" / "components" / "renew-login" / "renew-login.yaml"
# A process that pulls an image, waits, and pulls another one.
PULLS = """
import os, sys, time
from flows.tasks import PullImage
pull = PullImage(docker_server_url=os.environ["DOCKER_HOST"])
pull.run(repository=sys.argv[1])
print("the first pull is over", flush=True)
while not os.path.exists("/workspace/go"):
    time.sleep(0.2)
pull.run(repository=sys.argv[2])
print("so is the second", flush=True)
"""


def update_volumes(pod: RunningPod) -> None:
    """Let kubelet look at the pod's ConfigMaps and Secrets now, and not within two minutes.

    It does so when the pod changes.
    """
    kubectl(f"annotate --overwrite pod {pod.name} looked-at={uuid.uuid4()}")


@pytest.mark.timeout(500)
def test_a_login_that_is_renewed_between_two_pulls_by_one_process(
    submit: Submit,
    namespace: Namespace,
    private_image: str,
    small_image: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """By the CronJob's own script, with the rights of its account; `aws` is a stand-in."""
    address = private_image.partition("/")[0]
    ca = (tmp_path / "company-ca.crt").read_text()
    template = edited(
        "native_sidecar",
        '"configMap": {"name": "docker-sidecar"',
        '"configMap": {"name": "with-a-ca"',
    )
    mirror = json.dumps({"insecure-registries": [small_image.partition("/")[0]]})
    literals = f"--from-literal=daemon.json='{mirror}' --from-literal=ca.crt='{ca}'"
    kubectl(f"create configmap with-a-ca {literals}")
    expired = {"registry.example.com": address, "password=password": "password=expired"}
    readme("kubectl create secret docker-registry docker-sidecar", expired)
    instead = {"flows": namespace.name, "registry.example.com": address, "=AWS": "=user"}
    resources = replaced(RENEW_LOGIN.read_text(), instead)
    shell("kubectl create --filename -", stdin=resources)
    request.addfinalizer(
        lambda: shell(f"kubectl delete namespace {namespace.name}-logins --wait=false")
    )
    *_, cron_job = yaml.safe_load_all(resources)
    pod = submit(template, command=FOREVER).container_writes("up")

    def says(text: str) -> None:
        said = partial(pod.execute, "flow-container", "cat", "/tmp/said")
        wait_for(lambda: text in said(), text, said, 60)

    script = 'nohup python -c "$0" "$@" >/tmp/said 2>&1 &'
    pod.execute("flow-container", "sh", "-c", script, PULLS, small_image, private_image)
    says("the first pull is over")

    [container] = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    [script] = container["args"]
    account = f"--as=system:serviceaccount:{NAMESPACE}-logins:renew-login"
    stand_ins = f'aws() {{ echo password; }}; kubectl() {{ command kubectl {account} "$@"; }}'
    variables = {each["name"]: each["value"] for each in container["env"]}
    shell(f"{stand_ins}; {script}", environment=variables)

    def has_the_new_login() -> bool:
        update_volumes(pod)
        config = pod.execute("flow-container", "cat", "/docker-config/config.json")
        return login()["auth"] in config

    wait_for(has_the_new_login, "the pod has the new login", namespace.report, 150)
    pod.execute("flow-container", "touch", "/workspace/go")
    says("so is the second")


def test_the_stores_of_a_node_are_found(store: str) -> None:
    on_node("mkdir", "-p", f"{store}/0")
    instead = {
        "node/NODE": f"node/{cluster.NODE}",
        "--namespace kube-system": "--namespace default",  # the tests' own admits no such pod
    }
    assert f"/host{store}" in readme("kubectl debug node/NODE", instead)
    shell("kubectl delete pods --selector app.kubernetes.io/managed-by=kubectl-debug")


# docs/from-your-flows.md: other flows start the registered flow, and a repository of one's own


def register(api: PrefectAPI, folder: Path, source: str) -> str:
    """Register a flow that starts the registered one; returns its id.

    It needs neither an image nor an Agent to run here.
    """
    (folder / "parent.py").write_text(source)
    home = str(folder / "home")  # of the storage
    shell(
        "prefect register --project containers --path parent.py",
        folder,
        environment={**api.env, "PREFECT__HOME_DIR": home},
    )
    return next(reversed(api.flows))


@contextmanager
def executing(api: PrefectAPI, run: SubmittedRun, **environment: str) -> Iterator[None]:
    """A flow run's process, as an Agent would start it."""
    environment |= {
        "PREFECT__ENGINE__FLOW_RUNNER__DEFAULT_CLASS": "prefect.engine.cloud.CloudFlowRunner"
    }
    environment |= {**api.env, "PREFECT__CONTEXT__FLOW_RUN_ID": run.record.id}
    prefect = str(Path(sys.executable).with_name("prefect"))
    process = subprocess.Popen(
        [prefect, "execute", "flow-run"],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


# Of runs whose process the test starts itself.
NO_AGENT = ["executed-by-the-test"]


def is_child(run: FlowRun, parent: SubmittedRun) -> bool:
    """Whether a run has started another one: Prefect names it so."""
    return run.name.startswith(f"{parent.record.name}-")


def children(api: PrefectAPI, parent: SubmittedRun) -> list[str]:
    """The states of the runs that a run has started."""
    return sorted(run.state for run in api.flow_runs.values() if is_child(run, parent))


def test_a_parent_on_a_schedule_ends_as_its_container_ends(
    api: PrefectAPI, deployment: None, small_image: str, namespace: Namespace, tmp_path: Path
) -> None:
    """The test does what Prefect Server's scheduler does with the stored schedule."""
    parent_id = register(api, tmp_path, example("scheduled").replace("alpine:3", small_image))
    schedule = ScheduleSchema().load(api.flows[parent_id].schedule)
    events = schedule.next(10, return_events=True)
    commands = {event.parameter_defaults["command"] for event in events}
    assert commands == {"echo every night", "echo every Monday"}

    scheduled = events[0].parameter_defaults
    fails = {"image": small_image, "command": ["sh", "-c", "exit 3"]}
    good = start(api, namespace, parent_id, parameters=scheduled, labels=NO_AGENT)
    bad = start(api, namespace, parent_id, parameters=fails, labels=NO_AGENT)
    with executing(api, good), executing(api, bad):
        good.succeeds(scheduled["command"].removeprefix("echo "))
        bad.fails()
    messages = [str(run.message) for run in bad.record.task_runs]
    assert "xited with code 3" in " ".join(messages)
    assert children(api, good) == ["Success"]
    assert children(api, bad) == ["Failed"]


class Slack(BackgroundServer):
    """Takes what is sent to a webhook of Slack."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), TakesMessages)
        self.messages: list[str] = []


class TakesMessages(QuietHandler):
    server: Slack

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.messages.append(self.rfile.read(length).decode())
        self.send_response(200)
        self.end_headers()


@pytest.fixture
def slack() -> Iterator[Slack]:
    with Slack() as server:
        yield server


def test_a_parent_with_retries_notification_and_results(
    api: PrefectAPI,
    deployment: None,
    small_image: str,
    namespace: Namespace,
    slack: Slack,
    tmp_path: Path,
) -> None:
    """Two containers, one of which always fails: it is tried in two runs, and is told of once."""
    fails = '{"image": "alpine:3", "command": ["sh", "-c", "exit 3"]}'
    edits = {
        "range(30)\n]": f"[22]\n] + [{fails}]",
        "alpine:3": small_image,
        "max_retries=3": "max_retries=1",
        "minutes=1": "seconds=1",
    }
    parent_id = register(api, tmp_path, edited_example("parent", edits))
    run = start(api, namespace, parent_id, labels=NO_AGENT)
    url = f"http://127.0.0.1:{slack.server_port}"
    with executing(api, run, PREFECT__CONTEXT__SECRETS__SLACK_WEBHOOK_URL=url):
        run.fails(timeout=240)  # the total misses one of its two
    assert children(api, run) == ["Failed", "Failed", "Success"], run.record
    of_containers = [each for each in run.record.task_runs if "run_container" in each.task.slug]
    results = {each.map_index: each.state for each in of_containers}
    assert results == {-1: "Mapped", 0: "Success", 1: "Failed"}, run.record
    [message] = slack.messages
    assert "xited with code 3" in message


def edited_example(name: str, edits: dict[str, str]) -> str:
    """An example with each of these texts replaced, all of which it has."""
    for old in edits:
        assert old in example(name)
    return replaced(example(name), edits)


def parent_of(parameters: dict[str, Any]) -> str:
    """The page's parent, with one container that is tried once."""
    edits = {
        "range(30)\n]": f"range(0)\n] + [{parameters!r}]",
        "max_retries=3, retry_delay=timedelta(minutes=1), ": "",
    }
    return edited_example("parent", edits)


def test_a_restarted_parent_gives_its_container_the_same_parameters(
    api: PrefectAPI, deployment: None, small_image: str, namespace: Namespace, tmp_path: Path
) -> None:
    fails = {"image": small_image, "command": ["sh", "-c", "exit 3"]}
    parent_id = register(api, tmp_path, parent_of(fails))
    parent = start(api, namespace, parent_id, labels=NO_AGENT)
    with executing(api, parent):
        parent.fails()
    api.restart(parent.record.id)
    with executing(api, parent):
        parent.wait(lambda: len(children(api, parent)) == 2, "a second container is run", 60)
        parent.fails()
    runs = [run for run in api.flow_runs.values() if is_child(run, parent)]
    assert [run.parameters["command"] for run in runs] == [fails["command"]] * 2


def test_a_cancelled_parent_cancels_its_containers(
    api: PrefectAPI, deployment: None, small_image: str, namespace: Namespace, tmp_path: Path
) -> None:
    parent_id = register(api, tmp_path, parent_of({"image": small_image, "command": FOREVER}))
    parent = start(api, namespace, parent_id, labels=NO_AGENT)
    with executing(api, parent, PREFECT__CLOUD__CHECK_CANCELLATION_INTERVAL="1"):
        parent.wait(lambda: children(api, parent) == ["Running"], "the container runs", 60)
        [child] = [run for run in api.flow_runs.values() if is_child(run, parent)]
        SubmittedRun(namespace, child).container_writes("up")
        cancel = example("cancel").replace("RUN_ID", parent.record.id)
        shell(cancel, environment=api.env)
        parent.reaches("Cancelled")
        parent.wait(lambda: children(api, parent) == ["Cancelled"], "so is the container's", 90)


def test_an_image_in_a_plain_job(namespace: Namespace, tmp_path: Path) -> None:
    """The flow runs here, by the kubeconfig; its account may do what the flow does."""
    account = example("plain-job-account").replace("jobs:plain-job", f"{NAMESPACE}:plain-job")
    kubeconfig = {"KUBECONFIG": str(cluster.KUBECONFIG)}
    shell(account.replace("namespace jobs", f"namespace {NAMESPACE}"), environment=kubeconfig)
    user = f"--as=system:serviceaccount:{NAMESPACE}:plain-job"
    for right in ("create jobs", "get jobs/status", "delete jobs", "list pods", "get pods/log"):
        assert "yes" in kubectl(f"auth can-i {right} {user}")
    image = f"{REGISTRY}/{SMALL_IMAGE}"  # as the node calls it
    source = example("plain-job").replace("alpine:3", image)
    source = source.replace('NAMESPACE = "jobs"', f'NAMESPACE = "{NAMESPACE}"')
    (tmp_path / "plain_job.py").write_text(source)
    run = "prefect run --path plain_job.py"
    assert "no Docker" in shell(run, tmp_path, environment=kubeconfig)
    fails = """--param command='["sh","-c","echo no such order; exit 3"]' && exit 1 || true"""
    printed = shell(f"{run} {fails}", tmp_path, environment=kubeconfig)
    assert "no such order" in printed
    assert "failed" in printed


PROCESSES = {'"threads"': '"processes"', "In parallel": "In processes"}
SOURCES = {
    "two_containers": example("two-containers"),
    "build_and_run": example("build-and-run"),
    "parallel": example("parallel"),
    "parallel_processes": replaced(example("parallel"), PROCESSES),
}
IMPORTS = """
from prefect.run_configs import KubernetesRun
from flows.settings import PROJECT, Settings, load_job_template
from flows.storage import Docker
settings = Settings.from_environ()
"""


def complete(module: str, source: str) -> str:
    """An own flow with a run config and storage, and with a tag that the node has not pulled."""
    if "flow.run_config" not in source:
        _, start, end = SOURCES["two_containers"].partition("flow.run_config")
        names = {"two_containers": module, "two-containers": module.replace("_", "-")}
        source += IMPORTS + replaced(start + end, names)
    return source.replace('image_tag="1"', f'image_tag="{uuid.uuid4()}"')


@pytest.mark.timeout(500)
def test_own_flows_in_a_repository_of_their_own(
    api: PrefectAPI, deployment: None, namespace: Namespace, small_image: str, tmp_path: Path
) -> None:
    here = {"../docker-sidecar-on-kubernetes": str(PROJECT)}
    shell(replaced(example("own-repository"), here), tmp_path)
    for module, source in SOURCES.items():
        (tmp_path / "flows" / f"{module}.py").write_text(complete(module, source))
    modules = " ".join(f"-m flows.{module}" for module in SOURCES)
    register = example("register-own").replace("-m flows.two_containers", modules)
    shell(register, tmp_path, environment={**api.env, "FLOW_REGISTRY_URL": REGISTRY})
    runs = {}
    for name, flow_id in zip(SOURCES, list(api.flows)[-len(SOURCES) :]):
        runs[name] = start(api, namespace, flow_id, parameters={"image": small_image})
    for run in runs.values():
        run.succeeds()
        how, _ = run.job_ends()
        assert how == "Complete"
    runs["build_and_run"].logged("hello from an image that this run has built")
    # Worker processes may end before they have sent their logs, so threads are looked at.
    for word in ("apple", "pear", "plum", "cherry"):
        runs["parallel"].logged(f"hello {word}")
