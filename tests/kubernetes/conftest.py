"""A real kind cluster, a real Agent in it, and the flow, registered by the real CLI."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import kubernetes.utils
import pytest
import trustme
from docker.models.containers import Container
from prefect.run_configs import KubernetesRun

from flows.settings import load_job_template
from scripts import cluster
from scripts.base import DAEMON
from scripts.registry import registry_address
from tests.support.admin import copy_of_deploy
from tests.support.containers import archive
from tests.support.kubectl import NAMESPACE, kubectl, on_node
from tests.support.namespaces import Namespace, RunningPod
from tests.support.pages import command
from tests.support.prefect_api import PrefectAPI
from tests.support.provided_cluster import SMALL_IMAGE, api_with_the_flow, provided_cluster
from tests.support.registries import private_registry, wait_until_it_listens
from tests.support.session import WORKER, set_up_before_workers
from tests.support.shell import shell
from tests.support.submitted_runs import AGENT_LABELS, Submit, SubmittedRun, start
from tests.support.templates import NO_SUCH_DAEMON, TEMPLATES, Template

TIMEOUT = 400  # seconds, of a test that names none
# The folders for layers that the tests' namespace admits, beside the template's own.
STORES = [f"/var/lib/docker-sidecar-{NAMESPACE}-{number}" for number in range(20)]
UNUSED_STORES = iter(STORES)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        # It gives out single tests; the others give out a quarter of them at once.
        config.option.dist = "loadgroup"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/kubernetes/" in item.nodeid:
            item.add_marker("kubernetes")
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(TIMEOUT))
    items.sort(key=longest_timeout, reverse=True)  # what may take longest starts first


def longest_timeout(item: pytest.Item) -> int:
    return max((mark.args[0] for mark in item.iter_markers("timeout")), default=0)


def pytest_sessionstart(session: pytest.Session) -> None:
    set_up_before_workers(session, provided_cluster)


@pytest.fixture(scope="session")
def engine(engine: docker.DockerClient) -> Iterator[docker.DockerClient]:
    """The engine with the cluster. A worker uses what was set up before it."""
    if WORKER:
        yield engine
    else:
        with provided_cluster():
            yield engine


@pytest.fixture(scope="session")
def api(engine: docker.DockerClient) -> Iterator[PrefectAPI]:
    """A Prefect API of this process, in which the flow is registered."""
    with api_with_the_flow(engine) as api:
        yield api


@pytest.fixture(scope="session")
def namespace(
    engine: docker.DockerClient, api: PrefectAPI, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Namespace]:
    """The tests' namespace with the Agent, as an admin applies them."""
    settings = {
        "namespace": NAMESPACE,
        "api": os.environ["DOCKER_SIDECAR_TESTS_API"],
        "daemonImages": f"{DAEMON} {NO_SUCH_DAEMON}",
        "stores": " ".join(["/var/lib/docker-sidecar", *STORES]),
    }
    folder = copy_of_deploy(tmp_path_factory.mktemp("admin"), settings)
    shell(command("kubectl apply -k deploy"), folder)
    found = Namespace(cluster.api(), NAMESPACE)
    kubernetes.utils.create_from_dict(found.api, cluster.daemon_config(engine, found.name))
    yield found
    shell("kubectl delete -k deploy --ignore-not-found --wait=false", folder)
    # The Agent does not heed SIGTERM, and the namespace waits for it.
    kubectl("delete pods --all --force --wait=false")


@pytest.fixture(scope="session")
def deployment(namespace: Namespace) -> None:
    """The real Agent, which runs."""
    kubectl("rollout status deployment prefect-agent --timeout=180s")


@pytest.fixture
def agent(deployment: None, namespace: Namespace) -> RunningPod:
    """The Agent's pod, which a test may replace."""
    return namespace.pod("app=prefect-agent")


@pytest.fixture(scope="session")
def small_image(engine: docker.DockerClient) -> str:
    """A small image, by a name that the pods' daemons can pull."""
    return f"{registry_address(engine, cluster.NETWORK)}/{SMALL_IMAGE}"


@pytest.fixture(scope="session")
def templates(engine: docker.DockerClient) -> list[str]:
    """The templates that the node can run. For gVisor it is prepared as docs/gvisor.md says."""
    if on_node("sh", "-c", "command -v containerd-shim-runsc-v1 || true"):
        return TEMPLATES
    return [name for name in TEMPLATES if name != "gvisor_sidecar"]


@pytest.fixture(params=TEMPLATES)
def template_name(request: pytest.FixtureRequest, templates: list[str]) -> str:
    """The templates in turn, for tests of what all promise."""
    if request.param not in templates:
        pytest.skip(f"{request.param}: the node has no gVisor, see docs/gvisor.md")
    return str(request.param)


@pytest.fixture
def store() -> Iterator[str]:
    """A folder on the node for layers, of a test's own."""
    path = next(UNUSED_STORES)
    yield path
    on_node("rm", "-rf", path)


@pytest.fixture
def private_image(engine: docker.DockerClient, tmp_path: Path) -> Iterator[str]:
    """The small image in a registry that asks for a password, and has a certificate of a company.

    The company's CA is in tmp_path.
    """
    tls = {"REGISTRY_HTTP_TLS_CERTIFICATE": "/cert", "REGISTRY_HTTP_TLS_KEY": "/key"}
    volumes = {"docker-sidecar-registry": {"bind": "/var/lib/registry"}}
    with private_registry(engine, tls, network=cluster.NETWORK, volumes=volumes) as registry:
        address = registry.attrs["NetworkSettings"]["Networks"][cluster.NETWORK]["IPAddress"]
        company = trustme.CA()
        company.cert_pem.write_to_path(str(tmp_path / "company-ca.crt"))
        give_certificate(registry, company.issue_cert(address))
        wait_until_it_listens(registry)
        yield f"{address}:5000/{SMALL_IMAGE}"


def give_certificate(registry: Container, certificate: trustme.LeafCert) -> None:
    key = certificate.private_key_pem.bytes()
    cert = certificate.cert_chain_pems[0].bytes()
    registry.put_archive("/", archive({"key": key, "cert": cert}))


@pytest.fixture
def submit(
    namespace: Namespace, api: PrefectAPI, deployment: None, small_image: str
) -> Iterator[Submit]:
    """Submit a run of the flow, on a job template of its own if need be."""
    runs: list[SubmittedRun] = []

    def submit(
        template: Template | str = "docker_sidecar", memory: str | None = None, **parameters: Any
    ) -> SubmittedRun:
        config = KubernetesRun(
            job_template=load_job_template(template) if isinstance(template, str) else template,
            memory_request=memory,
            memory_limit=memory,
            labels=AGENT_LABELS,
        )
        run = start(
            api,
            namespace,
            parameters={"image": small_image, **parameters},
            run_config=config.serialize(),
        )
        runs.append(run)
        return run

    yield submit
    if runs:
        ids = ",".join(run.record.id for run in runs)
        kubectl(f"delete jobs --selector 'prefect.io/flow_run_id in ({ids})' --wait=false")
