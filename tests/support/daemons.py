"""Docker daemons for tests: this machine's engine, and the job templates' daemon inside of it."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import docker
from docker.models.containers import Container
from docker.models.networks import Network

import scripts.engine
import scripts.registry
from scripts.airgap import dockerd
from scripts.base import DAEMON, REGISTRY_IMAGE
from tests.support.containers import PREFECT_IMAGE, running_container
from tests.support.session import SESSION_LABELS
from tests.support.waiting import wait_for


@contextmanager
def provided_engine() -> Iterator[docker.DockerClient]:
    """This machine's Docker engine, with the images of the tests and a registry that has them."""
    with dockerd.running() as client:
        registry_was_there = client.containers.list(filters={"name": "docker-sidecar-registry"})
        scripts.registry.start(client, DAEMON, PREFECT_IMAGE, REGISTRY_IMAGE)
        yield client
        if not registry_was_there:
            dockerd.remove_ours(client)


@dataclass
class Daemon:
    """A Docker daemon as the job templates have it, in a container of the engine."""

    client: docker.DockerClient
    url: str
    container: Container


@contextmanager
def private_network(engine: docker.DockerClient) -> Iterator[Network]:
    """A network of the engine while the block lasts, with the local registry in it."""
    name = f"docker-sidecar-tests-{uuid.uuid4().hex[:8]}"
    network = engine.networks.create(name, labels=SESSION_LABELS)
    try:
        scripts.registry.registry_address(engine, network.name)
        yield network
    finally:
        for container in engine.networks.get(network.id).containers:
            network.disconnect(container, force=True)
        network.remove()


@contextmanager
def run_daemon(
    engine: docker.DockerClient, network: Network, *arguments: str, **options: Any
) -> Iterator[Daemon]:
    """Run the templates' daemon, with its port on this machine's loopback interface only."""
    # --tls=false: without it dockerd sleeps 15 s to warn of a port that only this network reaches.
    flags = ["--host=tcp://0.0.0.0:2375", "--tls=false", "--log-driver=local", *arguments]
    with running_container(
        engine,
        DAEMON,
        ["dockerd", *flags],
        environment={"DOCKER_TLS_CERTDIR": "", "DOCKER_HOST": "tcp://127.0.0.1:2375"},
        network=network.name,
        ports={"2375/tcp": ("127.0.0.1", None)},
        privileged=True,
        **options,
    ) as container:
        wait_for(lambda: answers(container), "dockerd answers", container.logs, 60)
        url = published_url(container)
        yield Daemon(scripts.engine.connect(url), url, container)


def answers(container: Container) -> bool:
    """Whether the daemon in a container answers its own Docker client."""
    return bool(container.exec_run(["docker", "version"]).exit_code == 0)


def published_url(container: Container) -> str:
    """The URL at which this machine reaches the daemon in a container."""
    container.reload()
    [binding] = container.attrs["NetworkSettings"]["Ports"]["2375/tcp"]
    return f"tcp://127.0.0.1:{binding['HostPort']}"


@contextmanager
def daemon_with_mirror(engine: docker.DockerClient, **options: Any) -> Iterator[Daemon]:
    """Run the templates' daemon, with the local registry as its mirror of Docker Hub."""
    with private_network(engine) as network:
        mirror = scripts.registry.registry_address(engine, network.name)
        flags = [f"--registry-mirror=http://{mirror}", f"--insecure-registry={mirror}"]
        with run_daemon(engine, network, *flags, **options) as daemon:
            yield daemon
