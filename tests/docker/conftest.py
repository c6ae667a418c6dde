"""A registry that the daemon can reach, and flow runs in this process."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import docker
import pytest
import requests
from docker.models.containers import Container
from docker.models.networks import Network
from prefect.engine.state import State

from flows import docker_sidecar
from scripts import run
from scripts.base import DAEMON, REGISTRY_IMAGE
from scripts.engine import connect
from scripts.registry import registry_address
from tests.conftest import LABELS, PREFECT, WORKER, busybox, container, have, provided, set_up_before_workers
from tests.support.waiting import wait_for

STORE = {"docker-sidecar-tests-registry": {"bind": "/var/lib/registry"}}  # of the tests' registries


def pytest_sessionstart(session: pytest.Session) -> None:
    set_up_before_workers(session, provided)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/docker/" in item.nodeid:
            item.add_marker("docker")


class Registry:
    """A registry of the tests' own, in a container on a client, which reaches it at its own localhost."""

    def __init__(self, client: docker.DockerClient, port: int) -> None:
        have(client, REGISTRY_IMAGE)
        self.client, self.address = client, f"localhost:{port}"
        ports = {"5000/tcp": ("127.0.0.1", port)}
        self.container: Container = client.containers.run(
            REGISTRY_IMAGE, detach=True, labels=LABELS, ports=ports, volumes=STORE
        )
        wait_for(lambda: b"listening on" in self.container.logs(), "the registry listens", self.container.logs)

    def push(self, image: str, name: str) -> str:
        """Push an image of the client under a name, and forget the name."""
        reference = f"{self.address}/{name}"
        self.client.images.get(image).tag(reference)
        for line in self.client.api.push(reference, stream=True, decode=True):
            assert "error" not in line, line
        self.client.images.remove(reference)
        return reference

    def sh(self, command: str) -> str:
        status, output = self.container.exec_run(["sh", "-euc", command])
        assert status == 0, output.decode()
        return str(output.decode())


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
        registry_address(engine, network.name)
        yield network
    finally:
        for each in engine.networks.get(network.id).containers:
            network.disconnect(each, force=True)
        network.remove()


@contextmanager
def run_daemon(engine: docker.DockerClient, network: Network, *arguments: str, **options: Any) -> Iterator[Daemon]:
    """Run the templates' daemon, with its port on this machine's loopback interface only."""
    # --tls=false: without it dockerd sleeps 15 s to warn of a port that only this network reaches
    with container(
        engine,
        DAEMON,
        ["dockerd", "--host=tcp://0.0.0.0:2375", "--tls=false", *arguments],
        environment={"DOCKER_TLS_CERTDIR": "", "DOCKER_HOST": "tcp://127.0.0.1:2375"},
        network=network.name,
        ports={"2375/tcp": ("127.0.0.1", None)},
        privileged=True,
        **options,
    ) as found:
        wait_for(lambda: found.attrs["NetworkSettings"]["Ports"] or found.reload(), "its port is known", found.logs)
        url = "tcp://127.0.0.1:" + found.attrs["NetworkSettings"]["Ports"]["2375/tcp"][0]["HostPort"]
        wait_for(lambda: answers(url), "dockerd answers", found.logs, 60)
        yield Daemon(connect(url), url, found)


@contextmanager
def daemon_with_mirror(engine: docker.DockerClient, **options: Any) -> Iterator[Daemon]:
    """Run the templates' daemon, with the local registry as its mirror of Docker Hub."""
    with private_network(engine) as network:
        mirror = registry_address(engine, network.name)
        flags = f"--registry-mirror=http://{mirror}", f"--insecure-registry={mirror}"
        with run_daemon(engine, network, *flags, **options) as daemon:
            yield daemon


def answers(url: str) -> bool:
    with suppress(docker.errors.DockerException, requests.RequestException):
        return bool(connect(url))
    return False


@pytest.fixture(scope="session")
def sidecar(engine: docker.DockerClient) -> Iterator[Daemon]:
    """The daemon that the flow's runs use. Its store is kept for the next time."""
    with daemon_with_mirror(
        engine, volumes={f"docker-sidecar-tests-daemon{WORKER}": {"bind": "/var/lib/docker"}}
    ) as found:
        have(found.client, PREFECT)
        for left in found.client.containers.list(all=True):  # by tests that were killed
            left.remove(force=True, v=True)
        yield found
        for left in found.client.containers.list(all=True):
            left.remove(force=True, v=True)


@pytest.fixture(scope="session")
def daemon(sidecar: Daemon) -> docker.DockerClient:
    return sidecar.client


@pytest.fixture
def current_docker(daemon: docker.DockerClient) -> None:
    """For tests of what Docker 20.10 cannot do: its stand-in where there is neither Docker Hub nor Go."""
    if docker.utils.version_lt(daemon.version()["ApiVersion"], "1.44"):
        pytest.skip("needs the Docker that the templates name; its stand-in, for lack of Go, is Docker 20.10")


@pytest.fixture(scope="session")
def registry(daemon: docker.DockerClient) -> Registry:
    return Registry(daemon, 5055)


@pytest.fixture(scope="session")
def image(registry: Registry) -> str:
    """The name of a small image that is in a registry."""
    return registry.push(busybox(registry.client), "busybox:1")


@dataclass
class Outcome:
    """A finished flow run: its state, its tasks' states, and its logs as (level, logger, text)."""

    state: State
    logs: list[tuple[str, str, str]]
    tasks: dict[str, State] = field(init=False)

    def __post_init__(self) -> None:
        self.tasks = {task.name: state for task, state in self.state.result.items()}

    def output(self, level: str) -> str:
        """What the container wrote, from the run's logs."""
        found = [text for at, logger, text in self.logs if logger == "prefect.WaitOnContainer" and at == level]
        return "\n".join(text for text in found if not text.startswith("Container "))

    def naming(self, words: str) -> list[str]:
        """The log lines that name something."""
        return [text for _, _, text in self.logs if words in text]


class _Handler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelname, record.name, record.getMessage()))


@pytest.fixture
def logs() -> Iterator[list[tuple[str, str, str]]]:
    """The run's logs, as they come."""
    handler = _Handler()
    logging.getLogger("prefect").addHandler(handler)
    yield handler.records
    logging.getLogger("prefect").removeHandler(handler)


@pytest.fixture
def flow_run(
    sidecar: Daemon,
    daemon: docker.DockerClient,
    logs: list[tuple[str, str, str]],
    on: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Outcome]]:
    """Run the flow; afterwards there is nothing on the daemon but images and what was there before."""
    monkeypatch.setattr("flows.pull.PULL_RETRY_SECONDS", (1, 1, 1))
    on(sidecar.url)
    before = {container.id for container in daemon.containers.list(all=True)}
    yield lambda **parameters: Outcome(run.run(daemon, **parameters), logs)
    assert {container.id for container in daemon.containers.list(all=True)} <= before


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Turn the flow to another daemon."""

    def turn(url: str) -> None:
        for task in docker_sidecar.flow.tasks:
            if hasattr(task, "docker_server_url"):
                monkeypatch.setattr(task, "docker_server_url", url)

    return turn
