"""The Docker engine that a local run uses: the user's own, or one that is started for as long as it is needed."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import docker
import docker.utils
import psutil
import requests
from docker.context import ContextAPI
from docker.errors import APIError, DockerException, ImageNotFound, NotFound

from flows.daemon import bypass_proxy
from flows.settings import PROJECT, load_job_template

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "docker-sidecar-on-kubernetes")
HOME = CACHE / "dockerd"  # of a dockerd started here: data root, exec root, socket, pid file, log
SOCKET = f"unix://{HOME}/docker.sock"
NAME = "docker-sidecar"
LABELS = {"docker-sidecar-on-kubernetes": "make"}  # of containers and networks started here
REGISTRY = "localhost:5001"  # the local registry, to push to and as a mirror of Docker Hub
REGISTRY_IMAGE = "registry:3"
# as the flow, the flow's image and the Agent's manifest name it
PREFECT = tuple(f"prefecthq/prefect:1.4.1{python}" for python in ("", "-python3.10", "-python3.7"))
DAEMON = str(load_job_template("native_sidecar")["spec"]["template"]["spec"]["initContainers"][0]["image"])
ANSWER_SECONDS, START_SECONDS, WORK_SECONDS = 5, 60, 600
UNREACHABLE = (DockerException, requests.RequestException)

_started: list[subprocess.Popen[bytes]] = []  # Python warns when a Popen of a running process is collected


class SetupError(RuntimeError):
    """The setup failed. The message says why, and what to do."""


def say(message: str) -> None:
    """Tell the user what is done, and how long it takes."""
    print(f"engine: {message}", flush=True)


def connect(base_url: str, **options: Any) -> docker.DockerClient:
    """A client of the Docker engine at a URL. Raises one of UNREACHABLE if none answers."""
    bypass_proxy(base_url)
    client = docker.DockerClient(base_url, timeout=ANSWER_SECONDS, **options)
    client.ping()
    client.api.timeout = WORK_SECONDS
    return client


def find() -> docker.DockerClient | None:
    """The user's engine, as `docker` finds it: DOCKER_HOST, the current Docker context, the usual socket."""
    chosen = os.environ.get("DOCKER_HOST")
    try:
        options = docker.utils.kwargs_from_env() if chosen else ContextAPI.kwargs_from_context()
        if "base_url" not in options:
            raise LookupError("there is no such context")
        client = connect(**options)
    except UNREACHABLE as error:
        if chosen and chosen != SOCKET:
            raise SetupError(f"no Docker engine answers at DOCKER_HOST={chosen}: {error}") from None
        return None
    except Exception as error:  # the SDK raises errors of many types
        raise SetupError(f"DOCKER_HOST, Docker's context or its config.json is wrong: {error}") from None
    os.environ["DOCKER_HOST"] = options["base_url"]  # for the flow, and for programs started from here
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
            "no Docker engine answers. Start one (`docker version` must answer), or set DOCKER_HOST. "
            "Only as root on Linux is one started for you"
        )
    if not shutil.which("dockerd"):
        say("installing dockerd from the Debian package docker.io (about 30 s)")
        if subprocess.run([PROJECT / "scripts" / "apt-install.sh", "docker.io"]).returncode != 0:
            raise SetupError("no Docker engine answers, and dockerd cannot be installed: install Docker")
        if client := find():  # with an init system, the package starts it
            return client
    HOME.mkdir(parents=True, exist_ok=True)
    log = HOME / "dockerd.log"
    (HOME / "daemon.json").write_text("{}")  # not the one of another engine on this machine
    command = ["dockerd", f"--host={SOCKET}", f"--config-file={HOME}/daemon.json", f"--pidfile={HOME}/dockerd.pid"]
    command += [f"--data-root={HOME}/data", f"--exec-root={HOME}/exec", f"--registry-mirror=http://{REGISTRY}"]
    command += [f"--add-runtime=careful={PROJECT}/scripts/airgap/runc-drop-missing-caps", "--default-runtime=careful"]
    say(f"starting dockerd (its log: {log})")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    _started.append(process)
    try:
        wait_until(lambda: own() or process.poll() is not None, "dockerd answers")
        if not (client := own()):
            raise SetupError(f"dockerd cannot be started. The end of its log:\n{log.read_text()[-1500:]}")
        if not can_pull(client, PREFECT[0]):
            say("Docker Hub is out of reach: a local registry with stand-in images takes its place")
            registry(client, PREFECT[0])
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
            for hung in psutil.wait_procs([process], timeout=START_SECONDS)[1]:
                hung.kill()
            say("dockerd has ended")
    while _started:
        _started.pop().wait()
    for mount in reversed(psutil.disk_partitions(all=True)):
        if mount.mountpoint.startswith(f"{HOME}/"):  # the namespace of the host's network, for one
            subprocess.run(["umount", mount.mountpoint], check=True)


def remove_ours(client: docker.DockerClient) -> None:
    """Remove the containers and networks that were started here. Volumes stay, for the next time."""
    ours: dict[str, Any] = {"label": [f"{key}={value}" for key, value in LABELS.items()]}
    for container in client.containers.list(all=True, filters=ours):
        container.remove(force=True)
    for network in client.networks.list(filters=ours):
        network.remove()


def can_pull(client: docker.DockerClient, image: str) -> bool:
    """Whether an engine reaches a registry that has an image: its own network, mirrors and proxies decide."""
    with suppress(*UNREACHABLE):
        return bool(client.images.get_registry_data(image))
    return False


def provide(client: docker.DockerClient, *names: str) -> None:
    """Have images on an engine: those that it has, else from their registry, else stand-ins."""
    from scripts.airgap import images  # it needs this module

    for name in names:
        try:
            stand_in = images.LABEL in client.images.get(name).labels
        except ImageNotFound:
            with suppress(*UNREACHABLE):
                client.images.pull(name)
                continue
            stand_in = True
        if stand_in:  # also if it is there: what it is made from may have changed
            images.build(client, name)


def registry(client: docker.DockerClient, *names: str) -> None:
    """Have a registry at localhost:5001, which also serves images under the names that they have on Docker Hub."""
    provide(client, *names, REGISTRY_IMAGE)  # in this order: the first may build a newer registry
    try:
        try:
            client.containers.get(f"{NAME}-registry").start()  # of a run that was killed
        except NotFound:
            client.containers.run(
                REGISTRY_IMAGE,
                name=f"{NAME}-registry",
                detach=True,
                labels=LABELS,
                ports={"5000/tcp": ("127.0.0.1", int(REGISTRY.partition(":")[2]))},
                volumes={f"{NAME}-registry": {"bind": "/var/lib/registry"}},
            )
    except APIError as error:
        raise SetupError(f"the local registry cannot start at {REGISTRY}: {error.explanation}") from None

    def answers() -> bool:
        with suppress(requests.RequestException), requests.Session() as session:
            session.trust_env = False  # no proxy
            return session.get(f"http://{REGISTRY}/v2/", timeout=ANSWER_SECONDS).ok
        return False

    wait_until(answers, f"the local registry answers at {REGISTRY}; is another program on that port?")
    for name in names:
        push(client, name, name)


def push(client: docker.DockerClient, image: str, name: str) -> str:
    """Push an image of the engine to the local registry under a name, and return its path there."""
    repository, tag = name.removeprefix("registry.k8s.io/").rsplit(":", 1)
    repository = repository if "/" in name else f"library/{repository}"
    client.images.get(image).tag(f"{REGISTRY}/{repository}", tag)
    for line in client.api.push(f"{REGISTRY}/{repository}", tag, stream=True, decode=True):
        if "error" in line:  # in the body of a 200
            raise SetupError(f"pushing {image} to {REGISTRY}: {line['error']}")
    client.images.remove(f"{REGISTRY}/{repository}:{tag}")
    return f"{repository}:{tag}"


def registry_address(client: docker.DockerClient, network: str) -> str:
    """The local registry's address and port in a network of the engine."""
    container, found = client.containers.get(f"{NAME}-registry"), client.networks.get(network)
    if container.id not in found.attrs["Containers"]:
        found.connect(container)
        found.reload()
    return "{}:5000".format(found.attrs["Containers"][container.id]["IPv4Address"].split("/")[0])


def wait_until(condition: Callable[[], object], what: str, seconds: float = START_SECONDS) -> None:
    """Wait for a condition. Raises SetupError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SetupError(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)
