"""Check the setup for registering the flow and running it on Kubernetes; changes nothing. `make preflight` runs it.

Environment: that of `flows.settings`, the Agent's NAMESPACE and SERVICE_ACCOUNT, Prefect's PROJECT, and KUBECONFIG.
"""

import base64
import json
import os
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import prefect
import requests
from docker.context import ContextAPI
from kubernetes import client, config
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import DynamicApiError
from prefect.agent.kubernetes import KubernetesAgent
from prefect.run_configs import KubernetesRun
from prefect.storage import Docker
from prefect.utilities.graphql import GraphQLResult

from flows.settings import Settings
from scripts import engine, given
from scripts.base import root_cause

SECONDS = 10  # the time limit of a request
NAME = "docker-sidecar"  # of the ConfigMap and the Secret that job_templates/ mount
# What the Agent of Prefect 1.4.1 does in the cluster, see its agent.py; its rbac.yaml grants more.
RIGHTS = ("create jobs", "list jobs", "delete jobs", "list pods", "list events")
PARAMETERS = ("NAMESPACE", "SERVICE_ACCOUNT", "PROJECT")
TTL = 120  # the Agent looks at Jobs once a minute; one that has gone by then cannot fail its run


class CheckFailed(Exception):
    """What keeps the flow from running. It may end in " → REMEDY", which replaces the check's own remedy."""


def needs(part: Any) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """The Secrets, ConfigMaps and PersistentVolumeClaims that a pod does not start without: kind, name, and keys."""
    for inner in part if isinstance(part, list) else ():
        yield from needs(inner)
    for field, value in (
        part.items() if isinstance(part, dict) else ()
    ):  # such as secretKeyRef, configMap, secret
        kind = re.fullmatch("(?i).*(secret|configmap|persistentvolumeclaim)(Key)?(Ref)?", field)
        if kind and isinstance(value, dict) and not value.get("optional"):
            name = value.get("name") or value.get("secretName") or value["claimName"]
            keys = [item["key"] for item in (value.get("items") or [value]) if "key" in item]
            yield kind[1].lower(), name, tuple(keys)
        yield from needs(
            [{"secret": secret} for secret in value] if field == "imagePullSecrets" else value
        )


class Preflight:
    """The checks: each returns what is fine or raises, a UserWarning if unsure, and may use what earlier ones set."""

    def __init__(self, namespace: str, account: str, project: str) -> None:
        self.namespace, self.project, here = namespace, project, f"--namespace {namespace}"
        self.path, self.user = (
            f"namespaces/{quote(namespace, safe='')}",
            f"system:serviceaccount:{namespace}:{account}",
        )
        self.label = f"kubectl label --overwrite namespace {namespace} pod-security.kubernetes.io/enforce=privileged"
        role = f"kubectl create role agent {here} --verb=create,list,delete --resource=jobs,pods,events"
        bind = f"kubectl create rolebinding agent {here} --role=agent --serviceaccount={namespace}:{account}"
        login = f"kubectl delete secret {NAME} {here} && kubectl create secret docker-registry {NAME} {here} …"
        self.checks = [  # name, method, what it needs, remedy
            ("settings", self._settings, "", ""),
            ("engine", self._engine, "", "prefect register builds the flow's image with one"),
            (
                "cluster",
                self._cluster,
                "",
                "start it, or choose another one: KUBECONFIG, kubectl config use-context",
            ),
            (
                "namespace",
                self._namespace,
                "cluster",
                f"kubectl create namespace {namespace} && {self.label}",
            ),
            ("Job", self._job, "settings, namespace", "correct the template (JOB_TEMPLATE)"),
            (
                "needed objects",
                self._objects,
                "Job",
                f"create them in {namespace}, or correct the template",
            ),
            ("Agent's rights", self._rights, "namespace", f"{role} && {bind}"),
            (
                "ConfigMap",
                self._config_map,
                "settings, namespace",
                f"kubectl edit configmap {NAME} {here}",
            ),
            ("Secret", self._secret, "namespace", login),
            (
                "Prefect",
                self._prefect,
                "",
                "start it, or set PREFECT__CLOUD__API; prefect backend, prefect auth login",
            ),
            (
                "Agent",
                self._agent,
                "settings, Prefect",
                "prefect agent kubernetes install --label …",
            ),
        ]

    def ask(self, path: str, body: Any = None, **query: str) -> Any:
        """The Kubernetes API's answer; None if there is no such object; CheckFailed if it refuses."""
        options = {
            "query_params": list(query.items()),
            "serialize": False,
            "_request_timeout": SECONDS,
        }
        try:
            return json.loads(
                self.cluster.request("post" if body else "get", path, body=body, **options).data
            )
        except DynamicApiError as error:
            if error.status == 404 and not body:
                return None
            seen = str(error.summary())  # type: ignore[no-untyped-call]
            if error.status == 403 and (not body or path.endswith("accessreviews")):
                raise PermissionError(seen) from None  # the user of the kubeconfig may not look
            remedy = (
                self.label
                if "violates PodSecurity" in seen
                else "use another NAMESPACE, or have that allowed"
            )
            remedy = (
                "install its runtime, or use another JOB_TEMPLATE"
                if "RuntimeClass" in seen
                else remedy
            )
            raise CheckFailed(f"{seen} → {remedy}" if error.status == 403 else seen) from None

    def _settings(self) -> str:
        it = self.settings = Settings.from_environ()
        image = f"{it.registry_url.rstrip('/')}/{it.image_name}:{it.image_tag}, built from {it.base_image}"
        return f"{image}; JOB_TEMPLATE={os.environ.get('JOB_TEMPLATE', 'docker_sidecar')}"

    def _engine(self) -> str:
        chosen, found = os.environ.get("DOCKER_HOST"), engine.find()
        if found is None:
            raise CheckFailed("no Docker engine answers")
        url = os.environ["DOCKER_HOST"]
        if not chosen and url != ContextAPI.DEFAULT_CONTEXT.Host:
            raise CheckFailed(
                f"prefect register does not know Docker contexts → export DOCKER_HOST={url}"
            )
        return f"Docker {found.version()['Version']} at {url}"

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
        if path := self.settings.job_template_path:
            raise UserWarning(
                f"the Agent reads {path} at each run; give a copy of that file as JOB_TEMPLATE to check it"
            )
        # what the Agent's own code needs of an Agent and of a run to render a Job
        image = {
            key: getattr(self.settings, key) for key in ("registry_url", "image_name", "image_tag")
        }
        flow = {
            "id": "preflight",
            "core_version": prefect.__version__,
            "storage": Docker(**image).serialize(),
        }
        agent: Any = SimpleNamespace(
            env_vars={}, labels=[], log_to_cloud=True, flow_run_api_key=None
        )
        agent.service_account_name = agent.image_pull_secrets = None
        agent._get_run_config = lambda *_: KubernetesRun(job_template=self.settings.job_template)
        job = KubernetesAgent.generate_job_spec(
            agent, GraphQLResult(id="preflight", flow=GraphQLResult(flow))
        )
        dry_run = {"dryRun": "All", "fieldValidation": "Strict"}
        self.ask(f"/apis/batch/v1/{self.path}/jobs", job, **dry_run)
        # the pod, too: Pod Security, quotas and limits do not look at Jobs
        pod = self.pod = job["spec"]["template"]
        kept = {
            key: value
            for key, value in pod["metadata"].items()
            if key in ("labels", "annotations", "finalizers")
        }
        self.ask(
            f"/api/v1/{self.path}/pods",
            {**pod, "metadata": {**kept, "generateName": "preflight-"}},
            **dry_run,
        )
        if (seconds := job["spec"].get("ttlSecondsAfterFinished")) is not None and seconds < TTL:
            seen = f"ttlSecondsAfterFinished is {seconds}: a Job may go before the Agent has seen how it ended"
            raise CheckFailed(f"{seen} → leave it out, or set {TTL} or more")
        return f"{self.namespace!r} admits the Job and its pod (a dry run; neither was created)"

    def _objects(self) -> str:
        there, missing = [], []
        for kind, name, keys in dict.fromkeys(needs(self.pod["spec"])):
            found = self.ask(f"/api/v1/{self.path}/{kind}s/{quote(name, safe='')}")
            data = {**found.get("data", {}), **found.get("binaryData", {})} if found else {}
            there.append(f"{kind} {name}")
            missing += (
                [f"key {key} of {there[-1]}" for key in keys if key not in data]
                if found
                else there[-1:]
            )
        if missing:
            raise CheckFailed(f"the pod cannot start without {', '.join(missing)}")
        return ", ".join(there) or "the pod needs no Secret, ConfigMap or PersistentVolumeClaim"

    def _rights(self) -> str:
        groups = [
            "system:serviceaccounts",
            f"system:serviceaccounts:{self.namespace}",
            "system:authenticated",
        ]
        missing, reviews = (
            [],
            f"/apis/authorization.k8s.io/v1/{self.path}/localsubjectaccessreviews",
        )
        for right in RIGHTS:
            verb, resource = right.split()
            what = {
                "verb": verb,
                "group": "batch" if resource == "jobs" else "",
                "resource": resource,
            }
            spec = {
                "user": self.user,
                "groups": groups,
                "resourceAttributes": {"namespace": self.namespace, **what},
            }
            if not self.ask(reviews, {"metadata": {"namespace": self.namespace}, "spec": spec})[
                "status"
            ]["allowed"]:
                missing.append(right)
        if missing:
            raise CheckFailed(f"{self.user} may not {', '.join(missing)}")
        return f"{self.user} may {', '.join(RIGHTS)}"

    def _config_map(self) -> str:
        if (found := self.ask(f"/api/v1/{self.path}/configmaps/{NAME}")) is None:
            return f"none named {NAME}; it would configure the daemon: mirrors, MTU, log limits, certificates"
        data = found.get("data") or {}
        try:
            options = {**json.loads(data.pop("daemon.json", "").strip() or "{}")}
        except (TypeError, ValueError) as error:
            raise CheckFailed(f"the daemon.json of {NAME} is not a JSON object: {error}") from None
        # dockerd does not start if a flag, as --host, names what its configuration, as "hosts", names; and its store
        # has to be the volume
        flags = json.dumps(self.settings.job_template)
        taken = [
            it
            for it in options
            if re.search(rf"--{re.escape(it.removesuffix('s'))}s?[= \\\"]", flags)
        ]
        if wrong := sorted({*taken, *({"data-root"} & options.keys())}):
            raise CheckFailed(
                f"the daemon.json of {NAME} sets {', '.join(wrong)}, which the job template sets"
            )
        return f"{NAME} sets {', '.join(sorted(options | data)) or 'nothing'}"

    def _secret(self) -> str:
        if (found := self.ask(f"/api/v1/{self.path}/secrets/{NAME}")) is None:
            return f"none named {NAME}; it would hold the logins for private registries"
        if found["type"] != "kubernetes.io/dockerconfigjson":
            raise CheckFailed(
                f"{NAME} is of type {found['type']}, not kubernetes.io/dockerconfigjson"
            )
        config = json.loads(
            base64.b64decode(found["data"][".dockerconfigjson"])
        )  # Kubernetes admits only JSON
        auths = config.get("auths") or {}
        logins = {
            name
            for name, it in auths.items()
            if it.get("auth") or (it.get("username") and it.get("password"))
        }
        if lost := sorted(auths.keys() - logins):
            raise CheckFailed(
                f"{NAME} names {', '.join(lost)}, but has neither auth nor username and password for it"
            )
        return f"{NAME} has logins for {', '.join(sorted(logins)) or 'no registry'}"

    def _graphql(self, query: str, **variables: str) -> Any:
        url, key = prefect.config.cloud.api, prefect.Client().api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        body = {"query": query, "variables": variables}
        answer = requests.post(
            url, json=body, headers=headers, timeout=SECONDS
        )  # Prefect's client tries for a minute
        answer.raise_for_status()
        if not (data := answer.json().get("data")):
            raise CheckFailed(f"{url} does not answer as the Prefect API does")
        return data

    def _prefect(self) -> str:
        query = "query($name: String) {project(where: {name: {_eq: $name}}) {id}}"
        found = self._graphql(query, name=self.project)["project"]
        if self.project and not found:
            raise CheckFailed(
                f"no project {self.project!r} → prefect create project {json.dumps(self.project)}"
            )
        shown = self.project or "(PROJECT) not set"
        return f"{prefect.config.cloud.api}, backend {prefect.config.backend!r}, project {shown}"

    def _agent(self) -> str:
        ours, since = (
            set(self.settings.labels),
            (datetime.now(timezone.utc) - timedelta(minutes=5)).isoformat(),
        )
        agents = self._graphql("{agent {labels last_queried}}")["agent"]
        alive = [set(agent["labels"]) for agent in agents if (agent["last_queried"] or "") > since]
        # an Agent takes the runs whose labels it has; without labels, runs without labels
        wanted = f"labels {', '.join(sorted(ours))}" if ours else "no labels (FLOW_LABELS)"
        if not any(ours <= labels and bool(ours) == bool(labels) for labels in alive):
            raise UserWarning(f"no Agent with {wanted} has asked for runs in the last 5 minutes")
        return f"one with {wanted} asks for runs"


def main() -> None:
    """Run every check, print a line on each, and exit with 0 if and only if nothing is wrong."""
    try:
        place = given.parameters("preflight", PARAMETERS)
    except given.UnknownParameter as error:
        sys.exit(f"preflight: {error}")
    namespace, account = (place.get(name) or "default" for name in ("NAMESPACE", "SERVICE_ACCOUNT"))
    outcomes: dict[str, str] = {}
    for name, check, wanted, remedy in Preflight(
        namespace, account, place.get("PROJECT", "")
    ).checks:
        blocked = " and the ".join(
            it for it in wanted.split(", ") if outcomes.get(it) not in (None, "fine", "forbidden")
        )
        try:
            outcome, text = (
                ("not checked", f"because of the {blocked}") if blocked else ("fine", check())
            )
        except (PermissionError, UserWarning) as error:
            outcome, text = "unsure" if isinstance(error, UserWarning) else "forbidden", str(error)
        except (
            Exception
        ) as error:  # whatever a template, a kubeconfig or an answer holds: a line, not a traceback
            root = root_cause(error)
            outcome, text = "wrong", str(root) or type(root).__name__
            text += f" → {remedy}" if remedy and " → " not in text else ""
        outcomes[name] = outcome
        print(f"{outcome:13}{name:17}{' '.join(text.split())}")
    if wrong := list(outcomes.values()).count("wrong"):
        sys.exit(f"preflight: {wrong} wrong")


if __name__ == "__main__":
    main()
