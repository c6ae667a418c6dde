"""Have images on an engine, from wherever they are to be had."""

from contextlib import suppress

import docker
from docker.errors import ImageNotFound

from scripts.airgap import images as stand_ins
from scripts.base import UNREACHABLE, say


def can_pull(client: docker.DockerClient, image: str) -> bool:
    """Whether an engine reaches a registry that has an image: its own network, mirrors and proxies decide."""
    with suppress(*UNREACHABLE):
        return bool(client.images.get_registry_data(image))
    return False


def provide(client: docker.DockerClient, *names: str) -> None:
    """Have images on an engine: those that it has, else from their registry, else stand-ins."""
    for name in names:
        try:
            is_stand_in = stand_ins.LABEL in client.images.get(name).labels
        except ImageNotFound:
            try:
                client.images.pull(name)
                continue
            except UNREACHABLE as error:
                say(f"{name} cannot be pulled: {getattr(error, 'explanation', None) or error}")
            is_stand_in = True
        if is_stand_in:  # also if it is there: what it is made from may have changed
            stand_ins.build(client, name)
