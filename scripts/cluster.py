"""A kind cluster of its own name, with its own kubeconfig: `make cluster-up`, `make cluster-down`.

With it comes a registry, called localhost:5001 on this machine and on the node, to push the flow's image to;
where Docker Hub cannot be reached it also stands in for it. The daemons in the pods use it as their mirror.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import docker
import kubernetes.client
import kubernetes.config
import kubernetes.utils
from docker.errors import ImageNotFound

from flows.settings import PROJECT
from scripts import sidecar
from scripts.sidecar import LABELS, REGISTRY, SidecarError
from tests.airgap import images

NAME = "docker-sidecar"
NODE = f"{NAME}-control-plane"
NETWORK = f"{NAME}-kind"
KUBECONFIG = PROJECT / ".kube" / "config"
CONFIG_MAP = "docker-sidecar"  # the name that job_templates/ expect
READY_SECONDS = 180
CONFIGURED = "/run/docker-sidecar"  # on the node: in memory, so gone with a stop of the node


def say(message: str) -> None:
    """Tell the user what is done, and how long it takes."""
    print(f"cluster: {message}", flush=True)


def kind(*arguments: str) -> str:
    """Run kind, with a network and a kubeconfig of the cluster's own.

    Raises:
        SidecarError: with kind's last words.
    """
    program = subprocess.run([PROJECT / "scripts" / "kind.sh"], check=True, stdout=subprocess.PIPE, text=True).stdout
    environment = {**os.environ, "KIND_EXPERIMENTAL_DOCKER_NETWORK": NETWORK, "KUBECONFIG": str(KUBECONFIG)}
    done = subprocess.run([program.strip(), *arguments], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SidecarError(f"kind {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def node_image(engine: docker.DockerClient, online: bool) -> list[str]:
    """The option that chooses the node image: $KIND_NODE_IMAGE, kind's own, or what `make airgap` has built."""
    chosen = os.environ.get("KIND_NODE_IMAGE")
    if online and chosen is None:
        return []
    name = images.NODE if chosen is None else chosen
    try:
        try:
            engine.images.get(name)
        except ImageNotFound:
            if chosen is None:
                raise SidecarError(
                    "Docker Hub is out of reach, and there is no node image: run `make airgap`"
                ) from None
            say(f"pulling {name}")
            engine.images.pull(name)
    except docker.errors.DockerException as error:
        raise SidecarError(
            f"KIND_NODE_IMAGE is {name!r}, which cannot be had: {error}. Unset, the default is used"
        ) from None
    return [f"--image={name}"]


def up() -> None:
    """Have the cluster, with its registry.

    Raises:
        SidecarError: if there can be none; then nothing of it is left.
    """
    engine, online = sidecar.engine(), sidecar.hub_answers()
    if NAME in kind("get", "clusters").split():
        if not KUBECONFIG.exists():
            raise SidecarError(
                f"there is a kind cluster named {NAME!r} that was not made from this folder. "
                f"If nobody needs it: kind delete cluster --name {NAME}"
            )
        node = engine.containers.get(NODE)
        if node.status == "running" and node.exec_run(["test", "-e", CONFIGURED])[0] == 0:
            say("is up")
            return
        say("it has stopped with its engine, and addresses change when that starts again; making it anew")
        kind("delete", "cluster", "--name", NAME)
    image = node_image(engine, online)
    if not engine.networks.list(names=[NETWORK]):
        engine.networks.create(NETWORK, labels=LABELS)
    mirror = sidecar.start_registry(engine, online, NETWORK)
    say("creating a node (about a minute)")
    try:
        kind("create", "cluster", "--name", NAME, f"--wait={READY_SECONDS}s", *image)
        _configure(engine, mirror, online)
    except BaseException:
        kind("delete", "cluster", "--name", NAME)
        raise
    say(f"ready: KUBECONFIG={KUBECONFIG.relative_to(PROJECT)}")


def _configure(engine: docker.DockerClient, mirror: str, online: bool) -> None:
    """Point the node's containerd, and the daemons of pods in the default namespace, at the registry."""
    for name, host in ((REGISTRY, sidecar.address_of(engine, "registry", NETWORK)), ("docker.io", mirror)):
        folder = f"/etc/containerd/certs.d/{name}"
        script = f"mkdir -p {folder} && echo '[host.\"{host}\"]' >{folder}/hosts.toml && touch {CONFIGURED}"
        status, output = engine.containers.get(NODE).exec_run(["sh", "-c", script])
        if status != 0:
            raise SidecarError(f"cannot configure the node's containerd: {output.decode()}")
    api = client()
    if not online:  # the node has no image of CoreDNS; nothing here needs names of Services
        scale = {"spec": {"replicas": 0}}
        kubernetes.client.AppsV1Api(api).patch_namespaced_deployment_scale("coredns", "kube-system", scale)
    kubernetes.utils.create_from_dict(api, daemon_config(engine, "default"))


def client() -> kubernetes.client.ApiClient:
    """A client of the cluster, whatever the user's own kubeconfig says."""
    return kubernetes.config.new_client_from_config(str(KUBECONFIG))


def daemon_config(engine: docker.DockerClient, namespace: str) -> dict[str, Any]:
    """The ConfigMap that gives the daemons of a namespace's pods their mirror."""
    registries = [sidecar.address_of(engine, name, NETWORK) for name in sidecar.registries(engine)]
    configuration = {
        "registry-mirrors": registries[-1:],
        "insecure-registries": [url.partition("://")[2] for url in registries],  # they have no certificates
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": CONFIG_MAP, "namespace": namespace},
        "data": {"daemon.json": json.dumps(configuration)},
    }


def delete(engine: docker.DockerClient) -> None:
    """Delete the cluster."""
    if sidecar.nodes(engine):
        kind("delete", "cluster", "--name", NAME)
    KUBECONFIG.unlink(missing_ok=True)


def down() -> None:
    """Delete the cluster, and end the daemon and the registry that it may have been on. Images stay."""
    engine = sidecar.connect()
    if not engine and (engine := sidecar.connect(sidecar.DAEMON)):
        os.environ["DOCKER_HOST"] = sidecar.DAEMON
    if engine:
        delete(engine)
    sidecar.down()


@contextmanager
def _engine() -> Iterator[docker.DockerClient]:
    """The engine for as long as the block lasts, and no longer unless it was there before."""
    with nullcontext() if sidecar.connect() else sidecar.running():
        yield sidecar.engine()


def airgap() -> None:
    """Build what a registry would have served: the images, and the node image."""
    if sidecar.hub_answers():
        say("Docker Hub answers: there is nothing to build")
        return
    with _engine() as engine:
        images.build(engine)
        script = PROJECT / "tests" / "airgap" / "kubernetes.sh"
        programs = subprocess.run([script], check=True, stdout=subprocess.PIPE, text=True).stdout
        images.build_node(engine, Path(programs.strip()))
    say("all images are there: `make cluster-up`, `make test`")


def possible() -> None:
    """Find out whether a cluster is up, or can be made without building Kubernetes first.

    Raises:
        SidecarError: if not.
    """
    with _engine() as engine:
        node_image(engine, sidecar.hub_answers())


if __name__ == "__main__":
    try:
        with sidecar.all_or_nothing():
            {"up": up, "down": down, "airgap": airgap, "possible": possible}[sys.argv[1]]()
    except SidecarError as error:
        sys.exit(f"cluster: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"cluster: {Path(error.cmd[0]).name} failed, see above")
