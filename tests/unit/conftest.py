"""Hermetic: no test here meets this machine's Docker, Kubernetes, Prefect settings, or the internet."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from prefect import Flow


@pytest.fixture(scope="session")
def nowhere() -> Iterator[int]:
    """A port of the loopback interface where nobody listens, nor can while the tests last."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture(autouse=True)
def _hermetic(monkeypatch: pytest.MonkeyPatch, nowhere: int) -> None:
    ours = ("FLOW_REGISTRY_URL", "FLOW_IMAGE_NAME", "FLOW_IMAGE_TAG", "FLOW_BASE_IMAGE", "FLOW_LABELS", "JOB_TEMPLATE")
    for name in (*ours, "IMAGE", "COMMAND", "http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{nowhere}")
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{nowhere}")
    monkeypatch.setenv("KUBECONFIG", os.devnull)


def docker_context(monkeypatch: pytest.MonkeyPatch, folder: Path, host: str) -> None:
    """Make a Docker context the current one, as `docker context create` and `docker context use` do."""
    name = "colima"
    meta = folder / "contexts" / "meta" / hashlib.sha256(name.encode()).hexdigest()
    meta.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"currentContext": name}))
    content = {"Name": name, "Metadata": {}, "Endpoints": {"docker": {"Host": host, "SkipTLSVerify": False}}}
    (meta / "meta.json").write_text(json.dumps(content))
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    monkeypatch.delenv("DOCKER_HOST")


@pytest.fixture
def flow() -> Flow:
    """The flow, made anew for each test by the means of the flow's image."""
    from prefect.utilities.storage import extract_flow_from_file

    from flows.settings import PROJECT

    return extract_flow_from_file(str(PROJECT / "flows" / "docker_sidecar.py"))
