"""What the pages show for a cluster: own flows and templates, volumes, secrets, a company's CA, a network policy."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import docker
import kubernetes.client
import kubernetes.utils
import pytest
import trustme
import yaml

from flows.settings import PROJECT, load_job_template
from scripts import cluster
from scripts.base import DAEMON, REGISTRY_IMAGE
from scripts.registry import REGISTRY
from tests.conftest import container, private_registry, tar
from tests.kubernetes.conftest import KUBECTL, SMALL_IMAGE, Namespace, Run
from tests.kubernetes.test_production import volume
from tests.support.pages import example, parameters
from tests.support.prefect_api import PrefectAPI
from tests.support.waiting import wait_for

Submit = Callable[..., Run]
OwnFlow = Callable[..., Run]
Template = dict[str, Any]
PARALLEL = example("parallel")
SOURCES = {
    "two_containers": example("two-containers"),
    "build_and_run": example("build-and-run"),
    "parallel": PARALLEL,
    "parallel_processes": PARALLEL.replace('"threads"', '"processes"'),
}
IMPORTS = """
from prefect.run_configs import KubernetesRun
from prefect.storage import Docker
from flows.settings import PROJECT, Settings, load_job_template
settings = Settings.from_environ()
"""
RUN_CONFIG_AND_STORAGE = SOURCES["two_containers"][SOURCES["two_containers"].index("flow.run_config") :]


@pytest.fixture
def own_flow(api: PrefectAPI, agent: str, namespace: Namespace, small_image: str, tmp_path: Path) -> OwnFlow:
    """Register a flow from a repository of its own, made as docs/from-your-flows.md says, and start a run of it."""

    def own_flow(module: str, source: str, **parameters: Any) -> Run:
        if "flow.run_config" not in source:
            end = RUN_CONFIG_AND_STORAGE.replace("two_containers", module)
            source += IMPORTS + end.replace("two-containers", module.replace("_", "-"))
        source = source.replace('image_tag="1"', f'image_tag="{namespace.name}"')  # which the node has not pulled
        register = example("register-own").replace("--project containers", f"--project {module}")
        register = register.replace("two_containers", module)
        environment = {**os.environ, **api.env, "FLOW_REGISTRY_URL": REGISTRY}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        copy = example("own-repository").replace("../docker-sidecar-on-kubernetes", str(PROJECT))
        folder = tmp_path / module
        folder.mkdir()
        for script in (copy, f"cat >flows/{module}.py", f"prefect create project {module}", register):
            done = subprocess.run(
                ["bash", "-euc", script],
                cwd=folder,
                env=environment,
                input=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, done.stdout
        flow_id = next(reversed(api.flows))
        run_id = api.create_flow_run(flow_id, parameters={"image": small_image, **parameters})
        return Run(namespace, api.flow_runs[run_id])

    return own_flow


@pytest.mark.parametrize("module", SOURCES)
def test_own_flow(own_flow: OwnFlow, module: str) -> None:
    run = own_flow(module, SOURCES[module])
    assert run.reaches("Success", "Failed").state == "Success", run.seen()
    if module == "build_and_run":
        run.logged("hello from an image that this run has built")
    elif module == "parallel":  # worker processes may end before they have sent their logs
        for word in ("apple", "pear", "plum", "cherry"):
            run.logged(f"hello {word}")
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


def test_own_template(
    submit: Submit, patched: Callable[[str], Template], namespace: Namespace, readme: Callable[..., str]
) -> None:
    """On a node with a label of the test's own."""
    key = f"dedicated-{uuid.uuid4().hex[:8]}"
    template = patched(example("own-template").replace("dedicated:", f"{key}:"))
    run = submit(template, command="echo on my own template")
    run.wait(lambda: "Unschedulable" in str(namespace.pods(run.record.id)), "no node has the label", 60)
    readme("kubectl label node", {"NODE": cluster.NODE, "dedicated=": f"{key}="})
    try:
        assert run.reaches("Success", "Failed").state == "Success", run.seen()
        run.logged("on my own template")
    finally:
        namespace.core.patch_node(cluster.NODE, {"metadata": {"labels": {key: None}}})


def test_docker_and_buildkit_in_a_container(submit: Submit, small_image: str) -> None:
    """The image of the daemon has a docker CLI, too."""
    text = example("docker-in-a-container").replace("docker:29-cli", DAEMON).replace("alpine:3", small_image)
    run = submit(load_job_template("native_sidecar"), **parameters(text))
    assert run.reaches("Success", "Failed").state == "Success", run.seen()
    run.logged("built")


def test_volume_claim(submit: Submit, patched: Callable[[str], Template], namespace: Namespace) -> None:
    """On a hostPath volume, for the cluster may have nothing that provides others."""
    name = f"datasets-{uuid.uuid4().hex[:8]}"
    path = {"path": f"/var/lib/{name}", "type": "DirectoryOrCreate"}
    claim = yaml.safe_load(example("volume-claim"))
    spec = {"capacity": claim["spec"]["resources"]["requests"], "accessModes": claim["spec"]["accessModes"]}
    volume = {"metadata": {"name": name}, "spec": {**spec, "hostPath": path, "storageClassName": name}}
    claim["spec"]["storageClassName"] = name
    namespace.core.create_persistent_volume(volume)
    try:
        namespace.core.create_namespaced_persistent_volume_claim(namespace.name, claim)
        template = patched(example("volume-patch"))
        for command in ("echo kept >/datasets/file; chown 1000 /datasets", "cat /datasets/file; echo up; sleep 600"):
            binds = {"binds": ["/datasets:/datasets"]}
            run = submit(template, command=["sh", "-c", command], host_config=binds)
            if "sleep" not in command:
                assert run.reaches("Success", "Failed").state == "Success", run.seen()
        pod = run.container_writes("kept")
        namespace.execute(pod, "flow-container", "touch", "/datasets/of-the-flow")
        assert "of-the-flow" in namespace.execute(pod, "dind-daemon", "ls", "/datasets")
    finally:
        namespace.core.delete_namespaced_persistent_volume_claim(claim["metadata"]["name"], namespace.name)
        namespace.core.delete_persistent_volume(name)


def test_a_secret_reaches_the_container_and_nothing_else(
    submit: Submit, patched: Callable[[str], Template], readme: Callable[..., str], namespace: Namespace
) -> None:
    value = f"hunter2-{uuid.uuid4().hex}"
    kubectl = {"--namespace flows": f"--namespace {namespace.name}", "value=…": f"value={value}"}
    readme("kubectl --namespace flows create secret generic", kubectl)
    run = submit(patched(example("secret-patch")), **parameters(example("secret-parameters")))
    assert run.reaches("Success", "Failed").state == "Success", run.seen()
    run.logged(f"the key has {len(value)} characters")
    run.job_ends()
    states = [state.serialized_state for each in (run.record, *run.record.task_runs) for state in each.states]
    assert value not in f"{run.logs()} {run.record.parameters} {run.record.run_config} {states}"


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


def test_a_registry_with_a_companys_own_ca(
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
    readme("kubectl --namespace flows create configmap docker-sidecar", instead)
    run = submit(template, image=private_ca_image, command="echo trusted")
    assert run.reaches("Success", "Failed").state == "Success", run.seen()
    run.logged("trusted")


TWO_PULLS = """
import os, time
from pathlib import Path
from prefect import Flow, Parameter, task
from flows.states import fail_with_cause
from flows.tasks import PullImage

@task
def wait_until_told():
    while not Path("/workspace/go").exists():
        time.sleep(0.2)

docker_server_url = os.environ.get("DOCKER_HOST", "")
with Flow("Two pulls", terminal_state_handler=fail_with_cause) as flow:
    first = PullImage(docker_server_url=docker_server_url)(repository=Parameter("image"))
    told = wait_until_told(upstream_tasks=[first])
    PullImage(docker_server_url=docker_server_url)(repository=Parameter("private"), upstream_tasks=[told])

"""


def test_a_login_that_is_renewed_between_two_pulls_of_a_run(
    own_flow: OwnFlow, namespace: Namespace, readme: Callable[..., str], engine: docker.DockerClient, tmp_path: Path
) -> None:
    """By the CronJob's own script, with the rights of its account; `aws` is a stand-in."""
    with private_registry(
        engine, network=cluster.NETWORK, volumes={"docker-sidecar-registry": {"bind": "/var/lib/registry"}}
    ) as registry:
        address = f"{registry.attrs['NetworkSettings']['Networks'][cluster.NETWORK]['IPAddress']}:5000"
        config = namespace.core.read_namespaced_config_map(cluster.CONFIG_MAP, namespace.name)
        daemon_json = json.loads(config.data["daemon.json"])
        daemon_json["insecure-registries"].append(address)
        config.data["daemon.json"] = json.dumps(daemon_json)
        namespace.core.replace_namespaced_config_map(cluster.CONFIG_MAP, namespace.name, config)
        flows = {"--namespace flows": f"--namespace {namespace.name}", "registry.example.com": address}
        readme(
            "kubectl create secret docker-registry", {**flows, "docker-password=password": "docker-password=expired"}
        )
        text = example("renew-login").replace("namespace: flows", f"namespace: {namespace.name}")
        text = text.replace("namespace: logins", f"namespace: {namespace.name}").replace("=AWS", "=user")
        for old, new in flows.items():
            text = text.replace(old, new)
        *others, cron_job = yaml.safe_load_all(text)
        for resource in (*others, cron_job):
            kubernetes.utils.create_from_dict(namespace.api, resource)
        run = own_flow("two_pulls", TWO_PULLS, private=f"{address}/{SMALL_IMAGE}")
        run.wait(lambda: SMALL_IMAGE in run.logs() and " for " in run.logs(), "the first pull is over", 120)
        [pod] = namespace.pods(run.record.id)

        [container] = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        account = f"--as=system:serviceaccount:{namespace.name}:renew-login"
        for name, script in {
            "aws": "#!/bin/sh\necho password",
            "kubectl": KUBECTL.replace("kubectl ", f"kubectl {account} "),
        }.items():
            (tmp_path / name).write_text(script)
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run([*container["command"], *container["args"]], env=environment, check=True)

        def current() -> bool:
            # kubelet looks at the Secrets of a pod that changes at once, and at others within two minutes
            namespace.core.patch_namespaced_pod(
                pod.metadata.name, namespace.name, {"metadata": {"annotations": {"looked-at": uuid.uuid4().hex}}}
            )
            found = namespace.execute(pod.metadata.name, "flow-container", "cat", "/docker-config/config.json")
            return "expired" not in found and base64.b64encode(b"user:password").decode() in found

        run.wait(current, "the pod has the new login", 150)
        namespace.execute(pod.metadata.name, "flow-container", "touch", "/workspace/go")
        assert run.reaches("Success", "Failed").state == "Success", run.seen()


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
