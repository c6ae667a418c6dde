"""Prefect's Docker storage, which pushes no image that was not built."""

import json
from collections.abc import Iterable, Iterator

import docker
import prefect.storage

from flows.daemon import connect


class Docker(prefect.storage.Docker):
    """Prefect's Docker storage. A build that fails is an error, and nothing is pushed.

    Prefect's own only looks whether there is an image of the name when the build has ended, and
    pushes an older one. The engine is found as by the tasks, so that one broken entry in Docker's
    config.json costs that entry only. The class is called as Prefect's, because Prefect stores a
    flow's storage by the name of its class.
    """

    def _get_client(self) -> docker.APIClient:
        if self.tls_config:
            return super()._get_client()
        return connect(self.base_url)

    @staticmethod
    def _parse_generator_output(generator: Iterable[bytes]) -> None:
        prefect.storage.Docker._parse_generator_output(_until_an_error(generator))


def _until_an_error(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Hand on what a build says. Raises ValueError after an error in it."""
    for chunk in chunks:
        yield chunk  # Prefect prints it
        for line in chunk.decode("utf-8").split("\n"):
            event = json.loads(line or "null")
            if isinstance(event, dict) and "error" in event:
                raise ValueError(f"The flow's image was not built, nor pushed: {event['error']}")
