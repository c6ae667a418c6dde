"""A Docker engine for a machine that has none: dockerd, started for as long as it is needed.

It needs root on Linux. On Debian it is installed first. If it does not reach Docker Hub, a local
registry with stand-ins takes Docker Hub's place.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import docker
import psutil

from flows.settings import PROJECT
from scripts import base, engine, registry
from scripts.base import CACHE, UNREACHABLE, SetupError, say, wait_until
from scripts.registry import can_pull

HOME = CACHE / "dockerd"  # data root, exec root, socket, pid file and log
LOG_END = 1500  # characters of dockerd's log that an error shows

# Python warns when a Popen of a running process is collected.
_started: list[subprocess.Popen[bytes]] = []


def own() -> docker.DockerClient | None:
    """The engine that was started here, if it runs."""
    with suppress(*UNREACHABLE):
        client = engine.connect(engine.OWN_SOCKET)
        os.environ["DOCKER_HOST"] = engine.OWN_SOCKET
        return client
    return None


@contextmanager
def running() -> Iterator[docker.DockerClient]:
    """An engine for as long as the block lasts: the user's, or one that ends with the block."""
    base.clean_up_on_signals()
    client = engine.find()
    if client is not None:
        yield client
        return
    with lock(), kept() as client:
        yield client
        if _started:
            stop()


@contextmanager
def kept() -> Iterator[docker.DockerClient]:
    """An engine that goes on after the block, unless the block fails and it was started for it."""
    base.clean_up_on_signals()
    try:
        yield engine.find() or own() or start()
    except BaseException:
        if _started:
            stop()
        raise


@contextmanager
def lock() -> Iterator[None]:
    """Hold the lock of this project: one `make` at a time starts or stops engine and cluster."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another `make` of this project to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def start() -> docker.DockerClient:
    """Start dockerd on a unix socket; without Docker Hub, a mirror with stand-in images as well."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise SetupError(engine.how_to_get_one())
    if not shutil.which("dockerd"):
        _install()
        client = engine.find()  # with an init system, the package starts it
        if client is not None:
            return client
    _launch()
    try:
        client = _wait_for_answer()
        if not can_pull(client, base.PREFECT[0]):
            say(
                "Docker Hub is out of reach: "
                "a local registry with stand-ins takes its place, for the images it has"
            )
            registry.start(client, base.PREFECT[0])
    except BaseException:
        stop()
        raise
    return client


def _install() -> None:
    say("installing dockerd from the Debian package docker.io (about 30 s)")
    installed = subprocess.run([PROJECT / "scripts" / "apt-install.sh", "docker.io"])
    if installed.returncode != 0:
        raise SetupError(
            "no Docker engine answers, and dockerd cannot be installed: install Docker"
        )


def _launch() -> None:
    """Start the process of dockerd."""
    HOME.mkdir(parents=True, exist_ok=True)
    log = HOME / "dockerd.log"
    (HOME / "daemon.json").write_text("{}")  # not the one of another engine on this machine
    command = [
        "dockerd",
        f"--host={engine.OWN_SOCKET}",
        f"--config-file={HOME}/daemon.json",
        f"--pidfile={HOME}/dockerd.pid",
        f"--data-root={HOME}/data",
        f"--exec-root={HOME}/exec",
        f"--registry-mirror=http://{registry.REGISTRY}",
        f"--add-runtime=careful={PROJECT}/scripts/airgap/runc-drop-missing-caps",
        "--default-runtime=careful",
    ]
    say(f"starting dockerd (its log: {log})")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    _started.append(process)


def _wait_for_answer() -> docker.DockerClient:
    """The client of the dockerd that was started last. Raises SetupError if it has ended."""
    process = _started[-1]
    wait_until(lambda: own() or process.poll() is not None, "dockerd answers")
    client = own()
    if client is None:
        log = (HOME / "dockerd.log").read_text()
        raise SetupError(f"dockerd cannot be started. The end of its log:\n{log[-LOG_END:]}")
    return client


def stop() -> None:
    """Stop the dockerd that start() has started, with its containers. Its images stay."""
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int((HOME / "dockerd.pid").read_text()))
        if f"--pidfile={HOME}/dockerd.pid" in process.cmdline():
            _end(process)
    while _started:  # without a pid file, too: it may have been interrupted before it had one
        _started[-1].terminate()
        _started.pop().wait()
    for mount in reversed(psutil.disk_partitions(all=True)):
        if mount.mountpoint.startswith(f"{HOME}/"):  # the namespace of the host's network, for one
            subprocess.run(["umount", mount.mountpoint], check=True)


def _end(process: psutil.Process) -> None:
    """End a dockerd, after what runs on it."""
    with suppress(*UNREACHABLE):  # what cannot be removed ends with dockerd
        client = own()
        if client is not None:
            remove_ours(client)
    process.terminate()
    _, hung = psutil.wait_procs([process], timeout=base.START_SECONDS)
    for each in hung:
        each.kill()
    say("dockerd has ended")


def remove_ours(client: docker.DockerClient) -> None:
    """Remove the containers and networks that were started here. Named volumes stay."""
    labels = [f"{key}={value}" for key, value in base.LABELS.items()]
    ours: dict[str, Any] = {"label": labels}
    for container in client.containers.list(all=True, filters=ours, ignore_removed=True):
        container.remove(force=True, v=True)
    for network in client.networks.list(filters=ours):
        network.remove()
