"""What the pages show for a cluster: own flows and templates, volumes, secrets, a network policy."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import uuid
from collections.abc import Callable
from typing import Any

import docker
import kubernetes.client
import kubernetes.utils
import pytest
import yaml

from flows.settings import PROJECT, load_job_template
from scripts import cluster
from scripts.base import DAEMON
from scripts.registry import REGISTRY
from tests.conftest import PREFECT, private_registry
from tests.kubernetes.conftest import KUBECTL, SMALL_IMAGE, Namespace, Readme, Run, Submit, Template, replaced, shell
from tests.support.pages import example, parameters
from tests.support.prefect_api import PrefectAPI
from tests.support.waiting import wait_for

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
SOURCES = {
    "two_containers": example("two-containers"),
    "build_and_run": example("build-and-run"),
    "parallel": example("parallel"),
    "parallel_processes": replaced(example("parallel"), {'"threads"': '"processes"', "In parallel": "In processes"}),
    "two_pulls": TWO_PULLS,
}
IMPORTS = """
from prefect.run_configs import KubernetesRun
from prefect.storage import Docker
from flows.settings import PROJECT, Settings, load_job_template
settings = Settings.from_environ()
"""
RUN_CONFIG_AND_STORAGE = SOURCES["two_containers"][SOURCES["two_containers"].index("flow.run_config") :]
together = pytest.mark.xdist_group("own flows")  # which are registered once


@pytest.fixture(scope="module")
def own_flows(api: PrefectAPI, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Flows of a repository of its own, made and registered as docs/from-your-flows.md says: the ids by module."""
    folder = tmp_path_factory.mktemp("repository")
    shell(example("own-repository").replace("../docker-sidecar-on-kubernetes", str(PROJECT)), folder)
    for module, source in SOURCES.items():
        if "flow.run_config" not in source:
            end = RUN_CONFIG_AND_STORAGE.replace("two_containers", module)
            source += IMPORTS + end.replace("two-containers", module.replace("_", "-"))
        # a tag that the node has not pulled
        (folder / "flows" / f"{module}.py").write_text(source.replace('image_tag="1"', f'image_tag="{uuid.uuid4()}"'))
    modules = " ".join(f"-m flows.{module}" for module in SOURCES)
    register = example("register-own").replace("-m flows.two_containers", modules)
    shell(register, folder, **api.env, FLOW_REGISTRY_URL=REGISTRY)
    return dict(zip(SOURCES, [*api.flows][-len(SOURCES) :]))


@pytest.fixture
def own_flow(
    own_flows: dict[str, str], api: PrefectAPI, agent: str, namespace: Namespace, small_image: str
) -> Callable[..., Run]:
    """Start a run of a flow of that repository."""

    def own_flow(module: str, **parameters: Any) -> Run:
        run_id = api.create_flow_run(own_flows[module], parameters={"image": small_image, **parameters})
        return Run(namespace, api.flow_runs[run_id])

    return own_flow


@together
@pytest.mark.timeout(500)
def test_own_flows(own_flow: Callable[..., Run]) -> None:
    runs = {module: own_flow(module) for module in SOURCES if module != "two_pulls"}
    for run in runs.values():
        run.succeeds()
        assert run.job_ends()[0] == "Complete"
    runs["build_and_run"].logged("hello from an image that this run has built")
    for word in ("apple", "pear", "plum", "cherry"):  # worker processes may end before they have sent their logs
        runs["parallel"].logged(f"hello {word}")


@together
@pytest.mark.timeout(500)
def test_a_login_that_is_renewed_between_two_pulls_of_a_run(
    own_flow: Callable[..., Run],
    namespace: Namespace,
    readme: Readme,
    engine: docker.DockerClient,
    tmp_path_factory: pytest.TempPathFactory,
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
        instead = {"registry.example.com": address, "=AWS": "=user"}
        readme("kubectl create secret docker-registry", {**instead, "password=password": "password=expired"})
        for old in ("namespace: flows", "namespace: logins", "namespace flows"):
            instead[old] = old.replace(old.split()[1], namespace.name)
        *others, cron_job = yaml.safe_load_all(replaced(example("renew-login"), instead))
        for resource in (*others, cron_job):
            kubernetes.utils.create_from_dict(namespace.api, resource)
        run = own_flow("two_pulls", private=f"{address}/{SMALL_IMAGE}")
        run.wait(lambda: SMALL_IMAGE in run.logs() and " for " in run.logs(), "the first pull is over", 120)
        [pod] = namespace.pods(run.record.id)

        [container] = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        account = f"--as=system:serviceaccount:{namespace.name}:renew-login"
        programs = tmp_path_factory.mktemp("bin")
        for name, script in {
            "aws": "#!/bin/sh\necho password",
            "kubectl": KUBECTL.replace("kubectl ", f"kubectl {account} "),
        }.items():
            (programs / name).write_text(script)
            (programs / name).chmod(0o755)
        command = [*container["command"], *container["args"]]
        subprocess.run(command, env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}, check=True)

        def current() -> bool:
            # kubelet looks at the Secrets of a pod that changes at once, and at others within two minutes
            namespace.core.patch_namespaced_pod(
                pod.metadata.name, namespace.name, {"metadata": {"annotations": {"looked-at": uuid.uuid4().hex}}}
            )
            found = namespace.execute(pod.metadata.name, "flow-container", "cat", "/docker-config/config.json")
            return "expired" not in found and base64.b64encode(b"user:password").decode() in found

        run.wait(current, "the pod has the new login", 150)
        namespace.execute(pod.metadata.name, "flow-container", "touch", "/workspace/go")
        run.succeeds()


def test_own_template(
    submit: Submit, patched: Callable[[str], Template], namespace: Namespace, readme: Readme
) -> None:
    """On a node with a label of the test's own."""
    key = f"dedicated-{uuid.uuid4().hex[:8]}"
    template = patched(example("own-template").replace("dedicated:", f"{key}:"))
    run = submit(template, command="echo on my own template")
    run.wait(lambda: "Unschedulable" in str(namespace.pods(run.record.id)), "no node has the label", 60)
    readme("kubectl label node", {"NODE": cluster.NODE, "dedicated=": f"{key}="})
    try:
        run.succeeds("on my own template")
    finally:
        namespace.core.patch_node(cluster.NODE, {"metadata": {"labels": {key: None}}})


def test_docker_and_buildkit_in_a_container(submit: Submit, small_image: str) -> None:
    """The image of the daemon has a docker CLI, too."""
    text = example("docker-in-a-container").replace("docker:29-cli", DAEMON).replace("alpine:3", small_image)
    submit(load_job_template("native_sidecar"), **parameters(text)).succeeds("built")


def test_volume_claim(
    submit: Submit, patched: Callable[[str], Template], namespace: Namespace, on_node: Callable[..., str]
) -> None:
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
        command = ["sh", "-c", "echo kept >/datasets/file; chown 1000 /datasets; echo up; sleep 600"]
        run = submit(
            patched(example("volume-patch")), command=command, host_config={"binds": ["/datasets:/datasets"]}
        )
        pod = run.container_writes("up")
        assert on_node("cat", f"/var/lib/{name}/file") == "kept"
        namespace.execute(pod, "flow-container", "touch", "/datasets/of-the-flow")
        assert "of-the-flow" in namespace.execute(pod, "dind-daemon", "ls", "/datasets")
    finally:
        namespace.core.delete_namespaced_persistent_volume_claim(claim["metadata"]["name"], namespace.name)
        namespace.core.delete_persistent_volume(name)


def test_a_secret_reaches_the_container_and_nothing_else(
    submit: Submit, patched: Callable[[str], Template], readme: Readme
) -> None:
    value = f"hunter2-{uuid.uuid4().hex}"
    readme("kubectl --namespace flows create secret generic", {"value=…": f"value={value}"})
    run = submit(patched(example("secret-patch")), **parameters(example("secret-parameters")))
    run.succeeds(f"the key has {len(value)} characters")
    run.job_ends()
    states = [state.serialized_state for each in (run.record, *run.record.task_runs) for state in each.states]
    assert value not in f"{run.logs()} {run.record.parameters} {run.record.run_config} {states}"


# tries two addresses until both give an answer, or neither does
PROBE = """
import socket, sys, time
def reach(address):
    try: socket.create_connection((address, 80), 3).close(); return "open"
    except OSError: return "closed"
while {reach(address) for address in sys.argv[2:]} != {sys.argv[1]}: time.sleep(1)
print("all", sys.argv[1])
"""


def test_network_policy(submit: Submit, namespace: Namespace, agent: str) -> None:
    """With the policy of the page a container reaches neither pods nor Services nor metadata, and the run succeeds."""
    name = f"probe-{uuid.uuid4().hex[:8]}"
    server = {"name": "server", "image": PREFECT, "command": ["python", "-m", "http.server", "80"]}
    pod = {"metadata": {"name": name, "labels": {"app": name}}, "spec": {"containers": [server]}}
    namespace.core.create_namespaced_pod(namespace.name, pod)
    service = {"metadata": {"name": name}, "spec": {"selector": {"app": name}, "ports": [{"port": 80}]}}
    service_address = namespace.core.create_namespaced_service(namespace.name, service).spec.cluster_ip
    policies = kubernetes.client.NetworkingV1Api(namespace.api)
    policy = yaml.safe_load(example("network-policy"))

    def address() -> Any:
        return namespace.core.read_namespaced_pod(name, namespace.name).status.pod_ip

    addresses = [wait_for(address, "the server has an address", namespace.report, 60), service_address]
    # the policy is for runs: the Agent's pod reaches the server
    assert "all open" in namespace.execute(agent, "agent", "timeout", "60", "python", "-c", PROBE, "open", *addresses)
    policies.create_namespaced_network_policy(namespace.name, policy)
    try:
        command = ["python", "-c", PROBE, "closed", *addresses, "169.254.169.254"]
        submit(load_job_template("native_sidecar"), image=PREFECT, command=command, time_limit=120).succeeds(
            "all closed"
        )
    finally:
        policies.delete_namespaced_network_policy(policy["metadata"]["name"], namespace.name)
        namespace.core.delete_namespaced_service(name, namespace.name)
        namespace.core.delete_namespaced_pod(name, namespace.name, grace_period_seconds=0)
