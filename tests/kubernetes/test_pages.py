"""What the pages show for a cluster: flows of one's own, /workspace, a company's CA, a policy for the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import docker
import kubernetes.client
import pytest
import trustme
import yaml

from flows.settings import PROJECT, load_job_template
from scripts import cluster
from scripts.base import REGISTRY_IMAGE
from scripts.registry import REGISTRY
from tests.conftest import container, tar
from tests.kubernetes.conftest import Namespace, Run
from tests.kubernetes.test_production import volume
from tests.support.pages import example
from tests.support.prefect_api import PrefectAPI
from tests.support.waiting import wait_for

Submit = Callable[..., Run]
Template = dict[str, Any]
SOURCES = {"two_containers": example("two-containers"), "build_and_run": example("build-and-run")}


@pytest.mark.parametrize(
    ("module", "says"),
    [("two_containers", None), ("build_and_run", "hello from an image that this run has built")],
)
def test_own_flow(
    api: PrefectAPI, agent: str, namespace: Namespace, small_image: str, tmp_path: Path, module: str, says: str | None
) -> None:
    """Registered from a copy of the project's folder that has it, as the page says."""
    for name in ("flows", "job_templates", "Dockerfile", "requirements.txt", ".dockerignore"):
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, tmp_path / name)
    source = SOURCES[module].replace('image_tag="1"', f'image_tag="{namespace.name}"')  # which the node has not pulled
    (tmp_path / "flows" / f"{module}.py").write_text(source)
    environment = {**os.environ, **api.env, "PYTHONPATH": str(tmp_path), "FLOW_REGISTRY_URL": REGISTRY}
    prefect = Path(sys.executable).with_name("prefect")
    for arguments in (["create", "project", module], ["register", "--project", module, "-m", f"flows.{module}"]):
        done = subprocess.run([prefect, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    flow_id = next(reversed(api.flows))
    run = Run(namespace, api.flow_runs[api.create_flow_run(flow_id, parameters={"image": small_image})])
    assert run.reaches("Success", "Failed").state == "Success", run.seen()
    if says:
        run.logged(says)
    assert run.job_ends()[0] == "Complete"


def test_workspace(submit: Submit, template: Template, namespace: Namespace) -> None:
    """Files go from the container to the flow's user and back."""
    there = "until [ -e /workspace/in ]; do sleep 0.1; done"
    script = f"echo from the container >/workspace/out; echo up; {there}; cat /workspace/in"
    run = submit(template, command=["sh", "-c", script], host_config={"binds": ["/workspace:/workspace"]})
    pod = run.container_writes("up")
    assert namespace.execute(pod, "flow-container", "cat", "/workspace/out") == "from the container\n"
    namespace.execute(pod, "flow-container", "sh", "-c", "echo from the flow >/workspace/in")
    assert run.reaches("Success", "Failed").state == "Success", run.seen()
    run.logged("from the flow")


def test_own_template(submit: Submit) -> None:
    run = submit(yaml.safe_load(example("own-template")), command="echo on my own template")
    assert run.reaches("Success", "Failed").state == "Success", run.seen()
    run.logged("on my own template")


@pytest.fixture
def private_ca_image(engine: docker.DockerClient, small_image: str, tmp_path: Path) -> Iterator[str]:
    """The small image in a registry whose certificate is from a CA of its own, which is left in tmp_path."""
    wait = "until [ -e /cert ]; do sleep 0.1; done; exec registry serve /etc/distribution/config.yml"
    environment = {"REGISTRY_HTTP_TLS_CERTIFICATE": "/cert", "REGISTRY_HTTP_TLS_KEY": "/key"}
    volumes = {"docker-sidecar-registry": {"bind": "/var/lib/registry"}}
    with container(
        engine,
        REGISTRY_IMAGE,
        entrypoint=["sh", "-euc", wait],
        environment=environment,
        network=cluster.NETWORK,
        volumes=volumes,
    ) as found:
        address = found.attrs["NetworkSettings"]["Networks"][cluster.NETWORK]["IPAddress"]
        authority = trustme.CA()
        certificate = authority.issue_cert(address)
        authority.cert_pem.write_to_path(str(tmp_path / "company-ca.crt"))
        key, cert = certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
        found.put_archive("/", tar({"key": key, "cert": cert}))
        wait_for(lambda: b"listening on" in found.logs(), "the registry listens", found.logs)
        yield f"{address}:5000/tests/busybox:1"


def test_row_35_a_registry_with_a_companys_own_ca(
    submit: Submit,
    template: Template,
    namespace: Namespace,
    readme: Callable[..., str],
    private_ca_image: str,
    tmp_path: Path,
) -> None:
    name = f"ca-{uuid.uuid4().hex[:8]}"
    volume(template, "daemon-config")["configMap"]["name"] = name
    record = submit(template, image=private_ca_image, command="true").reaches("Failed", "Success")
    assert record.state == "Failed"
    assert "x509" in record.message
    assert not [log for log in record.logs if "retry 1" in str(log.message)]

    instead = {  # the kubectl of the tests is on the node
        "--namespace flows": f"--namespace {namespace.name}",
        "configmap docker-sidecar": f"configmap {name}",
        "--from-file=daemon.json": "--from-literal=daemon.json={}",
        "--from-file=company-ca.crt": f"--from-literal=company-ca.crt='{(tmp_path / 'company-ca.crt').read_text()}'",
    }
    readme("kubectl --namespace flows create configmap", instead)
    run = submit(template, image=private_ca_image, command="echo trusted")
    assert run.reaches("Success", "Failed").state == "Success", run.seen()
    run.logged("trusted")


# a container that tries addresses until it reaches the second one, or no longer reaches it, and says what it reaches
PROBE = """
import socket, sys, time
def reach(address):
    try: socket.create_connection((address, 80), 3).close(); return "open"
    except OSError: return "closed"
while reach(sys.argv[3]) != sys.argv[1]: time.sleep(1)
print(*[f"{reach(address)} {address}" for address in sys.argv[2:]], sep="\\n")
"""


def test_network_policy(submit: Submit, namespace: Namespace, agent: str) -> None:
    """With the policy of the page a container reaches neither pods nor Services nor metadata, and the run succeeds."""
    template = load_job_template("native_sidecar")
    name, image = f"probe-{uuid.uuid4().hex[:8]}", "prefecthq/prefect:1.4.1"
    server = {"name": "server", "image": image, "command": ["python", "-m", "http.server", "80"]}
    pod = {"metadata": {"name": name, "labels": {"app": name}}, "spec": {"containers": [server]}}
    namespace.core.create_namespaced_pod(namespace.name, pod)
    service = {"metadata": {"name": name}, "spec": {"selector": {"app": name}, "ports": [{"port": 80}]}}
    service_address = namespace.core.create_namespaced_service(namespace.name, service).spec.cluster_ip
    policies = kubernetes.client.NetworkingV1Api(namespace.api)
    policy = yaml.safe_load(example("network-policy"))

    def address() -> Any:
        return namespace.core.read_namespaced_pod(name, namespace.name).status.pod_ip

    try:
        addresses = [wait_for(address, "the server has an address", namespace.report, 60), service_address]
        for expected, others in (("open", []), ("closed", ["169.254.169.254"])):
            if expected == "closed":
                policies.create_namespaced_network_policy(namespace.name, policy)
            command = ["python", "-c", PROBE, expected, *addresses, *others]
            run = submit(template, image=image, command=command, time_limit=120)
            assert run.reaches("Success", "Failed").state == "Success", run.seen()
            for each in addresses + others:
                run.logged(f"{expected} {each}")
    finally:
        with suppress(kubernetes.client.ApiException):
            policies.delete_namespaced_network_policy(policy["metadata"]["name"], namespace.name)
        namespace.core.delete_namespaced_service(name, namespace.name)
        namespace.core.delete_namespaced_pod(name, namespace.name, grace_period_seconds=0)


def test_two_native_daemons_on_one_store(submit: Submit, namespace: Namespace) -> None:
    """Without the edit for slots: the second daemon refuses to start, and the first one goes on."""
    template = load_job_template("native_sidecar")
    store = volume(template, "docker-graph-store")
    del store["emptyDir"]
    store["hostPath"] = {"path": f"/var/lib/docker-sidecar-{uuid.uuid4().hex[:8]}", "type": "DirectoryOrCreate"}
    first = submit(template, command=["sh", "-c", "echo up; exec sleep 85"])
    first.container_writes("up")
    second = submit(template, command="true")
    assert "does not answer" in second.reaches("Failed", "Success", timeout=120).message
    assert first.reaches("Success", "Failed").state == "Success", first.seen()
