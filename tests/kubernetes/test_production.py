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
from tests.kubernetes.conftest import Namespace, Run
from tests.kubernetes.test_cluster import FOREVER

Submit = Callable[..., Run]


def volume(template: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [v for v in template["spec"]["template"]["spec"]["volumes"] if v["name"] == name]
    return found  # type: ignore[no-any-return]


def on_node_storage() -> dict[str, Any]:
    """The template with the edit that it proposes for layers that outlive the pod."""
    template = load_job_template("docker_sidecar")
    store = volume(template, "docker-graph-store")
    del store["emptyDir"]
    store["hostPath"] = {"path": f"/var/lib/docker-sidecar-{uuid.uuid4().hex[:8]}", "type": "DirectoryOrCreate"}
    return template


def pull_seconds(run: Run) -> float:
    run.logged(f"for {PREFECT} (")  # Downloaded newer image for, Image is up to date for
    [found] = re.findall(rf"for {PREFECT} \((?:.*, )?([0-9.]+) s\)", run.logs())
    return float(found)


def test_the_second_run_on_a_node_pulls_nothing(
    submit: Submit, namespace: Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    template, pulls, spans, outcomes = on_node_storage(), [], [], []
    for _ in range(2):
        run = submit(template, image=PREFECT, command="true")
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


def test_two_runs_at_once_use_two_slots(submit: Submit, namespace: Namespace) -> None:
    template = on_node_storage()
    runs = [submit(template, command=FOREVER) for _ in range(2)]
    pods = [run.container_writes("up") for run in runs]
    ask = ["docker", "info", "--format", "{{.DockerRootDir}}"]
    roots = {namespace.execute(pod, "dind-daemon", *ask).strip() for pod in pods}
    assert roots == {"/var/lib/docker/0", "/var/lib/docker/1"}


def test_the_flow_has_few_rights(submit: Submit, namespace: Namespace) -> None:
    run = submit(command=FOREVER)
    pod = run.container_writes("up")
    status = namespace.execute(
        pod, "flow-container", "sh", "-c", "cat /proc/1/status; touch /here; ls /var/run/secrets"
    )
    assert re.search(r"^Uid:\s+1000\s", status, re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
    assert "Read-only file system" in status
    assert "kubernetes.io" not in status, "no token of a service account"


def test_a_hungry_container_takes_its_pod_not_the_node(submit: Submit, namespace: Namespace) -> None:
    template = load_job_template("docker_sidecar")
    template["spec"]["template"]["spec"]["containers"][1]["resources"]["limits"]["memory"] = "512Mi"
    run = submit(template, command=["sh", "-c", "echo up; x=eight888; while :; do x=$x$x; done"])
    message = run.reaches("Failed", "Success").message
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
        yield f"{address}:5000/busybox:1"


def test_configuration_and_private_image(submit: Submit, readme: Callable[..., str], private_image: str) -> None:
    """By the ConfigMap and the Secret of README.md, but for what a daemon here does not know or cannot reach."""
    registry, name = private_image.partition("/")[0], f"private-{uuid.uuid4().hex[:8]}"
    template = load_job_template("docker_sidecar")
    volume(template, "daemon-config")["configMap"]["name"] = name
    volume(template, "registry-credentials")["secret"]["secretName"] = name
    instead = {
        "docker-sidecar": name,
        '"registry-mirrors": ["https://mirror.example.com"]': f'"insecure-registries": ["{registry}"]',
        ',  "proxies": {"https-proxy": "http://proxy.example.com:3128"}': "",  # Docker 23 and newer
        "registry.example.com": registry,
    }
    readme("kubectl create configmap", instead)
    command = "cat /sys/class/net/eth0/mtu"
    record = submit(template, image=private_image, command=command).reaches("Failed", "Success")
    assert "a Secret named docker-sidecar of type kubernetes.io/dockerconfigjson" in record.message

    readme("kubectl create secret", instead)
    run = submit(template, image=private_image, command=command)
    assert run.reaches("Failed", "Success").state == "Success", run.seen()
    run.logged("1400")
