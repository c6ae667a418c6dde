"""The containers of docker_sidecar, run as a pod would run them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from flows.settings import load_job_template
from tests.support.containers import PREFECT_IMAGE, archive
from tests.support.session import SESSION_LABELS
from tests.support.templates import daemon_of, with_edits
from tests.support.waiting import wait_for

SIDECAR = daemon_of(load_job_template("docker_sidecar"))
FLOW = load_job_template("docker_sidecar")["spec"]["template"]["spec"]["containers"][0]
FLOW |= {"image": PREFECT_IMAGE, "args": ["true"]}  # what the Agent fills in

START_DOCKERD = "dockerd-entrypoint.sh dockerd"
IGNORES_SIGTERM = {
    START_DOCKERD: """sh -c "trap '' TERM; while :; do sleep 1; done" """,
    "timeout 15": "timeout 1",
}


@dataclass
class TemplateContainer:
    """A container of a template."""

    container: Container

    def output(self) -> str:
        return self.container.logs().decode(errors="replace")

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
            volumes=[f"{volume.name}:/alive"],
        )
        started.append(container)
        if daemon_json:
            container.put_archive("/", archive({"etc/docker/daemon.json": daemon_json.encode()}))
        container.start()
        return TemplateContainer(container)

    yield start
    for container in started:
        container.remove(force=True, v=True)
    volume.remove()


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
