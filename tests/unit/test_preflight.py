"""`make preflight` where there is no cluster: a line on each check, whatever is wrong, and never a traceback.

What it asks of Kubernetes is tested on a real cluster: tests/kubernetes/test_preflight.py.
"""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import make_server

import prefect
import pytest
import yaml
from prefect.utilities.configuration import set_temporary_config

from scripts import preflight
from tests.support.docker_context import docker_context
from tests.support.fake_docker import FakeDocker
from tests.support.prefect_api import PrefectAPI

Said = dict[str, tuple[str, str]]
RunPreflight = Callable[..., Said]
Server = Callable[[int, bytes], str]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> RunPreflight:
    """RunPreflight all checks; the result is the outcome of each by its name, and what is said."""

    def run(prefect_api: str = "", kubeconfig: str = "", **environment: str) -> Said:
        for name, value in environment.items():
            if name in preflight.PARAMETERS:
                monkeypatch.setenv("GIVEN", f"{name}={value}")
            else:
                monkeypatch.setenv(name, value)
        (tmp_path / "kubeconfig").write_text(kubeconfig)
        path = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
        monkeypatch.setattr(path, str(tmp_path / "kubeconfig"))
        config = {
            "backend": "server",
            "cloud.api": prefect_api,
            "cloud.api_key": None,
            "home_dir": str(tmp_path),
        }
        status: Any = 0
        with set_temporary_config(config):
            try:
                preflight.main()
            except SystemExit as end:
                status = end.code
        lines = capsys.readouterr().out.splitlines()
        said = {line[13:30].strip(): (line[:13].strip(), line[30:]) for line in lines}
        wrong = [outcome for outcome, _ in said.values()].count("wrong")
        assert status == (f"preflight: {wrong} wrong" if wrong else 0)
        return said

    return run


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that gives each request the same answer; calling it returns its URL."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"] or 0))
        start_response(f"{answer['status']} Status", [])
        return [answer["body"]]

    def server(status: int, body: bytes) -> str:
        answer.update(status=status, body=body)
        return f"http://127.0.0.1:{found.server_port}"

    answer: dict[str, Any] = {}
    with make_server("127.0.0.1", 0, app) as found:
        threading.Thread(target=found.serve_forever, args=[0.02], daemon=True).start()
        yield server
        found.shutdown()


def kubeconfig(url: str) -> str:
    context = "{name: there, context: {cluster: c, user: u}}"
    clusters, users = (
        f"{{name: c, cluster: {{server: {json.dumps(url)}}}}}",
        "{name: u, user: {token: me}}",
    )
    return f"{{current-context: there, contexts: [{context}], clusters: [{clusters}], users: [{users}]}}"


def test_nothing_is_there(run: RunPreflight, nowhere: int) -> None:
    url = f"http://127.0.0.1:{nowhere}"
    said = run(url, kubeconfig(url))
    outcomes = ["fine", "wrong", "wrong", *["not checked"] * 6, "wrong", "not checked"]
    assert [outcome for outcome, _ in said.values()] == outcomes
    image = "gcr.io/dev/docker-on-k8s-flow:0.1.0"
    base = "prefecthq/prefect:1.4.1-python3.10"
    assert said["settings"][1] == f"{image}, built from {base}; JOB_TEMPLATE=docker_sidecar"
    assert "Connection refused → start it, or choose another one: KUBECONFIG" in said["cluster"][1]
    assert said["namespace"][1] == "because of the cluster"
    assert said["Job"][1] == said["Secret"][1] == "because of the namespace"
    assert "Connection refused → start it" in said["Prefect"][1]


def test_a_template_that_cannot_be_used(run: RunPreflight) -> None:
    outcome, text = run(JOB_TEMPLATE="[bold]")["settings"]
    assert (outcome, text.partition(": ")[0]) == ("wrong", "JOB_TEMPLATE is '[bold]'")


URLS = ["", "5", "http://[::1", "ftp://127.0.0.1", f"http://{'a' * 70}.example"]


@pytest.mark.parametrize(
    "content",
    [
        *("", "two lines:\n- [", "[]", "5", "{contexts: 5}"),
        "{current-context: a, contexts: [{name: a}], clusters: []}",
        *map(kubeconfig, URLS),
    ],
)
def test_kubeconfigs(run: RunPreflight, content: str) -> None:
    outcome, text = run(kubeconfig=content)["cluster"]
    assert outcome == "wrong"
    assert " → start it, or choose another one: KUBECONFIG, kubectl config use-context" in text


@pytest.mark.parametrize(
    ("status", "body"),
    [
        *(
            (200, body)
            for body in (
                b"<html>",
                b"[]",
                b"{}",
                b'{"data": null}',
                b'{"errors": [{"path": ["project"]}]}',
            )
        ),
        *((status, b"words") for status in (401, 404, 429, 503)),
        (401, b'{"message": "no"}'),
    ],
)
def test_what_is_neither_kubernetes_nor_prefect(
    run: RunPreflight, server: Server, status: int, body: bytes
) -> None:
    url = server(status, body)
    said = run(url, kubeconfig(url), PROJECT="containers")
    assert said["cluster"][0] == said["Prefect"][0] == "wrong"


def test_prefect_and_its_agents(run: RunPreflight) -> None:
    """The Agent for the flow's labels, as Prefect Server chooses it."""
    with PrefectAPI() as api:
        assert run(api.url)["Prefect"] == (
            "fine",
            f"{api.url}, backend 'server', project (PROJECT) not set",
        )
        assert run(api.url)["Agent"][0] == "unsure"
        with set_temporary_config(
            {"backend": "server", "cloud.api": api.url, "cloud.api_key": None}
        ):
            client = prefect.Client()
            client.register_agent("kubernetes", "never asked", [])
            agent = client.register_agent("kubernetes", "asks", ["gpu", "team-a"])
            client.attach_headers({"X-PREFECT-AGENT-ID": agent})
            client.graphql("{hello}")
        said = "no Agent with no labels (FLOW_LABELS) has asked for runs in the last 5 minutes"
        assert run(api.url)["Agent"] == ("unsure", said)
        assert run(api.url, FLOW_LABELS="team-a")["Agent"] == (
            "fine",
            "one with labels team-a asks for runs",
        )
        assert run(api.url, FLOW_LABELS="team-a,team-b")["Agent"][0] == "unsure"
        assert not api.errors


def test_a_template_that_only_the_agent_sees(
    run: RunPreflight, server: Server, nowhere: int
) -> None:
    """The cluster is at localhost, which is not asked through a proxy."""
    url = server(200, b'{"gitVersion": "v1.37.2"}')
    proxy = f"http://127.0.0.1:{nowhere}"
    said = run(kubeconfig=kubeconfig(url), JOB_TEMPLATE="agent:///etc/job.yaml", HTTP_PROXY=proxy)
    assert said["cluster"] == ("fine", f"Kubernetes v1.37.2 at {url}")
    assert said["settings"][0] == "fine"
    assert said["Job"][0] == "unsure"
    assert "the Agent reads agent:///etc/job.yaml at each run" in said["Job"][1]
    assert said["needed objects"] == ("not checked", "because of the Job")


def test_an_engine_of_a_docker_context(
    run: RunPreflight, fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`docker` uses it, and `prefect register` does not."""
    fake.version = {"ApiVersion": "1.44", "Version": "29.9.0"}, 200
    docker_context(monkeypatch, tmp_path, fake.url)
    outcome, text = run()["engine"]
    assert (outcome, text.partition(" → ")[2]) == ("wrong", f"export DOCKER_HOST={fake.url}")
    assert run(DOCKER_HOST=fake.url)["engine"] == ("fine", f"Docker 29.9.0 at {fake.url}")


NEEDS = """
imagePullSecrets: [{name: pull}]
containers: [{envFrom: [{configMapRef: {name: all}}, {secretRef: {name: no, optional: true}}]}]
initContainers:
  - env: [{valueFrom: {configMapKeyRef: {name: first, key: b}}}, {valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
volumes:
  - secret: {secretName: files, items: [{key: c, path: d}]}
  - projected: {sources: [{secret: {name: part}}, {configMap: {name: other, items: [{key: e, path: f}]}}]}
  - csi: {nodePublishSecretRef: {name: csi}}
nodeSelector: {secret: "no"}
"""


def test_what_a_pod_needs() -> None:
    """Of other kinds than in the test on a cluster."""
    needed = {
        f"{kind} {name} {' '.join(keys)}".strip()
        for kind, name, keys in preflight.needs(yaml.safe_load(NEEDS))
    }
    config_maps = {"configmap all", "configmap first b", "configmap other e"}
    assert needed == {"secret pull", "secret files c", "secret part", "secret csi"} | config_maps
