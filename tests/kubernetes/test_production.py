"""What a sidecar needs to be left running: layers that stay, private images, few rights, limits."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest

from flows.settings import load_job_template
from scripts import cluster
from tests.conftest import PREFECT, private_registry
from tests.kubernetes.conftest import Namespace, Run, daemon_of
from tests.kubernetes.test_cluster import FOREVER, edited

Submit = Callable[..., Run]


def volume(template: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [v for v in template["spec"]["template"]["spec"]["volumes"] if v["name"] == name]
    return found  # type: ignore[no-any-return]


@pytest.fixture
def kept_layers(engine: docker.DockerClient) -> Iterator[dict[str, Any]]:
    """The template with a store of the test's own on the node."""
    template = load_job_template("kept_layers")
    path = volume(template, "docker-graph-store")["hostPath"]["path"] = (
        f"/var/lib/docker-sidecar-{uuid.uuid4().hex[:8]}"
    )
    yield template
    engine.containers.get(cluster.NODE).exec_run(["rm", "-rf", path])


def test_the_second_run_on_a_node_pulls_nothing(submit: Submit, kept_layers: dict[str, Any]) -> None:
    outcomes = []
    for _ in range(2):
        run = submit(kept_layers, image=PREFECT, command="true")
        assert run.reaches("Success", "Failed").state == "Success", run.seen()
        run.job_ends()
        outcomes += re.findall("Downloaded newer image|Image is up to date", run.logs())
    assert outcomes == ["Downloaded newer image", "Image is up to date"]


def test_a_second_run_may_use_the_name_of_the_first_ones_container(
    submit: Submit, namespace: Namespace, kept_layers: dict[str, Any]
) -> None:
    """What an earlier run left in a slot is gone before the flow starts."""
    first = submit(kept_layers, command=FOREVER)
    pod = first.container_writes("up")
    namespace.execute(pod, "dind-daemon", "docker", "volume", "create", "left")
    namespace.core.delete_namespaced_pod(pod, namespace.name, grace_period_seconds=0)
    first.job_ends()
    second = submit(kept_layers, command=FOREVER)
    pod = second.container_writes("up")
    left = "docker ps --all --quiet | wc -l; docker volume ls --quiet | wc -l"
    assert namespace.execute(pod, "dind-daemon", "sh", "-c", left).split() == ["1", "0"]


def test_two_runs_at_once_use_two_slots(submit: Submit, namespace: Namespace, kept_layers: dict[str, Any]) -> None:
    runs = [submit(kept_layers, command=FOREVER) for _ in range(2)]
    pods = [run.container_writes("up") for run in runs]
    ask = ["docker", "info", "--format", "{{.DockerRootDir}}"]
    assert {namespace.execute(pod, "dind-daemon", *ask).strip() for pod in pods} == {"/store/0", "/store/1"}


def test_more_runs_than_slots(submit: Submit, namespace: Namespace, kept_layers: dict[str, Any]) -> None:
    template = edited(kept_layers, "0 1 2 3 4 5 6 7", "0")
    first = submit(template, command=FOREVER)
    first.container_writes("up")
    second = submit(template, command="echo in a store of its own")
    assert second.reaches("Success", "Failed").state == "Success", second.seen()


def test_a_configuration_that_dockerd_refuses(submit: Submit, kept_layers: dict[str, Any]) -> None:
    """The hook gives up with the daemon, so that the flow starts and says what is wrong."""
    daemon_of(kept_layers)["args"].append("--mtu=many")
    run = submit(kept_layers, command="true")
    assert "dind-daemon" in run.reaches("Failed", "Success").message


def test_a_hungry_container_takes_its_pod_not_the_node(
    submit: Submit, template: dict[str, Any], template_name: str
) -> None:
    daemon_of(template)["resources"]["limits"]["memory"] = "512Mi"
    run = submit(template, command=["sh", "-c", "echo up; x=eight888; while :; do x=$x$x; done"])
    message = run.reaches("Failed", "Success").message
    if template_name == "gvisor_sidecar":  # the sandbox is one process, so the flow ends too, and the Agent says so
        run.logged("Reason: OOMKilled")
    else:
        run.logged("up")
        # the container, or dockerd itself: they are out of memory together
        assert "exited with code 137" in message or "does not answer" in message, run.seen()
    run.job_ends()
    assert submit(command="echo the node is well").reaches("Success", "Failed").state == "Success"


@pytest.fixture
def private_image(engine: docker.DockerClient, small_image: str) -> Iterator[str]:
    """The small image in a registry that asks for a password."""
    volumes = {"docker-sidecar-registry": {"bind": "/var/lib/registry"}}
    with private_registry(engine, network=cluster.NETWORK, volumes=volumes) as container:
        address = container.attrs["NetworkSettings"]["Networks"][cluster.NETWORK]["IPAddress"]
        yield f"{address}:5000/tests/busybox:1"


def test_configuration_and_private_image(
    submit: Submit, readme: Callable[..., str], private_image: str, template: dict[str, Any], template_name: str
) -> None:
    """By the ConfigMap and the Secret of the pages, but for what a daemon here does not know or cannot reach."""
    registry, name = private_image.partition("/")[0], f"private-{uuid.uuid4().hex[:8]}"
    volume(template, "daemon-config")["configMap"]["name"] = name
    volume(template, "registry-credentials")["secret"]["secretName"] = name
    if "hostPath" in (store := volume(template, "docker-graph-store")):  # another run may have pulled this image there
        store["hostPath"]["path"] = f"/var/lib/docker-sidecar-{name}"
    instead = {
        "docker-sidecar": name,
        '"registry-mirrors": ["https://mirror.example.com"]': f'"insecure-registries": ["{registry}"]',
        "registry.example.com": registry,
    }
    readme("kubectl create configmap", instead)
    command = "ip link show eth0"
    record = submit(template, image=private_image, command=command).reaches("Failed", "Success")
    assert "Secret docker-sidecar" in record.message

    readme("kubectl create secret", instead)
    run = submit(template, image=private_image, command=command)
    assert run.reaches("Failed", "Success").state == "Success", run.seen()
    run.logged("mtu 1386" if template_name == "gvisor_sidecar" else "mtu 1400")  # gVisor's is without the header's 14
