"""`make preflight` where there is no cluster: a line on each check, whatever is wrong, and never a traceback.

What it asks of Kubernetes is tested on a real cluster: tests/kubernetes/test_preflight.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.configuration import set_temporary_config

from flows.settings import PROJECT
from scripts import preflight
from tests.support.prefect_api import PrefectAPI

Said = dict[str, tuple[str, str]]
Run = Callable[..., Said]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run all checks; the result is the outcome of each by its name, and what is said."""
    for name in ("NAMESPACE", "SERVICE_ACCOUNT", "PROJECT", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)

    def run(prefect_api: str = "", kubeconfig: str = os.devnull, **environment: str) -> Said:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", kubeconfig)
        config = {"backend": "server", "cloud.api": prefect_api, "cloud.api_key": None, "home_dir": str(tmp_path)}
        with set_temporary_config(config), contextlib.suppress(SystemExit):
            preflight.main()
        lines = capsys.readouterr().out.splitlines()
        return {line[13:30].strip(): (line[:13].strip(), line[30:]) for line in lines}

    return run


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    """A server that gives each request the same answer; calling it returns its URL."""
    answer: list[Any] = [200, b""]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.send_response(answer[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, args=[0.02], daemon=True).start()

        def start(status: int, body: bytes) -> str:
            answer[:] = status, body
            return f"http://127.0.0.1:{found.server_port}"

        yield start
        found.shutdown()


def kubeconfig(folder: Path, url: str) -> str:
    config = {
        "current-context": "there",
        "contexts": [{"name": "there", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": "me"}}],
    }
    (folder / "kubeconfig").write_text(json.dumps(config))
    return str(folder / "kubeconfig")


def test_the_command() -> None:
    """The exit status, a line on each check, and nothing else."""
    environ = {**os.environ, "PREFECT__BACKEND": "cloud", "PREFECT__CLOUD__API_KEY": "", "NAMESPACE": "../a b"}
    command = [sys.executable, "-m", "scripts.preflight"]
    done = subprocess.run(command, env=environ, cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "preflight: 2 wrong\n")
    assert [line[:13].strip() for line in done.stdout.splitlines()] == (
        ["fine", "wrong", *["not checked"] * 5, "wrong"]
    )


def test_nothing_is_there(run: Run, tmp_path: Path, nowhere: int) -> None:
    said = run(kubeconfig=kubeconfig(tmp_path, f"http://127.0.0.1:{nowhere}"))
    image = "gcr.io/dev/docker-on-k8s-flow:0.1.0"
    assert said["settings"] == ("fine", f"{image}, built from prefecthq/prefect:1.4.1-python3.10")
    assert said["cluster"][0] == "wrong"
    assert "Connection refused → start it, or choose another one: KUBECONFIG" in said["cluster"][1]
    assert said["namespace"] == ("not checked", "because of the cluster")
    assert said["Job"] == said["Secret"] == ("not checked", "because of the namespace")


@pytest.mark.parametrize(
    "template", ["", "{{ .Values.x }}", "[" * 1000, "{apiVersion: batch/v1, kind: Job, metadata: 5}", "\x00"]
)
def test_row_24_templates(run: Run, tmp_path: Path, template: str) -> None:
    """A fault that only Kubernetes can see, such as `securityContext: privileged`, is in the cluster's tests."""
    (tmp_path / "[bold]").write_text(template)
    outcome, text = run(JOB_TEMPLATE=str(tmp_path / "[bold]"))["settings"]
    assert (outcome, text.partition(": ")[0]) == ("wrong", f"JOB_TEMPLATE is '{tmp_path / '[bold]'}'")


@pytest.mark.parametrize(
    "content",
    ["", "two lines:\n- [", "[]", "5", "{contexts: 5}", "{current-context: a, contexts: [{name: a}], clusters: []}"],
)
def test_row_24_kubeconfigs(run: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "kubeconfig").write_text(content)
    outcome, text = run(kubeconfig=str(tmp_path / "kubeconfig"))["cluster"]
    assert outcome == "wrong"
    assert " → start it, or choose another one: KUBECONFIG, kubectl config use-context" in text


@pytest.mark.parametrize("url", ["", "5", "http://[::1", "ftp://127.0.0.1", f"http://{'a' * 70}.example"])
def test_row_24_addresses(run: Run, tmp_path: Path, url: str) -> None:
    assert run(kubeconfig=kubeconfig(tmp_path, url))["cluster"][0] == "wrong"


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"<html>"), (200, b"[]"), (200, b"{}"), (503, b"later"), (401, b'{"message": "no"}')]
)
def test_row_24_no_cluster(run: Run, tmp_path: Path, server: Callable[..., str], status: int, body: bytes) -> None:
    assert run(kubeconfig=kubeconfig(tmp_path, server(status, body)))["cluster"][0] == "wrong"


def test_localhost_is_not_proxied(run: Run, tmp_path: Path, server: Callable[..., str], nowhere: int) -> None:
    url = server(200, b'{"gitVersion": "v1.37.2"}')
    said = run(kubeconfig=kubeconfig(tmp_path, url), HTTP_PROXY=f"http://127.0.0.1:{nowhere}")
    assert said["cluster"] == ("fine", f"Kubernetes v1.37.2 at {url}")


def test_prefect(run: Run) -> None:
    with PrefectAPI() as api:
        assert run(api.url)["Prefect"] == ("fine", f"{api.url}, backend 'server', project (PROJECT) not set")
        outcome, text = run(api.url, PROJECT="my project")["Prefect"]
        assert (outcome, text.partition(" → ")[2]) == ("wrong", 'prefect create project "my project"')
        assert not api.errors


def test_no_prefect(run: Run, nowhere: int) -> None:
    assert "Connection refused → start it" in run(f"http://127.0.0.1:{nowhere}")["Prefect"][1]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        *((200, body) for body in (b"<html>", b"[]", b"{}", b'{"data": null}', b'{"errors": [{"path": ["project"]}]}')),
        *((status, b"words") for status in (401, 404, 429, 503)),
    ],
)
def test_row_24_what_is_no_prefect_api(run: Run, server: Callable[..., str], status: int, body: bytes) -> None:
    assert run(server(status, body), PROJECT="containers")["Prefect"][0] == "wrong"
