"""A real kind cluster, a real Agent in it, and the flow, registered by the real CLI."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import docker
import kubernetes.client
import kubernetes.stream
import kubernetes.utils
import kubernetes.watch
import pytest
import urllib3
from prefect.run_configs import KubernetesRun

from flows.settings import PROJECT, load_job_template
from scripts import cluster, registry
from tests.conftest import SESSION, WORKER, busybox, provided, set_up_before_workers
from tests.support.pages import command, commands
from tests.support.prefect_api import FlowRun, PrefectAPI
from tests.support.waiting import wait_for

NAMESPACE = SESSION
SMALL_IMAGE = "tests/busybox:1"
KUBECTL = f"""#!/bin/sh
exec docker exec --interactive {cluster.NODE} kubectl --kubeconfig=/etc/kubernetes/admin.conf "$@"
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/kubernetes/" in item.nodeid:
            item.add_marker("kubernetes")
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(400))


@dataclass
class Namespace:
    """A namespace of the tests' own, and what happens in it."""

    api: kubernetes.client.ApiClient
    name: str
    jobs: dict[str, list[tuple[datetime, Any]]] = field(default_factory=dict)  # by flow run: when, and the Job

    def __post_init__(self) -> None:
        self.core = kubernetes.client.CoreV1Api(self.api)
        self.batch = kubernetes.client.BatchV1Api(self.api)
        threading.Thread(target=self._watch_jobs, daemon=True).start()

    def _watch_jobs(self) -> None:
        with suppress(urllib3.exceptions.HTTPError):  # the cluster is gone
            for event in kubernetes.watch.Watch().stream(self.batch.list_namespaced_job, namespace=self.name):
                job = event["object"]
                run_id = (job.metadata.labels or {}).get("prefect.io/flow_run_id")
                self.jobs.setdefault(run_id, []).append((datetime.now(timezone.utc), event["type"], job))

    def mirror(self) -> str:
        """The URL of the daemons' mirror."""
        found = self.core.read_namespaced_config_map(cluster.CONFIG_MAP, self.name).data["daemon.json"]
        return str(json.loads(found)["registry-mirrors"][0])

    def pods(self, run_id: str) -> list[Any]:
        selector = f"prefect.io/flow_run_id={run_id}"
        return list(self.core.list_namespaced_pod(self.name, label_selector=selector).items)

    def job_ended(self, run_id: str) -> tuple[str, datetime] | None:
        """How a Job ended, Complete, Failed or DELETED, and when that was seen."""
        for seen, event, job in self.jobs.get(run_id, []):
            if event == "DELETED":
                return event, seen
            for condition in job.status.conditions or []:
                if condition.type in ("Complete", "Failed") and condition.status == "True":
                    return condition.type, seen
        return None

    def execute(self, pod: str, container: str, *command: str) -> str:
        """Run a command in a container, and return what it writes."""
        return str(
            kubernetes.stream.stream(
                self.core.connect_get_namespaced_pod_exec,
                pod,
                self.name,
                container=container,
                command=list(command),
                stderr=True,
                stdout=True,
            )
        )

    def report(self) -> str:
        """Phases, conditions, events and the ends of logs, for a test that gives up."""
        lines = []
        for pod in self.core.list_namespaced_pod(self.name).items:
            lines.append(f"pod {pod.metadata.name}: {pod.status.phase}")
            statuses = [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]
            for status in statuses:
                state = {name: value for name, value in status.state.to_dict().items() if value}
                lines.append(f"  {status.name}: {state}")
                if not status.state.waiting:
                    text = self.core.read_namespaced_pod_log(
                        pod.metadata.name, self.name, container=status.name, tail_lines=15
                    )
                    lines += [f"    {line}" for line in text.splitlines()]
        for event in self.core.list_namespaced_event(self.name).items[-30:]:
            lines.append(f"event {event.involved_object.name}: {event.reason}: {event.message}")
        return "\n".join(lines)


@contextmanager
def clustered() -> Iterator[docker.DockerClient]:
    """The engine with the cluster, and a small image in its registry. Asked for and not to be had is a failure."""
    with provided() as client:
        was_up = bool(cluster.node_of(client))
        cluster.up(client)
        registry.push(client, busybox(client), SMALL_IMAGE)
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
    """The Prefect API, on an address of this machine that pods reach as well."""
    gateway = engine.networks.get(cluster.NETWORK).attrs["IPAM"]["Config"][0]["Gateway"]
    with PrefectAPI(host=gateway) as found:
        ask = ["bash", "-c", f"</dev/tcp/{gateway}/{found.server_port}"]
        status, output = engine.containers.get(cluster.NODE).exec_run(ask)
        assert status == 0, f"pods cannot reach this machine at {found.url}; a firewall? {output.decode()}"
        yield found
    assert not found.errors


@pytest.fixture(scope="session")
def prefect(api: PrefectAPI, engine: docker.DockerClient) -> Callable[..., str]:
    """The Prefect CLI."""

    def call(*arguments: str, **environment: str) -> str:
        program = Path(sys.executable).with_name("prefect")
        done = subprocess.run(
            [program, *arguments],
            cwd=PROJECT,
            env={**os.environ, **api.env, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return call


@pytest.fixture(scope="session")
def readme(
    api: PrefectAPI, engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """Run the one command of README.md that starts like this, as a user does, but on what is there for the tests."""
    home = tmp_path_factory.mktemp("home")
    (home / "kubectl").write_text(KUBECTL)  # each node image has one, a machine may not
    (home / "kubectl").chmod(0o755)
    names = {
        "http://your-server:4200": api.url,
        "registry.example.com/team/": f"{registry.REGISTRY}/",
        "namespace flows": f"namespace {NAMESPACE}",
        "NAMESPACE=flows": f"NAMESPACE={NAMESPACE}",
    }

    def readme(start: str, instead: Mapping[str, str] | None = None) -> str:
        exports = [command for command in commands() if command.startswith("export ")]
        script = "\n".join([*exports, command(start)])
        for old, new in {**names, **(instead or {})}.items():
            script = script.replace(old, new)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")}
        path = f"{home}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment.update(HOME=str(home), PATH=path, KUBECONFIG=str(cluster.KUBECONFIG))
        environment["FLOW_IMAGE_TAG"] = NAMESPACE  # not one that the node has pulled already
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    readme("prefect backend server")
    return readme


@pytest.fixture(scope="session")
def namespace(engine: docker.DockerClient, readme: Callable[..., str]) -> Iterator[Namespace]:
    readme("kubectl create namespace")
    readme("kubectl label namespace")
    found = Namespace(cluster.api(), NAMESPACE)
    kubernetes.utils.create_from_dict(found.api, cluster.daemon_config(engine, found.name))
    yield found
    found.core.delete_namespace(found.name)
    # the Agent does not heed SIGTERM, and kubelet may take two minutes to find that a pod has ended; a namespace waits
    found.core.delete_collection_namespaced_pod(found.name, grace_period_seconds=0)
    wait_for(
        lambda: found.name not in [n.metadata.name for n in found.core.list_namespace().items],
        f"{found.name} is gone",
        found.report,
        120,
    )


@pytest.fixture(scope="session")
def flow_id(api: PrefectAPI, readme: Callable[..., str]) -> str:
    readme("prefect create project")
    readme("prefect register")
    return next(reversed(api.flows))


@pytest.fixture(scope="session")
def agent(namespace: Namespace, readme: Callable[..., str]) -> str:
    """The real Agent, from the manifests that the CLI writes; returns the name of its pod."""
    readme("prefect agent kubernetes install --rbac")

    def running() -> str | None:
        pods = namespace.core.list_namespaced_pod(namespace.name, label_selector="app=prefect-agent").items
        ready = [pod.metadata.name for pod in pods if pod.status.phase == "Running"]
        return ready[0] if ready else None

    return wait_for(running, "the Agent runs", namespace.report, 180)


@pytest.fixture(scope="session")
def small_image(engine: docker.DockerClient) -> str:
    """A small image, by a name that the pods' daemons can pull."""
    return f"{registry.registry_address(engine, cluster.NETWORK)}/{SMALL_IMAGE}"


@pytest.fixture(scope="session")
def gvisor(engine: docker.DockerClient) -> None:
    """A node that has gVisor: the one that `make airgap` builds, or one that was given it as docs/gvisor.md says."""
    if engine.containers.get(cluster.NODE).exec_run(["sh", "-c", "command -v containerd-shim-runsc-v1"])[0] != 0:
        pytest.skip("gvisor_sidecar: the node has no gVisor, see docs/gvisor.md")


@pytest.fixture(params=["docker_sidecar", "native_sidecar", "kept_layers", "gvisor_sidecar"])
def template_name(request: pytest.FixtureRequest) -> str:
    """The templates in turn, for tests of what all promise."""
    if request.param == "gvisor_sidecar":
        request.getfixturevalue("gvisor")
    return str(request.param)


@pytest.fixture
def template(template_name: str) -> dict[str, Any]:
    return load_job_template(template_name)


@pytest.fixture
def patched(readme: Callable[..., str], tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Make native_sidecar with a patch, by the command of docs/template.md."""

    def patched(patch: str) -> dict[str, Any]:
        instead = {  # the tests' kubectl may be on the node, where these files are not
            "--filename job_templates/native_sidecar.yaml": "--filename - <job_templates/native_sidecar.yaml",
            "--patch-file patch.yaml": f"--patch {shlex.quote(patch)}",
            "job_templates/own.yaml": str(tmp_path / "own.yaml"),
        }
        readme("kubectl patch --local", instead)
        return load_job_template(str(tmp_path / "own.yaml"))

    return patched


def daemon_of(template: dict[str, Any]) -> dict[str, Any]:
    """The container of a template that runs the Docker daemon."""
    pod = template["spec"]["template"]["spec"]
    [found] = [c for c in (*pod["containers"], *pod.get("initContainers", [])) if c["name"] == "dind-daemon"]
    return found  # type: ignore[no-any-return]


@dataclass
class Run:
    """A flow run, from its submission to the end of its Job."""

    namespace: Namespace
    record: FlowRun

    def seen(self) -> str:
        return f"{self.record}\n{self.namespace.report()}"

    def wait(self, condition: Callable[[], Any], what: str, timeout: float) -> Any:
        return wait_for(condition, what, self.seen, timeout)

    def reaches(self, *states: str, timeout: float = 180) -> FlowRun:
        self.wait(lambda: self.record.state in states, f"the run is {' or '.join(states)}", timeout)
        return self.record

    def job_ends(self, timeout: float = 60) -> tuple[str, datetime]:
        self.wait(lambda: self.namespace.job_ended(self.record.id), "its Job has ended", timeout)
        ended = self.namespace.job_ended(self.record.id)
        assert ended
        return ended

    def logs(self) -> str:
        """What Prefect shows as the run's logs."""
        return "\n".join(str(log.message) for log in self.record.logs)

    def logged(self, text: str, timeout: float = 20) -> None:
        """Wait until something is in the run's logs: they are sent every 5 s, and when the process ends."""
        self.wait(lambda: text in self.logs(), f"the run logs {text!r}", timeout)

    def container_writes(self, text: str) -> str:
        """Wait until a line of the container is in the run's logs, and return the name of the pod."""
        found = lambda: text in self.logs().splitlines()  # noqa: E731
        self.wait(lambda: found() or self.record.state == "Failed", f"the run logs the line {text!r}", 180)
        assert found(), self.seen()
        [pod] = self.namespace.pods(self.record.id)
        return str(pod.metadata.name)


@pytest.fixture
def submit(
    namespace: Namespace, api: PrefectAPI, flow_id: str, agent: str, small_image: str
) -> Iterator[Callable[..., Run]]:
    """Submit a run of the flow, on a job template of its own if need be."""
    runs: list[Run] = []

    def create(template: dict[str, Any] | None = None, memory: str | None = None, **parameters: Any) -> Run:
        template = template or load_job_template("docker_sidecar")
        config = KubernetesRun(
            job_template=template,
            memory_request=memory,
            memory_limit=memory,
            labels=api.flows[flow_id].run_config["labels"],
        ).serialize()
        run_id = api.create_flow_run(flow_id, parameters={"image": small_image, **parameters}, run_config=config)
        runs.append(Run(namespace, api.flow_runs[run_id]))
        return runs[-1]

    yield create
    for run in runs:
        for pod in namespace.pods(run.record.id):
            job = pod.metadata.labels["job-name"]
            with suppress(kubernetes.client.ApiException):  # the Agent, or the test, has deleted it meanwhile
                namespace.batch.delete_namespaced_job(job, namespace.name, propagation_policy="Background")
