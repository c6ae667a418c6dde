"""Check the setup for registering the flow and running it on Kubernetes; changes nothing. `make preflight` runs it.

Environment variables: those of `flows.settings`, NAMESPACE and SERVICE_ACCOUNT of the Agent (both ``default``), PROJECT
of Prefect (optional), and KUBECONFIG, whose current context is the cluster.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlsplit

import prefect
import requests
from kubernetes import client, config
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import DynamicApiError
from prefect.agent.kubernetes import KubernetesAgent
from prefect.run_configs import KubernetesRun
from prefect.storage import Docker
from prefect.utilities.configuration import set_temporary_config
from prefect.utilities.graphql import GraphQLResult, with_args
from rich.console import Console
from rich.text import Text

from flows.settings import Settings

SECONDS = 10  # the time limit of a request
NAME = "docker-sidecar"  # of the ConfigMap and the Secret that job_templates/ mount
# What the Agent of Prefect 1.4.1 does in the cluster, see its agent.py; its rbac.yaml grants more.
RIGHTS = (("create", "jobs"), ("list", "jobs"), ("delete", "jobs"), ("list", "pods"), ("list", "events"))


class CheckFailed(Exception):
    """What keeps the flow from running and, unless the check itself suggests it, what to do about it."""


class Preflight:
    """The checks: each returns what is fine or raises an exception, and may use what an earlier one has left."""

    def __init__(self, namespace: str, account: str, project: str) -> None:
        self.namespace, self.project, here = namespace, project, f"--namespace {namespace}"
        self.path, self.user = f"namespaces/{quote(namespace, safe='')}", f"system:serviceaccount:{namespace}:{account}"
        self.label = f"kubectl label --overwrite namespace {namespace} pod-security.kubernetes.io/enforce=privileged"
        install = f"prefect agent kubernetes install --rbac {here} | kubectl apply {here} -f -"
        if account != "default":  # the only one that Prefect's manifest binds
            install += f" && kubectl create rolebinding prefect-agent-{account} --role=prefect-agent-rbac"
            install += f" --serviceaccount={namespace}:{account} {here}"
        secret = f"kubectl delete secret {NAME} {here} && kubectl create secret docker-registry {NAME} {here} …"
        server = "prefect backend server and PREFECT__CLOUD__API=http://HOST:4200, or prefect auth login --key KEY"
        self.checks: list[tuple[str, Callable[[], str], str, str]] = [  # name, method, what it needs, remedy
            ("settings", self._settings, "", ""),
            ("cluster", self._cluster, "", "start it, or choose another one: KUBECONFIG, kubectl config use-context"),
            ("namespace", self._namespace, "cluster", f"kubectl create namespace {namespace} && {self.label}"),
            ("Job", self._job, "settings, namespace", "correct the template (JOB_TEMPLATE)"),
            ("Agent's rights", self._rights, "namespace", install),
            ("ConfigMap", self._config_map, "settings, namespace", f"kubectl edit configmap {NAME} {here}"),
            ("Secret", self._secret, "namespace", secret),
            ("Prefect API", self._prefect_api, "", f"start it, or choose another one: {server}"),
            ("Prefect project", self._project, "Prefect API", f"prefect create project {shlex.quote(project)}"),
        ]

    def ask(self, path: str, body: Any = None, **query: str) -> Any:
        """The Kubernetes API's answer; None if there is no such object; CheckFailed if it refuses."""
        options = {"query_params": list(query.items()), "serialize": False, "_request_timeout": SECONDS}
        try:
            return json.loads(self.cluster.request("post" if body else "get", path, body=body, **options).data)
        except DynamicApiError as error:
            if error.status == 404 and not body:
                return None
            seen = str(error.summary())  # type: ignore[no-untyped-call]
            if error.status in (400, 422):  # the object is wrong: the check knows what to do
                raise CheckFailed(seen) from None
            remedy = "check that this is the right cluster, and that it is healthy"
            if error.status == 401 or " cannot " in seen:
                remedy = f"log in to the cluster as a user with the role admin in namespace {self.namespace!r}"
            elif "violates PodSecurity" in seen:
                remedy = f"{self.label}; if others use that namespace, give the flow one of its own"
            elif error.status == 403:  # a quota, a limit, or another rule of the cluster
                remedy = f"change what namespace {self.namespace!r} admits, or choose another with NAMESPACE"
            raise CheckFailed(seen, remedy) from None

    def _settings(self) -> str:
        self.settings = Settings.from_environ()
        return f"{self.settings.image}, built from {self.settings.base_image}"

    def _cluster(self) -> str:
        configuration = client.Configuration()
        config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        configuration.retries = False
        if re.match(r"(localhost|127\.[0-9.]+|\[::1\])(:|$)", urlsplit(configuration.host).netloc):
            configuration.proxy = None  # as kubectl does
        # no discoverer: it would write a file
        api_client = client.ApiClient(configuration)
        self.cluster = DynamicClient(api_client, discoverer=lambda *_: None)  # type: ignore[no-untyped-call]
        return f"Kubernetes {self.ask('/version')['gitVersion']} at {configuration.host}"

    def _namespace(self) -> str:
        if self.ask(f"/api/v1/{self.path}") is None:
            raise CheckFailed(f"there is no {self.namespace!r}")
        return f"{self.namespace!r} exists"

    def _job(self) -> str:
        # what the Agent's own code needs of an Agent and of a run to render a Job
        image = {key: getattr(self.settings, key) for key in ("registry_url", "image_name", "image_tag")}
        flow = {"id": "preflight", "core_version": prefect.__version__, "storage": Docker(**image).serialize()}
        agent: Any = SimpleNamespace(env_vars={}, labels=[], log_to_cloud=True, flow_run_api_key=None)
        agent.service_account_name = agent.image_pull_secrets = None
        agent._get_run_config = lambda *_: KubernetesRun(job_template=self.settings.job_template)
        job = KubernetesAgent.generate_job_spec(agent, GraphQLResult(id="preflight", flow=GraphQLResult(flow)))
        template = job["spec"]["template"]
        metadata = {key: template["metadata"].get(key) for key in ("labels", "annotations")}
        pod = {"metadata": {"generateName": "preflight-", **metadata}, "spec": template["spec"]}
        # the pod, too: Pod Security, quotas and limits do not look at Jobs
        for path, body in ((f"/apis/batch/v1/{self.path}/jobs", job), (f"/api/v1/{self.path}/pods", pod)):
            self.ask(path, body, dryRun="All", fieldValidation="Strict")
        return f"{self.namespace!r} admits the Job and its pod (a dry run; neither was created)"

    def _rights(self) -> str:
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{self.namespace}", "system:authenticated"]
        missing = []
        for verb, resource in RIGHTS:
            what = {"verb": verb, "group": "batch" if resource == "jobs" else "", "resource": resource}
            spec = {"user": self.user, "groups": groups, "resourceAttributes": {"namespace": self.namespace, **what}}
            body = {"metadata": {"namespace": self.namespace}, "spec": spec}
            answer = self.ask(f"/apis/authorization.k8s.io/v1/{self.path}/localsubjectaccessreviews", body)
            if not answer["status"]["allowed"]:
                missing.append(f"{verb} {resource}")
        if missing:
            raise CheckFailed(f"{self.user} may not {', '.join(missing)}")
        return f"{self.user} may {', '.join(map(' '.join, RIGHTS))}"

    def _config_map(self) -> str:
        if (found := self.ask(f"/api/v1/{self.path}/configmaps/{NAME}")) is None:
            return f"none named {NAME}; it would configure the daemon: mirrors, MTU, log limits, certificates"
        data = found.get("data") or {}
        if not any(key == "daemon.json" or "-----BEGIN " in value for key, value in data.items()):
            raise CheckFailed(f"{NAME} has neither a daemon.json nor a certificate")
        try:  # as dockerd reads it: an empty file is fine, and so is a byte order mark
            options = json.loads(data.pop("daemon.json", "").strip("\ufeff \r\n") or "{}")
        except ValueError as error:
            raise CheckFailed(f"the daemon.json of {NAME} is not JSON: {error}") from None
        if not isinstance(options, dict):
            raise CheckFailed(f"the daemon.json of {NAME} is not a JSON object")
        template, flags = json.dumps(self.settings.job_template), {"hosts": "--host", "data-root": "--data-root"}
        if twice := [key for key, flag in flags.items() if key in options and flag in template]:
            raise CheckFailed(f"the daemon.json of {NAME} sets {' and '.join(twice)}, which the template does already")
        return f"{NAME} sets {', '.join(sorted({*options, *data})) or 'nothing'}"

    def _secret(self) -> str:
        if (found := self.ask(f"/api/v1/{self.path}/secrets/{NAME}")) is None:
            return f"none named {NAME}; it would hold the logins for private registries"
        if found["type"] != "kubernetes.io/dockerconfigjson":
            raise CheckFailed(f"{NAME} is of type {found['type']}, not kubernetes.io/dockerconfigjson")
        logins = json.loads(base64.b64decode(found["data"][".dockerconfigjson"]))  # Kubernetes admits only JSON
        if not isinstance(logins, dict) or not isinstance(logins.get("auths"), dict):
            raise CheckFailed(f"the .dockerconfigjson of {NAME} has no auths")
        return f"{NAME} has logins for {', '.join(sorted(logins['auths'])) or 'no registry'}"

    def _prefect_api(self) -> str:
        url, self.client = prefect.config.cloud.api, prefect.Client()
        if prefect.config.backend == "cloud" and not self.client.api_key:
            raise CheckFailed(f"there is no key for {url}")
        # first without the client, which would try for a minute
        answer = requests.post(url, json={"query": "query { hello }"}, timeout=SECONDS)
        if answer.status_code >= 500:
            answer.raise_for_status()
        found: Any = self.client.graphql("query { hello }", retry_on_api_error=False)
        if "hello" not in (found.get("data") or {}):
            raise CheckFailed(f"{url} is not a Prefect API")
        return f"{url}, backend {prefect.config.backend!r}"

    def _project(self) -> str:
        if not self.project:
            return "PROJECT is not set, so none was looked for"
        query = {"query": {with_args("project", {"where": {"name": {"_eq": self.project}}}): {"id"}}}
        if not self.client.graphql(query, retry_on_api_error=False).data.project:
            raise CheckFailed(f"there is no {self.project!r}")
        return f"{self.project!r} exists"


def main() -> None:
    """Run every check, print a line on each, and exit with 0 if and only if nothing is wrong."""
    console, styles = Console(soft_wrap=True), {"fine": "green", "wrong": "bold red", "not checked": "yellow"}
    namespace, account = (os.environ.get(name) or "default" for name in ("NAMESPACE", "SERVICE_ACCOUNT"))
    outcomes: dict[str, str] = {}
    for name, check, needs, remedy in Preflight(namespace, account, os.environ.get("PROJECT", "")).checks:
        causes = [need for need in needs.split(", ") if outcomes.get(need, "fine") != "fine"]
        try:
            outcome, text = (
                ("not checked", f"because of the {' and the '.join(causes)}") if causes else ("fine", check())
            )
        except CheckFailed as error:
            outcome, text = "wrong", " → ".join([*error.args, remedy][:2])
        except Exception as error:  # whatever a template, a kubeconfig or an answer holds: a line, not a traceback
            outcome, text = "wrong", " → ".join(filter(None, [cause(error), remedy]))
        outcomes[name] = outcome
        console.print(Text.assemble((f"{outcome:13}", styles[outcome]), f"{name:17}{' '.join(text.split())}"))
    if wrong := list(outcomes.values()).count("wrong"):
        sys.exit(f"preflight: {wrong} wrong")


def cause(error: BaseException) -> str:
    """The root of an error, without what HTTP libraries wrap around it."""
    inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return cause(inner) if inner else str(error) or type(error).__name__


if __name__ == "__main__":
    # if the API says that it is asked too often, the client would wait for three minutes and more
    with set_temporary_config({"cloud.request_timeout": SECONDS, "cloud.rate_limiting.max_retries": 0}):
        main()
