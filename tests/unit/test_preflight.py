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

import prefect
import pytest
import yaml
from prefect.utilities.configuration import set_temporary_config

from flows.settings import PROJECT
from scripts import preflight
from tests.support.fake_docker import FakeDocker
from tests.support.prefect_api import PrefectAPI
from tests.unit.conftest import docker_context

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
    assert (done.returncode, done.stderr) == (1, "preflight: 3 wrong\n")
    assert [line[:13].strip() for line in done.stdout.splitlines()] == (
        ["fine", "wrong", "wrong", *["not checked"] * 6, "wrong", "not checked"]
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
def test_templates(run: Run, tmp_path: Path, template: str) -> None:
    """A fault that only Kubernetes can see, such as `securityContext: privileged`, is in the cluster's tests."""
    (tmp_path / "[bold]").write_text(template)
    outcome, text = run(JOB_TEMPLATE=str(tmp_path / "[bold]"))["settings"]
    assert (outcome, text.partition(": ")[0]) == ("wrong", f"JOB_TEMPLATE is '{tmp_path / '[bold]'}'")


@pytest.mark.parametrize(
    "content",
    ["", "two lines:\n- [", "[]", "5", "{contexts: 5}", "{current-context: a, contexts: [{name: a}], clusters: []}"],
)
def test_kubeconfigs(run: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "kubeconfig").write_text(content)
    outcome, text = run(kubeconfig=str(tmp_path / "kubeconfig"))["cluster"]
    assert outcome == "wrong"
    assert " → start it, or choose another one: KUBECONFIG, kubectl config use-context" in text


@pytest.mark.parametrize("url", ["", "5", "http://[::1", "ftp://127.0.0.1", f"http://{'a' * 70}.example"])
def test_addresses(run: Run, tmp_path: Path, url: str) -> None:
    assert run(kubeconfig=kubeconfig(tmp_path, url))["cluster"][0] == "wrong"


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"<html>"), (200, b"[]"), (200, b"{}"), (503, b"later"), (401, b'{"message": "no"}')]
)
def test_no_cluster(run: Run, tmp_path: Path, server: Callable[..., str], status: int, body: bytes) -> None:
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


def test_agents(run: Run) -> None:
    """The Agent for the flow's labels, as Prefect Server chooses it."""
    with PrefectAPI() as api:
        assert run(api.url)["Agent"][0] == "unsure"
        with set_temporary_config({"backend": "server", "cloud.api": api.url, "cloud.api_key": None}):
            client = prefect.Client()
            client.register_agent("kubernetes", "never asked", [])
            agent = client.register_agent("kubernetes", "asks", ["gpu", "team-a"])
            client.attach_headers({"X-PREFECT-AGENT-ID": agent})
            client.graphql("{hello}")
        assert run(api.url)["Agent"] == (
            "unsure",
            "no Agent with no labels (FLOW_LABELS) has asked for runs in the last 5 minutes",
        )
        assert run(api.url, FLOW_LABELS="team-a")["Agent"] == ("fine", "one with labels team-a asks for runs")
        assert run(api.url, FLOW_LABELS="team-a,team-b")["Agent"][0] == "unsure"


def test_a_template_that_only_the_agent_sees(run: Run, tmp_path: Path, server: Callable[..., str]) -> None:
    found = kubeconfig(tmp_path, server(200, b'{"gitVersion": "v1.37.2"}'))
    said = run(kubeconfig=found, JOB_TEMPLATE="agent:///etc/job.yaml")
    assert said["settings"][0] == "fine"
    assert said["Job"][0] == "unsure"
    assert "the Agent reads agent:///etc/job.yaml at each run" in said["Job"][1]
    assert said["needed objects"] == ("not checked", "because of the Job")


def test_an_engine_of_a_docker_context(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`docker` uses it, and `prefect register` does not."""
    with FakeDocker() as fake:
        fake.version = {"ApiVersion": "1.44", "Version": "29.9.0"}, 200
        docker_context(monkeypatch, tmp_path, fake.url)
        outcome, text = run()["engine"]
        assert (outcome, text.partition(" → ")[2]) == ("wrong", f"export DOCKER_HOST={fake.url}")
        assert run(DOCKER_HOST=fake.url)["engine"] == ("fine", f"Docker 29.9.0 at {fake.url}")


NEEDS = """
imagePullSecrets: [{name: pull}]
containers:
  - env: [{valueFrom: {secretKeyRef: {name: api, key: token}}}, {valueFrom: {fieldRef: {fieldPath: spec.nodeName}}},
      {valueFrom: {configMapKeyRef: {name: no, key: a, optional: true}}}]
    envFrom: [{configMapRef: {name: all}}, {secretRef: {name: no, optional: true}}]
initContainers: [{env: [{valueFrom: {configMapKeyRef: {name: first, key: b}}}]}]
volumes:
  - persistentVolumeClaim: {claimName: data}
  - secret: {secretName: files, items: [{key: c, path: d}]}
  - configMap: {name: no, optional: true}
  - projected: {sources: [{secret: {name: part}}, {configMap: {name: other, items: [{key: e, path: f}]}}]}
  - csi: {nodePublishSecretRef: {name: csi}}
nodeSelector: {secret: "no"}
"""


def test_what_a_pod_needs() -> None:
    assert set(preflight.needs(yaml.safe_load(NEEDS))) == {
        ("secret", "pull", ()),
        ("secret", "api", ("token",)),
        ("configmap", "all", ()),
        ("configmap", "first", ("b",)),
        ("persistentvolumeclaim", "data", ()),
        ("secret", "files", ("c",)),
        ("secret", "part", ()),
        ("configmap", "other", ("e",)),
        ("secret", "csi", ()),
    }


def test_no_prefect(run: Run, nowhere: int) -> None:
    assert "Connection refused → start it" in run(f"http://127.0.0.1:{nowhere}")["Prefect"][1]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        *((200, body) for body in (b"<html>", b"[]", b"{}", b'{"data": null}', b'{"errors": [{"path": ["project"]}]}')),
        *((status, b"words") for status in (401, 404, 429, 503)),
    ],
)
def test_what_is_no_prefect_api(run: Run, server: Callable[..., str], status: int, body: bytes) -> None:
    assert run(server(status, body), PROJECT="containers")["Prefect"][0] == "wrong"
