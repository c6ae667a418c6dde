"""What a sidecar needs to be left running: layers that stay, private images, few rights, limits."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest
import yaml

from scripts import cluster
from tests.conftest import PREFECT, private_registry
from tests.kubernetes.conftest import Namespace, Run, daemon_of
from tests.kubernetes.test_cluster import FOREVER
from tests.support.pages import example

Submit = Callable[..., Run]


def volume(template: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [v for v in template["spec"]["template"]["spec"]["volumes"] if v["name"] == name]
    return found  # type: ignore[no-any-return]


@pytest.fixture
def on_node_storage(template: dict[str, Any], template_name: str) -> dict[str, Any]:
    """The template with the edit that docs/kubernetes.md shows for layers that outlive the pod."""
    edits = {
        "docker_sidecar": example("layers-on-the-node-docker"),
        "native_sidecar": example("layers-on-the-node-native"),
    }
    edit = yaml.safe_load(edits[template_name])
    pod = template["spec"]["template"]["spec"]
    for key, items in edit.items():
        for item in items:
            [found] = [it for it in pod[key] if it["name"] == item["name"]]
            if "emptyDir" in found:
                del found["emptyDir"]
                item["hostPath"]["path"] += f"-{uuid.uuid4().hex[:8]}"
            found.update(item)
    return template


def pull_seconds(run: Run) -> float:
    run.logged(f"for {PREFECT} (")  # Downloaded newer image for, Image is up to date for
    [found] = re.findall(rf"for {PREFECT} \((?:.*, )?([0-9.]+) s\)", run.logs())
    return float(found)


def test_the_second_run_on_a_node_pulls_nothing(
    submit: Submit, namespace: Namespace, on_node_storage: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pulls, spans, outcomes = [], [], []
    for _ in range(2):
        run = submit(on_node_storage, image=PREFECT, command="true")
        assert run.reaches("Success", "Failed").state == "Success", run.seen()
        _, at = run.job_ends()
        spans.append((at - namespace.jobs[run.record.id][0][2].metadata.creation_timestamp).total_seconds())
        pulls.append(pull_seconds(run))
        outcomes += re.findall("Downloaded newer image|Image is up to date", run.logs())
    with capsys.disabled():
        print(
            f"\ncold: pull {pulls[0]:.1f} s, Job {spans[0]:.1f} s; warm: pull {pulls[1]:.1f} s, Job {spans[1]:.1f} s "
            f"({spans[1] / spans[0]:.0%})"
        )
    assert outcomes == ["Downloaded newer image", "Image is up to date"]


def test_two_runs_at_once_use_two_slots(submit: Submit, namespace: Namespace, on_node_storage: dict[str, Any]) -> None:
    runs = [submit(on_node_storage, command=FOREVER) for _ in range(2)]
    pods = [run.container_writes("up") for run in runs]
    ask = ["docker", "info", "--format", "{{.DockerRootDir}}"]
    roots = {namespace.execute(pod, "dind-daemon", *ask).strip() for pod in pods}
    assert roots == {"/var/lib/docker/0", "/var/lib/docker/1"}


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
