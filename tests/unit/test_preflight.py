"""`make preflight` without a cluster: a line on each check, whatever is wrong, and no traceback.

What it asks of Kubernetes is tested on a real cluster: tests/kubernetes/test_preflight.py.
"""

import copy
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

from flows.settings import JOB_TEMPLATES, load_job_template
from scripts import preflight
from scripts.checks.changes import changes_of_job, changes_of_pod
from scripts.checks.namespace import needs
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
    """Run all checks; the result is the outcome of each by its name, and what is said."""

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
    lists = f"contexts: [{context}], clusters: [{clusters}], users: [{users}]"
    return f"{{current-context: there, {lists}}}"


def test_nothing_is_there(run: RunPreflight, nowhere: int) -> None:
    url = f"http://127.0.0.1:{nowhere}"
    said = run(url, kubeconfig(url))
    outcomes = ["unsure", "wrong", "wrong", *["not checked"] * 7, "wrong", "not checked"]
    assert [outcome for outcome, _ in said.values()] == outcomes
    image = "gcr.io/dev/docker-on-k8s-flow:0.1.0"
    base = "prefecthq/prefect:1.4.1-python3.10"
    assert f"{image}, built from {base}; JOB_TEMPLATE=docker_sidecar" in said["settings"][1]
    assert "Connection refused → start it, or choose another one: KUBECONFIG" in said["cluster"][1]
    assert said["namespace"][1] == "it needs cluster"
    assert said["Job"][1] == said["Secret"][1] == "it needs namespace"
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
            agent = client.register_agent("kubernetes", "asks", ["gpu", "team-a"])
            client.attach_headers({"X-PREFECT-AGENT-ID": agent})
            client.graphql("{hello}")
        said = "no Agent with no labels (FLOW_LABELS) has asked for runs in the last 5 minutes"
        outcome, text = run(api.url)["Agent"]
        assert (outcome, text.partition(" → ")[0]) == ("unsure", said)
        assert "kubectl logs deployment/prefect-agent --namespace flows; FLOW_LABELS" in text
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
    assert said["Job"][0] == "unsure"
    assert "the Agent reads agent:///etc/job.yaml at each run" in said["Job"][1]
    assert said["needed objects"][0] == "unsure"


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
  - env:
      - {valueFrom: {configMapKeyRef: {name: first, key: b}}}
      - {valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
volumes:
  - secret: {secretName: files, items: [{key: c, path: d}]}
  - projected:
      sources:
        - {secret: {name: part}}
        - {configMap: {name: other, items: [{key: e, path: f}]}}
  - csi: {nodePublishSecretRef: {name: csi}}
nodeSelector: {secret: "no"}
"""


def test_what_a_pod_needs() -> None:
    """Of other kinds than in the test on a cluster."""
    needed = {
        f"{kind} {name} {' '.join(keys)}".strip()
        for kind, name, keys in needs(yaml.safe_load(NEEDS))
    }
    config_maps = {"configmap all", "configmap first b", "configmap other e"}
    assert needed == {"secret pull", "secret files c", "secret part", "secret csi"} | config_maps


def test_where_nobody_has_said_to_push(run: RunPreflight) -> None:
    """The default registry is the recipe's, and hardly the user's."""
    outcome, text = run()["settings"]
    assert outcome == "unsure"
    assert text.endswith("→ export FLOW_REGISTRY_URL=registry.example.com/team/")
    assert run(FLOW_REGISTRY_URL="registry.example.com/team/")["settings"][0] == "fine"


def answered(template: str) -> tuple[Any, Any]:
    """A pod's spec as it is asked for, and as an API server answers, with its defaults."""
    asked = load_job_template(template)["spec"]["template"]["spec"]
    answer = copy.deepcopy(asked)
    answer["dnsPolicy"] = "ClusterFirst"
    answer["securityContext"] = {}
    for container in answer["containers"]:
        container["imagePullPolicy"] = "IfNotPresent"
        container["terminationMessagePath"] = "/dev/termination-log"
        container["image"] = f"mirror.example.com/{container.get('image', 'flow')}"
        for variable in container["env"]:
            if variable.get("value") == "":
                del variable["value"]
        container["volumeMounts"].append({"name": "token", "mountPath": "/var/run/secrets"})
    answer["volumes"].append({"name": "token", "projected": {"sources": []}})
    answer.setdefault("tolerations", []).append({"key": "added", "operator": "Exists"})
    return asked, answer


TEMPLATES = sorted(path.stem for path in JOB_TEMPLATES.glob("*.yaml"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_a_cluster_may_change(template: str) -> None:
    asked, answer = answered(template)
    assert changes_of_pod(asked, answer) == []


def daemon(spec: Any) -> Any:
    return spec["initContainers"][0]


SPOILT: dict[str, Callable[[Any], object]] = {
    "initContainers[dind-daemon].restartPolicy was taken away": (
        lambda spec: daemon(spec).pop("restartPolicy")
    ),
    "initContainers[dind-daemon].securityContext was taken away": (
        lambda spec: daemon(spec).pop("securityContext")
    ),
    "securityContext.privileged was changed": (
        lambda spec: daemon(spec)["securityContext"].update(privileged=False)
    ),
    "securityContext.readOnlyRootFilesystem was added": (
        lambda spec: daemon(spec)["securityContext"].update(readOnlyRootFilesystem=True)
    ),
    "spec.securityContext.runAsNonRoot was added": (
        lambda spec: spec.update(securityContext={"runAsNonRoot": True})
    ),
    "initContainers[dind-daemon] was taken away": lambda spec: spec.update(initContainers=[]),
    "spec.initContainers[dind-daemon]": lambda spec: spec.pop("initContainers"),
    "initContainers[dind-daemon].args was changed": lambda spec: daemon(spec)["args"].pop(),
    "initContainers[dind-daemon].command was added": (
        lambda spec: daemon(spec).update(command=["sh"])
    ),
    "volumes[socket] was taken away": (
        lambda spec: spec.update(volumes=[v for v in spec["volumes"] if v["name"] != "socket"])
    ),
    "volumes[socket].emptyDir was taken away": (
        lambda spec: spec["volumes"][1].update(emptyDir=None, hostPath={"path": "/"})
    ),
    "volumeMounts[/run/dind] was taken away": (
        lambda spec: spec["containers"][0].update(volumeMounts=[])
    ),
    "env[DOCKER_HOST].value was changed": (
        lambda spec: spec["containers"][0]["env"].append({"name": "DOCKER_HOST", "value": "x"})
    ),
    "spec.runtimeClassName was added": lambda spec: spec.update(runtimeClassName="kata"),
    "spec.activeDeadlineSeconds was added": lambda spec: spec.update(activeDeadlineSeconds=60),
    "spec.restartPolicy was changed": lambda spec: spec.update(restartPolicy="OnFailure"),
    "spec.automountServiceAccountToken was changed": (
        lambda spec: spec.update(automountServiceAccountToken=True)
    ),
    "the container proxy was added": lambda spec: spec["containers"].append({"name": "proxy"}),
    "the first container is proxy": lambda spec: spec["containers"].insert(0, {"name": "proxy"}),
}


@pytest.mark.parametrize("change", SPOILT)
def test_what_a_cluster_may_not_change(change: str) -> None:
    """As a webhook does that does not know sidecars, or that hardens pods."""
    asked, answer = answered("native_sidecar")
    SPOILT[change](answer)
    changes = "; ".join(changes_of_pod(asked, answer))
    assert change in changes


def test_the_containers_keep_their_order() -> None:
    asked, answer = answered("docker_sidecar")
    answer["containers"].reverse()
    assert "the order of the containers was changed" in "; ".join(changes_of_pod(asked, answer))


def test_a_job_that_may_run_twice() -> None:
    asked = {"backoffLimit": 0, "template": {}}
    assert changes_of_job(asked, {"backoffLimit": 0, "completions": 1}) == []
    assert changes_of_job(asked, {"backoffLimit": 6}) == ["spec.backoffLimit was changed"]
    added = {"backoffLimit": 0, "activeDeadlineSeconds": 60}
    assert changes_of_job(asked, added) == ["spec.activeDeadlineSeconds was added"]


def test_a_quantity_may_be_written_in_another_way() -> None:
    asked, answer = answered("native_sidecar")
    for spec, size in ((asked, "1024Mi"), (answer, "1Gi")):
        spec["volumes"][0]["emptyDir"] = {"sizeLimit": size}
    assert changes_of_pod(asked, answer) == []


def test_no_value_of_a_variable_is_shown() -> None:
    asked, answer = answered("native_sidecar")
    asked["containers"][0]["env"].append({"name": "TOKEN", "value": "hunter2"})
    answer["containers"][0]["env"].append({"name": "TOKEN", "value": "hunter3"})
    changes = "; ".join(changes_of_pod(asked, answer))
    assert "env[TOKEN].value was changed" in changes
    assert "hunter" not in changes
