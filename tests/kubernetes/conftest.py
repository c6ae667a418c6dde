"""A real kind cluster, a real Agent in it, and the flow, registered by the real CLI."""

import json
import os
import pickle
import shlex
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import docker
import kubernetes.client
import kubernetes.stream
import kubernetes.utils
import kubernetes.watch
import pytest
import trustme
import urllib3
from prefect.run_configs import KubernetesRun

from flows.settings import JOB_TEMPLATES, PROJECT, load_job_template
from flows.states import SIGTERM_CAUSE
from scripts import cluster, registry
from tests.conftest import (
    SESSION,
    WORKER,
    busybox,
    private_registry,
    provided,
    set_up_before_workers,
    tar,
)
from tests.support.pages import command, commands
from tests.support.prefect_api import FlowRun, PrefectAPI
from tests.support.waiting import wait_for

Template = dict[str, Any]
Submit = Callable[..., "Run"]
NAMESPACE = SESSION
SMALL_IMAGE = "tests/busybox:1"
TEMPLATES = sorted(path.stem for path in JOB_TEMPLATES.glob("*.yaml"))
LABELS = ["docker-sidecar"]  # of the Agent
HEARTBEAT = 60  # seconds between two looks that the Agent takes at its Jobs
FOREVER = ["sh", "-c", "trap 'echo saving; exit' TERM; echo up; sleep 600 & wait"]
KUBECTL = f"""#!/bin/sh
exec docker exec --interactive {cluster.NODE} kubectl --kubeconfig=/etc/kubernetes/admin.conf "$@"
"""


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        config.option.dist = (
            "loadgroup"  # gives out single tests; the others give out a quarter of them at once
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/kubernetes/" in item.nodeid:
            item.add_marker("kubernetes")
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(400))
    # what may take longest starts first
    items.sort(
        key=lambda item: max((mark.args[0] for mark in item.iter_markers("timeout")), default=0),
        reverse=True,
    )


@dataclass
class Namespace:
    """A namespace of the tests' own, and what happens in it."""

    api: kubernetes.client.ApiClient
    name: str
    jobs: dict[str, list[tuple[datetime, Any]]] = field(
        default_factory=dict
    )  # by flow run: when, and the Job

    def __post_init__(self) -> None:
        self.core = kubernetes.client.CoreV1Api(self.api)
        self.batch = kubernetes.client.BatchV1Api(self.api)
        threading.Thread(target=self._watch_jobs, daemon=True).start()

    def _watch_jobs(self) -> None:
        with suppress(urllib3.exceptions.HTTPError):  # the cluster is gone
            for event in kubernetes.watch.Watch().stream(
                self.batch.list_namespaced_job, namespace=self.name
            ):
                job = event["object"]
                run_id = (job.metadata.labels or {}).get("prefect.io/flow_run_id")
                self.jobs.setdefault(run_id, []).append(
                    (datetime.now(timezone.utc), event["type"], job)
                )

    def pods(self, selector: str) -> list[Any]:
        return list(self.core.list_namespaced_pod(self.name, label_selector=selector).items)

    def pod(self, selector: str) -> "Pod":
        [found] = self.pods(selector)
        return Pod(self, found.metadata.name, found.status.pod_ip)

    def job_ended(self, run_id: str) -> tuple[str, datetime] | None:
        """How a Job ended, Complete, Failed or DELETED, and when that was seen."""
        for seen, event, job in self.jobs.get(run_id, []):
            if event == "DELETED":
                return event, seen
            for condition in job.status.conditions or []:
                if condition.type in ("Complete", "Failed") and condition.status == "True":
                    return condition.type, seen
        return None

    def report(self) -> str:
        """Pods, events and the ends of logs, for a test that gives up."""
        ours = f"kubectl --namespace {self.name}"
        logs = f"{ours} get pods --output name | xargs -I POD {ours} logs POD --all-containers --prefix --tail=15"
        return shell(f"{ours} describe pods; {ours} events; {logs} || true")


@dataclass
class Pod:
    """A pod that runs."""

    namespace: Namespace
    name: str
    address: str

    def execute(self, container: str, *command: str) -> str:
        """Run a command in a container, and return what it writes."""
        options = {"container": container, "command": [*command], "stderr": True, "stdout": True}
        call = self.namespace.core.connect_get_namespaced_pod_exec
        return str(kubernetes.stream.stream(call, self.name, self.namespace.name, **options))

    def asks(self, container: str, address: str) -> str:
        """What a connection from a container, which has Python, to port 2375 of an address meets."""
        script = f"import socket; socket.create_connection(('{address}', 2375), 5); print('open')"
        return self.execute(container, "python", "-c", script).strip().splitlines()[-1]


def shell(script: str, cwd: Path = PROJECT, stdin: str | None = None, **environment: str) -> str:
    """Run a script with the programs of .venv, and return what it writes."""
    path = f"{os.environ.get('DOCKER_SIDECAR_TESTS', '')}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env={**os.environ, "PATH": path, **environment},
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def kubectl(command: str, stdin: str | None = None) -> str:
    """The node's kubectl, in the tests' namespace."""
    return shell(f"kubectl --namespace {NAMESPACE} {command}", stdin=stdin)


def on_node(*command: str) -> str:
    """Run a command on the node, and return what it writes."""
    return shell(shlex.join(["docker", "exec", cluster.NODE, *command])).strip()


def replaced(text: str, instead: Mapping[str, str]) -> str:
    for old, new in instead.items():
        text = text.replace(old, new)
    return text


@contextmanager
def prefect_api(client: docker.DockerClient) -> Iterator[PrefectAPI]:
    """A Prefect API on an address of this machine that pods reach as well."""
    gateway = client.networks.get(cluster.NETWORK).attrs["IPAM"]["Config"][0]["Gateway"]
    with PrefectAPI(host=gateway) as found:
        ask = ["bash", "-c", f"</dev/tcp/{gateway}/{found.server_port}"]
        status, output = client.containers.get(cluster.NODE).exec_run(ask)
        assert status == 0, (
            f"pods cannot reach this machine at {found.url}; a firewall? {output.decode()}"
        )
        os.environ["DOCKER_SIDECAR_TESTS_API"] = found.url
        yield found
    assert not found.errors


def readme(start: str, instead: Mapping[str, str] | None = None) -> str:
    """Run the one command of the pages that starts like this, as a user does, but on what is there for the tests."""
    names = {
        "http://your-server:4200": os.environ["DOCKER_SIDECAR_TESTS_API"],
        "registry.example.com/team/": f"{registry.REGISTRY}/",
        "namespace flows": f"namespace {NAMESPACE}",
        "NAMESPACE=flows": f"NAMESPACE={NAMESPACE}",
    }
    exports = [command for command in commands() if command.startswith("export ")]
    script = "\n".join(['unset "${!PREFECT__@}"', *exports, command(start)])
    own = {
        "HOME": os.environ["DOCKER_SIDECAR_TESTS"],
        "FLOW_IMAGE_TAG": SESSION,
    }  # a tag that the node has not pulled
    return shell(
        replaced(script, {**names, **(instead or {})}), KUBECONFIG=str(cluster.KUBECONFIG), **own
    )


@contextmanager
def clustered() -> Iterator[docker.DockerClient]:
    """The engine with the cluster, a small image in its registry, and a home folder with the flow as registered once.

    Asked for and not to be had is a failure.
    """
    with provided() as client, TemporaryDirectory() as home:
        was_up = bool(cluster.node_of(client))
        cluster.up(client)
        registry.push(client, busybox(client), SMALL_IMAGE)
        os.environ["DOCKER_SIDECAR_TESTS"] = home
        kubectl = Path(home, "kubectl")  # each node image has one, a machine may not
        kubectl.write_text(KUBECTL)
        kubectl.chmod(0o755)
        with prefect_api(client) as api:
            readme("prefect backend server")
            readme("prefect create project")
            readme("prefect register")
            Path(home, "registered").write_bytes(pickle.dumps([*api.flows.values()]))
        yield client
        if not was_up:
            cluster.down(client)


def pytest_sessionstart(session: pytest.Session) -> None:
    set_up_before_workers(session, clustered)


@pytest.fixture(scope="session")
def engine(engine: docker.DockerClient) -> Iterator[docker.DockerClient]:
    if WORKER:
        yield engine
    else:
        with clustered():
            yield engine


@pytest.fixture(scope="session")
def api(engine: docker.DockerClient) -> Iterator[PrefectAPI]:
    """A Prefect API of this process, in which the flow is registered."""
    with prefect_api(engine) as found:
        [flow] = pickle.loads(Path(os.environ["DOCKER_SIDECAR_TESTS"], "registered").read_bytes())
        found.flows[flow.id] = flow
        found._store.project.append(flow.project)
        yield found


@pytest.fixture(scope="session")
def namespace(engine: docker.DockerClient, api: PrefectAPI) -> Iterator[Namespace]:
    readme("kubectl create namespace")
    readme("kubectl label namespace")
    found = Namespace(cluster.api(), NAMESPACE)
    kubernetes.utils.create_from_dict(found.api, cluster.daemon_config(engine, found.name))
    yield found
    kubectl(f"delete namespace {NAMESPACE} --wait=false")
    kubectl(
        "delete pods --all --force --wait=false"
    )  # the Agent does not heed SIGTERM, and the namespace waits for it


@pytest.fixture(scope="session")
def deployment(namespace: Namespace) -> None:
    """The real Agent, from the manifests that the CLI writes."""
    readme("prefect agent kubernetes install --rbac")
    kubectl("rollout status deployment prefect-agent --timeout=180s")


@pytest.fixture
def agent(deployment: None, namespace: Namespace) -> Pod:
    """The Agent's pod, which a test may replace."""
    return namespace.pod("app=prefect-agent")


@pytest.fixture(scope="session")
def small_image(engine: docker.DockerClient) -> str:
    """A small image, by a name that the pods' daemons can pull."""
    return f"{registry.registry_address(engine, cluster.NETWORK)}/{SMALL_IMAGE}"


@pytest.fixture(scope="session")
def templates(engine: docker.DockerClient) -> list[str]:
    """The templates that the node can run; for gVisor it is the one of `make airgap`, or as docs/gvisor.md says."""
    gvisor = on_node("sh", "-c", "command -v containerd-shim-runsc-v1 || true")
    return [name for name in TEMPLATES if name != "gvisor_sidecar" or gvisor]


@pytest.fixture(params=TEMPLATES)
def template_name(request: pytest.FixtureRequest, templates: list[str]) -> str:
    """The templates in turn, for tests of what all promise."""
    if request.param not in templates:
        pytest.skip(f"{request.param}: the node has no gVisor, see docs/gvisor.md")
    return str(request.param)


@pytest.fixture
def store() -> Iterator[str]:
    """A folder on the node for layers, of a test's own."""
    path = f"/var/lib/docker-sidecar-{uuid.uuid4().hex[:8]}"
    yield path
    on_node("rm", "-rf", path)


@pytest.fixture
def private_image(engine: docker.DockerClient, tmp_path: Path) -> Iterator[str]:
    """The small image in a registry that asks for a password; a CA of its own, in tmp_path, has signed for it."""
    tls = {"REGISTRY_HTTP_TLS_CERTIFICATE": "/cert", "REGISTRY_HTTP_TLS_KEY": "/key"}
    volumes = {"docker-sidecar-registry": {"bind": "/var/lib/registry"}}
    with private_registry(engine, tls, network=cluster.NETWORK, volumes=volumes) as found:
        address = found.attrs["NetworkSettings"]["Networks"][cluster.NETWORK]["IPAddress"]
        authority = trustme.CA()
        certificate = authority.issue_cert(address)
        authority.cert_pem.write_to_path(str(tmp_path / "company-ca.crt"))
        key, cert = certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
        found.put_archive("/", tar({"key": key, "cert": cert}))
        wait_for(lambda: b"listening on" in found.logs(), "the registry listens", found.logs)
        yield f"{address}:5000/{SMALL_IMAGE}"


def daemon_of(template: Template) -> dict[str, Any]:
    """The container of a template that runs the Docker daemon."""
    pod = template["spec"]["template"]["spec"]
    [found] = [
        c
        for c in (*pod["containers"], *pod.get("initContainers", []))
        if c["name"] == "dind-daemon"
    ]
    return found  # type: ignore[no-any-return]


def edited(template: str, old: str, new: str) -> Template:
    """A job template with one change of its text, as JSON."""
    text = json.dumps(load_job_template(template))
    assert old in text
    return dict(json.loads(text.replace(old, new)))


@dataclass
class Run:
    """A flow run, from its submission to the end of its Job."""

    namespace: Namespace
    record: FlowRun
    selector = property(lambda self: f"prefect.io/flow_run_id={self.record.id}")

    def seen(self) -> str:
        return f"{self.record}\n{self.namespace.report()}"

    def wait(self, condition: Callable[[], Any], what: str, timeout: float) -> Any:
        return wait_for(condition, what, self.seen, timeout)

    def reaches(self, *states: str, timeout: float = 180) -> FlowRun:
        self.wait(lambda: self.record.state in states, f"the run is {' or '.join(states)}", timeout)
        return self.record

    def succeeds(self, *logged: str, timeout: float = 180) -> None:
        """Wait until the run is a success, and has logged some texts."""
        assert self.reaches("Success", "Failed", timeout=timeout).state == "Success", self.seen()
        for text in logged:
            self.logged(text)

    def fails(self, timeout: float = 180) -> str:
        """Wait until the run has failed, and return its message."""
        assert self.reaches("Success", "Failed", "Cancelled", timeout=timeout).state == "Failed", (
            self.seen()
        )
        return str(self.record.message)

    def ends_by_sigterm(self, saves: bool = True) -> None:
        """Failed within the 30 s that Kubernetes gives, with the cause; and the container has the time to save."""
        assert self.fails(timeout=30) == SIGTERM_CAUSE, self.seen()
        self.wait(
            lambda: {*self.record.task_states.values()} <= {"Success", "Failed"},
            "no task is unfinished",
            30,
        )
        if saves:
            self.logged("saving", 30)

    def job_ends(self, timeout: float = 60) -> tuple[str, datetime]:
        """Wait until the Job has ended; how, and when that was seen."""
        return self.wait(
            lambda: self.namespace.job_ended(self.record.id), "its Job has ended", timeout
        )

    def logs(self) -> str:
        """What Prefect shows as the run's logs."""
        return "\n".join(str(log.message) for log in self.record.logs)

    def logged(self, text: str, timeout: float = 20) -> None:
        """Wait until something is in the run's logs: they are sent every 5 s, and when the process ends."""
        self.wait(lambda: text in self.logs(), f"the run logs {text!r}", timeout)

    def pods(self) -> list[Any]:
        return self.namespace.pods(self.selector)

    def container_writes(self, text: str) -> Pod:
        """Wait until a line of the container is in the run's logs, and return the pod."""
        found = lambda: text in self.logs().splitlines()  # noqa: E731
        self.wait(
            lambda: found() or self.record.state == "Failed", f"the run logs the line {text!r}", 180
        )
        assert found(), self.seen()
        return self.namespace.pod(self.selector)


def start(api: PrefectAPI, namespace: Namespace, flow_id: str | None = None, **options: Any) -> Run:
    """Create a run, by default of the registered flow as it is."""
    return Run(
        namespace, api.flow_runs[api.create_flow_run(flow_id or next(iter(api.flows)), **options)]
    )


@pytest.fixture
def submit(
    namespace: Namespace, api: PrefectAPI, deployment: None, small_image: str
) -> Iterator[Submit]:
    """Submit a run of the flow, on a job template of its own if need be."""
    runs: list[Run] = []

    def submit(
        template: Template | str = "docker_sidecar", memory: str | None = None, **parameters: Any
    ) -> Run:
        job = load_job_template(template) if isinstance(template, str) else template
        config = KubernetesRun(
            job_template=job, memory_request=memory, memory_limit=memory, labels=LABELS
        ).serialize()
        runs.append(
            start(
                api, namespace, parameters={"image": small_image, **parameters}, run_config=config
            )
        )
        return runs[-1]

    yield submit
    if runs:
        ids = ",".join(run.record.id for run in runs)
        kubectl(f"delete jobs --selector 'prefect.io/flow_run_id in ({ids})' --wait=false")
