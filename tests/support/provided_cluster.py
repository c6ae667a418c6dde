"""The cluster of the tests, set up once for all workers: what is there before the first test."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import docker

from scripts import cluster, registry
from tests.support.containers import import_busybox
from tests.support.daemons import provided_engine
from tests.support.kubectl import KUBECTL
from tests.support.prefect_api import PrefectAPI
from tests.support.readme import readme

SMALL_IMAGE = "tests/busybox:1"  # in the local registry


@contextmanager
def reachable_prefect_api(client: docker.DockerClient) -> Iterator[PrefectAPI]:
    """A Prefect API on an address of this machine that pods reach as well."""
    gateway = client.networks.get(cluster.NETWORK).attrs["IPAM"]["Config"][0]["Gateway"]
    with PrefectAPI(host=gateway) as api:
        connect = ["bash", "-c", f"</dev/tcp/{gateway}/{api.server_port}"]
        status, output = client.containers.get(cluster.NODE).exec_run(connect)
        assert status == 0, f"pods cannot reach this machine at {api.url}; a firewall? {output!r}"
        os.environ["DOCKER_SIDECAR_TESTS_API"] = api.url
        yield api
    assert not api.errors, api.errors


@contextmanager
def provided_cluster() -> Iterator[docker.DockerClient]:
    """The engine with the cluster, a small image in its registry, and the flow, registered once.

    A cluster that cannot be had is a failure.
    """
    with provided_engine() as client, TemporaryDirectory() as home:
        was_up = cluster.node_of(client)
        cluster.start(client)
        registry.push(client, import_busybox(client), SMALL_IMAGE)
        os.environ["DOCKER_SIDECAR_TESTS"] = home
        install_kubectl(Path(home))
        with reachable_prefect_api(client) as api:
            readme("prefect backend server")
            readme("prefect create project")
            readme("prefect register")
            registered_flows(home).write_bytes(pickle.dumps(list(api.flows.values())))
        yield client
        if not was_up:
            cluster.delete(client)


def install_kubectl(home: Path) -> None:
    program = home / "kubectl"
    program.write_text(KUBECTL)
    program.chmod(0o755)


def registered_flows(home: str) -> Path:
    """The file with the flows as the API has stored them: each worker has an API of its own."""
    return Path(home, "registered")


@contextmanager
def api_with_the_flow(client: docker.DockerClient) -> Iterator[PrefectAPI]:
    """A Prefect API of this process, in which the flow is registered."""
    stored = registered_flows(os.environ["DOCKER_SIDECAR_TESTS"]).read_bytes()
    [flow] = pickle.loads(stored)  # noqa: S301  # of this test session
    with reachable_prefect_api(client) as api:
        api.flows[flow.id] = flow
        api._store.project.append(flow.project)
        yield api
