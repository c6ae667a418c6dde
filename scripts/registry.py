"""A registry at localhost:5001, to push to, and as a mirror of Docker Hub for daemons that do not reach it."""

from contextlib import suppress
from typing import Any

import docker
import requests
from docker.errors import APIError, NotFound

from scripts.base import ANSWER_SECONDS, LABELS, NAME, REGISTRY_IMAGE, SetupError, wait_until
from scripts.images import provide

REGISTRY = "localhost:5001"


def start(client: docker.DockerClient, *names: str) -> None:
    """Start the registry, unless it runs, and push images to it under the names that they have on Docker Hub."""
    provide(client, *names, REGISTRY_IMAGE)  # in this order: the first may build a newer registry
    try:
        try:
            client.containers.get(f"{NAME}-registry").start()  # of a run that was killed
        except NotFound:
            options: Any = {"detach": True, "name": f"{NAME}-registry", "labels": LABELS}
            options["ports"] = {"5000/tcp": ("127.0.0.1", int(REGISTRY.partition(":")[2]))}
            options["volumes"] = {f"{NAME}-registry": {"bind": "/var/lib/registry"}}
            client.containers.run(REGISTRY_IMAGE, **options)
    except APIError as error:
        raise SetupError(
            f"the local registry cannot start at {REGISTRY}: {error.explanation}"
        ) from None

    def answers() -> bool:
        with suppress(requests.RequestException), requests.Session() as session:
            session.trust_env = False  # no proxy
            return session.get(f"http://{REGISTRY}/v2/", timeout=ANSWER_SECONDS).ok
        return False

    wait_until(
        answers, f"the local registry answers at {REGISTRY}; is another program on that port?"
    )
    for name in names:
        push(client, name, name)


def push(client: docker.DockerClient, image: str, name: str) -> str:
    """Push an image of the engine to the registry under a name, and return its path there."""
    repository, tag = name.removeprefix("registry.k8s.io/").rsplit(":", 1)
    repository = repository if "/" in name else f"library/{repository}"
    client.images.get(image).tag(f"{REGISTRY}/{repository}", tag)
    for line in client.api.push(f"{REGISTRY}/{repository}", tag, stream=True, decode=True):
        if "error" in line:  # in the body of a 200
            raise SetupError(f"pushing {image} to {REGISTRY}: {line['error']}")
    client.images.remove(f"{REGISTRY}/{repository}:{tag}")
    return f"{repository}:{tag}"


def registry_address(client: docker.DockerClient, network: str) -> str:
    """The registry's address and port in a network of the engine."""
    container, found = client.containers.get(f"{NAME}-registry"), client.networks.get(network)
    if container.id not in found.attrs["Containers"]:
        found.connect(container)
        found.reload()
    return "{}:5000".format(found.attrs["Containers"][container.id]["IPv4Address"].split("/")[0])
