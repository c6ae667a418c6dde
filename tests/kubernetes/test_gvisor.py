"""gvisor_sidecar: what the sandbox keeps from the node, seen from the node."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest

from flows.settings import load_job_template
from scripts import cluster
from tests.kubernetes.conftest import Namespace, Run
from tests.kubernetes.test_cluster import FOREVER

Submit = Callable[..., Run]
TEMPLATE = load_job_template("gvisor_sidecar")
# as much of the node as a container can ask for
GREEDY = {"privileged": True, "pid_mode": "host", "network_mode": "host", "binds": ["/:/host"]}
# for each process of a pod: its name, its user namespace, its effective capabilities
PROCESSES = """
for process in $(grep -l "pod$1" /proc/[0-9]*/cgroup | cut -d/ -f3); do
    echo $(cat /proc/$process/comm; readlink /proc/$process/ns/user; grep CapEff /proc/$process/status)
done
"""


@pytest.fixture
def on_node(engine: docker.DockerClient, gvisor: None) -> Callable[..., str]:
    """Run a command on the node, and return what it writes."""

    def run(*command: str) -> str:
        status, output = engine.containers.get(cluster.NODE).exec_run([*command])
        assert status == 0, output
        return str(output.decode())

    return run


@pytest.fixture
def marker(on_node: Callable[..., str]) -> Iterator[str]:
    """The name of a file in the root of the node."""
    name = f"marker-{uuid.uuid4().hex}"
    on_node("touch", f"/{name}")
    yield name
    on_node("rm", f"/{name}")
