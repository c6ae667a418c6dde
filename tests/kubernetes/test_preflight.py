"""Preflight on a real cluster: all is fine, then one thing at a time is not."""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import kubernetes.client
import kubernetes.utils
import prefect.agent.kubernetes
import pytest
import yaml
from prefect.utilities.configuration import set_temporary_config

from flows.settings import load_job_template
from scripts import cluster, preflight
from tests.support.namespaces import Namespace
from tests.support.prefect_api import PrefectAPI
from tests.support.registries import login
from tests.support.shell import shell
from tests.support.templates import Template, daemon_of, edited
from tests.support.waiting import wait_for

RBAC = Path(prefect.agent.kubernetes.__path__[0], "rbac.yaml")
Check = Callable[..., str]


@pytest.fixture
def place(namespace: Namespace) -> Iterator[str]:
    """A namespace of a test's own, where the Agent has its rights."""
    name = f"tests-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "privileged"}
    body: Any = {"metadata": {"name": name, "labels": labels}}
    namespace.core.create_namespace(body)
    try:
        rbac = RBAC.read_text().replace("namespace: default", f"namespace: {name}")
        shell(f"kubectl create --namespace {name} --filename -", stdin=rbac)
        accounts = namespace.core.list_namespaced_service_account
        wait_for(
            lambda: accounts(name).items,
            f"{name} has a ServiceAccount, without which it admits no pod",
        )
        yield name
    finally:
        namespace.core.delete_namespace(name)


def put(place: str, kind: str, name: str = "docker-sidecar", **fields: Any) -> None:
    """Create an object there, by default one of the name that the templates mount, or change it."""
    body = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, **fields}
    shell(f"kubectl apply --server-side --namespace {place} --filename -", stdin=json.dumps(body))


@pytest.fixture
def check(
    place: str, api: PrefectAPI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Check:
    """Run all checks, of which those of these names shall be wrong; returns all that is said."""
    ours = {
        "NAMESPACE": place,
        "SERVICE_ACCOUNT": "default",
        "PROJECT": "containers",
        "FLOW_REGISTRY_URL": "registry.example.com/team/",
    }

    def check(*wrong: str, **environment: str) -> str:
        with monkeypatch.context() as patch, suppress(SystemExit):
            patch.setattr(
                "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION",
                str(cluster.KUBECONFIG),
            )
            all_given = {**ours, **environment}
            words = [f"{name}={all_given.pop(name)}" for name in preflight.PARAMETERS]
            patch.setenv("GIVEN", " ".join(word.replace(" ", "\\ ") for word in words))
            for name, value in all_given.items():
                patch.setenv(name, value)
            with set_temporary_config({"backend": "server", "cloud.api": api.url}):
                preflight.main()
        said = capsys.readouterr().out
        assert {line[13:30].strip() for line in said.splitlines() if line.startswith("wrong ")} == {
            *wrong
        }, said
        return said

    return check


def own(folder: Path, template: Template) -> str:
    """The path of a template of one's own."""
    (folder / "own.yaml").write_text(json.dumps(template))
    return str(folder / "own.yaml")


def test_all_is_fine(check: Check, place: str, namespace: Namespace, templates: list[str]) -> None:
    """Without what a namespace may have, and with it; the tests below spoil one thing each."""
    for name in templates:
        check(JOB_TEMPLATE=name)
    auths = {"a.example": login(), "b.example": {"username": "u", "password": "p"}}
    logins = {".dockerconfigjson": json.dumps({"auths": auths})}
    put(place, "Secret", type="kubernetes.io/dockerconfigjson", stringData=logins)
    put(
        place,
        "ConfigMap",
        data={"daemon.json": '{"mtu": 1400}', "ca.crt": "-----BEGIN CERTIFICATE-----\n"},
    )
    for name in templates:
        said = check(JOB_TEMPLATE=name)
        others = said.splitlines()
        # this place has no Agent, and nothing of deploy/
        others = [line for line in others if line[13:30].strip() not in ("Agent", "protection")]
        assert {line.split()[0] for line in others} == {"fine"}, said
        assert f"system:serviceaccount:{place}:default may create jobs" in said
        assert "docker-sidecar has logins for a.example, b.example" in said
        assert "docker-sidecar sets ca.crt, mtu" in said
    assert not namespace.core.list_namespaced_pod(place).items, "nothing was created"
    assert not namespace.batch.list_namespaced_job(place).items


def test_no_namespace_and_no_project(check: Check) -> None:
    said = check("namespace", "Prefect", NAMESPACE="tests-nowhere", PROJECT="not there")
    assert (
        "there is no 'tests-nowhere' → kubectl apply -k deploy makes it; or give another NAMESPACE"
        in said
    )
    assert said.count("it needs namespace") == 5
    assert said.count("it needs Job") == 1
    assert "no project 'not there' → prefect create project \"not there\"" in said


def test_the_agent_lacks_rights(check: Check, place: str, namespace: Namespace) -> None:
    said = check("Agent's rights", SERVICE_ACCOUNT="agent")
    assert f"system:serviceaccount:{place}:agent may not create jobs" in said

    rules = [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "list"]}]
    rules.append({"apiGroups": [""], "resources": ["pods"], "verbs": ["*"]})
    rbac = kubernetes.client.RbacAuthorizationV1Api(namespace.api)
    rbac.patch_namespaced_role("prefect-agent-rbac", place, {"rules": rules})
    agent = f"--namespace {place} --as system:serviceaccount:{place}:default"
    ask = f"kubectl auth can-i list events {agent} || true"
    wait_for(lambda: "no" in shell(ask), "the role has changed")
    said = check("Agent's rights")
    assert "may not delete jobs, list events → kubectl apply -k deploy makes its account" in said


def test_the_config_map(check: Check, place: str, templates: list[str]) -> None:
    for content in ("{'mtu': 1400}", "[]"):
        put(place, "ConfigMap", data={"daemon.json": content})
        said = check("ConfigMap")
        assert "the daemon.json of docker-sidecar is not a JSON object" in said
        assert f"→ kubectl edit configmap docker-sidecar --namespace {place}" in said
    # dockerd does not start if a flag names what its configuration names
    options = {
        "hosts": "x",
        "data-root": "x",
        "log-driver": "x",
        "log-opts": {"max-size": "1m"},
        "mtu": 1400,
    }
    put(place, "ConfigMap", data={"daemon.json": json.dumps(options)})
    for name in templates:
        said = check("ConfigMap", JOB_TEMPLATE=name)
        assert (
            "docker-sidecar sets data-root, hosts, log-driver, which the job template sets" in said
        )


def test_a_secret_without_logins(check: Check, place: str, namespace: Namespace) -> None:
    """`docker login` with a credential store leaves neither auth nor a password."""
    auths = {
        "good.example": login(),
        "empty.example": {},
        "broken.example": {"auth": "?"},
        "token.example": {"identitytoken": "t"},
    }
    logins = {".dockerconfigjson": json.dumps({"auths": auths, "credsStore": "desktop"})}
    put(place, "Secret", type="kubernetes.io/dockerconfigjson", stringData=logins)
    said = check("Secret")
    assert "credsStore names a program" in said
    assert "empty.example has neither auth nor username and password" in said
    assert "broken.example is a broken login" in said
    assert "good.example" not in said
    assert "token.example" not in said
    namespace.core.delete_namespaced_secret("docker-sidecar", place)  # a type cannot be changed
    put(place, "Secret", stringData={"config.json": "{}"})
    said = check("Secret")
    assert f"kubectl create secret docker-registry docker-sidecar --namespace {place}" in said


def test_quota_and_pod_security(
    check: Check, place: str, namespace: Namespace, templates: list[str]
) -> None:
    put(place, "ResourceQuota", "none", spec={"hard": {"pods": "0"}})
    read = namespace.core.read_namespaced_resource_quota
    wait_for(lambda: read("none", place).status.hard, "the quota is in force")
    said = check("Job")
    assert "exceeded quota: none, requested: pods=1, used: pods=0" in said
    assert "→ use another NAMESPACE" in said

    labels = {"pod-security.kubernetes.io/enforce": "baseline"}
    namespace.core.patch_namespace(place, {"metadata": {"labels": labels}})
    for name in templates:
        said = check("Job", JOB_TEMPLATE=name)
        assert 'violates PodSecurity "baseline' in said
        label = "pod-security.kubernetes.io/enforce=privileged"
        assert f"→ kubectl label --overwrite namespace {place} {label}" in said


def test_what_the_api_server_refuses(check: Check, tmp_path: Path) -> None:
    for old, new, seen in (
        # of a Job, and not of a pod
        ('"restartPolicy": "Never"', '"restartPolicy": "Always"', "restartPolicy"),
        ('"name": "prefect-docker-job"', '"name": "a", "namespace": "default"', "namespace"),
        ('"name": "prefect-docker-job"', '"name": "My_Job"', "My_Job"),
        # what is no daemon
        (
            '"securityContext": {"privileged": true}',
            '"securityContext": "privileged"',
            "SecurityContext",
        ),
        ('"image":', '"args": 5, "image":', "args"),
        (
            '"name": "flow-container"',
            '"name": "a", "gpu": {}',
            'unknown field "spec.template.spec.containers[0]',
        ),
    ):
        said = check("Job", JOB_TEMPLATE=own(tmp_path, edited("docker_sidecar", old, new)))
        assert seen in said
        assert "→ correct the template (JOB_TEMPLATE)" in said
    nowhere = edited(
        "docker_sidecar", '"restartPolicy"', '"runtimeClassName": "not-there", "restartPolicy"'
    )
    said = check("Job", JOB_TEMPLATE=own(tmp_path, nowhere))
    assert (
        'RuntimeClass "not-there" not found → install its runtime, or use another JOB_TEMPLATE'
        in said
    )


def test_a_job_that_goes_too_soon(check: Check, tmp_path: Path) -> None:
    for seconds, wrong in ((0, ["Job"]), (119, ["Job"]), (120, [])):
        ttl = f'"ttlSecondsAfterFinished": {seconds}, "backoffLimit"'
        said = check(
            *wrong, JOB_TEMPLATE=own(tmp_path, edited("docker_sidecar", '"backoffLimit"', ttl))
        )
        assert (f"ttlSecondsAfterFinished is {seconds}" in said) == bool(wrong)


def test_what_the_pod_needs_and_is_not_there(check: Check, place: str, tmp_path: Path) -> None:
    template = load_job_template("docker_sidecar")
    spec = template["spec"]["template"]["spec"]
    for name in ("gone", "another"):
        key = {"secretKeyRef": {"name": name, "key": "token"}}
        spec["containers"][1]["env"].append({"name": name, "valueFrom": key})
    optional = {"configMapKeyRef": {"name": "maybe", "key": "b", "optional": True}}
    spec["containers"][1]["env"].append({"name": "maybe", "valueFrom": optional})
    spec["volumes"].append({"name": "settings", "configMap": {"name": "settings"}})
    spec["volumes"].append({"name": "data", "persistentVolumeClaim": {"claimName": "data"}})
    changed = own(tmp_path, template)
    put(place, "Secret", "another", stringData={"other": "x"})
    said = check("needed objects", JOB_TEMPLATE=changed)
    for words in (
        "secret gone",
        "key token of secret another",
        "configmap settings",
        "persistentvolumeclaim data",
    ):
        assert words in said
    assert "maybe" not in said
    for name in ("gone", "another"):
        put(place, "Secret", name, stringData={"token": "x"})
    put(place, "ConfigMap", "settings")
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    put(place, "PersistentVolumeClaim", "data", spec=claim)
    check(JOB_TEMPLATE=changed)


def test_what_is_not_understood_is_not_judged(check: Check, tmp_path: Path) -> None:
    """A daemon by another command, and without privileges, as sysbox runs it."""
    template = load_job_template("docker_sidecar")
    daemon_of(template).update(
        command=["dockerd", "--host=tcp://localhost:2375"], securityContext={}
    )
    check(JOB_TEMPLATE=own(tmp_path, template))


MUTATION = """
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {{name: {name}}}
spec:
  failurePolicy: Fail
  reinvocationPolicy: Never
  matchConstraints:
    resourceRules:
      - {{apiGroups: [""], apiVersions: [v1], resources: [pods], operations: [CREATE]}}
  mutations:
    - patchType: JSONPatch
      jsonPatch:
        expression: '[{patch}]'
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicyBinding
metadata: {{name: {name}}}
spec:
  policyName: {name}
  matchResources:
    namespaceSelector:
      matchLabels: {{kubernetes.io/metadata.name: {name}}}
"""
NO_SIDECARS = 'JSONPatch{op: "remove", path: "/spec/initContainers/0/restartPolicy"}'
INJECTED = """JSONPatch{op: "add", path: "/spec/containers/-",
  value: Object.spec.containers{name: "proxy", image: "proxy"}}"""


@contextmanager
def mutated(place: str, patch: str) -> Iterator[None]:
    """The cluster changes the pods of a namespace, as a webhook does."""
    policy = MUTATION.format(name=place, patch=patch.replace("\n", " "))
    shell("kubectl apply --filename -", stdin=policy)
    try:
        yield
    finally:
        shell("kubectl delete --filename -", stdin=policy)


def changes(place: str) -> bool:
    """Whether the cluster changes a pod there."""
    sidecar = {"name": "dind-daemon", "image": "a", "restartPolicy": "Always"}
    spec = {"initContainers": [sidecar], "containers": [{"name": "b", "image": "b"}]}
    asked = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "asked"}, "spec": spec}
    dry_run = f"kubectl create --dry-run=server --namespace {place} --output json --filename -"
    made = json.loads(shell(dry_run, stdin=json.dumps(asked)))["spec"]
    is_sidecar = made["initContainers"][0].get("restartPolicy") == "Always"
    return not is_sidecar or len(made["containers"]) > 1


@pytest.mark.parametrize(
    ("patch", "seen"),
    [
        (NO_SIDECARS, "initContainers[dind-daemon].restartPolicy was taken away"),
        (INJECTED, "the container proxy was added"),
    ],
)
def test_a_webhook_that_breaks_the_run(check: Check, place: str, patch: str, seen: str) -> None:
    with mutated(place, patch):
        wait_for(lambda: changes(place), "the policy is in force")
        said = check("Job", JOB_TEMPLATE="native_sidecar")
    assert seen in said
    assert "→ exempt these pods" in said


@pytest.fixture
def as_developer(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Be an account that may nothing yet, here named as `kubectl create rolebinding` takes it."""
    shell(f"kubectl create serviceaccount developer --namespace {place}")
    token = shell(f"kubectl create token developer --namespace {place}").strip()
    config = yaml.safe_load(cluster.KUBECONFIG.read_text())
    config["users"][0]["user"] = {"token": token}
    other = tmp_path / "kubeconfig"
    other.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(cluster, "KUBECONFIG", other)
    return f"{place}:developer"


@contextmanager
def granted(account: str, namespace: str, verb: str, resources: str) -> Iterator[None]:
    """An account may do something in a namespace."""
    name = f"tests-{uuid.uuid4().hex[:8]}"
    role = f"--verb={verb} --resource={resources}"
    binding = f"--role={name} --serviceaccount={account}"
    shell(f"kubectl create role {name} --namespace {namespace} {role}")
    shell(f"kubectl create rolebinding {name} --namespace {namespace} {binding}")
    try:
        yield
    finally:
        shell(f"kubectl delete role,rolebinding {name} --namespace {namespace}")


def outcomes(said: str) -> dict[str, str]:
    """What was found of each check."""
    return {line[13:30].strip(): line[:13].strip() for line in said.splitlines()}


def test_a_user_who_may_nothing(check: Check, as_developer: str) -> None:
    """The user may not look, and nothing is wrong."""
    said = check()
    found = outcomes(said)
    assert "you may neither create Jobs" in said
    assert (found["Job"], found["Secret"]) == ("forbidden", "forbidden")


def test_an_admin_under_the_policies(
    check: Check, namespace: Namespace, templates: list[str]
) -> None:
    """deploy/ admits Jobs of the Agent and pods of the Job controller: it is asked as those."""
    for name in templates:
        said = check(NAMESPACE=namespace.name, SERVICE_ACCOUNT="prefect-agent", JOB_TEMPLATE=name)
        found = outcomes(said)
        assert (found["Job"], found["protection"]) == ("fine", "fine"), said


def test_a_user_under_the_policies(check: Check, namespace: Namespace, as_developer: str) -> None:
    """Who may not ask as the Agent does not hear whether the Agent would be admitted."""
    there = {"NAMESPACE": namespace.name, "SERVICE_ACCOUNT": "prefect-agent"}
    with granted(as_developer, namespace.name, "create", "jobs,pods"):
        said = check(**there)
        assert outcomes(said)["Job"] == "unsure"
        assert "only the Agent may create Jobs here" in said
        assert f"who may impersonate system:serviceaccount:{namespace.name}:prefect-agent" in said
    with (
        granted(as_developer, namespace.name, "impersonate", "serviceaccounts"),
        granted(as_developer, namespace.name, "create", "localsubjectaccessreviews"),
    ):
        said = check(**there)
        assert outcomes(said)["Job"] == "forbidden"
        assert "the Job is fine, its pod was not tried" in said
        with granted(as_developer, "kube-system", "impersonate", "serviceaccounts"):
            assert outcomes(check(**there))["Job"] == "fine"
