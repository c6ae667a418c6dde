"""Where images come from: a registry of theirs, a stand-in, or the local registry.

The local registry is at localhost:5001. It takes what is pushed, and is a mirror of Docker Hub for
daemons that do not reach it.
"""

from contextlib import suppress
from typing import Any

import docker
import requests
from docker.errors import APIError, ImageNotFound, NotFound

from scripts.airgap import images as stand_ins
from scripts.base import (
    ANSWER_SECONDS,
    LABELS,
    NAME,
    REGISTRY_IMAGE,
    UNREACHABLE,
    SetupError,
    say,
    wait_until,
)

REGISTRY = "localhost:5001"


def can_pull(client: docker.DockerClient, image: str) -> bool:
    """Whether an engine reaches a registry that has an image.

    Its own network, mirrors and proxies decide.
    """
    with suppress(*UNREACHABLE):
        return bool(client.images.get_registry_data(image))
    return False


def provide(client: docker.DockerClient, *names: str) -> None:
    """Have images on an engine: those that it has, else from their registry, else stand-ins."""
    for name in names:
        if _has(client, name):
            stand_in = _is_stand_in(client, name)
        else:
            stand_in = not _pull(client, name)
        if stand_in:  # also if it is there: what it is made from may have changed
            stand_ins.build(client, name)


def _has(client: docker.DockerClient, name: str) -> bool:
    with suppress(ImageNotFound):
        client.images.get(name)
        return True
    return False


def _is_stand_in(client: docker.DockerClient, name: str) -> bool:
    return stand_ins.LABEL in client.images.get(name).labels


def _pull(client: docker.DockerClient, name: str) -> bool:
    """Pull an image; False if it cannot be pulled, after saying why."""
    try:
        client.images.pull(name)
    except UNREACHABLE as error:
        reason = getattr(error, "explanation", None) or error
        say(f"{name} cannot be pulled: {reason}")
        return False
    return True


def start(client: docker.DockerClient, *names: str) -> None:
    """Start the registry, unless it runs, and push images to it under their names on Docker Hub."""
    provide(client, *names, REGISTRY_IMAGE)  # in this order: the first may build a newer registry
    try:
        _run(client)
    except APIError as error:
        raise SetupError(
            f"the local registry cannot start at {REGISTRY}: {error.explanation}"
        ) from None
    wait_until(
        _answers, f"the local registry answers at {REGISTRY}; is another program on that port?"
    )
    for name in names:
        push(client, name, name)


def _run(client: docker.DockerClient) -> None:
    """Run the registry's container, or the one of a run that was killed."""
    try:
        client.containers.get(f"{NAME}-registry").start()
    except NotFound:
        port = int(REGISTRY.partition(":")[2])
        options: Any = {
            "detach": True,
            "name": f"{NAME}-registry",
            "labels": LABELS,
            "ports": {"5000/tcp": ("127.0.0.1", port)},
            "volumes": {f"{NAME}-registry": {"bind": "/var/lib/registry"}},
        }
        client.containers.run(REGISTRY_IMAGE, **options)


def _answers() -> bool:
    with suppress(requests.RequestException), requests.Session() as session:
        session.trust_env = False  # no proxy
        return session.get(f"http://{REGISTRY}/v2/", timeout=ANSWER_SECONDS).ok
    return False


def push(client: docker.DockerClient, image: str, name: str) -> str:
    """Push an image of the engine to the registry under a name, and return its path there."""
    repository, tag = name.removeprefix("registry.k8s.io/").rsplit(":", 1)
    if "/" not in name:
        repository = f"library/{repository}"
    client.images.get(image).tag(f"{REGISTRY}/{repository}", tag)
    for line in client.api.push(f"{REGISTRY}/{repository}", tag, stream=True, decode=True):
        if "error" in line:  # in the body of a 200
            raise SetupError(f"pushing {image} to {REGISTRY}: {line['error']}")
    client.images.remove(f"{REGISTRY}/{repository}:{tag}")
    return f"{repository}:{tag}"


def registry_address(client: docker.DockerClient, network: str) -> str:
    """The registry's address and port in a network of the engine."""
    container = client.containers.get(f"{NAME}-registry")
    found = client.networks.get(network)
    if container.id not in found.attrs["Containers"]:
        found.connect(container)
        found.reload()
    address, _ = found.attrs["Containers"][container.id]["IPv4Address"].split("/")
    return f"{address}:5000"
