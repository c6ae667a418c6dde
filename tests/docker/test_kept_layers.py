"""The daemon of kept_layers, run as a pod would run it.

A container of the engine stands for the daemon's container of a pod. Its anonymous volumes stand
for the pod's own, and starting it again is what kubelet does. A volume of the engine stands for the
node's folder: all pods of a test use it.
"""

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest
from docker.models.containers import Container
from docker.models.volumes import Volume
from docker.types import Mount

from flows.settings import load_job_template
from tests.support.containers import archive, run_shell
from tests.support.daemons import answers
from tests.support.session import SESSION_LABELS
from tests.support.templates import daemon_of, with_edits
from tests.support.waiting import wait_for

BOOT_ID = "$(cat /proc/sys/kernel/random/boot_id)"
SLOTS = "/store/$(cat /proc/sys/kernel/random/boot_id)"
SLOTS_OF_THE_TEMPLATE = "for slot in 0 1 2 3 4 5 6 7"
LAYER = "tar -C / -c bin/busybox | docker import - kept:1"
IMAGES = "docker image ls --format '{{.Repository}}'"
ROOT = "docker info --format '{{.DockerRootDir}}'"
OWN_STORE = "/var/lib/docker"
LEFT = """
docker ps --all --quiet
docker volume ls --quiet
docker network ls --quiet --filter type=custom
"""
REFUSED = [
    '{"storage-driver": "nonsense"}',
    '{"mtu": ',
    '{"mtu": "many"}',
    '{"hosts": ["tcp://x"]}',
]

StartPod = Callable[..., Container]


@pytest.fixture
def node_folder(engine: docker.DockerClient) -> Iterator[Volume]:
    """The folder that the template mounts from its node."""
    volume = engine.volumes.create(labels=SESSION_LABELS)
    yield volume
    volume.remove()


@pytest.fixture
def small_disk(engine: docker.DockerClient) -> Iterator[Volume]:
    """A node's folder on a disk of 100 MB."""
    options = {"type": "tmpfs", "device": "tmpfs", "o": "size=100m"}
    volume = engine.volumes.create(labels=SESSION_LABELS, driver_opts=options)
    yield volume
    volume.remove()


@pytest.fixture
def start_pod(engine: docker.DockerClient, node_folder: Volume) -> Iterator[StartPod]:
    """Start the daemon's container of a new pod, on the node's folder."""
    started: list[Container] = []

    def start_pod(
        edits: dict[str, str] | None = None,
        daemon_json: str = "",
        folder: Volume = node_folder,
        read_only: bool = False,
        **options: Any,
    ) -> Container:
        spec = with_edits(daemon_of(load_job_template("kept_layers")), edits or {})
        container = engine.containers.create(
            spec["image"],
            spec["args"],
            entrypoint=spec["command"],
            environment={entry["name"]: entry["value"] for entry in spec["env"]},
            labels=SESSION_LABELS,
            privileged=True,
            mounts=[
                Mount("/store", folder.name, read_only=read_only),
                Mount("/run/dind", None),
                Mount(OWN_STORE, None),
            ],
            **options,
        )
        started.append(container)
        if daemon_json:
            container.put_archive("/", archive({"etc/docker/daemon.json": daemon_json.encode()}))
        container.start()
        return container

    yield start_pod
    for container in started:
        container.remove(force=True, v=True)


def ready(pod: Container) -> Container:
    """A daemon that answers, with nothing left on it of an earlier run."""
    wait_for(lambda: answers(pod), "dockerd answers", pod.logs, 60)
    wait_for(lambda: run_shell(pod, LEFT) == "", "what was left is removed", pod.logs, 60)
    return pod


def end(pod: Container, within: float = 40) -> str:
    """Wait until a container has ended, and return what it wrote."""

    def has_ended() -> bool:
        pod.reload()
        return bool(pod.status == "exited")

    wait_for(has_ended, "the container ends", pod.logs, within)
    return str(pod.logs().decode())


def start_again(pod: Container) -> Container:
    """What kubelet does when the daemon's container has ended."""
    end(pod)
    pod.start()
    return pod


def with_a_layer(pod: Container) -> Container:
    """A daemon with an image, and with a container, a volume and a network that nobody removes."""
    run_shell(ready(pod), LAYER)
    run_shell(pod, "docker create --name stale --volume stale:/v kept:1 true")
    run_shell(pod, "docker network create stale")
    # The next pod removes networks that are older than its start, in whole seconds.
    run_shell(pod, "now=$(date +%s); until [ $(date +%s) -gt $now ]; do sleep 0.1; done")
    return pod


def root_of(pod: Container) -> str:
    """The store of a daemon, without the node's boot id."""
    boot_id = run_shell(pod, "cat /proc/sys/kernel/random/boot_id")
    return run_shell(pod, ROOT).replace(boot_id, "BOOT")


def exists(pod: Container, path: str) -> bool:
    return bool(pod.exec_run(["sh", "-c", f"test -e {path}"]).exit_code == 0)


def folders(pod: Container) -> list[str]:
    """What is in the node's folder beside the slots of this start of the node."""
    boot_id = run_shell(pod, "cat /proc/sys/kernel/random/boot_id")
    return sorted(set(run_shell(pod, "ls /store").split()) - {boot_id})


def test_layers_outlive_the_pod_and_its_sudden_death_and_what_a_run_left_does_not(
    start_pod: StartPod,
) -> None:
    with_a_layer(start_pod()).kill("SIGKILL")
    second = ready(start_pod())
    assert run_shell(second, IMAGES) == "kept"
    second.kill("SIGTERM")
    assert "Daemon shutdown complete" in end(second)
    assert run_shell(ready(start_pod()), IMAGES) == "kept"


def test_what_a_flow_creates_at_once_is_not_taken_for_a_left_over(start_pod: StartPod) -> None:
    """The removal of what was left goes on while the flow starts."""
    with_a_layer(start_pod()).kill("SIGKILL")
    pod = start_pod({"until docker info >/dev/null 2>&1; do sleep 0.2; done": "sleep 5"})
    create = "docker network create new && docker volume create new"
    wait_for(lambda: pod.exec_run(["sh", "-c", create]).exit_code == 0, "created", pod.logs, 5)
    assert len(run_shell(pod, LEFT).split()) == 5, "those and what the first one left"
    wait_for(lambda: "stale" not in run_shell(pod, LEFT), "what was left is gone", pod.logs)
    assert "new" in run_shell(pod, "docker volume ls --quiet")
    assert "new" in run_shell(pod, "docker network ls --format '{{.Name}}'")


@pytest.mark.timeout(300)
def test_nine_runs_at_once(start_pod: StartPod) -> None:
    """Eight have a slot each. The ninth one has its pod's own store."""
    pods = [start_pod() for _ in range(9)]
    wait_for(lambda: all(map(answers, pods)), "all answer", pods[-1].logs, 200)
    roots = sorted(root_of(pod) for pod in pods)
    assert roots == [*(f"/store/BOOT/{slot}" for slot in range(8)), OWN_STORE]


BROKEN = {
    "network": "echo broken >{slot}/network/files/local-kv.db",
    "containerd": "echo broken >{slot}/containerd/daemon/io.containerd.metadata.v1.bolt/meta.db",
    "volumes": "echo broken >{slot}/volumes/metadata.db",
    "a file in place of a folder": "rm -rf {slot}/containers; touch {slot}/containers",
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("when", ["before it ever worked", "after it worked"])
def test_a_store_that_dockerd_cannot_use(start_pod: StartPod, broken: str, when: str) -> None:
    """The pod goes on without it, and deletes it: the next pod has a slot that works."""
    first = ready(start_pod())
    if when == "after it worked":
        run_shell(first, LAYER)
    first.kill("SIGKILL")
    end(first)
    spoil = BROKEN[broken].format(slot=f"{SLOTS}/0")
    if when == "before it ever worked":
        spoil = f"find {SLOTS}/0 -type f -exec rm {{}} +; {spoil}"
    breaker = start_pod({"exec dockerd-entrypoint.sh dockerd": "sleep 600; true"})
    run_shell(breaker, spoil)
    breaker.kill("SIGKILL")

    pod = start_again(start_pod())
    wait_for(lambda: answers(pod), "dockerd answers", pod.logs, 60)
    assert root_of(pod) == OWN_STORE
    wait_for(lambda: not exists(pod, f"{SLOTS}/0"), "the slot is gone", pod.logs)
    wait_for(lambda: folders(pod) == [], "nothing of it stays", lambda: folders(pod))
    pod.kill("SIGKILL")
    with_a_layer(start_pod()).kill("SIGKILL")
    assert run_shell(ready(start_pod()), IMAGES) == "kept"


@pytest.mark.parametrize("daemon_json", REFUSED)
def test_a_configuration_that_dockerd_refuses_touches_no_store(
    start_pod: StartPod, daemon_json: str
) -> None:
    with_a_layer(start_pod()).kill("SIGKILL")
    refused = start_again(start_pod(daemon_json=daemon_json))
    assert "image store is /var/lib/docker" in end(refused)
    pod = ready(start_pod())
    assert run_shell(pod, IMAGES) == "kept"
    assert folders(pod) == []


def test_a_daemon_that_dies_in_mid_run_is_not_the_fault_of_its_store(start_pod: StartPod) -> None:
    first = with_a_layer(start_pod())
    run_shell(first, "kill -9 $(pidof dockerd)")
    again = start_again(first)
    wait_for(lambda: answers(again), "dockerd answers", again.logs, 60)
    assert root_of(again) == OWN_STORE
    assert run_shell(ready(start_pod()), IMAGES) == "kept"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL"])
def test_a_pod_that_ends_at_any_moment_leaves_the_store_whole(
    start_pod: StartPod, signal: str
) -> None:
    with_a_layer(start_pod()).kill("SIGKILL")
    for _ in range(10):
        pod = start_pod()
        time.sleep(random.uniform(0, 3))  # noqa: S311
        pod.kill(signal)
        pod.stop(timeout=2)  # a signal may come before there is anybody to heed it
    pod = ready(start_pod())
    assert run_shell(pod, IMAGES) == "kept"
    assert root_of(pod) == "/store/BOOT/0"
    assert folders(pod) == []


def test_a_start_of_the_node_deletes_what_an_earlier_one_left(start_pod: StartPod) -> None:
    first = with_a_layer(start_pod({BOOT_ID: "earlier"}))
    assert root_of(first) == "/store/earlier/0"
    first.kill("SIGKILL")
    pod = ready(start_pod())
    assert run_shell(pod, IMAGES) == ""
    wait_for(lambda: folders(pod) == [], "the earlier stores are gone", lambda: folders(pod))


def test_a_removal_that_takes_long_holds_nobody_up(start_pod: StartPod) -> None:
    run_shell(ready(start_pod({BOOT_ID: "earlier"})), "true")
    pod = start_pod({"rm -rf {} +": "sleep 600 \\;"})
    wait_for(lambda: answers(pod), "dockerd answers", pod.logs, 30)
    assert "earlier" in folders(pod)


def test_a_removal_that_fails_keeps_nobody_from_starting(start_pod: StartPod) -> None:
    """A mount cannot be removed. So nothing is removed that is in the same folder but empties."""
    pod = ready(start_pod(tmpfs={"/store/earlier/0": ""}))
    assert folders(pod) == ["earlier"]
    assert b"/store/earlier" in pod.logs(), "the daemon's log says so"
    assert root_of(pod) == "/store/BOOT/0"


def test_a_disk_that_is_nearly_full(small_disk: Volume, start_pod: StartPod) -> None:
    """Slots that no daemon uses are emptied, with BuildKit's cache. The others are not touched.

    The disk is the first argument, so that the pods that use it are removed before it.
    """
    used, idle = start_pod(folder=small_disk), start_pod(folder=small_disk)
    for pod in (used, idle):
        with_a_layer(pod)
    run_shell(idle, f"head -c 60m /dev/zero >{SLOTS}/1/buildkit/cache")
    idle.kill("SIGKILL")
    run_shell(used, "head -c 30m /dev/zero >/store/left-by-another-start || true")
    pod = ready(start_pod(folder=small_disk))
    assert run_shell(pod, IMAGES) == ""
    assert folders(pod) == []
    assert int(run_shell(pod, "df -P /store | awk 'END { print $5 + 0 }'")) < 50
    assert run_shell(used, IMAGES) == "kept"


def test_a_file_system_without_locks(start_pod: StartPod) -> None:
    """Nothing is kept there, and nothing that others keep there is touched."""
    with_a_layer(start_pod()).kill("SIGKILL")
    pod = start_pod({"flock -n 9": "false", "-gt 80": "-gt -1"})
    wait_for(lambda: answers(pod), "dockerd answers", pod.logs, 60)
    assert root_of(pod) == OWN_STORE
    pod.kill("SIGKILL")
    assert run_shell(ready(start_pod()), IMAGES) == "kept"


def test_a_folder_that_cannot_be_written(start_pod: StartPod) -> None:
    pod = start_pod(read_only=True)
    wait_for(lambda: answers(pod), "dockerd answers", pod.logs, 60)
    assert root_of(pod) == OWN_STORE
