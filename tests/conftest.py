"""What the tests on a real Docker daemon and those on a real cluster share."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing

import docker
import pytest

# A developer's own settings take no part. Prefect reads these when it is imported, so that no
# fixture can set them.
os.environ["PREFECT__USER_CONFIG_PATH"] = os.devnull
os.environ["PREFECT__BACKEND_CONFIG_PATH"] = os.devnull

from scripts.engine import connect
from tests.support.daemons import provided_engine
from tests.support.session import SESSION, WORKER

# Under `make test &` SIGINT is ignored, and stays so in what is started from here. But runs are
# cancelled by it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """This machine's Docker engine. A worker uses what was set up before it."""
    client_of_engine = closing(connect(os.environ["DOCKER_HOST"])) if WORKER else provided_engine()
    with client_of_engine as client:
        yield client
        remove_containers_of_this_session(client)


def remove_containers_of_this_session(client: docker.DockerClient) -> None:
    label = f"docker-sidecar-on-kubernetes={SESSION}"
    for container in client.containers.list(all=True, filters={"label": label}):
        container.remove(force=True, v=True)
