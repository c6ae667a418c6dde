"""The Docker engine that a local run uses: the user's own, or one that is started for as long as it is needed."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import docker
import docker.utils
import psutil
from docker.context import ContextAPI

from flows.daemon import bypass_proxy
from flows.settings import PROJECT
from scripts import base, registry
from scripts.base import CACHE, UNREACHABLE, SetupError, root_cause, say, wait_until
from scripts.images import can_pull

HOME = CACHE / "dockerd"  # of a dockerd started here: data root, exec root, socket, pid file, log
SOCKET = f"unix://{HOME}/docker.sock"

_started: list[
    subprocess.Popen[bytes]
] = []  # Python warns when a Popen of a running process is collected


def connect(base_url: str, **options: Any) -> docker.DockerClient:
    """A client of the Docker engine at a URL. Raises one of UNREACHABLE if none answers."""
    bypass_proxy(base_url)
    client = docker.DockerClient(base_url, timeout=base.ANSWER_SECONDS, **options)
    client.ping()
    client.api.timeout = 600
    return client


def find() -> docker.DockerClient | None:
    """The user's engine, as `docker` finds it: DOCKER_HOST, the current Docker context, the usual socket.

    None if the user has chosen no engine, and nothing listens at the usual socket.
    """
    chosen, url = os.environ.get("DOCKER_HOST"), ""
    try:
        options = docker.utils.kwargs_from_env() if chosen else ContextAPI.kwargs_from_context()
        if not (url := str(options.get("base_url", ""))):
            raise LookupError("there is no such context")
        client = connect(**options)
    except Exception as error:  # the SDK raises errors of many types
        usual = chosen == SOCKET or (not chosen and url == ContextAPI.DEFAULT_CONTEXT.Host)
        if usual and isinstance(root_cause(error), (FileNotFoundError, ConnectionRefusedError)):
            return None
        name = f"DOCKER_HOST={chosen}" if chosen else url or "the current Docker context"
        raise SetupError(f"no Docker engine answers at {name}: {error}") from None
    os.environ["DOCKER_HOST"] = url  # for the flow, and for programs started from here
    if not chosen and (tls := options.get("tls")) and tls.cert:
        verify = "1" if tls.verify else ""
        os.environ.update(DOCKER_CERT_PATH=str(Path(tls.cert[0]).parent), DOCKER_TLS_VERIFY=verify)
    return client


def own() -> docker.DockerClient | None:
    """The engine that was started here, if it runs."""
    with suppress(*UNREACHABLE):
        client = connect(SOCKET)
        os.environ["DOCKER_HOST"] = SOCKET
        return client
    return None


@contextmanager
def running() -> Iterator[docker.DockerClient]:
    """An engine for as long as the block lasts: the user's, or one that ends with the block."""
    _clean_up_on_signals()
    if client := find():
        yield client
        return
    with lock(), kept() as client:
        yield client
        if _started:
            stop()


@contextmanager
def kept() -> Iterator[docker.DockerClient]:
    """An engine that goes on after the block, unless the block fails and the engine was started for it."""
    _clean_up_on_signals()
    try:
        yield find() or own() or start()
    except BaseException:
        if _started:
            stop()
        raise


def _clean_up_on_signals() -> None:
    """Treat SIGTERM, and a terminal that is closed, like Ctrl-C. Ignore the second SIGTERM that make sends."""

    def interrupt(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)


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
    """Start dockerd on a unix socket. If Docker Hub is out of reach, start a mirror with stand-in images as well."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise SetupError(
            "no Docker engine answers. Start one (`docker version` must answer), or set DOCKER_HOST"
        )
    if not shutil.which("dockerd"):
        say("installing dockerd from the Debian package docker.io (about 30 s)")
        if subprocess.run([PROJECT / "scripts" / "apt-install.sh", "docker.io"]).returncode != 0:
            raise SetupError(
                "no Docker engine answers, and dockerd cannot be installed: install Docker"
            )
        if client := find():  # with an init system, the package starts it
            return client
    HOME.mkdir(parents=True, exist_ok=True)
    log = HOME / "dockerd.log"
    (HOME / "daemon.json").write_text("{}")  # not the one of another engine on this machine
    command = [
        "dockerd",
        f"--host={SOCKET}",
        f"--config-file={HOME}/daemon.json",
        f"--pidfile={HOME}/dockerd.pid",
    ]
    command += [
        f"--data-root={HOME}/data",
        f"--exec-root={HOME}/exec",
        f"--registry-mirror=http://{registry.REGISTRY}",
    ]
    command += [
        f"--add-runtime=careful={PROJECT}/scripts/airgap/runc-drop-missing-caps",
        "--default-runtime=careful",
    ]
    say(f"starting dockerd (its log: {log})")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    _started.append(process)
    try:
        wait_until(lambda: own() or process.poll() is not None, "dockerd answers")
        if not (client := own()):
            raise SetupError(
                f"dockerd cannot be started. The end of its log:\n{log.read_text()[-1500:]}"
            )
        if not can_pull(client, base.PREFECT[0]):
            say(
                "Docker Hub is out of reach: a local registry with stand-ins takes its place, for the images it has"
            )
            registry.start(client, base.PREFECT[0])
    except BaseException:
        stop()
        raise
    return client


def stop() -> None:
    """Stop the dockerd that start() has started, with its containers. Images stay, for the next time."""
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int((HOME / "dockerd.pid").read_text()))
        if f"--pidfile={HOME}/dockerd.pid" in process.cmdline():
            with suppress(*UNREACHABLE):  # what cannot be removed ends with dockerd
                if client := own():
                    remove_ours(client)
            process.terminate()
            for hung in psutil.wait_procs([process], timeout=base.START_SECONDS)[1]:
                hung.kill()
            say("dockerd has ended")
    while _started:  # without a pid file, too: it may have been interrupted before it had one
        _started[-1].terminate()
        _started.pop().wait()
    for mount in reversed(psutil.disk_partitions(all=True)):
        if mount.mountpoint.startswith(f"{HOME}/"):  # the namespace of the host's network, for one
            subprocess.run(["umount", mount.mountpoint], check=True)


def remove_ours(client: docker.DockerClient) -> None:
    """Remove the containers and networks that were started here. Volumes stay, for the next time."""
    ours: dict[str, Any] = {"label": [f"{key}={value}" for key, value in base.LABELS.items()]}
    for container in client.containers.list(all=True, filters=ours, ignore_removed=True):
        container.remove(force=True)
    for network in client.networks.list(filters=ours):
        network.remove()
