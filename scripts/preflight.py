"""Check the setup for registering the flow and running it on Kubernetes; changes nothing. `make preflight` runs it.

Environment: that of `flows.settings`, the Agent's NAMESPACE and SERVICE_ACCOUNT, Prefect's PROJECT, and KUBECONFIG.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import prefect
import requests
from kubernetes import client, config
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import DynamicApiError
from prefect.agent.kubernetes import KubernetesAgent
from prefect.run_configs import KubernetesRun
from prefect.storage import Docker
from prefect.utilities.graphql import GraphQLResult

from flows.settings import Settings

SECONDS = 10  # the time limit of a request
NAME = "docker-sidecar"  # of the ConfigMap and the Secret that job_templates/ mount
# What the Agent of Prefect 1.4.1 does in the cluster, see its agent.py; its rbac.yaml grants more.
RIGHTS = ("create jobs", "list jobs", "delete jobs", "list pods", "list events")


class CheckFailed(Exception):
    """What keeps the flow from running. It may end in " → REMEDY", which replaces the check's own remedy."""


class Preflight:
    """The checks: each returns what is fine or raises an exception, and may use what an earlier check has set."""

    def __init__(self, namespace: str, account: str, project: str) -> None:
        self.namespace, self.project, here = namespace, project, f"--namespace {namespace}"
        self.path, self.user = f"namespaces/{quote(namespace, safe='')}", f"system:serviceaccount:{namespace}:{account}"
        self.label = f"kubectl label --overwrite namespace {namespace} pod-security.kubernetes.io/enforce=privileged"
        role = f"kubectl create role agent {here} --verb=create,list,delete --resource=jobs,pods,events"
        bind = f"kubectl create rolebinding agent {here} --role=agent --serviceaccount={namespace}:{account}"
        login = f"kubectl delete secret {NAME} {here} && kubectl create secret docker-registry {NAME} {here} …"
        self.checks = [  # name, method, what it needs, remedy
            ("settings", self._settings, "", ""),
            ("cluster", self._cluster, "", "start it, or choose another one: KUBECONFIG, kubectl config use-context"),
            ("namespace", self._namespace, "cluster", f"kubectl create namespace {namespace} && {self.label}"),
            ("Job", self._job, "settings, namespace", "correct the template (JOB_TEMPLATE)"),
            ("Agent's rights", self._rights, "namespace", f"{role} && {bind}"),
            ("ConfigMap", self._config_map, "namespace", f"kubectl edit configmap {NAME} {here}"),
            ("Secret", self._secret, "namespace", login),
            ("Prefect", self._prefect, "", "start it, or set PREFECT__CLOUD__API; prefect backend, prefect auth login"),
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
            if error.status == 403 and (not body or path.endswith("accessreviews")):
                raise PermissionError(seen) from None  # the user of the kubeconfig may not look
            remedy = self.label if "violates PodSecurity" in seen else "use another NAMESPACE, or have that allowed"
            raise CheckFailed(seen if error.status in (400, 422) else f"{seen} → {remedy}") from None

    def _settings(self) -> str:
        self.settings = Settings.from_environ()
        return f"{self.settings.image}, built from {self.settings.base_image}"

    def _cluster(self) -> str:
        target = client.Configuration(retries=False)
        config.load_kube_config(client_configuration=target)  # type: ignore[no-untyped-call]
        target.no_proxy = f"localhost,127.0.0.1,::1,{target.no_proxy or ''}"  # as kubectl does
        # no discoverer: it would write a file
        self.cluster = DynamicClient(client.ApiClient(target), discoverer=lambda *_: None)  # type: ignore[no-untyped-call]
        if "gitVersion" not in (answer := self.ask("/version") or {}):
            raise CheckFailed(f"{target.host} does not answer as Kubernetes does")
        return f"Kubernetes {answer['gitVersion']} at {target.host}"

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
        dry_run = {"dryRun": "All", "fieldValidation": "Strict"}
        self.ask(f"/apis/batch/v1/{self.path}/jobs", job, **dry_run)
        # the pod, too: Pod Security, quotas and limits do not look at Jobs
        pod = job["spec"]["template"]
        kept = {key: value for key, value in pod["metadata"].items() if key in ("labels", "annotations", "finalizers")}
        self.ask(f"/api/v1/{self.path}/pods", {**pod, "metadata": {**kept, "generateName": "preflight-"}}, **dry_run)
        return f"{self.namespace!r} admits the Job and its pod (a dry run; neither was created)"

    def _rights(self) -> str:
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{self.namespace}", "system:authenticated"]
        missing, reviews = [], f"/apis/authorization.k8s.io/v1/{self.path}/localsubjectaccessreviews"
        for right in RIGHTS:
            verb, resource = right.split()
            what = {"verb": verb, "group": "batch" if resource == "jobs" else "", "resource": resource}
            spec = {"user": self.user, "groups": groups, "resourceAttributes": {"namespace": self.namespace, **what}}
            if not self.ask(reviews, {"metadata": {"namespace": self.namespace}, "spec": spec})["status"]["allowed"]:
                missing.append(right)
        if missing:
            raise CheckFailed(f"{self.user} may not {', '.join(missing)}")
        return f"{self.user} may {', '.join(RIGHTS)}"

    def _config_map(self) -> str:
        if (found := self.ask(f"/api/v1/{self.path}/configmaps/{NAME}")) is None:
            return f"none named {NAME}; it would configure the daemon: mirrors, MTU, log limits, certificates"
        data = found.get("data") or {}
        try:
            options = {**json.loads(data.pop("daemon.json", "").strip() or "{}"), **data}
        except (TypeError, ValueError) as error:
            raise CheckFailed(f"the daemon.json of {NAME} is not a JSON object: {error}") from None
        return f"{NAME} sets {', '.join(sorted(options)) or 'nothing'}"

    def _secret(self) -> str:
        if (found := self.ask(f"/api/v1/{self.path}/secrets/{NAME}")) is None:
            return f"none named {NAME}; it would hold the logins for private registries"
        if found["type"] != "kubernetes.io/dockerconfigjson":
            raise CheckFailed(f"{NAME} is of type {found['type']}, not kubernetes.io/dockerconfigjson")
        logins = json.loads(base64.b64decode(found["data"][".dockerconfigjson"]))  # Kubernetes admits only JSON
        return f"{NAME} has logins for {', '.join(sorted(logins.get('auths') or [])) or 'no registry'}"

    def _prefect(self) -> str:
        url, key = prefect.config.cloud.api, prefect.Client().api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        query = "query($name: String) {project(where: {name: {_eq: $name}}) {id}}"
        body = {"query": query, "variables": {"name": self.project}}
        answer = requests.post(url, json=body, headers=headers, timeout=SECONDS)  # Prefect's client tries for a minute
        answer.raise_for_status()
        if (found := (answer.json().get("data") or {}).get("project")) is None:
            raise CheckFailed(f"{url} does not answer as the Prefect API does")
        if self.project and not found:
            raise CheckFailed(f"no project {self.project!r} → prefect create project {json.dumps(self.project)}")
        return f"{url}, backend {prefect.config.backend!r}, project {self.project or '(PROJECT) not set'}"


def main() -> None:
    """Run every check, print a line on each, and exit with 0 if and only if nothing is wrong."""
    namespace, account = (os.environ.get(name) or "default" for name in ("NAMESPACE", "SERVICE_ACCOUNT"))
    outcomes: dict[str, str] = {}
    for name, check, needs, remedy in Preflight(namespace, account, os.environ.get("PROJECT", "")).checks:
        blocked = " and the ".join(need for need in needs.split(", ") if outcomes.get(need) in ("wrong", "not checked"))
        try:
            outcome, text = ("not checked", f"because of the {blocked}") if blocked else ("fine", check())
        except PermissionError as error:
            outcome, text = "forbidden", str(error)
        except Exception as error:  # whatever a template, a kubeconfig or an answer holds: a line, not a traceback
            root: BaseException = error  # without what HTTP libraries wrap around it
            while inner := root.__cause__ or (None if root.__suppress_context__ else root.__context__):
                root = inner
            outcome, text = "wrong", str(root) or type(root).__name__
            text += f" → {remedy}" if remedy and " → " not in text else ""
        outcomes[name] = outcome
        print(f"{outcome:13}{name:17}{' '.join(text.split())}")
    if wrong := list(outcomes.values()).count("wrong"):
        sys.exit(f"preflight: {wrong} wrong")


if __name__ == "__main__":
    main()
