"""The daemon of kept_layers.yaml, run as a pod would run it, on a volume in place of the node's folder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from flows.settings import load_job_template
from scripts.base import DAEMON
from tests.conftest import LABELS, tar
from tests.docker.test_sidecar import end, sh
from tests.support.waiting import wait_for

SIDECAR = load_job_template("kept_layers")["spec"]["template"]["spec"]["initContainers"][0]
HOOK = SIDECAR["lifecycle"]["postStart"]["exec"]["command"]
ROOT = "docker info --format '{{.DockerRootDir}}'"
KEEP = "tar -C / -c bin/busybox | docker import - kept:1; docker create --name stale --volume stale:/v kept:1 true"
IMAGES = "docker image ls --format '{{.Repository}}'"

Start = Callable[..., Container]


@pytest.fixture
def start(engine: docker.DockerClient) -> Iterator[Start]:
    """Start a daemon on the store that all of a test share; kubelet's hook runs beside it."""
    store, started = engine.volumes.create(labels=LABELS), list[Container]()

    def start(
        edits: dict[str, str] | None = None, files: dict[str, str] | None = None, hook: list[str] = HOOK
    ) -> Container:
        command: Any = SIDECAR["command"]
        for old, new in (edits or {}).items():
            assert any(old in word for word in [*command, *hook]), f"{old!r} is no longer in the template"
            command, hook = ([word.replace(old, new) for word in words] for words in (command, hook))
        container = engine.containers.create(
            DAEMON,
            SIDECAR["args"],
            entrypoint=command,
            environment={entry["name"]: entry["value"] for entry in SIDECAR["env"]},
            labels=LABELS,
            privileged=True,
            volumes={store.name: {"bind": "/store"}},
            tmpfs={"/run/dind": ""},
        )
        started.append(container)
        for path, content in (files or {}).items():
            container.put_archive("/", tar({path: content.encode()}))
        container.start()
        container.hook = threading.Thread(target=container.exec_run, args=(hook,))
        container.hook.start()
        return container

    yield start
    for container in started:
        container.remove(force=True, v=True)
        container.hook.join()
    store.remove()


def ready(container: Container) -> Container:
    """A daemon whose hook has ended, as it is when the flow starts."""
    container.hook.join()
    assert container.exec_run(["docker", "version"]).exit_code == 0, container.logs().decode()
    return container


def test_layers_outlive_the_pod_and_its_sudden_death(start: Start) -> None:
    first = ready(start())
    sh(first, f"{KEEP}; docker network create stale; docker volume create named")
    first.kill("SIGKILL")
    second = ready(start())
    assert sh(second, IMAGES) == "kept"
    left = "docker ps --all --quiet; docker volume ls --quiet; docker network ls --quiet --filter type=custom"
    assert sh(second, left) == "", "what the first one left is gone before the flow starts"
    second.kill("SIGTERM")
    code, output = end(second, 20)
    assert code == 0
    assert "Daemon shutdown complete" in output
    assert sh(ready(start()), IMAGES) == "kept"


def test_daemons_at_once_have_a_slot_each(start: Start) -> None:
    first, second = ready(start()), ready(start())
    assert [sh(each, ROOT) for each in (first, second)] == ["/store/0", "/store/1"]
    first.kill("SIGKILL")
    assert sh(ready(start()), ROOT) == "/store/0"


def test_no_slot_is_free(start: Start) -> None:
    ready(start({"0 1 2 3 4 5 6 7": "0"}))
    second = ready(start({"0 1 2 3 4 5 6 7": "0"}))
    assert sh(second, ROOT) == "/var/lib/docker", "the store in the pod"
    assert b"no layers are kept" in second.logs()


def test_a_store_that_dockerd_cannot_use_is_set_aside(start: Start) -> None:
    first = ready(start())
    sh(first, f"{KEEP}; echo broken >/store/0/network/files/local-kv.db")
    first.kill("SIGKILL")
    second = ready(start())
    assert sh(second, IMAGES) == ""
    assert sh(second, "ls -d /store/0.broken/network") == "/store/0.broken/network"
    assert b"set aside as /store/0.broken" in second.logs()


def test_a_configuration_that_dockerd_refuses_touches_no_store(start: Start) -> None:
    first = ready(start())
    sh(first, KEEP)
    first.kill("SIGKILL")
    broken = start(files={"etc/docker/daemon.json": '{"mtu": '})
    assert "unable to configure the Docker daemon with file /etc/docker/daemon.json" in end(broken, 20)[1]
    assert sh(ready(start()), IMAGES) == "kept"


def test_sigterm_while_dockerd_starts_touches_no_store(start: Start) -> None:
    first = ready(start())
    sh(first, KEEP)
    first.kill("SIGKILL")
    slow = start({"dockerd-entrypoint.sh dockerd": 'sh -c "exec sleep 300"'})
    wait_for(lambda: b"configuration OK" in slow.logs(), "it starts", slow.logs)
    slow.kill("SIGTERM")
    end(slow, 20)
    assert sh(ready(start()), IMAGES) == "kept"


def test_a_daemon_that_dies_in_mid_run_keeps_its_store(start: Start) -> None:
    first = ready(start())
    sh(first, f"{KEEP}; kill -9 $(pidof dockerd)")
    end(first, 20)
    assert sh(ready(start()), IMAGES) == "kept"


def test_unused_images_go_when_the_disk_is_nearly_full(start: Start) -> None:
    first = ready(start())
    sh(first, KEEP)
    first.kill("SIGKILL")
    assert sh(ready(start({"-le 80": "-lt 0"})), IMAGES) == ""


def test_the_hook_has_a_limit(start: Start) -> None:
    """A daemon that hangs, here for the hook alone: the flow starts all the same, and says what is wrong."""
    hung = start({"timeout 60": "timeout 1", "until docker info": "until false"})
    hung.hook.join(20)
    assert not hung.hook.is_alive()
    sh(hung, "ls /hook")
