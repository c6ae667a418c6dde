"""Containers of docker_sidecar and kept_layers, run as a pod would run them, on a volume of the engine."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from flows.settings import load_job_template
from tests.support.containers import PREFECT_IMAGE, archive, run_shell
from tests.support.session import SESSION_LABELS
from tests.support.waiting import wait_for

FLOW, SIDECAR = load_job_template("docker_sidecar")["spec"]["template"]["spec"]["containers"]
FLOW |= {"image": PREFECT_IMAGE, "args": ["true"]}  # what the Agent fills in
DEAF = {  # a daemon that does not heed SIGTERM
    "dockerd-entrypoint.sh dockerd": """sh -c "trap '' TERM; while :; do sleep 1; done" """,
    "timeout 15": "timeout 1",
}
KEPT = load_job_template("kept_layers")["spec"]["template"]["spec"]["initContainers"][0]
KEEP = "tar -C / -c bin/busybox | docker import - kept:1; docker create --name stale --volume stale:/v kept:1 true"
IMAGES = "docker image ls --format '{{.Repository}}'"

Start = Callable[..., Container]


@pytest.fixture
def start(engine: docker.DockerClient) -> Iterator[Start]:
    """Start a container of a template, with its hook as kubelet would. All containers of a test share a volume."""
    volume, started, pool = (
        engine.volumes.create(labels=SESSION_LABELS),
        list[Container](),
        ThreadPoolExecutor(),
    )

    def start(
        spec: dict[str, Any], edits: dict[str, str] | None = None, daemon_json: str = ""
    ) -> Container:
        text = json.dumps(spec)
        for old, new in (edits or {}).items():
            assert old in text, f"{old!r} is no longer in the template"
            text = text.replace(old, json.dumps(new)[1:-1])
        spec = json.loads(text)
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
        if "lifecycle" in spec:
            container.hook = pool.submit(
                container.exec_run, spec["lifecycle"]["postStart"]["exec"]["command"]
            )
        return container

    yield start
    for container in started:
        container.remove(force=True, v=True)
    pool.shutdown()
    volume.remove()


def ready(container: Container) -> Container:
    """A daemon whose hook has ended, as it is when the flow starts."""
    container.hook.result()
    assert container.exec_run(["docker", "version"]).exit_code == 0, container.logs().decode()
    return container


def second_after(start: Start, script: str) -> Container:
    """A daemon on the store of one that has run a script, and was killed."""
    first = ready(start(KEPT))
    run_shell(first, script)
    first.kill("SIGKILL")
    return ready(start(KEPT))


def end(container: Container, within: float = 20) -> tuple[int, str]:
    """The exit code of a container that has to end within some seconds, and what it wrote."""
    wait_for(
        lambda: container.reload() or container.status == "exited",
        "the container ends",
        container.logs,
        within,
    )
    return container.attrs["State"]["ExitCode"], container.logs().decode()


@pytest.mark.parametrize("edits", [{}, DEAF], ids=["before the daemon is up", "deaf daemon"])
def test_a_flow_that_ends_at_once(start: Start, edits: dict[str, str]) -> None:
    sidecar = start(SIDECAR, edits)
    end(start(FLOW), 10)
    assert end(sidecar)[0] == 0, "the Job is complete"


def test_a_flow_that_cannot_start(start: Start) -> None:
    """As with an image of another architecture, or without flock: no lock is taken. Here the limit is 2 s."""
    assert end(start(SIDECAR, {"timeout 100": "timeout 2"}))[0] != 0, (
        "the pod fails, and the Agent fails the run"
    )


def test_daemon_json_cannot_open_the_daemon(start: Start) -> None:
    """The daemon does not start. The flow gives up, and the pod fails with the daemon's last words."""
    sidecar = start(SIDECAR, daemon_json='{"hosts": ["tcp://0.0.0.0:2375"]}')
    why = "specified both as a flag and in the configuration file: hosts"
    wait_for(lambda: why.encode() in sidecar.logs(), "dockerd says why", sidecar.logs)
    end(start(FLOW), 10)
    code, output = end(sidecar)
    assert code != 0
    assert output.count(why) == 1


def test_layers_outlive_the_pod_and_its_sudden_death(start: Start) -> None:
    second = second_after(start, f"{KEEP}; docker network create stale; docker volume create named")
    assert run_shell(second, IMAGES) == "kept"
    left = "docker ps --all --quiet; docker volume ls --quiet; docker network ls --quiet --filter type=custom"
    assert run_shell(second, left) == "", "what the first one left is gone before the flow starts"
    second.kill("SIGTERM")
    code, output = end(second)
    assert code == 0
    assert "Daemon shutdown complete" in output
    third = ready(start(KEPT))
    assert run_shell(third, IMAGES) == "kept"
    third.kill("SIGKILL")
    assert run_shell(ready(start(KEPT, {"-le 80": "-lt 0"})), IMAGES) == "", (
        "the disk is nearly full"
    )


def test_daemons_at_once_have_a_slot_each_while_there_are_slots(start: Start) -> None:
    daemons = [ready(start(KEPT, {"0 1 2 3 4 5 6 7": "0 1"})) for _ in range(3)]
    roots = [run_shell(each, "docker info --format '{{.DockerRootDir}}'") for each in daemons]
    assert roots == ["/store/0", "/store/1", "/var/lib/docker"]
    assert b"no layers are kept" in daemons[2].logs()


def test_a_store_that_dockerd_cannot_use_is_set_aside(start: Start) -> None:
    second = second_after(start, f"{KEEP}; echo broken >/store/0/network/files/local-kv.db")
    assert run_shell(second, IMAGES) == ""
    assert run_shell(second, "ls -d /store/0.broken/network") == "/store/0.broken/network"
    assert b"set aside as /store/0.broken" in second.logs()


def test_what_does_not_touch_the_store(start: Start) -> None:
    """A daemon that dies in mid-run, a configuration that dockerd refuses, and SIGTERM while dockerd starts."""
    first = ready(start(KEPT))
    run_shell(first, f"{KEEP}; kill -9 $(pidof dockerd)")
    end(first)
    refused = start(KEPT, daemon_json='{"mtu": ')
    assert (
        "unable to configure the Docker daemon with file /etc/docker/daemon.json" in end(refused)[1]
    )
    slow = start(KEPT, {"dockerd-entrypoint.sh dockerd": 'sh -c "exec sleep 300"'})
    wait_for(lambda: b"configuration OK" in slow.logs(), "it starts", slow.logs)
    slow.kill("SIGTERM")
    end(slow)
    assert run_shell(ready(start(KEPT)), IMAGES) == "kept"


def test_the_hook_has_a_limit(start: Start) -> None:
    """A daemon that hangs, here for the hook alone: the flow starts all the same, and says what is wrong."""
    hung = start(KEPT, {"timeout 60": "timeout 1", "until docker info": "until false"})
    hung.hook.result(timeout=20)
    run_shell(hung, "ls /hook")
