"""The cluster, the namespace, and what has to be in it."""

import base64
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from flows.docker_config import usable_login
from flows.settings import JOB_TEMPLATES, load_job_template
from scripts.base import NAME
from scripts.checks.check import CheckFailed, Setup, Unsure
from scripts.checks.kubernetes_api import KubernetesAPI, namespaced

# What the Agent of Prefect 1.4.1 does in the cluster, see its agent.py; its rbac.yaml grants more.
RIGHTS = ("create jobs", "list jobs", "delete jobs", "list pods", "list events")
ADMISSION = "/apis/admissionregistration.k8s.io/v1"


def cluster_answers(setup: Setup) -> str:
    """The API server answers as Kubernetes does."""
    setup.api = KubernetesAPI()
    version = setup.api.get("/version") or {}
    if "gitVersion" not in version:
        raise CheckFailed(f"{setup.api.host} does not answer as Kubernetes does")
    return f"Kubernetes {version['gitVersion']} at {setup.api.host}"


def namespace_exists(setup: Setup) -> str:
    """The namespace is there."""
    if setup.api.get(f"/api/v1/{namespaced(setup.namespace)}") is None:
        raise CheckFailed(f"there is no {setup.namespace!r}")
    return f"{setup.namespace!r} exists"


def agent_has_its_rights(setup: Setup) -> str:
    """The Agent's account may do what the Agent does."""
    missing = []
    for right in RIGHTS:
        if not setup.api.account_may(right, setup.namespace, setup.account):
            missing.append(right)
    if missing:
        raise CheckFailed(f"{setup.agent} may not {', '.join(missing)}")
    return f"{setup.agent} may {', '.join(RIGHTS)}"


def deployed_objects_exist(setup: Setup) -> str:
    """What `kubectl apply -k deploy` makes for the protection of the namespace is there."""
    here = namespaced(setup.namespace)
    paths = {
        f"networkpolicy {NAME}": f"/apis/networking.k8s.io/v1/{here}/networkpolicies/{NAME}",
        f"resourcequota {NAME}": f"/api/v1/{here}/resourcequotas/{NAME}",
    }
    for policy in ("pods", "users"):
        name = f"{NAME}-{policy}.{setup.namespace}"
        paths[f"policy {name}"] = f"{ADMISSION}/validatingadmissionpolicies/{name}"
        paths[f"binding of {name}"] = f"{ADMISSION}/validatingadmissionpolicybindings/{name}"
    missing = []
    for name, path in paths.items():
        if setup.api.get(path) is None:
            missing.append(name)
    if missing:
        raise Unsure(f"not there: {', '.join(missing)}", "kubectl apply -k deploy, or your own")
    return ", ".join(paths)


Needed = tuple[str, str, tuple[str, ...]]  # the kind of an object, its name, and keys of it


def needs(part: Any) -> Iterator[Needed]:
    """The Secrets, ConfigMaps and PersistentVolumeClaims that a pod does not start without."""
    if isinstance(part, list):
        for item in part:
            yield from needs(item)
    if not isinstance(part, dict):
        return
    for field, value in part.items():
        needed = _needed(field, value)
        if needed:
            yield needed
        if field == "imagePullSecrets":
            value = [{"secret": secret} for secret in value]
        yield from needs(value)


def _needed(field: str, value: Any) -> Needed | None:
    """The object that a field names, such as secretKeyRef, configMap or secret."""
    kind = re.fullmatch("(?i).*(secret|configmap|persistentvolumeclaim)(Key)?(Ref)?", field)
    if not kind or not isinstance(value, dict) or value.get("optional"):
        return None
    name = value.get("name") or value.get("secretName") or value["claimName"]
    items = value.get("items") or [value]
    keys = tuple(item["key"] for item in items if "key" in item)
    return kind[1].lower(), name, keys


def needed_objects_exist(setup: Setup) -> str:
    """What the pod does not start without is there."""
    if setup.pod is None:
        raise Unsure("the template is read by the Agent, see above")
    there = []
    missing = []
    for kind, name, keys in dict.fromkeys(needs(setup.pod["spec"])):
        path = f"/api/v1/{namespaced(setup.namespace)}/{kind}s/{quote(name, safe='')}"
        found = setup.api.get(path)
        there.append(f"{kind} {name}")
        if found is None:
            missing.append(f"{kind} {name}")
            continue
        data = {**found.get("data", {}), **found.get("binaryData", {})}
        missing += [f"key {key} of {kind} {name}" for key in keys if key not in data]
    if missing:
        raise CheckFailed(f"the pod cannot start without {', '.join(missing)}")
    return ", ".join(there) or "the pod needs no Secret, ConfigMap or PersistentVolumeClaim"


def daemon_config_is_usable(setup: Setup) -> str:
    """The ConfigMap for the daemon, if there is one, holds what dockerd takes."""
    found = setup.api.get(f"/api/v1/{namespaced(setup.namespace)}/configmaps/{NAME}")
    if found is None:
        return (
            f"none named {NAME}; it would configure the daemon: "
            "mirrors, MTU, log limits, certificates"
        )
    data = found.get("data") or {}
    text = data.pop("daemon.json", "").strip() or "{}"
    try:
        options = {**json.loads(text)}
    except (TypeError, ValueError) as error:
        raise CheckFailed(f"the daemon.json of {NAME} is not a JSON object: {error}") from None
    wrong = _set_by_the_template(setup, options)
    if wrong:
        names = ", ".join(sorted(wrong))
        raise CheckFailed(f"the daemon.json of {NAME} sets {names}, which the job template sets")
    return f"{NAME} sets {', '.join(sorted(options | data)) or 'nothing'}"


def _set_by_the_template(setup: Setup, options: dict[str, Any]) -> set[str]:
    """The options with which dockerd does not start, or that would take its store elsewhere.

    A flag, as --host, must not name what its configuration, as "hosts", names.
    """
    templates = [setup.settings.job_template]
    if setup.settings.job_template is None:  # the Agent reads it at each run
        templates = [load_job_template(path.stem) for path in JOB_TEMPLATES.glob("*.yaml")]
    flags = json.dumps(templates)
    wrong = {option for option in options if _is_a_flag(option, flags)}
    if "data-root" in options:  # the store has to be the volume
        wrong.add("data-root")
    return wrong


def _is_a_flag(option: str, flags: str) -> bool:
    singular = re.escape(option.removesuffix("s"))
    return bool(re.search(rf"--{singular}s?[= \\\"]", flags))


def logins_are_usable(setup: Setup) -> str:
    """The Secret with logins, if there is one, holds what the flow can use."""
    found = setup.api.get(f"/api/v1/{namespaced(setup.namespace)}/secrets/{NAME}")
    if found is None:
        return f"none named {NAME}; it would hold the logins for private registries"
    if found["type"] != "kubernetes.io/dockerconfigjson":
        raise CheckFailed(f"{NAME} is of type {found['type']}, not kubernetes.io/dockerconfigjson")
    text = base64.b64decode(found["data"][".dockerconfigjson"])
    content = json.loads(text)  # Kubernetes admits only JSON
    faults = _faults(content)
    if faults:
        raise CheckFailed(f"{NAME}: {'; '.join(sorted(faults))}")
    registries = ", ".join(sorted(content.get("auths") or {}))
    return f"{NAME} has logins for {registries or 'no registry'}"


def _faults(content: dict[str, Any]) -> list[str]:
    """What the flow cannot use of a Docker configuration."""
    faults = []
    for name in ("credsStore", "credHelpers"):
        if content.get(name):
            faults.append(f"{name} names a program, which the flow's image does not have")
    for registry, entry in (content.get("auths") or {}).items():
        try:
            login = usable_login(registry, entry)
        except ValueError as error:
            faults.append(f"{registry} {error}")
            continue
        if not login.get("auth") and not login.get("identitytoken"):
            faults.append(f"{registry} has neither auth nor username and password")
    return faults
