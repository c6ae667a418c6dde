"""Hermetic: no test here meets this machine's Docker, Kubernetes or Prefect, or the internet."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import Flow
from prefect.utilities.storage import extract_flow_from_file

from flows.settings import PROJECT
from tests.support.fake_docker import FakeDocker

# What flows and scripts read from the environment, and what the libraries below them do.
VARIABLES = """
FLOW_REGISTRY_URL FLOW_IMAGE_NAME FLOW_IMAGE_TAG FLOW_BASE_IMAGE FLOW_LABELS JOB_TEMPLATE
IMAGE COMMAND ENVIRONMENT HOST_CONFIG EXTRA_DOCKER_KWARGS TIME_LIMIT
NAMESPACE SERVICE_ACCOUNT PROJECT
DOCKER_CERT_PATH DOCKER_CONTEXT DOCKER_TLS_VERIFY REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
http_proxy HTTP_PROXY https_proxy all_proxy ALL_PROXY no_proxy NO_PROXY
"""


@pytest.fixture(scope="session")
def nowhere() -> Iterator[int]:
    """A port of the loopback interface where nobody listens, nor can while the tests last."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture(autouse=True)
def _hermetic(monkeypatch: pytest.MonkeyPatch, nowhere: int, tmp_path: Path) -> Iterator[None]:
    for name in VARIABLES.split():
        monkeypatch.setenv(name, "")  # first, so that monkeypatch takes back what the code sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{nowhere}")
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{nowhere}")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # flows and scripts have handlers of their own


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDocker]:
    monkeypatch.setattr("flows.watch.FLUSH_SECONDS", 0.05)
    with FakeDocker() as fake:
        yield fake


@pytest.fixture
def flow() -> Flow:
    """The flow, made anew for each test by the means of the flow's image."""
    return extract_flow_from_file(str(PROJECT / "flows" / "docker_sidecar.py"))
