"""What `make run` finds of an earlier one that was killed."""

from __future__ import annotations

import docker
import pytest
import requests

from scripts import sidecar
from tests.conftest import SERVE, have


def test_a_registry_is_waited_for_whatever_it_has_logged(
    engine: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar, "NAME", "docker-sidecar-slow")
    monkeypatch.setattr(sidecar, "REGISTRY_PORT", 5058)
    monkeypatch.setattr(sidecar, "REGISTRY", "localhost:5058")
    have(engine, "registry:2")
    engine.containers.create(
        "registry:2",
        name="docker-sidecar-slow-registry",
        entrypoint=["sh", "-euc", f"echo listening on; sleep 1; {SERVE}"],
        labels=sidecar.LABELS,
        ports={"5000/tcp": ("127.0.0.1", 5058)},
        volumes={"docker-sidecar-registry": {"bind": "/var/lib/registry"}},  # filled already, where it has to be
    )
    try:
        sidecar.start_registry(engine, sidecar.hub_answers())
        assert requests.get("http://localhost:5058/v2/", timeout=sidecar.ANSWER_SECONDS).ok
    finally:
        for container in engine.containers.list(all=True, filters={"name": "docker-sidecar-slow-"}):
            container.remove(force=True)
        for volume in engine.volumes.list(filters={"name": "docker-sidecar-slow-"}):
            volume.remove()
