"""What a sidecar needs to be left running: layers that stay, a configuration, private images."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
import trustme

from flows.settings import load_job_template
from scripts import cluster
from tests.conftest import private_registry, tar
from tests.kubernetes.conftest import FOREVER, SMALL_IMAGE, Namespace, Readme, Submit, Template, edited, volume
from tests.support.waiting import wait_for


def test_kept_layers(submit: Submit, namespace: Namespace, store: str) -> None:
    """Two runs have a slot each, a third one a store of its own; after the first one's death its slot is used again."""
    template = edited(load_job_template("kept_layers"), "0 1 2 3 4 5 6 7", "0 1")
    volume(template, "docker-graph-store")["hostPath"]["path"] = store
    runs = [submit(template, command=FOREVER) for _ in range(2)]
    pods = [run.container_writes("up") for run in runs]
    ask = ["docker", "info", "--format", "{{.DockerRootDir}}"]
    roots = [namespace.execute(pod, "dind-daemon", *ask).strip() for pod in pods]
    assert set(roots) == {"/store/0", "/store/1"}
    submit(template, command="true").succeeds("Downloaded newer image")

    namespace.execute(pods[0], "dind-daemon", "docker", "volume", "create", "left")
    namespace.core.delete_namespaced_pod(pods[0], namespace.name, grace_period_seconds=0)
    runs[0].job_ends()
    again = submit(template, command=FOREVER)
    pod = again.container_writes("up")
    again.logged("Image is up to date")
    assert namespace.execute(pod, "dind-daemon", *ask).strip() == roots[0]
    left = "docker ps --all --quiet | wc -l; docker volume ls --quiet | wc -l"
    assert namespace.execute(pod, "dind-daemon", "sh", "-c", left).split() == ["1", "0"], "only its own container"


@pytest.fixture
def private_image(engine: docker.DockerClient, tmp_path: Path) -> Iterator[str]:
    """The small image in a registry that asks for a password; a CA of its own, in tmp_path, has signed for it."""
    tls = {"REGISTRY_HTTP_TLS_CERTIFICATE": "/cert", "REGISTRY_HTTP_TLS_KEY": "/key"}
    volumes = {"docker-sidecar-registry": {"bind": "/var/lib/registry"}}
    with private_registry(engine, tls, network=cluster.NETWORK, volumes=volumes) as found:
        address = found.attrs["NetworkSettings"]["Networks"][cluster.NETWORK]["IPAddress"]
        authority = trustme.CA()
        certificate = authority.issue_cert(address)
        authority.cert_pem.write_to_path(str(tmp_path / "company-ca.crt"))
        key, cert = certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
        found.put_archive("/", tar({"key": key, "cert": cert}))
        wait_for(lambda: b"listening on" in found.logs(), "the registry listens", found.logs)
        yield f"{address}:5000/{SMALL_IMAGE}"


def test_configuration_ca_login_and_proxy(
    submit: Submit,
    readme: Readme,
    private_image: str,
    template: Template,
    template_name: str,
    store: str,
    namespace: Namespace,
    tmp_path: Path,
) -> None:
    """By the ConfigMap and the Secret of the pages. What is missing is said by the flow, so one template tells."""
    name, tells = f"private-{uuid.uuid4().hex[:8]}", template_name == "native_sidecar"
    volume(template, "daemon-config")["configMap"]["name"] = name
    volume(template, "registry-credentials")["secret"]["secretName"] = name
    if "hostPath" in (graph_store := volume(template, "docker-graph-store")):
        graph_store["hostPath"]["path"] = store  # another run may have pulled this image on the node
    # Row 1: the Agent's NO_PROXY takes the place of the template's
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "172.16.0.0/12"}
    [flow] = template["spec"]["template"]["spec"]["containers"][:1]
    flow["env"] += [{"name": key, "value": value} for key, value in proxy.items()]
    instead = {  # the kubectl of the tests is on the node
        "configmap docker-sidecar": f"configmap {name}",
        "docker-registry docker-sidecar": f"docker-registry {name}",
        '"registry-mirrors": ["https://mirror.example.com"],': "",
        "registry.example.com": private_image.partition("/")[0],
        "--from-file=daemon.json": """--from-literal=daemon.json='{"mtu": 1400}'""",
        "--from-file=company-ca.crt": f"--from-literal=company-ca.crt='{(tmp_path / 'company-ca.crt').read_text()}'",
    }
    run = {"template": template, "image": private_image, "command": "ip link show eth0"}
    if tells:
        readme("kubectl create configmap", instead)
        failed = submit(**run)
        assert "x509" in failed.fails()
        assert not [log for log in failed.record.logs if "retry 1" in str(log.message)]
        namespace.core.delete_namespaced_config_map(name, namespace.name)
    readme("kubectl --namespace flows create configmap docker-sidecar", instead)
    if tells:
        assert "Secret docker-sidecar" in submit(**run).fails()
    readme("kubectl create secret docker-registry", instead)
    # gVisor's MTU is without the header's 14
    submit(**run).succeeds("mtu 1386" if template_name == "gvisor_sidecar" else "mtu 1400")
