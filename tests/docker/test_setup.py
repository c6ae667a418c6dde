"""What `make run` finds on a machine: proxies, mirrors, volumes, a registry, a bad dockerd."""

import io
import json
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import docker
import pytest
import requests
from docker.models.containers import Container

from flows.settings import PROJECT
from scripts import engine as scripts_engine
from scripts import registry as local_registry
from scripts.airgap import dockerd
from scripts.base import ANSWER_SECONDS, LABELS, NAME, PREFECT, REGISTRY_IMAGE, SetupError
from scripts.registry import can_pull, provide
from tests.support.containers import PREFECT_IMAGE, import_busybox
from tests.support.daemons import Daemon
from tests.support.local_runs import RunFlow
from tests.support.make import make
from tests.support.registries import push_to_inner_registry


def test_an_engine_that_only_has_a_mirror(daemon: docker.DockerClient) -> None:
    """Whether there are images is the engine's to say, whatever this machine reaches itself."""
    assert can_pull(daemon, PREFECT_IMAGE)
    assert not can_pull(daemon, "docker-sidecar-tests/not-there:1")


def test_make_run_behind_a_proxy(sidecar: Daemon, image: str) -> None:
    """The engine on the loopback interface is not asked for through the proxy."""
    proxy = {
        "http_proxy": "http://127.0.0.1:9",
        "all_proxy": "http://127.0.0.1:9",
        "no_proxy": ".corp",
    }
    given = [f"IMAGE={image}", "COMMAND=echo no proxy"]
    done = make("run", *given, DOCKER_HOST=sidecar.url, **proxy)
    assert "| no proxy\n" in done.stdout, done
    assert done.returncode == 0


def test_make_run_with_everything_that_a_shell_would_change(sidecar: Daemon, image: str) -> None:
    """`$`, quotes and a newline reach the container as they were written."""
    script = """echo "$0: it's $((6 * 7)) \\\\ $(echo done)"\necho 'second "line"'"""
    given = [f"IMAGE={image}", f"COMMAND={json.dumps(['sh', '-c', script])}"]
    done = make("run", *given, DOCKER_HOST=sidecar.url)
    assert """| sh: it's 42 \\ done\nsecond "line"\n""" in done.stdout, done


def test_workspace_on_this_machines_engine(engine: docker.DockerClient, tmp_path: Path) -> None:
    """`make run HOST_CONFIG=…` with a folder of this machine, in and out."""
    (tmp_path / "in").write_text("from here\n")
    name = import_busybox(engine, "docker-sidecar-tests:workspace")
    image = f"{local_registry.REGISTRY}/{local_registry.push(engine, name, 'tests/workspace:1')}"
    binds = json.dumps({"binds": [f"{tmp_path}:/workspace"]})
    command = "cp /workspace/in /workspace/out"
    done = make("run", f"IMAGE={image}", f"COMMAND={command}", f"HOST_CONFIG={binds}")
    assert done.returncode == 0, done
    assert (tmp_path / "out").read_text() == "from here\n"


def test_make_run_leaves_no_volume(
    daemon: docker.DockerClient, registry: Container, flow_run: RunFlow
) -> None:
    """An image with VOLUME, as those of databases: Docker makes a volume without a name for it."""
    name = import_busybox(daemon, "docker-sidecar-tests:volume", "VOLUME /data")
    image = push_to_inner_registry(daemon, name, "tests/volume:1")
    before = {volume.id for volume in daemon.volumes.list()}
    outcome = flow_run(image=image, command="sh -c 'echo kept >/data/file; cat /proc/mounts'")
    assert " /data " in outcome.output("INFO"), "there was a volume"
    assert {volume.id for volume in daemon.volumes.list()} == before


def python(*arguments: str, **environment: str) -> None:
    """Run Python in the project's folder, successfully."""
    subprocess.run(
        [sys.executable, *arguments], cwd=PROJECT, env={**os.environ, **environment}, check=True
    )


def test_a_base_image_with_a_user_of_its_own(engine: docker.DockerClient) -> None:
    """As `prefect register` builds the flow's image."""
    base, name = "docker-sidecar-tests:base-user", f"docker-sidecar-tests/{uuid.uuid4().hex[:8]}"
    provide(engine, PREFECT[1])
    text = f"FROM {PREFECT[1]}\nRUN useradd app\nUSER app\n"
    engine.images.build(fileobj=io.BytesIO(text.encode()), tag=base, rm=True)
    script = "from flows.docker_sidecar import flow; "
    script += "flow.storage.add_flow(flow); flow.storage.build(push=False)"
    python("-c", script, FLOW_BASE_IMAGE=base, FLOW_REGISTRY_URL="localhost", FLOW_IMAGE_NAME=name)
    flow = f"localhost/{name}:0.1.0"
    try:
        load = ["python", "-c", "from flows.docker_sidecar import flow; print(flow.name)"]
        assert b"Docker sidecar example" in engine.containers.run(
            flow, load, user="1000", remove=True
        )
    finally:
        engine.images.remove(flow)
        engine.images.remove(base)


def test_a_dockerd_that_cannot_start_leaves_what_is_there(
    engine: docker.DockerClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "dockerd").write_text("#!/bin/sh\necho no such luck >&2; exit 1\n")
    (tmp_path / "dockerd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(dockerd, "HOME", tmp_path / "home")
    monkeypatch.setattr(scripts_engine, "OWN_SOCKET", f"unix://{tmp_path}/none.sock")
    monkeypatch.setattr(dockerd, "_started", [])  # the tests' own engine may be in it
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(SetupError, match="no such luck"):
        dockerd.start()
    assert engine.containers.get(f"{NAME}-registry").status == "running"


def test_a_registry_is_waited_for_whatever_it_has_logged(
    engine: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_registry, "NAME", "docker-sidecar-slow")
    monkeypatch.setattr(local_registry, "REGISTRY", "localhost:5058")
    slow = engine.containers.create(
        REGISTRY_IMAGE,
        name="docker-sidecar-slow-registry",
        entrypoint=[
            "sh",
            "-euc",
            "echo listening on; sleep 1; exec registry serve /etc/distribution/config.yml",
        ],
        labels=LABELS,
        ports={"5000/tcp": ("127.0.0.1", 5058)},
    )
    try:
        local_registry.start(engine)
        assert requests.get("http://localhost:5058/v2/", timeout=ANSWER_SECONDS).ok
    finally:
        slow.remove(force=True, v=True)


def test_a_port_that_another_program_has(
    engine: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(local_registry, "NAME", "docker-sidecar-taken")
        monkeypatch.setattr(local_registry, "REGISTRY", f"localhost:{taken.getsockname()[1]}")
        try:
            with pytest.raises(SetupError, match=f"{local_registry.REGISTRY}.* in use"):
                local_registry.start(engine)
        finally:
            engine.containers.get("docker-sidecar-taken-registry").remove(force=True)
            engine.volumes.get("docker-sidecar-taken-registry").remove()
