"""Containers that last as long as a block, and the small image that most of them run."""

import base64
import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import docker
from docker.models.containers import Container

from scripts.base import DAEMON, PREFECT
from tests.support.session import SESSION_LABELS

PREFECT_IMAGE = PREFECT[0]
# The smallest image that can run a command: the busybox of the daemon's image, whether that is the
# published one (Alpine, where busybox needs musl) or the stand-in.
BUSYBOX_TREE = """
mkdir -p /t/bin /t/lib
cp /bin/busybox /t/bin/
cp /lib/ld-musl* /t/lib/
busybox --list | while read -r applet; do ln -s busybox /t/bin/$applet; done
tar -C /t -c . | base64
"""


@contextmanager
def running_container(
    client: docker.DockerClient, image: str, command: list[str] | None = None, **options: Any
) -> Iterator[Container]:
    """A container that runs while the block lasts."""
    container = client.containers.run(image, command, detach=True, labels=SESSION_LABELS, **options)
    try:
        container.reload()
        yield container
    finally:
        container.remove(force=True, v=True)


def run_shell(container: Container, script: str) -> str:
    """Run shell commands in a container, successfully, and return what they write."""
    status, output = container.exec_run(["sh", "-euc", script])
    assert isinstance(output, bytes)
    text = output.decode()
    assert status == 0, text
    return text.strip()


def archive(files: dict[str, bytes]) -> bytes:
    """Files by their paths as a tar archive, which `put_archive` takes."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def import_busybox(
    client: docker.DockerClient, name: str = "docker-sidecar-tests:busybox", *changes: str
) -> str:
    """Make a small image, which is in no registry, on a daemon, and return its name."""
    with running_container(client, DAEMON, ["-c", BUSYBOX_TREE], entrypoint=["sh"]) as container:
        container.wait()
        output = container.logs(stderr=False)
    repository, tag = name.split(":")
    client.api.import_image_from_data(
        base64.b64decode(output), repository, tag, ["ENV PATH=/bin", *changes]
    )
    return name
