"""A registry that the daemon can reach, and flow runs in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import docker
import pytest
from docker.models.containers import Container
from prefect.engine.state import State

from flows import docker_sidecar, tasks
from scripts import run
from tests.conftest import LABELS, busybox, have
from tests.support.waiting import wait_for

STORE = {"docker-sidecar-tests": {"bind": "/var/lib/registry"}}  # of the tests' registries


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/docker/" in item.nodeid:
            item.add_marker("docker")


class Registry:
    """A registry of the tests' own, in a container on a client, which reaches it at its own localhost."""

    def __init__(self, client: docker.DockerClient, port: int) -> None:
        have(client, "registry:2")
        self.client, self.address = client, f"localhost:{port}"
        ports = {"5000/tcp": ("127.0.0.1", port)}
        self.container: Container = client.containers.run(
            "registry:2", detach=True, labels=LABELS, ports=ports, volumes=STORE
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
    daemon: docker.DockerClient, logs: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Outcome]]:
    """Run the flow; afterwards there is nothing on the daemon but images and what was there before."""
    monkeypatch.setattr(tasks, "PULL_RETRY_SECONDS", (1, 1, 1))
    before = {container.id for container in daemon.containers.list(all=True)}
    yield lambda **parameters: Outcome(run.run(daemon, **parameters), logs)
    assert {container.id for container in daemon.containers.list(all=True)} <= before


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Give the host configuration of the flow's container, as a user of CreateContainer does."""
    return lambda host_config: monkeypatch.setattr(docker_sidecar.container_id, "host_config", host_config)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Turn the flow to another daemon."""

    def turn(url: str) -> None:
        for task in docker_sidecar.flow.tasks:
            if hasattr(task, "docker_server_url"):
                monkeypatch.setattr(task, "docker_server_url", url)

    return turn
