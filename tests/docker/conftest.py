"""Docker daemons as the job templates have them, a registry that a daemon can reach, and flow runs in this process."""

import logging
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import docker
import pytest
from docker.models.containers import Container
from docker.models.networks import Network
from prefect.engine.state import State

import scripts.registry
from flows import docker_sidecar
from scripts import run
from scripts.base import DAEMON, REGISTRY_IMAGE
from scripts.engine import connect
from tests.conftest import LABELS, WORKER, busybox, container, provided, set_up_before_workers
from tests.support.waiting import wait_for

REGISTRY = "localhost:5055"  # the tests' own, as the daemon that it runs in reaches it
STORE = {
    "docker-sidecar-tests-registry": {"bind": "/var/lib/registry"}
}  # of the registries in that daemon


def pytest_sessionstart(session: pytest.Session) -> None:
    set_up_before_workers(session, provided)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/docker/" in item.nodeid:
            item.add_marker("docker")


@dataclass
class Daemon:
    """A Docker daemon as the job templates have it, in a container of the engine."""

    client: docker.DockerClient
    url: str
    container: Container


@contextmanager
def private_network(engine: docker.DockerClient) -> Iterator[Network]:
    """A network of the engine while the block lasts, with the local registry in it."""
    network = engine.networks.create(f"docker-sidecar-tests-{uuid.uuid4().hex[:8]}", labels=LABELS)
    try:
        scripts.registry.registry_address(engine, network.name)
        yield network
    finally:
        for each in engine.networks.get(network.id).containers:
            network.disconnect(each, force=True)
        network.remove()


@contextmanager
def run_daemon(
    engine: docker.DockerClient, network: Network, *arguments: str, **options: Any
) -> Iterator[Daemon]:
    """Run the templates' daemon, with its port on this machine's loopback interface only."""
    # --tls=false: without it dockerd sleeps 15 s to warn of a port that only this network reaches
    with container(
        engine,
        DAEMON,
        ["dockerd", "--host=tcp://0.0.0.0:2375", "--tls=false", "--log-driver=local", *arguments],
        environment={"DOCKER_TLS_CERTDIR": "", "DOCKER_HOST": "tcp://127.0.0.1:2375"},
        network=network.name,
        ports={"2375/tcp": ("127.0.0.1", None)},
        privileged=True,
        **options,
    ) as found:
        wait_for(
            lambda: found.exec_run(["docker", "version"]).exit_code == 0,
            "dockerd answers",
            found.logs,
            60,
        )
        found.reload()  # now it has its port
        url = (
            "tcp://127.0.0.1:" + found.attrs["NetworkSettings"]["Ports"]["2375/tcp"][0]["HostPort"]
        )
        yield Daemon(connect(url), url, found)


@contextmanager
def daemon_with_mirror(engine: docker.DockerClient, **options: Any) -> Iterator[Daemon]:
    """Run the templates' daemon, with the local registry as its mirror of Docker Hub."""
    with private_network(engine) as network:
        mirror = scripts.registry.registry_address(engine, network.name)
        flags = f"--registry-mirror=http://{mirror}", f"--insecure-registry={mirror}"
        with run_daemon(engine, network, *flags, **options) as daemon:
            yield daemon


@pytest.fixture(scope="session")
def sidecar(engine: docker.DockerClient) -> Iterator[Daemon]:
    """The daemon that the flow's runs use. Its store is kept for the next time."""
    store = {f"docker-sidecar-tests-daemon{WORKER}": {"bind": "/var/lib/docker"}}
    with daemon_with_mirror(engine, volumes=store) as found:
        for left in found.client.containers.list(all=True):  # by tests that were killed
            left.remove(force=True, v=True)
        yield found


@pytest.fixture(scope="session")
def daemon(sidecar: Daemon) -> docker.DockerClient:
    return sidecar.client


@pytest.fixture
def current_docker(daemon: docker.DockerClient) -> None:
    """For tests of what Docker 20.10 cannot do: its stand-in where there is neither Docker Hub nor Go."""
    if docker.utils.version_lt(daemon.version()["ApiVersion"], "1.44"):
        pytest.skip(
            "needs the Docker that the templates name; its stand-in, for lack of Go, is Docker 20.10"
        )


@pytest.fixture(scope="session")
def registry(daemon: docker.DockerClient) -> Iterator[Container]:
    """The registry at REGISTRY."""
    ports = {"5000/tcp": ("127.0.0.1", int(REGISTRY.partition(":")[2]))}
    with container(daemon, REGISTRY_IMAGE, ports=ports, volumes=STORE) as found:
        wait_for(lambda: b"listening on" in found.logs(), "the registry listens", found.logs)
        yield found


def push(client: docker.DockerClient, image: str, name: str) -> str:
    """Push an image to REGISTRY, and return its name there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.registry, "REGISTRY", REGISTRY)
        return f"{REGISTRY}/{scripts.registry.push(client, image, name)}"


@pytest.fixture(scope="session")
def image(daemon: docker.DockerClient, registry: Container) -> str:
    """The name of a small image that is in a registry."""
    return push(daemon, busybox(daemon), "tests/busybox:1")


def sh(container: Container, command: str) -> str:
    """Run shell commands in a container, and return what they write."""
    status, output = container.exec_run(["sh", "-euc", command])
    assert status == 0, output.decode()
    return str(output.decode().strip())


@dataclass
class Outcome:
    """A finished flow run: its state, and what it logged."""

    state: State
    records: list[logging.LogRecord]

    @property
    def tasks(self) -> dict[str, State]:
        """The state of each task, by its name."""
        return {task.name: state for task, state in self.state.result.items()}

    def output(self, level: str) -> str:
        """What the container wrote, from the run's logs."""
        found = [
            each
            for each in self.records
            if (each.name, each.levelname) == ("prefect.WaitOnContainer", level)
        ]
        return "\n".join(
            each.getMessage() for each in found if not each.getMessage().startswith("Container ")
        )

    def naming(self, words: str) -> list[str]:
        """The log lines that name something."""
        return [each.getMessage() for each in self.records if words in each.getMessage()]

    def warnings(self) -> list[str]:
        return [each.getMessage() for each in self.records if each.levelname == "WARNING"]


FlowRun = Callable[..., Outcome]
WhenLogged = Callable[[str, Callable[[], object]], None]


@pytest.fixture
def flow_run(
    sidecar: Daemon, image: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FlowRun]:
    """Run the flow on the sidecar, or on the daemon whose URL is given as ``on``; without an image, on the small one.

    Afterwards there is nothing on the sidecar but images and what was there before.
    """
    monkeypatch.setattr("flows.pull.PULL_RETRY_SECONDS", (1, 1, 1))
    before = {container.id for container in sidecar.client.containers.list(all=True)}

    def flow_run(on: str = sidecar.url, **parameters: Any) -> Outcome:
        caplog.clear()
        for task in docker_sidecar.flow.tasks:
            if hasattr(task, "docker_server_url"):
                monkeypatch.setattr(task, "docker_server_url", on)
        state = run.run(sidecar.client, **{"image": image, **parameters})
        return Outcome(
            state, [record for record in caplog.records if record.name.startswith("prefect")]
        )

    yield flow_run
    assert {container.id for container in sidecar.client.containers.list(all=True)} <= before


@pytest.fixture
def when_logged(caplog: pytest.LogCaptureFixture) -> Iterator[WhenLogged]:
    """Do something during a run, as soon as the run has logged something that a pattern is found in."""

    def wait_and_act(pattern: str, act: Callable[[], object]) -> None:
        wait_for(
            lambda: re.search(pattern, "\n".join(caplog.messages), re.MULTILINE),
            pattern,
            lambda: caplog.text,
        )
        act()

    with ThreadPoolExecutor() as pool:
        acts: list[Future[None]] = []
        yield lambda pattern, act: acts.append(pool.submit(wait_and_act, pattern, act))
        for each in acts:
            each.result()
