"""Containers of the job templates, run as a pod would run them, on a volume of the engine."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from flows.settings import load_job_template
from tests.support.containers import PREFECT_IMAGE, archive, run_shell
from tests.support.session import SESSION_LABELS
from tests.support.templates import daemon_of
from tests.support.waiting import wait_for

SIDECAR = daemon_of(load_job_template("docker_sidecar"))
KEPT = daemon_of(load_job_template("kept_layers"))
FLOW = load_job_template("docker_sidecar")["spec"]["template"]["spec"]["containers"][0]
FLOW |= {"image": PREFECT_IMAGE, "args": ["true"]}  # what the Agent fills in

START_DOCKERD = "dockerd-entrypoint.sh dockerd"
IGNORES_SIGTERM = {
    START_DOCKERD: """sh -c "trap '' TERM; while :; do sleep 1; done" """,
    "timeout 15": "timeout 1",
}
CREATE_IMAGE_AND_CONTAINER = """
tar -C / -c bin/busybox | docker import - kept:1
docker create --name stale --volume stale:/v kept:1 true
"""
IMAGES = "docker image ls --format '{{.Repository}}'"


@dataclass
class TemplateContainer:
    """A container of a template, and its postStart hook, which kubelet runs beside it."""

    container: Container
    hook: Future[Any] | None

    def sh(self, script: str) -> str:
        return run_shell(self.container, script)

    def kill(self, signal: str) -> None:
        self.container.kill(signal)

    def output(self) -> str:
        return self.container.logs().decode(errors="replace")

    def ready(self) -> "TemplateContainer":
        """Wait until the hook has ended, which is when the flow starts. The daemon answers then."""
        assert self.hook
        self.hook.result()
        status, _ = self.container.exec_run(["docker", "version"])
        assert status == 0, self.output()
        return self

    def writes(self, text: str) -> None:
        """Wait until the container has written something."""
        wait_for(lambda: text in self.output(), f"it writes {text!r}", self.output)

    def ends(self, within: float = 20) -> int:
        """Wait until the container has ended, at most some seconds, and return its exit code."""
        wait_for(self._has_ended, "the container ends", self.output, within)
        return int(self.container.attrs["State"]["ExitCode"])

    def _has_ended(self) -> bool:
        self.container.reload()
        return bool(self.container.status == "exited")


Start = Callable[..., TemplateContainer]


@pytest.fixture
def start(engine: docker.DockerClient) -> Iterator[Start]:
    """Start a container of a template as kubelet would. All those of a test share a volume."""
    volume = engine.volumes.create(labels=SESSION_LABELS)
    started: list[Container] = []
    hooks = ThreadPoolExecutor()

    def start(
        spec: dict[str, Any], edits: dict[str, str] | None = None, daemon_json: str = ""
    ) -> TemplateContainer:
        spec = with_edits(spec, edits or {})
        container = engine.containers.create(
            spec["image"],
            spec.get("args"),
            entrypoint=spec["command"],
            environment={entry["name"]: entry["value"] for entry in spec["env"]},
            labels=SESSION_LABELS,
            privileged=spec["securityContext"].get("privileged", False),
            volumes=[f"{volume.name}:/alive", f"{volume.name}:/store"],
            tmpfs={"/run/dind": ""},
        )
        started.append(container)
        if daemon_json:
            container.put_archive("/", archive({"etc/docker/daemon.json": daemon_json.encode()}))
        container.start()
        if "lifecycle" not in spec:
            return TemplateContainer(container, None)
        command = spec["lifecycle"]["postStart"]["exec"]["command"]
        return TemplateContainer(container, hooks.submit(container.exec_run, command))

    yield start
    for container in started:
        container.remove(force=True, v=True)
    hooks.shutdown()
    volume.remove()


def with_edits(spec: dict[str, Any], edits: dict[str, str]) -> dict[str, Any]:
    """A container of a template with some texts in its strings replaced."""
    text = json.dumps(spec)
    for old, new in edits.items():
        assert old in text, f"{old!r} is no longer in the template"
        text = text.replace(old, json.dumps(new)[1:-1])
    return dict(json.loads(text))


# docker_sidecar: the flow and the daemon end together


@pytest.mark.parametrize(
    "edits", [{}, IGNORES_SIGTERM], ids=["before the daemon is up", "daemon ignores SIGTERM"]
)
def test_the_daemon_ends_well_when_the_flow_has_ended(start: Start, edits: dict[str, str]) -> None:
    sidecar = start(SIDECAR, edits)
    start(FLOW).ends(within=10)
    assert sidecar.ends() == 0, "the Job is complete"


def test_the_daemon_gives_up_if_no_flow_takes_the_lock(start: Start) -> None:
    """As with an image of another architecture, or without flock. The Agent then fails the run."""
    sidecar = start(SIDECAR, {"timeout 100": "timeout 2"})
    assert sidecar.ends() != 0


def test_daemon_json_cannot_open_the_daemon_to_others(start: Start) -> None:
    """The daemon does not start. The flow gives up, and the pod fails with the daemon's words."""
    sidecar = start(SIDECAR, daemon_json='{"hosts": ["tcp://0.0.0.0:2375"]}')
    why = "specified both as a flag and in the configuration file: hosts"
    sidecar.writes(why)
    start(FLOW).ends(within=10)
    assert sidecar.ends() != 0
    assert sidecar.output().count(why) == 1


# kept_layers: images outlive the pod


def second_after(start: Start, script: str) -> TemplateContainer:
    """A daemon on the store of one that has run a script, and was killed."""
    first = start(KEPT).ready()
    first.sh(script)
    first.kill("SIGKILL")
    return start(KEPT).ready()


def test_layers_outlive_a_pod_that_is_killed_and_nothing_else_does(start: Start) -> None:
    create = "docker network create stale; docker volume create named"
    second = second_after(start, CREATE_IMAGE_AND_CONTAINER + create)
    assert second.sh(IMAGES) == "kept"
    assert second.sh("docker ps --all --quiet") == ""
    assert second.sh("docker volume ls --quiet") == ""
    assert second.sh("docker network ls --quiet --filter type=custom") == ""


def test_layers_outlive_a_pod_that_ends_well(start: Start) -> None:
    first = start(KEPT).ready()
    first.sh(CREATE_IMAGE_AND_CONTAINER)
    first.kill("SIGTERM")
    assert first.ends() == 0
    assert "Daemon shutdown complete" in first.output()
    assert start(KEPT).ready().sh(IMAGES) == "kept"


def test_a_store_on_a_nearly_full_disk_is_emptied(start: Start) -> None:
    first = start(KEPT).ready()
    first.sh(CREATE_IMAGE_AND_CONTAINER)
    first.kill("SIGKILL")
    second = start(KEPT, {"-le 80": "-lt 0"}).ready()
    assert second.sh(IMAGES) == ""


def test_daemons_at_once_have_a_slot_each_while_there_are_slots(start: Start) -> None:
    daemons = [start(KEPT, {"0 1 2 3 4 5 6 7": "0 1"}).ready() for _ in range(3)]
    roots = [daemon.sh("docker info --format '{{.DockerRootDir}}'") for daemon in daemons]
    assert roots == ["/store/0", "/store/1", "/var/lib/docker"]
    assert "no layers are kept" in daemons[2].output()


def test_a_store_that_dockerd_cannot_use_is_set_aside(start: Start) -> None:
    spoil = "echo broken >/store/0/network/files/local-kv.db"
    second = second_after(start, CREATE_IMAGE_AND_CONTAINER + spoil)
    assert second.sh(IMAGES) == ""
    assert second.sh("ls -d /store/0.broken/network") == "/store/0.broken/network"
    assert "set aside as /store/0.broken" in second.output()


@pytest.fixture
def good_store(start: Start) -> Iterator[None]:
    """A store with an image. It is as good when the test has ended."""
    first = start(KEPT).ready()
    first.sh(CREATE_IMAGE_AND_CONTAINER)
    first.kill("SIGKILL")
    yield
    assert start(KEPT).ready().sh(IMAGES) == "kept"


@pytest.mark.usefixtures("good_store")
def test_a_daemon_that_dies_in_mid_run_leaves_its_store(start: Start) -> None:
    daemon = start(KEPT).ready()
    daemon.sh("kill -9 $(pidof dockerd)")
    daemon.ends()


@pytest.mark.usefixtures("good_store")
def test_a_configuration_that_dockerd_refuses_leaves_the_store(start: Start) -> None:
    refused = start(KEPT, daemon_json='{"mtu": ')
    refused.ends()
    why = "unable to configure the Docker daemon with file /etc/docker/daemon.json"
    assert why in refused.output()


@pytest.mark.usefixtures("good_store")
def test_sigterm_while_dockerd_starts_leaves_the_store(start: Start) -> None:
    slow = start(KEPT, {START_DOCKERD: 'sh -c "exec sleep 300"'})
    slow.writes("configuration OK")
    slow.kill("SIGTERM")
    slow.ends()


def test_the_flow_starts_though_the_daemon_hangs(start: Start) -> None:
    """The hook has a limit, so that the flow can say what is wrong."""
    hung = start(KEPT, {"timeout 60": "timeout 1", "until docker info": "until false"})
    assert hung.hook
    hung.hook.result(timeout=20)
    hung.sh("ls /hook")
