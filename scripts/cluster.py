"""A kind cluster of its own name, with its own kubeconfig: `make cluster-up`, `make cluster-down`.

With it comes a registry: localhost:5001 on this machine and on the node, and a mirror of Docker Hub for node and pods.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import docker
import kubernetes.client
import kubernetes.config
import kubernetes.utils
from docker.errors import ImageNotFound, NotFound

from flows.settings import PROJECT
from scripts import engine, registry
from scripts.airgap import images as stand_ins
from scripts.base import CACHE, DAEMON, LABELS, NAME, PREFECT, REGISTRY_IMAGE, SetupError, say
from scripts.images import can_pull, provide

NODE = f"{NAME}-control-plane"
NETWORK = f"{NAME}-kind"
KUBECONFIG = PROJECT / ".kube" / "config"
CONFIG_MAP = "docker-sidecar"  # the name that job_templates/ expect
IMAGES = (*PREFECT, DAEMON, stand_ins.OLD_DAEMON)
DEFAULT_NODE = "kindest/node:v1.37.0"  # to see whether kind can pull its own
GVISOR = {
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": "gvisor"},
    "handler": "runsc",
}
WORKERS = {
    "tests/unit": 2,
    "tests/docker": 2,
    "tests/kubernetes": 5,
}  # for two cores; tests on a cluster mostly wait
CONFIGURED = "/run/docker-sidecar"  # on the node: in memory, so gone with a stop of the node


def kind(*arguments: str) -> None:
    """Run kind, with a network and a kubeconfig of the cluster's own."""
    program = shutil.which("kind") or f"{stand_ins.programs('kubernetes')}/kind"
    environment = {
        **os.environ,
        "KIND_EXPERIMENTAL_DOCKER_NETWORK": NETWORK,
        "KUBECONFIG": str(KUBECONFIG),
    }
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(f"kind {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


def node_options(client: docker.DockerClient) -> list[str] | None:
    """The options that choose the node: $KIND_NODE_IMAGE, kind's own, or what `make airgap` has built; else None."""
    if chosen := os.environ.get("KIND_NODE_IMAGE"):
        return [f"--image={chosen}"]
    if shutil.which("kind") and can_pull(client, DEFAULT_NODE):
        return []
    with suppress(ImageNotFound):
        client.images.get(stand_ins.NODE)
        return [f"--image={stand_ins.NODE}", f"--config={PROJECT}/scripts/airgap/node/kind.yaml"]
    return None


def up(client: docker.DockerClient) -> None:
    """Create the cluster and its registry, unless they run. Raises SetupError, and then leaves nothing of them."""
    if node := node_of(client):
        refuse_foreign()
        if node.status == "running" and node.exec_run(["test", "-e", CONFIGURED])[0] == 0:
            say("is up")
            return
        say("the cluster was stopped with its engine; creating it again")
        kind("delete", "cluster", "--name", NAME)
    if (options := node_options(client)) is None:
        raise SetupError(
            "a cluster needs kind (https://kind.sigs.k8s.io) and Docker Hub, or `make airgap` as root"
        )
    try:
        if not client.networks.list(names=[NETWORK]):
            client.networks.create(NETWORK, labels=LABELS)
        registry.start(client, *IMAGES)
        for name in (
            stand_ins.control_plane_images() if f"--image={stand_ins.NODE}" in options else ()
        ):
            registry.push(client, name, name)
        address = registry.registry_address(client, NETWORK)  # which the node already needs
        say("creating a node (about a minute)")
        KUBECONFIG.parent.mkdir(exist_ok=True)
        KUBECONFIG.touch()  # a cluster that is being created is this folder's, too
        kind("create", "cluster", "--name", NAME, "--wait=300s", *options)
        for name in (registry.REGISTRY, "docker.io"):  # point the node's containerd at the registry
            folder = f"/etc/containerd/certs.d/{name}"
            script = f"mkdir -p {folder}; echo '[host.\"http://{address}\"]' >{folder}/hosts.toml; touch {CONFIGURED}"
            code, output = client.containers.get(NODE).exec_run(["sh", "-euc", script])
            if code != 0:
                raise SetupError(f"the node cannot be pointed at the registry: {output!r}")
        create(daemon_config(client, "default"))
        create(GVISOR)
    except BaseException:
        down(client)
        raise
    say(f"ready: KUBECONFIG={KUBECONFIG.relative_to(PROJECT)}")


def api() -> kubernetes.client.ApiClient:
    """A client of the cluster, whatever the user's own kubeconfig says."""
    return kubernetes.config.new_client_from_config(str(KUBECONFIG))  # type: ignore[no-untyped-call, no-any-return]


def create(resource: dict[str, Any]) -> None:
    """Create a resource on the cluster."""
    kubernetes.utils.create_from_dict(api(), resource)  # type: ignore[no-untyped-call]


def daemon_config(client: docker.DockerClient, namespace: str) -> dict[str, Any]:
    """The ConfigMap that gives the daemons of a namespace's pods their mirror."""
    address = registry.registry_address(client, NETWORK)
    daemon_json = json.dumps(
        {"registry-mirrors": [f"http://{address}"], "insecure-registries": [address]}
    )
    metadata = {"name": CONFIG_MAP, "namespace": namespace}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {"daemon.json": daemon_json},
    }


def node_of(client: docker.DockerClient) -> Any:
    """The cluster's node, a container of the engine; None if there is no cluster."""
    with suppress(NotFound):
        return client.containers.get(NODE)
    return None


def refuse_foreign() -> None:
    """Raise SetupError if the cluster that runs was not made from this folder."""
    if not KUBECONFIG.exists():
        raise SetupError(
            f"the kind cluster {NAME} was not made from this folder. kind delete cluster --name {NAME}?"
        )


def down(client: docker.DockerClient) -> None:
    """Delete the cluster, its registry and its network. Images stay, for the next time."""
    if node_of(client):
        refuse_foreign()
        kind("delete", "cluster", "--name", NAME)
    KUBECONFIG.unlink(missing_ok=True)
    engine.remove_ours(client)


def testable() -> list[str]:
    """The folders of tests that this machine can run. Says what is left out, and why."""
    try:
        with engine.running() as client:
            if node_of(client) or node_options(client) is not None:
                return ["tests/unit", "tests/docker", "tests/kubernetes"]
            say("the cluster is left out. Install kind, or without Docker Hub run `make airgap`")
            return ["tests/unit", "tests/docker"]
    except SetupError as error:
        say(f"{error}. All but the unit tests are left out")
        return ["tests/unit"]


def main(what: str, *folders: str) -> None:
    """Do what the Makefile asks for; tests are by default those that this machine can run."""
    if what == "up":
        with engine.lock(), engine.kept() as client:
            up(client)
    elif what in ("down", "clean"):
        with engine.lock():
            for look in (engine.find, engine.own):
                if found := look():
                    down(found)
                    volumes = found.volumes.list(filters={"name": f"^{NAME}-(registry$|tests-)"})
                    for volume in volumes if what == "clean" else ():
                        volume.remove()
            engine.stop()
            for path in CACHE.iterdir() if what == "clean" else ():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":  # for which another `make` may wait
                    path.unlink()
    elif what == "test":
        commands = [
            [sys.executable, "-m", "pytest", f"-n{WORKERS[it]}", it] for it in folders or testable()
        ]
        sys.exit(
            max(abs(subprocess.run(command).returncode) for command in commands)
        )  # negative: by a signal
    elif what == "bench":
        paths = [str(path) for folder in testable() for path in Path(folder).glob("bench_*.py")]
        sys.exit(subprocess.run([sys.executable, "-m", "pytest", *paths]).returncode)
    elif what == "airgap":
        with engine.running() as client:
            options = node_options(client)
            if options is None or f"--image={stand_ins.NODE}" in options:
                stand_ins.build(client, stand_ins.NODE)
                provide(client, *IMAGES, REGISTRY_IMAGE)
            say("all images are there: `make cluster-up`, `make test`")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SetupError as error:
        sys.exit(f"cluster: {error}")
    except KeyboardInterrupt:
        sys.exit("cluster: interrupted")
