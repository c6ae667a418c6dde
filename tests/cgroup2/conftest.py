"""A machine with cgroup v2, which is built and booted for the first test."""

import subprocess
from collections.abc import Iterator

import pytest

from flows.settings import PROJECT
from scripts.airgap import dockerd
from tests.support.cgroup2_node import Node, built


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """The machine. The test that is the first to ask for it waits until it is built and booted."""
    install = str(PROJECT / "scripts" / "apt-install.sh")
    packages = ["qemu-system-x86", "e2fsprogs"]
    subprocess.run([install, "--no-install-recommends", *packages], check=True)
    with dockerd.running() as client:
        folder = built(client)
    machine = Node(folder, tmp_path_factory.mktemp("node") / "console")
    yield machine
    machine.end()
