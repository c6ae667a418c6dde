"""Is everything there that registering and running the flow need? `make preflight` looks, and changes nothing.

It reads the environment as registering does, and also NAMESPACE (where the Agent makes its Jobs, ``default``),
SERVICE_ACCOUNT (the Agent's, ``default``), PROJECT (the Prefect project; not set, none is looked for) and KUBECONFIG
(its current context is the cluster). `CHECKS`, below, lists what is looked at.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

import kubernetes.client
import kubernetes.config
import prefect
import requests
import urllib3.exceptions
from docker import auth
from docker.errors import DockerException
from kubernetes.client import ApiException
from prefect.exceptions import ClientError
from prefect.utilities.configuration import set_temporary_config
from prefect.utilities.graphql import with_args
from rich.console import Console
from rich.text import Text

from flows.settings import Settings, SettingsError

SECONDS = 10  # how long anybody has to answer
NAME = "docker-sidecar"  # of the ConfigMap and the Secret that job_templates/ look for
DAEMON = "tcp://127.0.0.1:2375"
LOCAL = re.compile(r"(localhost|127\.[0-9.]+)(:|$)")
POD_SECURITY = "pod-security.kubernetes.io/enforce"
# what the Agent of Prefect 1.4.1 asks of the cluster, see its agent.py; its rbac.yaml gives more
RIGHTS = (("create", "jobs"), ("list", "jobs"), ("delete", "jobs"), ("list", "pods"), ("list", "events"))


class Wrong(Exception):
    """Something that keeps the flow from running: what was seen, what to do about it, and the HTTP status, if any."""

    def __init__(self, seen: str, remedy: str = "", status: int = 0) -> None:
        super().__init__(f"{seen} → {remedy}" if remedy else seen)
        self.seen, self.status = seen, status


@dataclass
class Target:
    """What is to be registered and where; what is not given is left by the check that finds it."""

    namespace: str
    service_account: str
    project: str
    settings: Settings = field(init=False)
    template: dict[str, Any] = field(init=False)
    cluster: kubernetes.client.ApiClient = field(init=False)
    version: str = field(init=False)  # the cluster's, as in 'v1.29.0'
    prefect_api: prefect.Client = field(init=False)

    @property
    def repository(self) -> str:
        """The flow's image, without its tag."""
        return f"{self.settings.registry_url.rstrip('/')}/{self.settings.image_name}"

    @property
    def core(self) -> kubernetes.client.CoreV1Api:
        """The part of the cluster's API that has pods, ConfigMaps and Secrets."""
        return kubernetes.client.CoreV1Api(self.cluster)


def settings(target: Target) -> str:
    """Every setting can be used."""
    try:
        target.settings = Settings.from_environ()
    except SettingsError as error:
        raise Wrong(str(error)) from None
    return f"{target.repository}:{target.settings.image_tag}, built from {target.settings.base_image}"


def template(target: Target) -> str:
    """The template has a Docker daemon, which nobody but its own pod can reach."""
    target.template = target.settings.job_template["spec"]["template"]
    pod = target.template["spec"]
    beside = [*pod["containers"][1:], *restartable(pod)]
    daemons = [c for c in beside if isinstance(c, dict) and (c.get("securityContext") or {}).get("privileged")]
    words = " ".join(str(word) for c in daemons for key in ("command", "args") for word in c.get(key) or [])
    hosts = re.findall(r"""(?:--host|-H)[=\s]+["']?([^\s"']+)""", words)
    exposed = [host for host in hosts if not re.match(r"(tcp://)?(127\.|localhost[:/]|\[::1\])|unix:|fd:", host)]
    if not daemons:
        seen = "no privileged container beside the flow's, to run the Docker daemon"
    elif DAEMON not in hosts:
        seen = f"nothing tells the daemon --host={DAEMON}; by default it serves the whole cluster"
    elif exposed or pod.get("hostNetwork"):
        seen = f"the daemon serves {', '.join(exposed) or 'the whole node (hostNetwork)'}: root for whoever comes"
    else:
        return f"the daemon, {daemons[0].get('name')!r}, listens on {DAEMON} and nowhere else"
    raise Wrong(seen, "follow job_templates/docker_sidecar.yaml")


def restartable(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """The init containers that run beside the others: a pod's sidecars, as Kubernetes 1.29 and newer know them."""
    return [c for c in pod.get("initContainers") or [] if isinstance(c, dict) and c.get("restartPolicy") == "Always"]


def cluster(target: Target) -> str:
    """The cluster of the current context answers."""
    configuration = kubernetes.client.Configuration()
    try:
        kubernetes.config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call, unused-ignore]
        _, context = kubernetes.config.list_kube_config_contexts()  # type: ignore[no-untyped-call, unused-ignore]
    except Exception as error:  # the ways in which a kubeconfig can be wrong have no class in common
        raise Wrong(cause(error), "point KUBECONFIG at your cluster's, and choose a context with kubectl") from None
    configuration.retries = False
    if LOCAL.match(urlsplit(configuration.host).netloc):
        configuration.proxy = None  # as kubectl does
    target.cluster = kubernetes.client.ApiClient(configuration)
    target.version = ask(kubernetes.client.VersionApi(target.cluster).get_code).git_version
    return f"Kubernetes {target.version} at {configuration.host}, context {context['name']!r}"


def ask(method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The answer of the Kubernetes API; None if it has no such thing. Its refusals, and silence, are wrong."""
    try:
        return method(*arguments, **options, _request_timeout=SECONDS)
    except ApiException as error:
        if error.status == 404:
            return None
        seen = f"{error.status} {error.reason}"
        with suppress(ValueError, KeyError, TypeError):
            seen = json.loads(error.body or "")["message"]
        remedies = {401: "log in to the cluster again"}
        remedies[403] = "get the role admin in that namespace, or have someone run this who has it"
        remedy = remedies.get(error.status or 0, "see whether this is the right cluster, and whether it is well")
        raise Wrong(seen, remedy, error.status or 0) from None
    except (urllib3.exceptions.HTTPError, ValueError) as error:  # ValueError: not as Kubernetes would answer
        raise Wrong(f"no answer of a cluster: {cause(error)}", "start it, or choose another context") from None


def cause(error: BaseException) -> str:
    """What is at the root of an error, without what HTTP libraries wrap around it."""
    inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if inner and not isinstance(error, ClientError):
        return cause(inner)
    return str(error) or type(error).__name__


def namespace(target: Target) -> str:
    """The namespace exists."""
    if not (found := ask(target.core.read_namespace, target.namespace)):
        label = f"kubectl label namespace {target.namespace} {POD_SECURITY}=privileged"
        raise Wrong(f"there is no {target.namespace!r}", f"kubectl create namespace {target.namespace} && {label}")
    return f"{target.namespace!r}, Pod Security: {(found.metadata.labels or {}).get(POD_SECURITY, 'not set')}"


def admission(target: Target) -> str:
    """The cluster knows what the pod asks for, and the namespace admits it: Pod Security, quotas, limits and more."""
    spec = target.template["spec"]
    if restartable(spec) and [int(number) for number in re.findall(r"\d+", target.version)[:2]] < [1, 29]:
        seen = f"the template has a restartable init container, which Kubernetes {target.version} does not know"
        raise Wrong(seen, "JOB_TEMPLATE=docker_sidecar is for any Kubernetes; or upgrade to 1.29 or newer")
    flow, *others = spec["containers"]
    flow = {"name": "flow", **flow, "image": f"{target.repository}:{target.settings.image_tag}"}
    pod = {
        "metadata": {**(target.template.get("metadata") or {}), "generateName": "preflight-"},
        "spec": {"restartPolicy": "Never", **spec, "containers": [flow, *others]},
    }
    try:
        ask(target.core.create_namespaced_pod, target.namespace, pod, dry_run="All")
    except Wrong as refusal:
        if refusal.status not in (400, 403, 422) or "cannot create resource" in refusal.seen:
            raise  # it is not the pod that is refused
        remedy = f"change what namespace {target.namespace!r} admits, or choose another with NAMESPACE"
        if "violates PodSecurity" in refusal.seen:
            remedy = f"kubectl label --overwrite namespace {target.namespace} {POD_SECURITY}=privileged, "
            remedy += "but not if others use it: give the flow a namespace of its own"
        elif refusal.status != 403:
            remedy = "mend the template (JOB_TEMPLATE)"
        raise Wrong(refusal.seen, remedy) from None
    return f"{target.namespace!r} admits it (a dry run, it was not made)"


def rights(target: Target) -> str:
    """The Agent may do what it does."""
    namespace, account = target.namespace, target.service_account
    user = f"system:serviceaccount:{namespace}:{account}"
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
    review = kubernetes.client.AuthorizationV1Api(target.cluster).create_namespaced_local_subject_access_review
    missing = []
    for verb, resource in RIGHTS:
        what = {"namespace": namespace, "verb": verb, "resource": resource}
        what["group"] = "batch" if resource == "jobs" else ""
        spec = {"user": user, "groups": groups, "resourceAttributes": what}
        if not ask(review, namespace, {"metadata": {"namespace": namespace}, "spec": spec}).status.allowed:
            missing.append(f"{verb} {resource}")
    if missing:
        here = f"--namespace {namespace}"  # the Agent's Deployment names none itself
        remedy = f"prefect agent kubernetes install --rbac {here} | kubectl apply {here} -f -"
        if account != "default":  # which is the only one that Prefect binds
            remedy += f" && kubectl create rolebinding prefect-agent-{account} --role=prefect-agent-rbac"
            remedy += f" --serviceaccount={namespace}:{account} {here}"
        raise Wrong(f"{user} may not {', '.join(missing)}", remedy)
    return f"{user} may {', '.join(map(' '.join, RIGHTS))}"


def config_map(target: Target) -> str:
    """The daemon will take its configuration, if there is one."""
    if not (found := ask(target.core.read_namespaced_config_map, NAME, target.namespace)):
        return f"none named {NAME}; it would configure the daemon: mirrors, MTU, log limits"
    try:
        text = (found.data or {})["daemon.json"]
        configuration = dict(json.loads(text))
        if ours := {"hosts", "data-root"} & configuration.keys():
            raise ValueError(f"{' and '.join(sorted(ours))}: that is for the template to say, and not twice")
    except KeyError:
        seen = f"{NAME} has no daemon.json"
    except (TypeError, ValueError) as error:
        seen = f"the daemon.json of {NAME} is no JSON object that dockerd takes: {error}"
    else:
        return f"{NAME} sets {', '.join(sorted(configuration)) or 'nothing'}"
    raise Wrong(seen, f"kubectl edit configmap {NAME} --namespace {target.namespace}")


def secret(target: Target) -> str:
    """The daemon has logins for private registries, if it needs them."""
    if not (found := ask(target.core.read_namespaced_secret, NAME, target.namespace)):
        return f"none named {NAME}; it would hold the daemon's logins for private registries"
    kubectl = f"{NAME} --namespace {target.namespace}"
    remedy = f"kubectl delete secret {kubectl} && kubectl create secret docker-registry {kubectl} --docker-server=…"
    if found.type != "kubernetes.io/dockerconfigjson":
        raise Wrong(f"{NAME} is of type {found.type}, not kubernetes.io/dockerconfigjson", remedy)
    logins = json.loads(base64.b64decode(found.data[".dockerconfigjson"]))  # Kubernetes sees to it that it is JSON
    if not isinstance(logins, dict) or not isinstance(logins.get("auths"), dict):
        raise Wrong(f"the .dockerconfigjson of {NAME} has no auths", remedy)
    return f"{NAME} has logins for {', '.join(sorted(logins['auths'])) or 'no registry'}"


def registry(target: Target) -> str:
    """This user may push the flow's image: an upload is begun, and cancelled."""
    host, _, name = target.repository.partition("/")
    host = auth.resolve_index_name(host)
    local = LOCAL.match(host)  # Docker needs no certificate there, and no proxy
    server = "registry-1.docker.io" if host == auth.INDEX_NAME else host
    url = f"{'http' if local else 'https'}://{server}/v2/{name}/blobs/uploads/"
    try:
        found = auth.resolve_authconfig(auth.load_config(), host) or {}
    except (DockerException, ValueError) as error:
        raise Wrong(f"Docker's config.json: {cause(error)}", f"mend it, or docker login {host}") from None
    login = {key.lower(): value for key, value in found.items()}  # those of credential helpers have capitals
    who = f"as {login.get('username', 'the owner of a token')!r}" if any(login.values()) else "without a login"
    try:
        with requests.Session() as session:
            session.trust_env = not local
            answer = begin_upload(session, url, name, login)
            if answer.status_code == 202:
                location = urljoin(answer.url, answer.headers["Location"])
                if urlsplit(location).netloc != urlsplit(url).netloc:
                    session.headers.pop("Authorization", None)
                session.delete(location, timeout=SECONDS)
                return f"{host} lets push {name} {who}"
    except (requests.RequestException, KeyError) as error:
        remedy = "check FLOW_REGISTRY_URL; if its certificate is known to Docker only, set REQUESTS_CA_BUNDLE"
        raise Wrong(f"no answer of a registry from {url}: {cause(error)}", remedy) from None
    words = answer.reason
    with suppress(ValueError, KeyError, TypeError, IndexError):
        words = answer.json()["errors"][0]["message"]
    remedies = dict.fromkeys((401, 403), f"docker login {host}, or set FLOW_REGISTRY_URL to where you may push")
    remedies[404] = "create that repository there, or set FLOW_REGISTRY_URL to another"
    seen = f"{host} does not let push {name} {who}: {answer.status_code} {words}"
    raise Wrong(seen, remedies.get(answer.status_code, "check FLOW_REGISTRY_URL"))


def begin_upload(session: requests.Session, url: str, name: str, login: dict[str, Any]) -> requests.Response:
    """Ask a registry for an upload, with the login that it asks for.

    Returns:
        Its answer, or that of the service that it sends us to for a token, if that refuses.

    Source: https://distribution.github.io/distribution/spec/auth/token/
    """
    session.auth = lambda request: request  # without it, requests logs in with what ~/.netrc has; Docker does not
    answer = session.post(url, timeout=SECONDS)
    scheme, _, challenge = answer.headers.get("WWW-Authenticate", "").partition(" ")
    if answer.status_code != 401 or not scheme:
        return answer
    if login.get("username"):
        pair = f"{login['username']}:{login['password']}".encode()
        session.headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    if scheme.lower() == "bearer":
        asked = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        query = {"service": asked.get("service", ""), "scope": f"repository:{name}:pull,push"}
        if refresh := login.get("identitytoken"):
            form = {"grant_type": "refresh_token", "refresh_token": refresh, "client_id": "preflight", **query}
            answer = session.post(asked["realm"], form, timeout=SECONDS)
        else:
            answer = session.get(asked["realm"], params=query, timeout=SECONDS)
        if not answer.ok:
            return answer
        token = answer.json().get("token") or answer.json()["access_token"]
        session.headers["Authorization"] = f"Bearer {token}"
    return session.post(url, timeout=SECONDS)


def prefect_api(target: Target) -> str:
    """The Prefect API answers, and lets this user in."""
    url, backend = prefect.config.cloud.api, prefect.config.backend
    choose = "prefect backend server and PREFECT__CLOUD__API=http://HOST:4200, or prefect auth login --key KEY"
    try:
        target.prefect_api = client = prefect.Client()
        if backend == "cloud" and not client.api_key:
            raise Wrong(f"none is configured: there is no key for {url}", choose)
        # first without the client, which would try for a minute
        answer = requests.post(url, json={"query": "query { hello }"}, timeout=SECONDS)
        if answer.status_code >= 500:
            answer.raise_for_status()
        client.graphql("query { hello }", retry_on_api_error=False)
    except (ClientError, ValueError, requests.RequestException) as error:
        raise Wrong(f"no good answer from {url}: {cause(error)}", f"start it, or {choose}") from None
    return f"{url}, backend {backend!r}"


def project(target: Target) -> str:
    """The project to register in exists."""
    if not target.project:
        return "PROJECT is not set, none was looked for"
    # as `prefect register` asks
    query = {"query": {with_args("project", {"where": {"name": {"_eq": target.project}}}): {"id"}}}
    try:
        found = target.prefect_api.graphql(query, retry_on_api_error=False).data.project
    except (ClientError, requests.RequestException) as error:
        raise Wrong(cause(error), "ask whoever runs the Prefect API") from None
    if not found:
        raise Wrong(f"there is no {target.project!r}", f"prefect create project {shlex.quote(target.project)}")
    return f"{target.project!r} exists"


CHECKS: list[tuple[str, Callable[[Target], str], list[str]]] = [
    # what is looked at, how, and what has to be fine for that
    ("settings", settings, []),
    ("job template", template, ["settings"]),
    ("cluster", cluster, []),
    ("namespace", namespace, ["cluster"]),
    ("admission", admission, ["job template", "namespace"]),
    ("Agent's rights", rights, ["namespace"]),
    ("ConfigMap", config_map, ["namespace"]),
    ("Secret", secret, ["namespace"]),
    ("registry", registry, ["settings"]),
    ("Prefect API", prefect_api, []),
    ("Prefect project", project, ["Prefect API"]),
]


def main() -> None:
    """Look at everything, say a line on each, and exit with 0 if and only if nothing is wrong."""
    place, account = (os.environ.get(variable) or "default" for variable in ("NAMESPACE", "SERVICE_ACCOUNT"))
    target = Target(place, account, os.environ.get("PROJECT", ""))
    console = Console(soft_wrap=True)
    outcomes: dict[str, str] = {}
    for name, check, needs in CHECKS:
        if causes := [need for need in needs if outcomes[need] != "fine"]:
            outcome, style, words = "not checked", "yellow", f"because of the {' and the '.join(causes)}"
        else:
            try:
                outcome, style, words = "fine", "green", check(target)
            except Wrong as error:
                outcome, style, words = "wrong", "bold red", str(error)
        outcomes[name] = outcome
        console.print(Text.assemble((f"{outcome:13}", style), f"{name:17}{' '.join(words.split())}"))
    if wrong := list(outcomes.values()).count("wrong"):
        sys.exit(f"preflight: {wrong} wrong")


if __name__ == "__main__":
    # if the API says that it is asked too often, the client would wait for three minutes and more
    with set_temporary_config({"cloud.request_timeout": SECONDS, "cloud.rate_limiting.max_retries": 0}):
        main()
