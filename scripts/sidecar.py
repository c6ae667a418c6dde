"""A Docker daemon on tcp://localhost:2375, as the flow finds it in its pod.

`make sidecar-up` and `make sidecar-down` call it, and `make run` for as long as it needs one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import docker
import psutil
import requests
from docker.errors import DockerException, NotFound
from docker.models.containers import Container
from docker.models.networks import Network

from flows.settings import PROJECT, load_job_template
from tests.airgap import images

PORT = 2375
DAEMON = f"tcp://127.0.0.1:{PORT}"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "docker-sidecar-on-kubernetes")
HOME = CACHE / "dockerd"  # of a daemon started here: data root, exec root, pid file, log
REGISTRY_PORT = 5001
REGISTRY = f"localhost:{REGISTRY_PORT}"
NAME = "docker-sidecar"  # of the daemon's container and its network
LABELS = {"docker-sidecar-on-kubernetes": "make"}
OURS: dict[str, str | list[str] | bool] = {"label": [f"{key}={value}" for key, value in LABELS.items()]}
START_SECONDS = 60
ANSWER_SECONDS, WORK_SECONDS = 5, 600  # how long to wait for a sign of life, and for a build
WAYS = """There are three ways to get a Docker daemon at tcp://localhost:2375:
  - start one there yourself; it is used and left alone
  - have a Docker engine on this machine (`docker version` answers); a daemon is started in a container
  - be root on Linux; dockerd is started directly (on Debian it is installed if need be)"""


# A proxy that the environment names must not be asked for what is here.
os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "localhost,127.0.0.1"]))

_started: list[subprocess.Popen[bytes]] = []  # kept, for a Popen that is forgotten warns that its process goes on


class SidecarError(RuntimeError):
    """There can be no daemon; the message says why and what to do."""


def say(message: str) -> None:
    """Tell the user what is done, and how long it takes."""
    print(f"sidecar: {message}", flush=True)


def connect(url: str | None = None) -> docker.DockerClient | None:
    """The Docker engine at a URL (by default at ``DOCKER_HOST`` or the current Docker context), if one answers."""
    try:
        client = docker.DockerClient(url, timeout=ANSWER_SECONDS) if url else docker.from_env(timeout=ANSWER_SECONDS)
        client.ping()
    except (DockerException, requests.RequestException):
        return None
    client.api.timeout = WORK_SECONDS
    return client


def hub_answers() -> bool:
    """Whether Docker Hub can be reached."""
    with suppress(requests.RequestException):
        answer = requests.get("https://registry-1.docker.io/v2/", timeout=ANSWER_SECONDS)
        return answer.status_code in (200, 401)  # 401 asks for a token; anything else is a proxy's
    return False


def port_owner(port: int) -> str | None:
    """Who listens on a port of the loopback interface."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) != 0:
            return None
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return "a process of another user"


def engine() -> docker.DockerClient:
    """The Docker engine of this machine, or the daemon that takes its place, also for programs started from here."""
    if client := connect():
        return client
    client = up()
    os.environ["DOCKER_HOST"] = DAEMON
    return client


def up() -> docker.DockerClient:
    """Have a daemon at tcp://localhost:2375, and with it, where Docker Hub cannot be reached, its images.

    Raises:
        SidecarError: if there can be none.
    """
    if daemon := connect(DAEMON):
        say(f"using the Docker daemon {daemon.version()['Version']} that answers at {DAEMON}")
        return daemon
    if owner := port_owner(PORT):
        raise SidecarError(f"port {PORT} is taken by {owner}, which is no Docker daemon: stop it")
    online = hub_answers()
    if not online:
        say("Docker Hub cannot be reached: a local registry with stand-in images takes its place")
    if engine := connect():
        return _run_in_container(engine, online)
    if sys.platform != "linux" or os.geteuid() != 0:
        raise SidecarError(f"no Docker engine answers, and this is not root on Linux.\n{WAYS}")
    if not shutil.which("dockerd"):
        if not shutil.which("apt-get"):
            raise SidecarError(f"no Docker engine answers, and there is no dockerd to start.\n{WAYS}")
        say("installing dockerd from the Debian package docker.io (about 30 s)")
        if subprocess.run([PROJECT / "scripts" / "apt-install.sh", "docker.io"]).returncode != 0:
            raise SidecarError(f"no Docker engine answers, and dockerd cannot be installed.\n{WAYS}")
        if engine := connect():  # with an init system, the package starts it
            return _run_in_container(engine, online)
    return _start_dockerd(online)


def _run_in_container(engine: docker.DockerClient, online: bool) -> docker.DockerClient:
    image = load_job_template("docker_sidecar")["spec"]["template"]["spec"]["containers"][1]["image"]
    say(f"starting {image} in a container of the Docker engine {engine.version()['Version']}")
    if online:
        engine.images.pull(image)
    for stale in [thing for thing in _ours() if thing.name == NAME]:  # of a run that was killed
        _remove(stale)
    # a network of its own, so that no other container can reach the port; only it is published, on loopback
    network = engine.networks.create(NAME, labels=LABELS)
    mirror = [] if online else [f"--registry-mirror={start_registry(engine, online, network.name)}"]
    container = engine.containers.run(
        image,
        # --tls=false: without it dockerd sleeps 15 s to warn of what nobody can reach here
        ["dockerd", f"--host=tcp://0.0.0.0:{PORT}", "--tls=false", *mirror],
        name=NAME,
        detach=True,
        environment={"DOCKER_TLS_CERTDIR": ""},
        labels=LABELS,
        network=network.name,
        ports={f"{PORT}/tcp": ("127.0.0.1", PORT)},
        privileged=True,
        volumes={f"{NAME}-store": {"bind": "/var/lib/docker"}},
    )

    def ended() -> str | None:
        container.reload()
        return None if container.status == "running" else container.logs(tail=5).decode()

    return _wait_for_daemon(ended)


def _start_dockerd(online: bool) -> docker.DockerClient:
    HOME.mkdir(parents=True, exist_ok=True)
    log = HOME / "dockerd.log"
    # no daemon.json of another engine on this machine
    (HOME / "daemon.json").write_text("{}")
    command = ["dockerd", f"--host={DAEMON}", f"--config-file={HOME}/daemon.json"]
    command += [f"--data-root={HOME}/data", f"--exec-root={HOME}/exec", f"--pidfile={HOME}/dockerd.pid"]
    command += [
        f"--add-runtime=careful={PROJECT}/tests/airgap/runc-drop-missing-caps",
        "--default-runtime=careful",
    ]
    if not online:
        command += [f"--registry-mirror=http://{REGISTRY}"]
    say(f"starting dockerd (its log: {log})")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    _started.append(process)
    daemon = _wait_for_daemon(lambda: None if process.poll() is None else log.read_text()[-1500:])
    if not online:
        start_registry(daemon, online)
    return daemon


def _wait_for_daemon(last_words: Callable[[], str | None]) -> docker.DockerClient:
    """Wait until the daemon answers, or has ended and left some last words."""
    try:
        wait_until(lambda: connect(DAEMON) or last_words() is not None, f"dockerd answers at {DAEMON}")
        if daemon := connect(DAEMON):
            return daemon
        raise SidecarError(f"dockerd ended before it answered. Its last words:\n{last_words()}")
    except SidecarError:
        down()
        raise


def start_registry(engine: docker.DockerClient, online: bool, network: str = "bridge") -> str:
    """Have a registry on the engine, to push to and, where Docker Hub cannot be reached, filled with stand-ins.

    Args:
        engine: where the registry runs, in a container with its port published on the loopback interface.
        online: whether Docker Hub can be reached; then a second registry is a pull-through cache of it.
        network: the network of the engine that the daemons to serve are on.

    Returns:
        The URL of a mirror of Docker Hub, as seen from the network.
    """
    if online:
        engine.images.pull("registry:2")
    else:
        images.build(engine)
    _run_registry(engine, "registry", {"5000/tcp": ("127.0.0.1", REGISTRY_PORT)}, {})
    if online:
        _run_registry(engine, "mirror", {}, {"REGISTRY_PROXY_REMOTEURL": "https://registry-1.docker.io"})
    wait_until(_registry_answers, f"the local registry answers at {REGISTRY}")
    if not online:
        images.fill(engine, REGISTRY)
    return address_of(engine, registries(engine)[-1], network)


def registries(engine: docker.DockerClient) -> list[str]:
    """Which registries run: the one to push to, and the mirror of Docker Hub, if that is another."""
    running = [container.name for container in engine.containers.list(filters=OURS)]
    return [name for name in ("registry", "mirror") if f"{NAME}-{name}" in running]


def address_of(engine: docker.DockerClient, name: str, network: str) -> str:
    """The URL of a registry in a network: by address, as pods of the cluster that `make airgap` enables have no DNS."""
    registry, found = engine.containers.get(f"{NAME}-{name}"), engine.networks.get(network)
    if registry.id not in found.attrs["Containers"]:
        found.connect(registry)
        found.reload()
    return "http://{}:5000".format(found.attrs["Containers"][registry.id]["IPv4Address"].split("/")[0])


def _registry_answers() -> bool:
    with suppress(requests.RequestException):
        return requests.get(f"http://{REGISTRY}/v2/", timeout=ANSWER_SECONDS).ok
    return False


def _run_registry(engine: docker.DockerClient, name: str, ports: dict[str, Any], environment: dict[str, str]) -> None:
    try:
        engine.containers.get(f"{NAME}-{name}").start()  # of a run that was killed
    except NotFound:
        if ports and (owner := port_owner(REGISTRY_PORT)):
            message = f"port {REGISTRY_PORT}, for the local registry, is taken by {owner}: stop it"
            raise SidecarError(message) from None
        engine.containers.run(
            "registry:2",
            name=f"{NAME}-{name}",
            detach=True,
            labels=LABELS,
            environment=environment,
            ports=ports,
            volumes={f"{NAME}-{name}": {"bind": "/var/lib/registry"}},
        )


def wait_until(condition: Callable[[], object], what: str, seconds: float = START_SECONDS) -> None:
    """Wait for a condition.

    Raises:
        SidecarError: if it does not come.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SidecarError(f"not within {seconds} s: {what}")
        time.sleep(0.1)


def down(keep: Collection[str] = ()) -> None:
    """Stop what up() started, but for containers and networks of these ids. Images stay, for the next time."""
    for thing in _ours():
        if thing.id not in keep:
            _remove(thing)
    if pid := _pid():
        os.kill(pid, signal.SIGTERM)
        psutil.wait_procs([psutil.Process(pid)], timeout=START_SECONDS)
        while _started:
            _started.pop().wait()
        for mount in reversed(psutil.disk_partitions(all=True)):
            if mount.mountpoint.startswith(f"{HOME}/"):  # the namespace of the host's network, for one
                subprocess.run(["umount", mount.mountpoint], check=True)
        say("dockerd has ended")


def stop() -> None:
    """down(), for whoever asks for it.

    Raises:
        SidecarError: if a cluster needs what would be stopped.
    """
    if any(map(nodes, filter(None, (connect(), connect(DAEMON))))):
        raise SidecarError("a kind cluster needs what this would stop: `make cluster-down` ends both")
    down()


def nodes(engine: docker.DockerClient) -> list[Container]:
    """The nodes of the kind cluster that is on an engine."""
    return list(engine.containers.list(all=True, filters={"label": f"io.x-k8s.kind.cluster={NAME}"}))


def _ours() -> list[Container | Network]:
    """The containers and networks that were started here, on the engine that they are on."""
    engine = connect(DAEMON) if _pid() else connect()
    return [*engine.containers.list(all=True, filters=OURS), *engine.networks.list(filters=OURS)] if engine else []


def _remove(thing: Container | Network) -> None:
    if isinstance(thing, Container):
        thing.remove(force=True)
        return
    thing.reload()
    for container in thing.containers:
        thing.disconnect(container, force=True)
    thing.remove()


def _pid() -> int | None:
    """The process id of the dockerd that was started here, if it runs."""
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int((HOME / "dockerd.pid").read_text()))
        if f"--pidfile={HOME}/dockerd.pid" in process.cmdline():
            return int(process.pid)
    return None


def _interrupt(*_: object) -> None:
    """Let SIGTERM end this process as Ctrl-C does: by its own account, it would leave what was started."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # make sends another, which must not cut the end short
    raise KeyboardInterrupt


@contextmanager
def running() -> Iterator[docker.DockerClient]:
    """A daemon for as long as the block lasts, and no longer unless it was there before."""
    signal.signal(signal.SIGTERM, _interrupt)
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another `make run` or `make test` to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        found, keep = connect(DAEMON), [thing.id for thing in _ours()]
        try:
            yield up()
        finally:
            if not found:
                down(keep)


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """If the block fails, what it has started ends, and what was there before stays."""
    signal.signal(signal.SIGTERM, _interrupt)
    found, keep = connect(DAEMON), [thing.id for thing in _ours()]
    try:
        yield
    except BaseException:
        if not found:
            down(keep)
        raise


def clean() -> None:
    """Remove what is kept for the next time."""
    if engine := connect():
        for volume in engine.volumes.list():
            if volume.name.startswith(f"{NAME}-"):
                volume.remove()
    shutil.rmtree(CACHE, ignore_errors=True)


if __name__ == "__main__":
    try:
        with all_or_nothing():
            {"up": up, "down": stop, "clean": clean}[sys.argv[1]]()
    except SidecarError as error:
        sys.exit(f"sidecar: {error}")
