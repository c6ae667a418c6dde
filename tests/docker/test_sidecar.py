"""The job template's two containers, run as a pod would run them, and daemons that fail."""

from __future__ import annotations

import io
import tarfile
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from flows.settings import load_job_template
from tests.conftest import LABELS, PREFECT, SIDECAR, busybox
from tests.docker.conftest import Outcome, Registry
from tests.support.waiting import wait_for

FLOW = load_job_template("docker_sidecar")["spec"]["template"]["spec"]["containers"][0]
ASK = "import docker; d = docker.from_env(); print(d.info()['OSType'], d.info()['Labels'])"
NO_DAEMON = "flow-container: the Docker daemon did not start, dind-daemon says why\n"
NESTED = "tcp://localhost:23750"


class Pod:
    """Two containers with a network and a gate in common."""

    def __init__(self, daemon: docker.DockerClient, store: str = "") -> None:
        self.daemon = daemon
        self.gate = daemon.volumes.create(labels=LABELS).name
        self.store = {store: {"bind": "/var/lib/docker"}} if store else {}
        self.containers: list[Container] = []

    def remove(self) -> None:
        for container in reversed(self.containers):
            container.remove(force=True, v=True)
        self.daemon.volumes.get(self.gate).remove()

    def _start(
        self, image: str, spec: dict[str, Any], edits: dict[str, str], files: dict[str, str], **options: Any
    ) -> Container:
        command, args = spec["command"], spec["args"]
        for old, new in edits.items():
            assert any(old in word for word in command + args), f"{old!r} is no longer in the template"
            command, args = ([word.replace(old, new) for word in words] for words in (command, args))
        container = self.daemon.containers.create(
            image,
            args,
            entrypoint=command,
            environment={entry["name"]: entry["value"] for entry in spec["env"]},
            labels=LABELS,
            volumes={self.gate: {"bind": "/gate"}, **(self.store if options.get("privileged") else {})},
            **options,
        )
        self.containers.append(container)
        for path, content in files.items():
            container.put_archive("/", _tar({path: content.encode()}))
        container.start()
        return container

    def sidecar(self, edits: dict[str, str] | None = None, files: dict[str, str] | None = None) -> Container:
        return self._start(SIDECAR["image"], SIDECAR, edits or {}, files or {}, privileged=True)

    def flow(self, *command: str, beside: Container | None = None, edits: dict[str, str] | None = None) -> Container:
        network = {"network_mode": f"container:{beside.id}"} if beside else {}
        return self._start(PREFECT, {**FLOW, "args": list(command)}, edits or {}, {}, **network)


def _tar(files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def end(container: Container, within: float) -> tuple[int, str]:
    """The exit code of a container that has to end within some seconds, and what it wrote."""

    def ended() -> bool:
        container.reload()
        return bool(container.status == "exited")

    wait_for(ended, f"{container.attrs['Config']['Entrypoint']} ends", container.logs, within)
    return container.attrs["State"]["ExitCode"], container.logs().decode()


@pytest.fixture
def pod(daemon: docker.DockerClient) -> Iterator[Pod]:
    found = Pod(daemon)
    yield found
    found.remove()


def test_flow_starts_with_a_ready_daemon_and_ends_it(pod: Pod) -> None:
    sidecar = pod.sidecar()
    flow = pod.flow("sh", "-c", f'python -c "{ASK}"; exit 5', beside=sidecar)
    code, output = end(flow, 30)
    assert code == 5
    assert "linux" in output
    code, output = end(sidecar, 15)
    assert code == 0
    assert "Daemon shutdown complete" in output


def test_flow_killed_with_sigkill(pod: Pod) -> None:
    sidecar = pod.sidecar()
    flow = pod.flow("sh", "-c", "echo up; sleep 300", beside=sidecar)
    wait_for(lambda: b"up" in flow.logs(), "the flow runs", sidecar.logs)
    flow.kill("SIGKILL")
    assert end(sidecar, 15)[0] == 0


def test_sigterm_to_the_flow(pod: Pod) -> None:
    sidecar = pod.sidecar()
    flow = pod.flow("python", "-uc", "print('up'); import time; time.sleep(300)", beside=sidecar)
    wait_for(lambda: b"up" in flow.logs(), "the flow runs", sidecar.logs)
    flow.kill("SIGTERM")
    code, output = end(flow, 10)
    assert code == 143
    assert "Main child exited with signal (with signal 'Terminated')" in output
    assert end(sidecar, 15)[0] == 0


def test_sigint_reaches_the_flow(pod: Pod) -> None:
    """Prefect cancels a run with SIGINT, which a shell's background processes ignore."""
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    code, output = end(pod.flow("python", "-c", interrupt, beside=pod.sidecar()), 30)
    assert code != 0
    assert "KeyboardInterrupt" in output


def test_sigterm_to_the_sidecar_while_the_flow_runs(pod: Pod) -> None:
    """In a pod the flow gets it at the same time, and stops its container, for which it needs the daemon."""
    sidecar = pod.sidecar()
    ask = "import docker; docker.from_env().ping(); print('answers')"
    stop = f"""trap 'sleep 1; python -c "{ask}"; exit' TERM; echo up; while :; do sleep 0.1; done"""
    flow = pod.flow("sh", "-c", stop, beside=sidecar)
    wait_for(lambda: b"up" in flow.logs(), "the flow runs", sidecar.logs)
    for container in (sidecar, flow):
        container.kill("SIGTERM")
    assert "answers" in end(flow, 8)[1]
    assert end(sidecar, 8)[0] == 143


def test_sigterm_does_not_wait_for_ever_on_the_flow(pod: Pod) -> None:
    sidecar = pod.sidecar(edits={"timeout 10": "timeout 1"})
    flow = pod.flow("sh", "-c", "echo up; sleep 300", beside=sidecar)
    wait_for(lambda: b"up" in flow.logs(), "the flow runs", sidecar.logs)
    sidecar.kill("SIGTERM")
    assert end(sidecar, 8)[0] == 143


def test_sigterm_to_the_sidecar_before_the_flow_comes(pod: Pod) -> None:
    sidecar = pod.sidecar()
    wait_for(lambda: b"API listen on" in sidecar.logs(), "dockerd answers", sidecar.logs)
    sidecar.kill("SIGTERM")
    code, output = end(sidecar, 15)
    assert code == 143
    assert "Daemon shutdown complete" in output


def test_no_flow(pod: Pod) -> None:
    code, output = end(pod.sidecar(edits={"read -r -t 300": "read -r -t 2"}), 30)
    assert code == 1
    assert "dind-daemon: no flow within 300 s" in output


def test_no_sidecar(pod: Pod) -> None:
    code, output = end(pod.flow("true", edits={"-le 1500": "-le 5"}), 10)
    assert (code, output) == (1, "flow-container: no Docker daemon within 300 s\n")


def test_daemon_that_cannot_start(pod: Pod) -> None:
    sidecar = pod.sidecar(files={"config/daemon.json": '{"mtu": '})
    assert end(pod.flow("true", beside=sidecar), 30) == (1, NO_DAEMON)
    code, output = end(sidecar, 10)
    assert code == 1
    assert output.count("unable to configure the Docker daemon with file /config/daemon.json") == 1
    assert output.endswith("dind-daemon: dockerd does not answer\n")


def test_daemon_that_fails_after_it_has_mounted(pod: Pod) -> None:
    sidecar = pod.sidecar(edits={"--data-root=": "--storage-driver=nonsense --data-root="})
    assert end(pod.flow("true", beside=sidecar), 30) == (1, NO_DAEMON)
    code, output = end(sidecar, 10)
    assert code == 1
    assert "nonsense" in output


def test_sidecar_that_fails_by_itself(pod: Pod) -> None:
    sidecar = pod.sidecar(edits={"mkfifo -m 666": "no-such-command"})
    assert end(pod.flow("true", beside=sidecar), 30)[0] == 1
    assert end(sidecar, 10)[0] != 0


def test_daemon_that_neither_answers_nor_ends(pod: Pod) -> None:
    listens = """sh -c 'trap "" TERM; echo $$ >/var/run/docker.pid; while :; do nc -l -p 2375 -e sleep 300; done'"""
    edits = {"timeout 60": "timeout 2", "sleep 15": "sleep 1"}
    sidecar = pod.sidecar(edits={**edits, 'exec dockerd-entrypoint.sh "$@"': f"exec {listens}"})
    assert end(pod.flow("true", beside=sidecar), 30) == (1, NO_DAEMON)
    code, output = end(sidecar, 10)
    assert code == 1
    assert "dind-daemon: dockerd does not answer\n" in output


def test_daemon_configuration_is_read_but_cannot_open_the_daemon(pod: Pod) -> None:
    sidecar = pod.sidecar(files={"config/daemon.json": '{"labels": ["who=us"]}'})
    code, output = end(pod.flow("python", "-c", ASK, beside=sidecar), 30)
    assert code == 0
    assert "['who=us']" in output
    sidecar = pod.sidecar(files={"config/daemon.json": '{"hosts": ["tcp://0.0.0.0:2375"]}'})
    assert "specified both as a flag and in the configuration file: hosts" in end(sidecar, 30)[1]


def test_daemon_killed_while_the_flow_runs(pod: Pod) -> None:
    sidecar = pod.sidecar()
    script = "import docker; d = docker.from_env(); print('up', flush=True)\nwhile d.ping(): pass"
    flow = pod.flow("python", "-c", script, beside=sidecar)
    wait_for(lambda: b"up" in flow.logs(), "the flow runs", sidecar.logs)
    sidecar.exec_run(["sh", "-c", "kill -9 $(pidof dockerd)"])
    assert end(flow, 10)[0] == 1
    code, output = end(sidecar, 10)
    assert code == 1
    assert "dind-daemon: dockerd has ended before the flow" in output


def test_port_is_closed_to_other_pods(pod: Pod) -> None:
    sidecar = pod.sidecar()
    flow = pod.flow("sh", "-c", f'python -c "{ASK}"; sleep 300', beside=sidecar)
    wait_for(lambda: b"linux" in flow.logs(), "the flow reaches the daemon", flow.logs)
    assert refuses_others(pod.daemon, sidecar)


def refuses_others(daemon: docker.DockerClient, sidecar: Container) -> bool:
    """Whether another container that wants to talk to the sidecar's daemon is refused."""
    sidecar.reload()
    [network] = sidecar.attrs["NetworkSettings"]["Networks"].values()
    ask = ["docker", "--host", f"tcp://{network['IPAddress']}:2375", "version"]
    with pytest.raises(docker.errors.ContainerError) as error:
        daemon.containers.run(SIDECAR["image"], ask, entrypoint=[], remove=True, labels=LABELS)
    return b"Cannot connect to the Docker daemon" in error.value.stderr


def test_native_sidecar(daemon: docker.DockerClient) -> None:
    """What Kubernetes 1.29 and newer do with it: start it, probe it, end it."""
    [spec] = load_job_template("native_sidecar")["spec"]["template"]["spec"]["initContainers"]
    environment = {entry["name"]: entry["value"] for entry in spec["env"]}
    container = daemon.containers.run(
        spec["image"], spec["args"], detach=True, environment=environment, labels=LABELS, privileged=True
    )
    try:
        probe, limit = spec["startupProbe"]["exec"]["command"], spec["startupProbe"]["failureThreshold"]
        wait_for(lambda: container.exec_run(probe).exit_code == 0, "its probe succeeds", container.logs, limit)
        assert refuses_others(daemon, container)
        container.kill("SIGTERM")
        assert end(container, 15)[0] == 0
    finally:
        container.remove(force=True, v=True)


@pytest.fixture
def new_pod(daemon: docker.DockerClient) -> Iterator[Callable[[], Pod]]:
    """Pods with node storage in common, here a volume."""
    store = daemon.volumes.create(labels=LABELS)
    pods: list[Pod] = []

    def create() -> Pod:
        pods.append(Pod(daemon, store.name))
        return pods[-1]

    yield create
    for pod in pods:
        pod.remove()
    store.remove()


def ready(sidecar: Container) -> Container:
    wait_for(lambda: sidecar.exec_run(["test", "-p", "/gate/flow"]).exit_code == 0, "the gate opens", sidecar.logs)
    return sidecar


def sh(container: Container, command: str) -> str:
    code, output = container.exec_run(["sh", "-euc", command])
    assert code == 0, output.decode()
    return str(output.decode().strip())


KEEP = "tar -C / -c bin/busybox | docker import - kept:1; docker create --name stale --volume stale:/v kept:1 true"


def test_layers_outlive_the_pod_and_its_sudden_death(new_pod: Callable[[], Pod]) -> None:
    first = ready(new_pod().sidecar())
    sh(first, f"{KEEP}; docker network create stale; tar -C / -c bin/sh | docker import -")
    first.kill("SIGKILL")
    second = ready(new_pod().sidecar())
    images = sh(second, "docker image ls --all --format '{{.Repository}}'").split()
    assert sorted(images) == ["<none>", "kept"], "a nameless one, too"
    left = "docker ps --all --quiet; docker volume ls --quiet; docker network ls --quiet --filter type=custom"
    assert sh(second, left) == "", "what the predecessor left is gone"
    assert sh(second, "ls /var/lib/docker") == "0\n0.lock"


def test_two_pods_at_once_have_a_slot_each(new_pod: Callable[[], Pod]) -> None:
    first, second = ready(new_pod().sidecar()), ready(new_pod().sidecar())
    roots = [sh(sidecar, "docker info --format '{{.DockerRootDir}}'") for sidecar in (first, second)]
    assert roots == ["/var/lib/docker/0", "/var/lib/docker/1"]
    first.kill("SIGKILL")
    assert sh(ready(new_pod().sidecar()), "docker info --format '{{.DockerRootDir}}'") == "/var/lib/docker/0"


def test_a_broken_slot_is_set_aside(new_pod: Callable[[], Pod]) -> None:
    first = ready(new_pod().sidecar())
    sh(first, "echo broken >/var/lib/docker/0/network/files/local-kv.db")
    first.kill("SIGKILL")
    second = ready(new_pod().sidecar())
    assert b"dind-daemon: slot 0 is set aside as /var/lib/docker/0.broken" in second.logs()
    assert sh(second, "ls /var/lib/docker") == "0\n0.broken\n0.lock"


def test_a_bad_configuration_breaks_no_slot(new_pod: Callable[[], Pod]) -> None:
    first = ready(new_pod().sidecar())
    sh(first, KEEP)
    first.kill("SIGKILL")
    assert end(new_pod().sidecar(files={"config/daemon.json": '{"mtu": '}), 30)[0] == 1
    assert sh(ready(new_pod().sidecar()), "docker image ls --quiet kept:1")


def test_a_full_slot_loses_its_oldest_images(new_pod: Callable[[], Pod]) -> None:
    first = ready(new_pod().sidecar())
    big = "dd if=/dev/urandom of=/big bs=1M count=20 2>/dev/null; tar -C / -c big | docker import - {}:1; sleep 1; "
    sh(first, big.format("old") + big.format("new"))
    first.kill("SIGKILL")
    second = ready(new_pod().sidecar(edits={"-gt 20480": "-gt 30"}))
    assert sh(second, "docker image ls --format '{{.Repository}}'") == "new"


@pytest.fixture
def nested(engine: docker.DockerClient, on: Callable[[str], None]) -> Iterator[Callable[..., tuple[Container, str]]]:
    """Start a daemon that may break, turn the flow to it, and tell what an image of the engine is called there."""
    network = engine.networks.create(f"nested-{uuid.uuid4().hex[:8]}", labels=LABELS)
    registry = Registry(engine, 5059)
    network.connect(registry.container)
    network.reload()
    address = network.attrs["Containers"][registry.container.id]["IPv4Address"].split("/")[0] + ":5000"
    started: list[Container] = [registry.container]

    def start(image: str, **options: Any) -> tuple[Container, str]:
        registry.push(image, "nested:1")
        arguments = ["dockerd", "--host=tcp://0.0.0.0:23750", "--tls=false", f"--insecure-registry={address}"]
        started.append(
            engine.containers.run(
                SIDECAR["image"],
                arguments,
                detach=True,
                environment={"DOCKER_TLS_CERTDIR": ""},
                labels=LABELS,
                network=network.name,
                ports={"23750/tcp": ("127.0.0.1", 23750)},
                privileged=True,
                **options,
            )
        )
        wait_for(lambda: b"API listen on" in started[-1].logs(), "dockerd answers", started[-1].logs)
        on(NESTED)
        return started[-1], f"{address}/nested:1"

    yield start
    for container in started:
        container.remove(force=True, v=True)
    network.remove()


def test_daemon_dies_during_the_wait(
    flow_run: Callable[..., Outcome],
    engine: docker.DockerClient,
    nested: Callable[..., tuple[Container, str]],
    logs: list[tuple[str, str, str]],
) -> None:
    container, image = nested(busybox(engine))

    def kill() -> None:
        wait_for(lambda: any(text == "up" for _, _, text in logs), "the container runs", lambda: logs)
        container.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    run = flow_run(image=image, command=["sh", "-c", "echo up; sleep 300"])
    killer.join()
    assert run.state.is_failed()
    assert f"the Docker daemon at {NESTED} does not answer" in run.state.message
    assert f"(image {image})" in run.state.message
    assert run.tasks["GetContainerLogs"].is_skipped()


def test_no_disk_space_for_the_image(
    flow_run: Callable[..., Outcome],
    engine: docker.DockerClient,
    nested: Callable[..., tuple[Container, str]],
) -> None:
    engine.api.import_image_from_data(_tar({"big": bytes(64 << 20)}), "docker-sidecar-tests", "big")
    _, image = nested("docker-sidecar-tests:big", tmpfs={"/var/lib/docker": "size=32m"})
    engine.images.remove("docker-sidecar-tests:big")
    run = flow_run(image=image, command="true")
    assert run.state.is_failed()
    assert "no space left on device" in run.state.message
    assert not run.naming("retry")
