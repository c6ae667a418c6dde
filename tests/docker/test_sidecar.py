"""The default template's two containers, run as a pod would run them, and daemons that fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from flows.settings import load_job_template
from scripts.base import DAEMON
from scripts.registry import push
from tests.conftest import LABELS, PREFECT, busybox, container, tar
from tests.docker.conftest import Outcome, daemon_with_mirror
from tests.support.waiting import wait_for

FLOW, SIDECAR = load_job_template("docker_sidecar")["spec"]["template"]["spec"]["containers"]
ASK = "import docker; d = docker.from_env(); print(d.info()['OSType'], d.info()['Labels'])"
WAIT = """import docker, time
while True:
    try: docker.from_env().ping(); break
    except docker.errors.DockerException: time.sleep(0.1)
"""  # as the flow's first task does


class Pod:
    """Two containers with a network and a lock in common."""

    def __init__(self, engine: docker.DockerClient) -> None:
        self.engine = engine
        self.alive = engine.volumes.create(labels=LABELS).name
        self.containers: list[Container] = []

    def remove(self) -> None:
        for found in reversed(self.containers):
            found.remove(force=True, v=True)
        self.engine.volumes.get(self.alive).remove()

    def _start(
        self, image: str, spec: dict[str, Any], args: list[str], edits: dict[str, str], files: dict[str, str],
        **options: Any,
    ) -> Container:  # fmt: skip
        command = spec["command"]
        for old, new in edits.items():
            assert any(old in word for word in command), f"{old!r} is no longer in the template"
            command = [word.replace(old, new) for word in command]
        container = self.engine.containers.create(
            image,
            args,
            entrypoint=command,
            environment={entry["name"]: entry["value"] for entry in spec["env"]},
            labels=LABELS,
            volumes={self.alive: {"bind": "/alive"}},
            **options,
        )
        self.containers.append(container)
        for path, content in files.items():
            container.put_archive("/", tar({path: content.encode()}))
        container.start()
        return container

    def sidecar(self, edits: dict[str, str] | None = None, files: dict[str, str] | None = None) -> Container:
        return self._start(DAEMON, SIDECAR, [], edits or {}, files or {}, privileged=True)

    def flow(self, *command: str, beside: Container) -> Container:
        return self._start(PREFECT, FLOW, list(command), {}, {}, network_mode=f"container:{beside.id}")

    def ready(self, **options: Any) -> Container:
        """A sidecar whose daemon answers."""
        sidecar = self.sidecar(**options)
        wait_for(lambda: sidecar.exec_run(["docker", "version"]).exit_code == 0, "dockerd answers", sidecar.logs, 60)
        return sidecar


def end(container: Container, within: float) -> tuple[int, str]:
    """The exit code of a container that has to end within some seconds, and what it wrote."""

    def ended() -> bool:
        container.reload()
        return bool(container.status == "exited")

    wait_for(ended, f"{container.attrs['Config']['Entrypoint']} ends", container.logs, within)
    return container.attrs["State"]["ExitCode"], container.logs().decode()


def sh(container: Container, command: str) -> str:
    code, output = container.exec_run(["sh", "-euc", command])
    assert code == 0, output.decode()
    return str(output.decode().strip())


@pytest.fixture
def pod(engine: docker.DockerClient) -> Iterator[Pod]:
    found = Pod(engine)
    yield found
    found.remove()


def test_the_daemon_ends_with_the_flow(pod: Pod) -> None:
    sidecar = pod.sidecar()
    code, output = end(pod.flow("python", "-c", f"{WAIT}{ASK}; raise SystemExit(5)", beside=sidecar), 60)
    assert code == 5
    assert "linux" in output
    code, output = end(sidecar, 20)
    assert code == 0
    assert "Daemon shutdown complete" in output


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
def test_the_flow_is_killed(pod: Pod, signal: str) -> None:
    sidecar = pod.ready()
    flow = pod.flow("sh", "-c", "echo up; exec sleep 300", beside=sidecar)
    wait_for(lambda: b"up" in flow.logs(), "the flow runs", sidecar.logs)
    flow.kill(signal)
    assert end(flow, 10)[0] == {"SIGKILL": 137, "SIGTERM": 143}[signal]
    assert end(sidecar, 20)[0] == 0


def test_sigint_reaches_the_flow(pod: Pod) -> None:
    """Prefect cancels a run with SIGINT, which a shell's background processes ignore."""
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    code, output = end(pod.flow("python", "-c", interrupt, beside=pod.sidecar()), 30)
    assert code != 0
    assert "KeyboardInterrupt" in output


def test_a_flow_that_ends_before_the_daemon_is_up(pod: Pod) -> None:
    sidecar = pod.sidecar()
    end(pod.flow("true", beside=sidecar), 10)
    assert end(sidecar, 20)[0] == 0, "the Job is complete"


def test_a_flow_that_cannot_start(pod: Pod) -> None:
    """As with an image of another architecture, or without flock: no lock is taken. Here the limit is 2 s."""
    sidecar = pod.sidecar(edits={"timeout 100": "timeout 2"})
    assert end(sidecar, 20)[0] != 0, "the pod fails, and the Agent fails the run"


def test_sigterm_to_the_sidecar_while_the_flow_runs(pod: Pod) -> None:
    """As when the pod is deleted: dockerd goes on until the flow has stopped its container."""
    sidecar = pod.ready()
    ask = "import docker; print(docker.from_env().ping())"
    stop = f"""trap 'sleep 1; python -c "{ask}"; exit' TERM; echo up; while :; do sleep 0.1; done"""
    flow = pod.flow("sh", "-c", stop, beside=sidecar)
    wait_for(lambda: b"up" in flow.logs(), "the flow runs", sidecar.logs)
    sidecar.kill("SIGTERM")
    flow.kill("SIGTERM")
    assert "True" in end(flow, 8)[1]
    assert end(sidecar, 20)[0] == 0


def test_a_daemon_that_does_not_heed_sigterm(pod: Pod) -> None:
    deaf = """sh -c "trap '' TERM; while :; do sleep 1; done" """
    sidecar = pod.sidecar(edits={"dockerd-entrypoint.sh dockerd": deaf, "timeout 15": "timeout 1"})
    end(pod.flow("true", beside=sidecar), 10)
    end(sidecar, 20)


def test_a_daemon_that_cannot_start(pod: Pod) -> None:
    """The flow gives up after 60 s, here at once. Then the pod fails, with the daemon's last words."""
    sidecar = pod.sidecar(files={"etc/docker/daemon.json": '{"mtu": '})
    why = "unable to configure the Docker daemon with file /etc/docker/daemon.json"
    wait_for(lambda: why.encode() in sidecar.logs(), "dockerd says why", sidecar.logs)
    end(pod.flow("true", beside=sidecar), 10)
    code, output = end(sidecar, 20)
    assert code != 0
    assert output.count(why) == 1


def test_daemon_json_is_read_but_cannot_open_the_daemon(pod: Pod) -> None:
    sidecar = pod.ready(files={"etc/docker/daemon.json": '{"labels": ["who=us"]}'})
    assert "who=us" in sh(sidecar, "docker info --format '{{.Labels}}'")
    sidecar = pod.sidecar(files={"etc/docker/daemon.json": '{"hosts": ["tcp://0.0.0.0:2375"]}'})
    why = b"specified both as a flag and in the configuration file: hosts"
    wait_for(lambda: why in sidecar.logs(), "dockerd says why", sidecar.logs)


def test_the_port_is_closed_to_other_pods(pod: Pod) -> None:
    sidecar = pod.ready()
    sidecar.reload()
    [network] = sidecar.attrs["NetworkSettings"]["Networks"].values()
    ask = ["docker", "--host", f"tcp://{network['IPAddress']}:2375", "version"]
    with container(pod.engine, DAEMON, ask, entrypoint=[]) as other:
        assert other.wait()["StatusCode"] == 1
        assert b"Cannot connect to the Docker daemon" in other.logs()


# Daemons that fail under the flow


def test_daemon_dies_during_the_wait(
    flow_run: Callable[..., Outcome],
    engine: docker.DockerClient,
    on: Callable[[str], None],
    logs: list[tuple[str, str, str]],
) -> None:
    with daemon_with_mirror(engine) as daemon:
        image = push(engine, busybox(engine), "tests/busybox:1")  # to the daemon's mirror
        on(daemon.url)

        def kill() -> None:
            wait_for(lambda: any(text == "up" for _, _, text in logs), "the container runs", lambda: logs)
            daemon.container.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        run = flow_run(image=image, command=["sh", "-c", "echo up; sleep 300"])
        killer.join()
    assert run.state.is_failed()
    assert f"the Docker daemon at {daemon.url} does not answer" in run.state.message
    assert f"(image {image})" in run.state.message
    assert run.tasks["GetContainerLogs"].is_skipped()


@pytest.mark.usefixtures("current_docker")
def test_no_disk_space_for_the_image(
    flow_run: Callable[..., Outcome], engine: docker.DockerClient, on: Callable[[str], None]
) -> None:
    with daemon_with_mirror(engine, tmpfs={"/var/lib/docker": "size=48m"}) as daemon:
        on(daemon.url)
        run = flow_run(image=PREFECT, command="true")
    assert run.state.is_failed()
    assert "no space left on device" in run.state.message
    assert not run.naming("retry")
