"""Docker daemons as the job templates have them, and flow runs in this process."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from flows import docker_sidecar
from scripts import run
from scripts.base import REGISTRY_IMAGE
from tests.support.containers import import_busybox, running_container
from tests.support.daemons import Daemon, daemon_with_mirror, provided_engine
from tests.support.local_runs import Outcome, RunFlow, WhenLogged
from tests.support.registries import (
    INNER_REGISTRY,
    INNER_STORE,
    push_to_inner_registry,
    wait_until_it_listens,
)
from tests.support.session import WORKER, set_up_before_workers
from tests.support.waiting import wait_for


def pytest_sessionstart(session: pytest.Session) -> None:
    set_up_before_workers(session, provided_engine)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/docker/" in item.nodeid:
            item.add_marker("docker")


@pytest.fixture(scope="session")
def sidecar(engine: docker.DockerClient) -> Iterator[Daemon]:
    """The daemon that the flow's runs use. Its store is kept for the next time."""
    store = {f"docker-sidecar-tests-daemon{WORKER}": {"bind": "/var/lib/docker"}}
    with daemon_with_mirror(engine, volumes=store) as daemon:
        for left_by_killed_tests in daemon.client.containers.list(all=True):
            left_by_killed_tests.remove(force=True, v=True)
        yield daemon


@pytest.fixture(scope="session")
def daemon(sidecar: Daemon) -> docker.DockerClient:
    return sidecar.client


@pytest.fixture
def current_docker(daemon: docker.DockerClient) -> None:
    """For tests of what Docker 20.10 cannot do, which stands in where there is no Go."""
    if docker.utils.version_lt(daemon.version()["ApiVersion"], "1.44"):
        pytest.skip("needs the Docker that the templates name; without Go its stand-in is 20.10")


@pytest.fixture(scope="session")
def registry(daemon: docker.DockerClient) -> Iterator[Container]:
    """The registry at INNER_REGISTRY."""
    port = int(INNER_REGISTRY.partition(":")[2])
    ports = {"5000/tcp": ("127.0.0.1", port)}
    with running_container(daemon, REGISTRY_IMAGE, ports=ports, volumes=INNER_STORE) as container:
        wait_until_it_listens(container)
        yield container


@pytest.fixture(scope="session")
def image(daemon: docker.DockerClient, registry: Container) -> str:
    """The name of a small image that is in a registry."""
    return push_to_inner_registry(daemon, import_busybox(daemon), "tests/busybox:1")


@pytest.fixture
def flow_run(
    sidecar: Daemon, image: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunFlow]:
    """Run the flow on the sidecar, or on the daemon at the URL ``on``; by default the small image.

    Afterwards there is nothing on the sidecar but images and what was there before.
    """
    monkeypatch.setattr("flows.pull.PULL_RETRY_SECONDS", (1, 1, 1))
    before = container_ids(sidecar.client)

    def flow_run(on: str = sidecar.url, **parameters: Any) -> Outcome:
        caplog.clear()
        for task in docker_sidecar.flow.tasks:
            if hasattr(task, "docker_server_url"):
                monkeypatch.setattr(task, "docker_server_url", on)
        state = run.run(sidecar.client, **{"image": image, **parameters})
        records = [record for record in caplog.records if record.name.startswith("prefect")]
        return Outcome(state, records)

    yield flow_run
    assert container_ids(sidecar.client) <= before


def container_ids(client: docker.DockerClient) -> set[str]:
    return {str(container.id) for container in client.containers.list(all=True)}


@pytest.fixture
def when_logged(caplog: pytest.LogCaptureFixture) -> Iterator[WhenLogged]:
    """Do something during a run, as soon as a pattern is found in what the run has logged."""

    def is_logged(pattern: str) -> bool:
        return bool(re.search(pattern, "\n".join(caplog.messages), re.MULTILINE))

    def wait_and_act(pattern: str, act: Callable[[], object]) -> None:
        wait_for(lambda: is_logged(pattern), pattern, lambda: caplog.text)
        act()

    acts: list[Future[None]] = []
    with ThreadPoolExecutor() as pool:
        yield lambda pattern, act: acts.append(pool.submit(wait_and_act, pattern, act))
        for act in acts:
            act.result()
