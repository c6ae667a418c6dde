"""What the tests on a real Docker daemon and those on a real cluster share."""

import base64
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any

import docker
import pytest
from docker.models.containers import Container
from docker.utils.build import create_archive

# A developer's own settings take no part. Prefect reads these when the scripts import it, so no fixture can set them.
os.environ["PREFECT__USER_CONFIG_PATH"] = os.environ["PREFECT__BACKEND_CONFIG_PATH"] = os.devnull

from scripts import engine as scripts_engine
from scripts import registry
from scripts.base import DAEMON, REGISTRY_IMAGE
from tests.support.waiting import wait_for

# Under `make test &` SIGINT is ignored, and stays so in what is started from here; but runs are cancelled by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

SESSION = (
    f"tests-{uuid.uuid4().hex[:8]}"  # of this process: others may use the same engine and cluster
)
LABELS = {"docker-sidecar-on-kubernetes": SESSION}
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
PREFECT = "prefecthq/prefect:1.4.1"
# The smallest image that can run a command: the busybox of the dind image, whether that is the published one (Alpine,
# where busybox needs musl) or the stand-in.
BUSYBOX = "mkdir -p /t/bin /t/lib; cp /bin/busybox /t/bin/; cp /lib/ld-musl* /t/lib/; \
busybox --list | while read -r a; do ln -s busybox /t/bin/$a; done; tar -C /t -c . | base64"

# of a registry that asks for a password, which is the word "password"
_USER = "user:$2b$05$YgkE/uhk8SIDXkewhKhhpu49zzgu.Nt1jTgkrF7U6pEsmjYs/T.yK"


@contextmanager
def private_registry(
    client: docker.DockerClient, tls: dict[str, str] | None = None, **options: Any
) -> Iterator[Container]:
    """A registry, in a container on an engine, that lets in only user, with the password "password".

    With TLS it does not start before the certificate is there.
    """
    wait = "until [ -e /cert ]; do sleep 0.1; done; " if tls else ""
    with container(
        client,
        REGISTRY_IMAGE,
        entrypoint=[
            "sh",
            "-euc",
            f"echo '{_USER}' >/htpasswd; {wait}exec registry serve /etc/distribution/config.yml",
        ],
        environment={
            "REGISTRY_AUTH": "htpasswd",
            "REGISTRY_AUTH_HTPASSWD_REALM": "tests",
            "REGISTRY_AUTH_HTPASSWD_PATH": "/htpasswd",
            **(tls or {}),
        },
        **options,
    ) as found:
        if not tls:
            wait_for(lambda: b"listening on" in found.logs(), "the registry listens", found.logs)
        yield found


@contextmanager
def container(
    client: docker.DockerClient, image: str, command: list[str] | None = None, **options: Any
) -> Iterator[Container]:
    """A container that runs while the block lasts."""
    found = client.containers.run(image, command, detach=True, labels=LABELS, **options)
    try:
        found.reload()
        yield found
    finally:
        found.remove(force=True, v=True)


def tar(files: dict[str, bytes]) -> bytes:
    texts = [(name, content.decode()) for name, content in files.items()]
    return bytes(create_archive("/", files=[], extra_files=texts).read())


def login(password: str = "password") -> dict[str, str]:
    """The user's login, as Docker's config.json has it."""
    return {"auth": base64.b64encode(f"user:{password}".encode()).decode()}


@contextmanager
def provided() -> Iterator[docker.DockerClient]:
    """This machine's Docker engine, with the images of the tests and a registry that has them."""
    with scripts_engine.running() as client:
        registry_was_there = bool(
            client.containers.list(filters={"name": "docker-sidecar-registry"})
        )
        registry.start(client, DAEMON, PREFECT, REGISTRY_IMAGE)
        yield client
        if not registry_was_there:
            scripts_engine.remove_ours(client)


def set_up_before_workers(
    session: pytest.Session, set_up: Callable[[], AbstractContextManager[object]]
) -> None:
    """With `pytest -n`: what the workers share is set up once, in the process that starts them."""
    if session.config.getoption("numprocesses", None) and not WORKER:
        context = set_up()
        context.__enter__()
        session.config.add_cleanup(lambda: context.__exit__(None, None, None))


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    with (
        closing(scripts_engine.connect(os.environ["DOCKER_HOST"]))
        if WORKER
        else provided() as client
    ):
        yield client
        for left in client.containers.list(
            all=True, filters={"label": f"docker-sidecar-on-kubernetes={SESSION}"}
        ):
            left.remove(force=True, v=True)


def busybox(
    client: docker.DockerClient, name: str = "docker-sidecar-tests:busybox", *changes: str
) -> str:
    """The name of a small image that is in no registry, and from now on on the client."""
    with container(client, DAEMON, ["-c", BUSYBOX], entrypoint=["sh"]) as found:
        found.wait()
        output = found.logs(stderr=False)
    client.api.import_image_from_data(
        base64.b64decode(output), *name.split(":"), ["ENV PATH=/bin", *changes]
    )
    return name
