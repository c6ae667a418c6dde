"""deploy/ as an admin uses it: applied, used by runs of each template, and deleted."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker
import kubernetes.utils
import pytest
from prefect.run_configs import KubernetesRun

from flows.settings import load_job_template
from scripts import cluster
from scripts.registry import push, registry_address
from tests.support.admin import copy_of_deploy
from tests.support.containers import import_busybox
from tests.support.kubectl import NAMESPACE, on_node
from tests.support.namespaces import Namespace
from tests.support.prefect_api import PrefectAPI
from tests.support.shell import shell
from tests.support.submitted_runs import SubmittedRun, start
from tests.support.templates import Template
from tests.support.waiting import wait_for

CLUSTER_SCOPED = (
    "namespaces,validatingadmissionpolicies,validatingadmissionpolicybindings,"
    "runtimeclasses,clusterroles,clusterrolebindings,persistentvolumes"
)
REGISTRY_CONTAINER = "docker-sidecar-registry"
pytestmark = pytest.mark.timeout(900)


class Team:
    """A namespace with an Agent, and runs that this Agent takes."""

    def __init__(self, api: PrefectAPI, folder: Path, name: str) -> None:
        self.api = api
        self.folder = folder
        self.name = name
        self.namespace = Namespace(cluster.api(), name)

    def run(self, template: Template | str, **parameters: object) -> SubmittedRun:
        job = load_job_template(template) if isinstance(template, str) else template
        return self.submit(KubernetesRun(job_template=job), **parameters)

    def submit(self, config: KubernetesRun, **parameters: object) -> SubmittedRun:
        return start(
            self.api,
            self.namespace,
            parameters=parameters,
            run_config=config.serialize(),
            labels=[self.name],
        )


@contextmanager
def team(api: PrefectAPI, folder: Path, name: str, *components: str) -> Iterator[Team]:
    """Apply deploy/ under a name of the tests' own, wait for its Agent, and delete it."""
    settings = {"namespace": name, "label": name, "api": os.environ["DOCKER_SIDECAR_TESTS_API"]}
    copy_of_deploy(folder, settings, *components)
    with applied(folder, name):
        yield Team(api, folder, name)


@contextmanager
def applied(folder: Path, namespace: str) -> Iterator[None]:
    shell("kubectl apply -k deploy", folder)
    try:
        wait = "rollout status deployment --timeout=180s"
        shell(f"kubectl --namespace {namespace} {wait}")
        yield
    finally:
        # The Agent does not heed SIGTERM, and the namespace waits for it.
        shell(f"kubectl --namespace {namespace} delete deployments,jobs --all --wait=false")
        shell(f"kubectl --namespace {namespace} delete pods --all --force --wait=false")
        shell("kubectl delete -k deploy --ignore-not-found --timeout=200s", folder)


def cluster_scoped() -> set[str]:
    return set(shell(f"kubectl get {CLUSTER_SCOPED} --output name").split())


def test_each_setting_arrives(engine: docker.DockerClient, tmp_path: Path) -> None:
    settings = {
        "namespace": "a-namespace",
        "api": "http://an-api:1",
        "label": "a-label",
        "agentImage": "an/agent:1",
        "daemonImages": "a/daemon:1 a/daemon:2",
        "stores": "/a/store /another/store",
        "podNetwork": "10.1.0.0/16",
        "serviceNetwork": "10.2.0.0/16",
    }
    components = ["gvisor", "node-pool", "mirror", "renew-login", "one-template"]
    copy_of_deploy(tmp_path, settings, *components)
    applied = shell("kubectl apply -k deploy --dry-run=client --output json", tmp_path)
    missing = [value for value in settings.values() if value not in applied]
    assert missing == []
    without_prose = applied.replace("the flows", "").replace("flows.", "")
    assert re.findall(r'": "flows|-flows|your-server', without_prose) == []


def test_a_run_of_each_template_and_nothing_stays(
    api: PrefectAPI,
    tmp_path: Path,
    templates: list[str],
    engine: docker.DockerClient,
    small_image: str,
) -> None:
    name = f"{NAMESPACE}-all"
    before = cluster_scoped()
    with team(api, tmp_path, name) as ours:
        kubernetes.utils.create_from_dict(cluster.api(), cluster.daemon_config(engine, name))
        runs = [ours.run(each, image=small_image, command="echo hi") for each in templates]
        for run in runs:
            run.succeeds("hi")
    of_ours = {each for each in cluster_scoped() - before if name in each}
    assert of_ours == set()


def test_two_teams_on_one_cluster(
    api: PrefectAPI, tmp_path: Path, engine: docker.DockerClient, small_image: str
) -> None:
    """One's deletion leaves the other's policies and Agent."""
    first, second = f"{NAMESPACE}-a", f"{NAMESPACE}-b"
    with team(api, tmp_path / "b", second) as other:
        with team(api, tmp_path / "a", first) as ours:
            for each in (ours, other):
                config = cluster.daemon_config(engine, each.name)
                kubernetes.utils.create_from_dict(cluster.api(), config)
            runs = [
                each.run("native_sidecar", image=small_image, command="true")
                for each in (ours, other)
            ]
            for run in runs:
                run.succeeds()
        assert not any(first in each for each in cluster_scoped())
        other.run("native_sidecar", image=small_image, command="true").succeeds()


def test_one_template_is_changed_without_registering(
    api: PrefectAPI, tmp_path: Path, engine: docker.DockerClient, small_image: str
) -> None:
    name = f"{NAMESPACE}-one"
    with team(api, tmp_path, name, "one-template") as ours:
        kubernetes.utils.create_from_dict(cluster.api(), cluster.daemon_config(engine, name))
        config = KubernetesRun(job_template_path="agent:///job-template/native_sidecar.yaml")
        parameters = {
            "image": small_image,
            "environment": ["TEMPLATE"],
            "command": ["sh", "-c", "echo $TEMPLATE"],
        }
        template = tmp_path / "job_templates" / "native_sidecar.yaml"
        variable = "          env:\n            - {name: TEMPLATE, value: the second one}\n"
        name_of_the_flow = "- name: flow-container\n          env:\n"
        text = template.read_text()
        assert name_of_the_flow in text
        ours.submit(config, **{**parameters, "environment": {}}).succeeds()
        template.write_text(text.replace(name_of_the_flow, f"- name: flow-container\n{variable}"))
        shell("kubectl apply -k deploy", tmp_path)

        def agent_has_it() -> bool:
            # kubelet looks at the volumes of a pod that changes at once, at others within minutes
            agent = ours.namespace.pod("app=prefect-agent")
            annotate = f"annotate --overwrite pod {agent.name} looked-at={uuid.uuid4()}"
            shell(f"kubectl --namespace {name} {annotate}")
            mounted = agent.execute("agent", "cat", "/job-template/native_sidecar.yaml")
            return "the second one" in mounted

        wait_for(agent_has_it, "the Agent has the template", ours.namespace.report, 150)
        ours.submit(config, **parameters).succeeds("the second one")


class DockerHub:
    """The local registry, which the mirror takes for Docker Hub, and an image of it."""

    def __init__(self, engine: docker.DockerClient) -> None:
        self.engine = engine
        self.name = f"tests/{uuid.uuid4().hex}"
        push(engine, import_busybox(engine), f"{self.name}:1")
        self.address = registry_address(engine, cluster.NETWORK)

    def requests(self, method: str) -> int:
        """How many requests for the image have reached the registry, by its log."""
        log = self.engine.containers.get(REGISTRY_CONTAINER).logs().decode()
        return len(re.findall(rf'"{method} /v2/{self.name}/(?:manifests|blobs)/', log))


@contextmanager
def volume(claim_of: str) -> Iterator[None]:
    """A volume for the mirror: the cluster has nothing that provides one."""
    path = f"/var/lib/{claim_of}"
    on_node("sh", "-c", f"mkdir -p {path} && chown 1000 {path}")
    spec = {
        "capacity": {"storage": "50Gi"},
        "accessModes": ["ReadWriteOnce"],
        "hostPath": {"path": path},
        "claimRef": {"name": "docker-hub", "namespace": claim_of},
    }
    body = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": claim_of},
        "spec": spec,
    }
    kubernetes.utils.create_from_dict(cluster.api(), body)
    try:
        yield
    finally:
        shell(f"kubectl delete persistentvolume {claim_of} --wait=false")
        on_node("rm", "-rf", path)


def test_with_the_mirror_thirty_runs_download_an_image_from_docker_hub_once(
    api: PrefectAPI, tmp_path: Path, engine: docker.DockerClient
) -> None:
    """Later ones only ask whether the tag is still the same. Docker Hub does not count that."""
    hub = DockerHub(engine)
    name = f"{NAMESPACE}-mirror"
    settings = {"namespace": name, "label": name, "api": os.environ["DOCKER_SIDECAR_TESTS_API"]}
    copy_of_deploy(tmp_path, settings, "mirror")
    mirror = tmp_path / "deploy" / "components" / "mirror" / "mirror.yaml"
    text = mirror.read_text()
    assert "https://registry-1.docker.io" in text
    mirror.write_text(text.replace("https://registry-1.docker.io", f"http://{hub.address}"))
    pushed = hub.requests("GET")
    with volume(name), applied(tmp_path, name):
        ours = Team(api, tmp_path, name)
        ours.run("native_sidecar", image=f"{hub.name}:1", command="true").succeeds()
        downloaded = hub.requests("GET") - pushed
        assert downloaded > 0, "the first run's image came from there"
        for count in [5, 5, 5, 5, 5, 4]:  # at once; more are too many for a small node
            runs = [
                ours.run("native_sidecar", image=f"{hub.name}:1", command="true")
                for _ in range(count)
            ]
            for run in runs:
                run.succeeds()
        assert hub.requests("GET") - pushed == downloaded
        assert hub.requests("HEAD") > 0
