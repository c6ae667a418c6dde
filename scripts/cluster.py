"""A kind cluster of its own name, with its own kubeconfig: `make cluster-up`, `make cluster-down`.

With it comes a registry: localhost:5001 on this machine and on the node, and a mirror of Docker
Hub for node and pods. What the Makefile asks for besides is here too: tests, benchmarks, the
images of `make airgap`, and the cleanup.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import docker
import kubernetes.client
import kubernetes.config
import kubernetes.utils
import yaml
from docker.errors import ImageNotFound, NotFound

from flows.settings import PROJECT
from scripts import engine, registry
from scripts.airgap import dockerd
from scripts.airgap import images as stand_ins
from scripts.base import (
    CACHE,
    DAEMON,
    LABELS,
    NAME,
    PREFECT,
    REGISTRY_IMAGE,
    UNREACHABLE,
    SetupError,
    say,
)
from scripts.registry import can_pull, provide

NODE = f"{NAME}-control-plane"
NETWORK = f"{NAME}-kind"
KUBECONFIG = PROJECT / ".kube" / "config"
CONFIG_MAP = "docker-sidecar"  # the name that job_templates/ expect
IMAGES = (*PREFECT, DAEMON, stand_ins.OLD_DAEMON)
DEFAULT_NODE = "kindest/node:v1.37.0"  # to see whether kind can pull its own
RUNTIME_CLASS = PROJECT / "deploy" / "components" / "gvisor" / "runtime-class.yaml"
# Processes of pytest, for two cores: many tests wait, and those on a cluster mostly do.
WORKERS = {"tests/unit": 3, "tests/docker": 3, "tests/kubernetes": 5}
CONFIGURED = "/run/docker-sidecar"  # on the node: in memory, so gone with a stop of the node


def kind(*arguments: str) -> None:
    """Run kind, with a network and a kubeconfig of the cluster's own."""
    program = shutil.which("kind")
    if program is None:
        program = str(stand_ins.programs("kubernetes") / "kind")
    environment = {
        **os.environ,
        "KIND_EXPERIMENTAL_DOCKER_NETWORK": NETWORK,
        "KUBECONFIG": str(KUBECONFIG),
    }
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(f"kind {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


def node_options(client: docker.DockerClient) -> list[str] | None:
    """The options of kind that choose the node; None if there is none.

    It is $KIND_NODE_IMAGE, kind's own, or what `make airgap` has built.
    """
    chosen = os.environ.get("KIND_NODE_IMAGE")
    if chosen:
        return [f"--image={chosen}"]
    if shutil.which("kind") and can_pull(client, DEFAULT_NODE):
        return []
    with suppress(ImageNotFound):
        client.images.get(stand_ins.node_image())
        return [
            f"--image={stand_ins.node_image()}",
            f"--config={PROJECT}/scripts/airgap/node/kind.yaml",
        ]
    return None


def start(client: docker.DockerClient) -> None:
    """Create the cluster and its registry, unless they run.

    Raises SetupError, and then leaves nothing of them.
    """
    node = node_of(client)
    if node:
        refuse_foreign()
        if node.status == "running" and node.exec_run(["test", "-e", CONFIGURED])[0] == 0:
            say("is up")
            return
        say("the cluster was stopped with its engine; creating it again")
        kind("delete", "cluster", "--name", NAME)
    options = node_options(client)
    if options is None:
        raise SetupError(
            "a cluster needs kind (https://kind.sigs.k8s.io) and Docker Hub, "
            "or `make airgap` as root"
        )
    try:
        _create_cluster(client, options)
    except BaseException:
        delete(client)
        raise
    say(f"ready: KUBECONFIG={KUBECONFIG.relative_to(PROJECT)}")


def _create_cluster(client: docker.DockerClient, options: list[str]) -> None:
    if not client.networks.list(names=[NETWORK]):
        client.networks.create(NETWORK, labels=LABELS)
    registry.start(client, *IMAGES)
    if f"--image={stand_ins.node_image()}" in options:
        for name in stand_ins.control_plane_images():
            registry.push(client, name, name)
    address = registry.registry_address(client, NETWORK)  # which the node already needs
    say("creating a node (about a minute)")
    KUBECONFIG.parent.mkdir(exist_ok=True)
    KUBECONFIG.touch()  # a cluster that is being created is this folder's, too
    kind("create", "cluster", "--name", NAME, "--wait=300s", *options)
    for name in (registry.REGISTRY, "docker.io"):
        _point_node_at(client, name, address)
    create(daemon_config(client, "default"))
    create(yaml.safe_load(RUNTIME_CLASS.read_text()))


def _point_node_at(client: docker.DockerClient, registry_name: str, address: str) -> None:
    """Have the node's containerd ask an address for the images of a registry."""
    folder = f"/etc/containerd/certs.d/{registry_name}"
    hosts = f"echo '[host.\"http://{address}\"]' >{folder}/hosts.toml"
    script = f"mkdir -p {folder}; {hosts}; touch {CONFIGURED}"
    code, output = client.containers.get(NODE).exec_run(["sh", "-euc", script])
    if code != 0:
        raise SetupError(f"the node cannot be pointed at the registry: {output!r}")


def api() -> kubernetes.client.ApiClient:
    """A client of the cluster, whatever the user's own kubeconfig says."""
    return kubernetes.config.new_client_from_config(str(KUBECONFIG))  # type: ignore[no-untyped-call, no-any-return]


def create(resource: dict[str, Any]) -> None:
    """Create a resource on the cluster."""
    kubernetes.utils.create_from_dict(api(), resource)  # type: ignore[no-untyped-call]


def daemon_config(client: docker.DockerClient, namespace: str) -> dict[str, Any]:
    """The ConfigMap that gives the daemons of a namespace's pods their mirror."""
    address = registry.registry_address(client, NETWORK)
    options = {"registry-mirrors": [f"http://{address}"], "insecure-registries": [address]}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": CONFIG_MAP, "namespace": namespace},
        "data": {"daemon.json": json.dumps(options)},
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
            f"the kind cluster {NAME} was not made from this folder. "
            f"kind delete cluster --name {NAME}?"
        )


def delete(client: docker.DockerClient) -> None:
    """Delete the cluster, its registry and its network. Images stay, for the next time."""
    if node_of(client):
        refuse_foreign()
        kind("delete", "cluster", "--name", NAME)
    KUBECONFIG.unlink(missing_ok=True)
    dockerd.remove_ours(client)


def testable() -> list[str]:
    """The folders of tests that this machine can run. Says what is left out, and why."""
    try:
        with dockerd.running() as client:
            if sys.platform != "linux":
                say("the cluster is left out. Its pods reach this machine only on Linux")
                return ["tests/unit", "tests/docker"]
            if node_of(client) or node_options(client) is not None:
                return ["tests/unit", "tests/docker", "tests/kubernetes"]
            say("the cluster is left out. Install kind, or without Docker Hub run `make airgap`")
            return ["tests/unit", "tests/docker"]
    except SetupError as error:
        say(f"{error}. All but the unit tests are left out")
        return ["tests/unit"]


def up() -> None:
    """`make cluster-up`."""
    with dockerd.lock(), dockerd.kept() as client:
        start(client)


def down() -> None:
    """`make cluster-down`: delete the cluster, and stop a dockerd that was started for it."""
    with dockerd.lock():
        for find in (engine.find, dockerd.own):
            client = find()
            if client:
                delete(client)
        dockerd.stop()


def clean() -> None:
    """`make clean`: remove all that was made, as far as that is possible.

    Raises:
        SetupError: what could not be removed, and why. Everything else is removed then.
    """
    failed = []
    with dockerd.lock():
        for find in (engine.find, dockerd.own):
            try:
                client = find()
                if client:
                    _clean_engine(client)
            except (*UNREACHABLE, SetupError) as error:
                failed.append(str(error))
        dockerd.stop()
        _clean_cache()
    if failed:
        raise SetupError(
            f"{'; '.join(failed)}. Containers, networks and volumes there were not removed; "
            "caches and .venv were. Start that engine and run `make clean` again"
        )


def _clean_engine(client: docker.DockerClient) -> None:
    delete(client)
    for volume in client.volumes.list(filters={"name": f"^{NAME}-(registry$|tests-)"}):
        volume.remove()


def _clean_cache() -> None:
    for path in CACHE.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":  # for which another `make` may wait
            path.unlink()


def test(*folders: str) -> None:
    """`make test`: run tests, by default those that this machine can run."""
    status = 0
    for folder in folders or testable():
        workers = f"-n{WORKERS[folder]}"
        command = [sys.executable, "-m", "pytest", workers, "--dist=worksteal", folder]
        ended = subprocess.run(command).returncode
        status = max(status, abs(ended))  # negative: by a signal
    sys.exit(status)


def bench() -> None:
    """`make bench`: run the benchmarks that this machine can run."""
    paths = []
    for folder in testable():
        paths += [str(path) for path in Path(folder).glob("bench_*.py")]
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", *paths]).returncode)


def airgap() -> None:
    """`make airgap`: build the stand-ins, where kind's own node cannot be had."""
    with dockerd.running() as client:
        options = node_options(client)
        if options is None or f"--image={stand_ins.node_image()}" in options:
            stand_ins.build(client, stand_ins.node_image())
            provide(client, *IMAGES, REGISTRY_IMAGE)
        say("all images are there: `make cluster-up`, `make test`")


VERBS: dict[str, Callable[..., None]] = {
    "up": up,
    "down": down,
    "clean": clean,
    "test": test,
    "bench": bench,
    "airgap": airgap,
}


def main(verb: str, *arguments: str) -> None:
    """Do what the Makefile asks for."""
    try:
        VERBS[verb](*arguments)
    except SetupError as error:
        sys.exit(f"cluster: {error}")
    except KeyboardInterrupt:
        sys.exit("cluster: interrupted")


if __name__ == "__main__":
    main(*sys.argv[1:])
