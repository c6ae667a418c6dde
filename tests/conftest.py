"""What the tests on a real Docker daemon and those on a real cluster share."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from flows.settings import load_job_template
from scripts import sidecar
from tests.support.waiting import wait_for

# A developer's own settings take no part. Prefect reads these when it is imported, so no fixture can set them.
os.environ["PREFECT__USER_CONFIG_PATH"] = os.environ["PREFECT__BACKEND_CONFIG_PATH"] = os.devnull
# Under `make test &` SIGINT is ignored, and stays so in what is started from here; but runs are cancelled by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

LABELS = {"docker-sidecar-on-kubernetes": "test"}
PREFECT = "prefecthq/prefect:1.4.1"
SIDECAR = load_job_template("docker_sidecar")["spec"]["template"]["spec"]["containers"][1]
# Everything in one static or nearly static file: the smallest image that can run a command. The dind image has
# it, whether it is the published one (Alpine) or the stand-in.
BUSYBOX = "mkdir -p /t/bin /t/lib; cp /bin/busybox /t/bin/; cp /lib/ld-musl* /t/lib/; \
busybox --list | while read -r a; do ln -s busybox /t/bin/$a; done; tar -C /t -c . | base64"


# of a registry that asks for a password, which is the word "password"
_USER = "user:$2b$05$YgkE/uhk8SIDXkewhKhhpu49zzgu.Nt1jTgkrF7U6pEsmjYs/T.yK"
SERVE = "exec $(command -v registry || command -v docker-registry) serve /etc/docker/registry/config.yml"


@contextmanager
def private_registry(engine: docker.DockerClient, **options: Any) -> Iterator[Container]:
    """A registry, in a container on the engine, that lets in only user, with the password "password"."""
    container = engine.containers.run(
        "registry:2",
        detach=True,
        labels=LABELS,
        entrypoint=["sh", "-euc", f"echo '{_USER}' >/htpasswd; {SERVE}"],
        environment={
            "REGISTRY_AUTH": "htpasswd",
            "REGISTRY_AUTH_HTPASSWD_REALM": "tests",
            "REGISTRY_AUTH_HTPASSWD_PATH": "/htpasswd",
        },
        **options,
    )
    try:
        wait_for(lambda: b"listening on" in container.logs(), "the registry listens", container.logs)
        container.reload()
        yield container
    finally:
        container.remove(force=True, v=True)


def login(password: str = "password") -> dict[str, str]:
    """The user's login, as Docker's config.json has it."""
    return {"auth": base64.b64encode(f"user:{password}".encode()).decode()}


@pytest.fixture(scope="session")
def daemon() -> Iterator[docker.DockerClient]:
    with sidecar.running() as client:
        have(client, SIDECAR["image"], PREFECT)
        yield client
        for container in client.containers.list(all=True, filters={"label": "docker-sidecar-on-kubernetes=test"}):
            container.remove(force=True, v=True)


@pytest.fixture(scope="session")
def engine(daemon: docker.DockerClient) -> docker.DockerClient:
    """The engine of this machine, whose ports can be reached from here; where there is none, the daemon itself."""
    return sidecar.engine()


def have(client: docker.DockerClient, *images: str) -> None:
    for image in images:
        try:
            client.images.get(image)
        except docker.errors.ImageNotFound:
            client.images.pull(image)


def busybox(client: docker.DockerClient) -> str:
    """The name of a small image that is in no registry, and from now on on the client."""
    have(client, SIDECAR["image"])
    output = client.containers.run(SIDECAR["image"], ["-c", BUSYBOX], entrypoint=["sh"], remove=True, labels=LABELS)
    client.api.import_image_from_data(base64.b64decode(output), "docker-sidecar-tests", "busybox", ["ENV PATH=/bin"])
    return "docker-sidecar-tests:busybox"
