"""`make preflight`, with small servers that stand for a cluster, a registry and its token service."""

from __future__ import annotations

import base64
import copy
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes.client
import pytest
import requests
from prefect.utilities.configuration import set_temporary_config

from flows.settings import JOB_TEMPLATES, PROJECT, Settings, load_job_template
from scripts import preflight
from scripts.preflight import Target, Wrong
from tests.support.prefect_api import PrefectAPI

NAMES = [name for name, _, _ in preflight.CHECKS]
UPLOADS = "POST /v2/team/docker-on-k8s-flow/blobs/uploads/"
UPLOAD = "/v2/team/docker-on-k8s-flow/blobs/uploads/1?_state=a"
PODS = "POST /api/v1/namespaces/flows/pods"
REVIEWS = "POST /apis/authorization.k8s.io/v1/namespaces/flows/localsubjectaccessreviews"
POD_SECURITY = (
    'pods "preflight-x" is forbidden: violates PodSecurity "baseline:latest": privileged '
    '(container "dind-daemon" must not set securityContext.privileged=true)'
)


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    login: str | None
    body: str


@dataclass
class Answer:
    status: int = 200
    body: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    logins: tuple[str, ...] = ()  # who gets this answer; anybody else gets 401


class Server(ThreadingHTTPServer):
    """Gives the answers that it is told to give; to anything else, 404."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}"
        self.answers: dict[str, Answer] = {}
        self.challenge = ""
        self.requests: list[Request] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        login = self.headers["Authorization"]
        self.server.requests.append(Request(self.command, url.path, parse_qs(url.query), login, body))
        answer = self.server.answers.get(f"{self.command} {url.path}", Answer(404, {"message": "not found"}))
        if answer.logins and login not in answer.logins:
            challenge = {"WWW-Authenticate": self.server.challenge} if self.server.challenge else {}
            answer = Answer(401, {"errors": [{"message": "authentication required"}]}, challenge)
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        threading.Thread(target=found.serve_forever, args=[0.02], daemon=True).start()
        yield found
        found.shutdown()


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody's logins, and nobody's wishes."""
    for name in ("NAMESPACE", "SERVICE_ACCOUNT", "PROJECT", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))


@pytest.fixture
def target(server: Server) -> Target:
    """Everything on the server that stands for it."""
    found = Target("flows", "default", "containers")
    found.settings = Settings.from_environ({"FLOW_REGISTRY_URL": f"{server.host}/team/"})
    preflight.template(found)
    configuration = kubernetes.client.Configuration(host=server.url)
    configuration.proxy = None
    found.cluster = kubernetes.client.ApiClient(configuration)
    found.version = "v1.34.1"
    return found


def run(**environment: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The real command: its exit status, and by check the outcome and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.preflight"],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert [line[13:30].strip() for line in lines] == NAMES, "one line per check" + done.stdout + done.stderr
    wrong = sum(line.startswith("wrong") for line in lines)
    assert done.stderr == (f"preflight: {wrong} wrong\n" if wrong else "")
    return done.returncode, {name: (line[:13].strip(), line[30:]) for name, line in zip(NAMES, lines)}


# ---------------------------------------------------------------------------------------- all of it


def test_nothing_is_there(nowhere: int) -> None:
    status, said = run(FLOW_REGISTRY_URL=f"127.0.0.1:{nowhere}", PREFECT__BACKEND="cloud", PREFECT__CLOUD__API_KEY="")
    assert status == 1
    assert [name for name, (outcome, _) in said.items() if outcome == "fine"] == ["settings", "job template"]
    assert said["cluster"] == ("wrong", said["cluster"][1])
    assert "→ point KUBECONFIG at your cluster's" in said["cluster"][1]
    assert said["namespace"] == ("not checked", "because of the cluster")
    assert said["ConfigMap"] == ("not checked", "because of the namespace")
    assert "Connection refused → check FLOW_REGISTRY_URL" in said["registry"][1]
    assert "there is no key for https://api.prefect.io → prefect backend server" in said["Prefect API"][1]
    assert said["Prefect project"] == ("not checked", "because of the Prefect API")


def test_a_setting_that_cannot_be_used() -> None:
    status, said = run(FLOW_IMAGE_TAG="[bold]no tag", PREFECT__BACKEND="cloud", PREFECT__CLOUD__API_KEY="")
    assert status == 1
    assert said["settings"][0] == "wrong"
    assert said["settings"][1].startswith("FLOW_IMAGE_TAG is '[bold]no tag'. Allowed: ")
    assert said["job template"] == said["registry"] == ("not checked", "because of the settings")


def kubernetes_answers() -> dict[str, Answer]:
    """Those of a cluster where all is well."""
    words = ("buildDate", "compiler", "gitCommit", "gitTreeState", "goVersion", "major", "minor", "platform")
    version = dict.fromkeys(words, "x")
    return {
        "GET /version/": Answer(body={**version, "gitVersion": "v1.34.1"}),
        "GET /api/v1/namespaces/flows": Answer(body={"metadata": {"labels": {preflight.POD_SECURITY: "privileged"}}}),
        PODS: Answer(201, {"metadata": {"name": "preflight-x"}}),
        REVIEWS: Answer(201, {"spec": {}, "status": {"allowed": True}}),
    }


def kubeconfig(url: str, folder: Path) -> str:
    """The path of one whose cluster is there."""
    config = {
        "current-context": "there",
        "contexts": [{"name": "there", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": "me"}}],
    }
    (folder / "kubeconfig").write_text(json.dumps(config))
    return str(folder / "kubeconfig")


def test_everything_is_there(server: Server, tmp_path: Path) -> None:
    server.answers = kubernetes_answers()
    lets_push(server)
    with PrefectAPI() as api:
        environment = {"KUBECONFIG": kubeconfig(server.url, tmp_path), "NAMESPACE": "flows", **api.env}
        status, said = run(FLOW_REGISTRY_URL=f"{server.host}/team", PROJECT="containers", **environment)
        assert (status, said["Prefect project"]) == (
            1,
            ("wrong", "there is no 'containers' → prefect create project containers"),
        )
        assert [name for name, (outcome, _) in said.items() if outcome != "fine"] == ["Prefect project"]
        status, said = run(FLOW_REGISTRY_URL=f"{server.host}/team", **environment)
        assert not api.errors
    assert (status, {outcome for outcome, _ in said.values()}) == (0, {"fine"})
    assert said["cluster"][1] == f"Kubernetes v1.34.1 at {server.url}, context 'there'"
    assert said["namespace"][1] == "'flows', Pod Security: privileged"
    assert said["ConfigMap"][1].startswith("none named docker-sidecar; it would configure")
    assert said["Prefect project"][1] == "PROJECT is not set, none was looked for"
    for request in server.requests:
        if request.method != "GET" and "review" not in request.path and "/v2/" not in request.path:
            assert request.query == {"dryRun": ["All"]}, request


# ----------------------------------------------------------------------------------------- template


@pytest.mark.parametrize("name", sorted(path.stem for path in JOB_TEMPLATES.glob("*.yaml")))
def test_our_own_templates(name: str, target: Target) -> None:
    target.settings = replace(target.settings, job_template=load_job_template(name))
    assert "listens on tcp://127.0.0.1:2375 and nowhere else" in preflight.template(target)


def with_daemon(daemon: dict[str, Any], native: bool = False, **pod: Any) -> dict[str, Any]:
    """A template with this daemon beside the flow, or as a restartable init container."""
    flow = {"name": "flow"}
    pod["containers"] = [flow] if native else [flow, daemon]
    if native:
        pod["initContainers"] = [{"name": "before", "securityContext": {"privileged": True}}, daemon]
    return {"spec": {"template": {"spec": pod}}}


NATIVE = {
    "name": "dind",
    "restartPolicy": "Always",
    "args": ["dockerd", "--host=tcp://127.0.0.1:2375"],
    "securityContext": {"privileged": True},
}


@pytest.mark.parametrize(
    "arguments",
    [
        ["dockerd", "--host=tcp://127.0.0.1:2375"],
        ["dockerd", "-H", "tcp://127.0.0.1:2375", "-H", "unix:///var/run/docker.sock"],
        ["sh", "-c", "exec dockerd --host='tcp://127.0.0.1:2375' --host=fd://"],
    ],
)
@pytest.mark.parametrize("native", [False, True])
def test_a_daemon_of_its_own_pod(arguments: list[str], native: bool, target: Target) -> None:
    template = with_daemon({**NATIVE, "args": arguments}, native)
    target.settings = replace(target.settings, job_template=template)
    assert preflight.template(target).startswith("the daemon, 'dind', listens")


@pytest.mark.parametrize(
    ("template", "seen"),
    [
        (with_daemon({}), "no privileged container beside the flow's"),
        (with_daemon({**NATIVE, "securityContext": None}), "no privileged container beside the flow's"),
        (with_daemon({**NATIVE, "restartPolicy": None}, native=True), "no privileged container beside the flow's"),
        (with_daemon({**NATIVE, "args": None}), "nothing tells the daemon --host"),
        (with_daemon({**NATIVE, "args": ["--host=tcp://0.0.0.0:2375"]}), "nothing tells the daemon --host"),
        (with_daemon({**NATIVE, "command": ["-H=tcp://0.0.0.0:2376"]}), "the daemon serves tcp://0.0.0.0:2376: root"),
        (with_daemon({**NATIVE, "command": ["-H", "tcp://:2376"]}), "the daemon serves tcp://:2376: root"),
        (with_daemon(NATIVE, hostNetwork=True), r"serves the whole node \(hostNetwork\): root"),
    ],
)
def test_a_daemon_of_everybodys(template: dict[str, Any], seen: str, target: Target) -> None:
    target.settings = replace(target.settings, job_template=template)
    with pytest.raises(Wrong, match=f"{seen}.* → follow job_templates/docker_sidecar.yaml"):
        preflight.template(target)


# ------------------------------------------------------------------------------------------ cluster


def refusal(status: int, message: str) -> Answer:
    return Answer(status, {"kind": "Status", "message": message, "code": status})


def test_what_is_no_kubeconfig(tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").write_text("two lines:\n- [")
    status, said = run(KUBECONFIG=str(tmp_path / "kubeconfig"), FLOW_IMAGE_TAG="")
    assert (status, said["cluster"][0]) == (1, "wrong")
    assert said["cluster"][1].endswith("→ point KUBECONFIG at your cluster's, and choose a context with kubectl")


def test_what_is_no_kubernetes(server: Server, tmp_path: Path) -> None:
    server.answers["GET /version/"] = Answer(body=b"<html>")
    status, said = run(KUBECONFIG=kubeconfig(server.url, tmp_path), FLOW_IMAGE_TAG="")
    assert (status, said["cluster"][0]) == (1, "wrong")
    assert said["cluster"][1].startswith("no answer of a cluster: ")


def test_a_cluster_that_says_nothing(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        path = kubeconfig(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", path)
        with pytest.raises(Wrong, match="no answer of a cluster: timed out → start it, or choose another context"):
            preflight.cluster(target)
        silent.accept()[0].close()
        silent.settimeout(0.2)
        with pytest.raises(socket.timeout):  # it was tried once
            silent.accept()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(404), "there is no 'flows' → kubectl create namespace flows && kubectl label namespace flows pod-sec"),
        (refusal(401, "Unauthorized"), "Unauthorized → log in to the cluster again"),
        (refusal(403, 'namespaces "flows" is forbidden'), 'namespaces "flows" is forbidden → get the role admin'),
        (Answer(503, b"later"), "503 Service Unavailable → see whether this is the right cluster"),
    ],
)
def test_no_namespace(answer: Answer, says: str, server: Server, target: Target) -> None:
    server.answers["GET /api/v1/namespaces/flows"] = answer
    with pytest.raises(Wrong) as error:
        preflight.namespace(target)
    assert str(error.value).startswith(says)


def test_the_pod_that_is_asked_for(server: Server, target: Target) -> None:
    server.answers = kubernetes_answers()
    target.template = {**target.template, "metadata": {"labels": {"team": "data"}}}
    before = copy.deepcopy(target.template)
    assert preflight.admission(target) == "'flows' admits it (a dry run, it was not made)"
    assert target.template == before
    [request] = server.requests
    pod = json.loads(request.body)
    assert request.query == {"dryRun": ["All"]}
    assert pod["metadata"] == {"labels": {"team": "data"}, "generateName": "preflight-"}
    assert pod["spec"]["containers"][0]["image"] == f"{server.host}/team/docker-on-k8s-flow:0.1.0"
    assert pod["spec"]["containers"][1:] == before["spec"]["containers"][1:]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            refusal(403, POD_SECURITY),
            f"{POD_SECURITY} → kubectl label --overwrite namespace flows "
            "pod-security.kubernetes.io/enforce=privileged, but not if others use it: "
            "give the flow a namespace of its own",
        ),
        (refusal(403, "exceeded quota: q"), "exceeded quota: q → change what namespace 'flows' admits, or choose"),
        (refusal(422, "spec is invalid"), "spec is invalid → mend the template (JOB_TEMPLATE)"),
        (refusal(403, 'pods is forbidden: User "me" cannot create resource "pods"'), "pods is forbidden: User"),
        (refusal(500, "etcd is full"), "etcd is full → see whether this is the right cluster, and whether it is well"),
    ],
)
def test_a_pod_that_is_not_admitted(answer: Answer, says: str, server: Server, target: Target) -> None:
    server.answers[PODS] = answer
    with pytest.raises(Wrong) as error:
        preflight.admission(target)
    assert str(error.value).startswith(says)
    if "User" in says:
        assert str(error.value).endswith(" → get the role admin in that namespace, or have someone run this who has it")


@pytest.mark.parametrize(
    ("version", "knows"), [("v1.20.2", False), ("v1.28.15-eks-1", False), ("v1.29.0", True), ("v1.34.1+k3s1", True)]
)
def test_restartable_init_containers(version: str, knows: bool, server: Server, target: Target) -> None:
    server.answers = kubernetes_answers()
    target.version, target.template = version, with_daemon(NATIVE, native=True)["spec"]["template"]
    if knows:
        assert "admits it" in preflight.admission(target)
    else:
        with pytest.raises(Wrong, match=f"which Kubernetes {version} does not know → JOB_TEMPLATE=docker_sidecar"):
            preflight.admission(target)
        assert not server.requests


def test_what_the_agent_may_not(server: Server, target: Target) -> None:
    server.answers[REVIEWS] = Answer(201, {"spec": {}, "status": {"allowed": False}})
    install = "prefect agent kubernetes install --rbac --namespace flows | kubectl apply --namespace flows -f -"
    with pytest.raises(Wrong) as error:
        preflight.rights(target)
    rights = "create jobs, list jobs, delete jobs, list pods, list events"
    assert str(error.value) == f"system:serviceaccount:flows:default may not {rights} → {install}"
    asked = [json.loads(request.body)["spec"] for request in server.requests]
    assert {spec["user"] for spec in asked} == {"system:serviceaccount:flows:default"}
    assert asked[0]["resourceAttributes"] == {
        "namespace": "flows",
        "verb": "create",
        "resource": "jobs",
        "group": "batch",
    }
    assert asked[0]["groups"] == ["system:serviceaccounts", "system:serviceaccounts:flows", "system:authenticated"]
    target.service_account = "agent"
    with pytest.raises(Wrong, match=r"kubectl create rolebinding prefect-agent-agent .*--serviceaccount=flows:agent"):
        preflight.rights(target)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "docker-sidecar has no daemon.json"),
        ({"config.json": "{}"}, "docker-sidecar has no daemon.json"),
        ({"daemon.json": ""}, "no JSON object that dockerd takes: Expecting value"),
        ({"daemon.json": "{'mtu': 1400}"}, "no JSON object that dockerd takes: Expecting property name"),
        ({"daemon.json": "[1]"}, "no JSON object that dockerd takes: "),
        ({"daemon.json": "null"}, "no JSON object that dockerd takes: "),
        ({"daemon.json": '"text"'}, "no JSON object that dockerd takes: "),
        ({"daemon.json": '{"hosts": []}'}, "no JSON object that dockerd takes: hosts: that is for the template"),
        ({"daemon.json": '{"data-root": "/a", "hosts": []}'}, "data-root and hosts: that is for the template"),
    ],
)
def test_a_config_map_that_dockerd_would_not_take(
    data: dict[str, str] | None, says: str, server: Server, target: Target
) -> None:
    server.answers["GET /api/v1/namespaces/flows/configmaps/docker-sidecar"] = Answer(body={"data": data})
    with pytest.raises(Wrong, match=f"{says}.* → kubectl edit configmap docker-sidecar --namespace flows"):
        preflight.config_map(target)


def test_a_config_map(server: Server, target: Target) -> None:
    answer = Answer(body={"data": {"daemon.json": '{"mtu": 1400, "log-opts": {}}'}})
    server.answers["GET /api/v1/namespaces/flows/configmaps/docker-sidecar"] = answer
    assert preflight.config_map(target) == "docker-sidecar sets log-opts, mtu"


@pytest.mark.parametrize(
    ("type", "content", "says"),
    [
        (
            "Opaque",
            "{}",
            "docker-sidecar is of type Opaque, not kubernetes.io/dockerconfigjson → kubectl delete secret",
        ),
        ("kubernetes.io/dockerconfigjson", "{}", "the .dockerconfigjson of docker-sidecar has no auths → kubectl"),
        ("kubernetes.io/dockerconfigjson", "[]", "the .dockerconfigjson of docker-sidecar has no auths → kubectl"),
        ("kubernetes.io/dockerconfigjson", '{"auths": {"b.io": {"auth": "c2VjcmV0"}, "a.io": {}}}', ""),
    ],
)
def test_a_secret(type: str, content: str, says: str, server: Server, target: Target) -> None:
    data = {".dockerconfigjson": base64.b64encode(content.encode()).decode()}
    server.answers["GET /api/v1/namespaces/flows/secrets/docker-sidecar"] = Answer(body={"type": type, "data": data})
    if says:
        with pytest.raises(Wrong) as error:
            preflight.secret(target)
        assert str(error.value).startswith(says)
    else:
        assert preflight.secret(target) == "docker-sidecar has logins for a.io, b.io"


# ----------------------------------------------------------------------------------------- registry

ME, STRANGER = (f"Basic {base64.b64encode(pair).decode()}" for pair in (b"me:pass", b"me:wrong"))


def log_in(folder: Path, host: str, basic: str | None = None, **entry: str) -> None:
    """What `docker login` leaves."""
    if basic:
        entry["auth"] = basic.split()[1]
    (folder / "config.json").write_text(json.dumps({"auths": {host: entry}}))


def lets_push(server: Server, *logins: str, location: str = UPLOAD) -> None:
    server.answers[UPLOADS] = Answer(202, headers={"Location": location}, logins=logins)
    server.answers[f"DELETE {urlsplit(UPLOAD).path}"] = Answer(204)


def test_a_registry_without_logins(server: Server, target: Target) -> None:
    lets_push(server)
    assert preflight.registry(target) == f"{server.host} lets push team/docker-on-k8s-flow without a login"
    assert [(request.method, request.login) for request in server.requests] == [("POST", None), ("DELETE", None)]
    assert server.requests[1].query == {"_state": ["a"]}


def test_a_login_that_docker_does_not_have(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password pass")
    server.challenge = 'Basic realm="here"'
    lets_push(server, ME)
    with requests.Session() as session:
        url = f"{server.url}{UPLOADS.split()[1]}"
        assert preflight.begin_upload(session, url, "team/docker-on-k8s-flow", {}).status_code == 401
    assert [request.login for request in server.requests] == [None, None]


def test_a_registry_with_passwords(server: Server, target: Target, tmp_path: Path) -> None:
    server.challenge = 'Basic realm="here"'
    lets_push(server, ME)
    log_in(tmp_path, server.host, ME)
    assert preflight.registry(target) == f"{server.host} lets push team/docker-on-k8s-flow as 'me'"
    assert [request.login for request in server.requests] == [None, ME, ME]


def test_a_login_does_not_go_to_another_host(server: Server, target: Target, tmp_path: Path) -> None:
    server.challenge = 'Basic realm="here"'
    lets_push(server, ME, location=f"http://localhost:{server.server_port}{UPLOAD}")
    log_in(tmp_path, server.host, ME)
    assert "lets push" in preflight.registry(target)
    assert [request.login for request in server.requests] == [None, ME, None]


def test_a_credential_helper(server: Server, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-here"
    helper.write_text("""#!/bin/sh\ncat >/dev/null\necho '{"Username": "me", "Secret": "pass"}'\n""")
    helper.chmod(0o755)
    (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {server.host: "here"}}))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    server.challenge = 'Basic realm="here"'
    lets_push(server, ME)
    assert preflight.registry(target).endswith("as 'me'")


@pytest.fixture
def tokens(server: Server) -> Server:
    """The registry sends us to itself for a token."""
    server.challenge = f'Bearer realm="{server.url}/token",service="here, and there",scope="repository:x:pull"'
    server.answers["GET /token"] = Answer(body={"token": "T"}, logins=(ME,))
    server.answers["POST /token"] = Answer(body={"access_token": "T"})
    lets_push(server, "Bearer T")
    return server


def test_a_registry_with_tokens(tokens: Server, target: Target, tmp_path: Path) -> None:
    log_in(tmp_path, tokens.host, ME)
    assert preflight.registry(target).endswith("as 'me'")
    assert [request.login for request in tokens.requests] == [None, ME, "Bearer T", "Bearer T"]
    scope = "repository:team/docker-on-k8s-flow:pull,push"
    assert tokens.requests[1].query == {"service": ["here, and there"], "scope": [scope]}


def test_a_registry_with_refresh_tokens(tokens: Server, target: Target, tmp_path: Path) -> None:
    log_in(tmp_path, tokens.host, identitytoken="R")
    assert preflight.registry(target).endswith("as 'the owner of a token'")
    form = parse_qs(tokens.requests[1].body)
    assert (form["grant_type"], form["refresh_token"]) == (["refresh_token"], ["R"])
    assert form["service"] == ["here, and there"]
    assert [request.login for request in tokens.requests] == [None, None, "Bearer T", "Bearer T"]


@pytest.mark.parametrize(("login", "who"), [(None, "without a login"), (STRANGER, "as 'me'")])
@pytest.mark.parametrize("challenge", ["", 'Basic realm="here"', None])
def test_a_registry_that_refuses(
    challenge: str | None, login: str | None, who: str, tokens: Server, target: Target, tmp_path: Path
) -> None:
    if challenge is not None:
        tokens.challenge = challenge
    if login:
        log_in(tmp_path, tokens.host, login)
    with pytest.raises(Wrong) as error:
        preflight.registry(target)
    seen = f"{tokens.host} does not let push team/docker-on-k8s-flow {who}: 401 authentication required"
    assert str(error.value) == f"{seen} → docker login {tokens.host}, or set FLOW_REGISTRY_URL to where you may push"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(403, {"errors": [{"message": "denied"}]}), ": 403 denied → docker login 127.0.0.1:"),
        (Answer(404, {"errors": [{"message": "name unknown"}]}), ": 404 name unknown → create that repository there"),
        (Answer(405, {"errors": []}), ": 405 Method Not Allowed → check FLOW_REGISTRY_URL"),
        (Answer(200, b"<html>"), ": 200 OK → check FLOW_REGISTRY_URL"),
        (Answer(202), "no answer of a registry from http://127.0.0.1:"),
    ],
)
def test_a_registry_that_will_not(answer: Answer, says: str, server: Server, target: Target) -> None:
    server.answers[UPLOADS] = answer
    with pytest.raises(Wrong) as error:
        preflight.registry(target)
    assert says in str(error.value)


def test_a_token_service_that_talks_nonsense(tokens: Server, target: Target) -> None:
    tokens.answers["GET /token"] = Answer(body=b"<html>")
    with pytest.raises(Wrong, match=r"no answer of a registry from .*Expecting value.* → check FLOW_REGISTRY_URL"):
        preflight.registry(target)


@pytest.mark.filterwarnings("ignore:docker-credential-not-there not installed")
@pytest.mark.parametrize(
    "config", [{"credsStore": "not-there"}, {"auths": {"127.0.0.1": "text"}}, {"auths": {"127.0.0.1": {"auth": "x"}}}]
)
def test_a_docker_configuration_that_is_none(config: dict[str, Any], target: Target, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Wrong, match=r"Docker's config.json: .* → mend it, or docker login 127.0.0.1:"):
        preflight.registry(target)


# ------------------------------------------------------------------------------------------ Prefect


def test_the_project(target: Target) -> None:
    with PrefectAPI() as api, set_temporary_config({"backend": "server", "cloud.api": api.url, "cloud.api_key": None}):
        assert preflight.prefect_api(target) == f"{api.url}, backend 'server'"
        with pytest.raises(Wrong, match="there is no 'containers' → prefect create project containers"):
            preflight.project(target)
        target.prefect_api.create_project("containers")
        assert preflight.project(target) == "'containers' exists"
        target.project = 'it\'s "mine"'
        with pytest.raises(Wrong, match="prefect create project 'it'"):
            preflight.project(target)
        assert not api.errors


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(503, b"later"), "503 Server Error: Service Unavailable"),
        (Answer(404, b"nothing"), "404 Client Error: Not Found"),
        (Answer(429, b"slowly"), "429 Client Error: Too Many Requests"),
        (Answer(200, b"<html>"), "Malformed response received from API."),
        (Answer(200, {"errors": [{"message": "UNAUTHENTICATED"}]}), "UNAUTHENTICATED"),
    ],
)
def test_what_is_no_prefect_api(answer: Answer, says: str, server: Server, target: Target) -> None:
    server.answers["POST /"] = answer
    quick = {"cloud.rate_limiting.max_retries": 0}  # as the command sets it
    config = {"backend": "server", "cloud.api": server.url, "cloud.api_key": None, **quick}
    started = time.monotonic()
    with set_temporary_config(config), pytest.raises(Wrong) as error:
        preflight.prefect_api(target)
    assert time.monotonic() - started < 20, "the client would try for a minute"
    assert str(error.value).startswith(f"no good answer from {server.url}: ")
    assert says in str(error.value)


def test_no_prefect_api(nowhere: int, target: Target) -> None:
    url = f"http://127.0.0.1:{nowhere}"
    says = r"no good answer from .*Connection refused → start it, or prefect backend server and"
    config = {"backend": "server", "cloud.api": url, "cloud.api_key": None}
    started = time.monotonic()
    with set_temporary_config(config), pytest.raises(Wrong, match=says):
        preflight.prefect_api(target)
    assert time.monotonic() - started < 20, "the client would try for a minute"
