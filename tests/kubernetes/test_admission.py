"""docs/admission.md: a namespace that holds only these pods, with an Agent that has few rights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import docker
import kubernetes.client
import kubernetes.utils
import pytest
import yaml
from prefect.run_configs import KubernetesRun

from flows.settings import load_job_template
from scripts import cluster
from tests.kubernetes.conftest import NAMESPACE, Namespace, Readme, Run, daemon_of, replaced, shell, start
from tests.support.pages import example
from tests.support.prefect_api import PrefectAPI
from tests.support.waiting import wait_for

pytestmark = pytest.mark.xdist_group("admission")  # of one second namespace
TEAM = f"{NAMESPACE}-team"
JOB_CONTROLLER = "system:serviceaccount:kube-system:job-controller"
HERE = {"namespace flows": f"namespace {TEAM}", "label docker-sidecar": f"label {TEAM}"}


def here(text: str) -> str:
    """An example of the page as a file for kubectl, in the tests' own namespace and under a name of its own."""
    instead = {
        "namespace: flows": f"namespace: {TEAM}",
        "metadata.name: flows": f"metadata.name: {TEAM}",
        "serviceaccount:flows:": f"serviceaccount:{TEAM}:",
        "name: docker-sidecar}": f"name: {TEAM}}}",
        "policyName: docker-sidecar": f"policyName: {TEAM}",
    }
    return f"- <<'EOF'\n{replaced(text, instead)}EOF"


@pytest.fixture(scope="module")
def team(engine: docker.DockerClient, readme: Readme) -> Iterator[Namespace]:
    """A second namespace, as docs/operations.md adds one."""
    readme("kubectl create namespace", HERE)
    readme("kubectl label namespace", HERE)
    found = Namespace(cluster.api(), TEAM)
    kubernetes.utils.create_from_dict(found.api, cluster.daemon_config(engine, TEAM))
    readme("kubectl apply --filename agent-role.yaml", {"agent-role.yaml": here(example("agent-role"))})
    readme("kubectl apply --filename admission-policy.yaml", {"admission-policy.yaml": here(example("admission-policy"))})
    try:
        wait_for(lambda: refusal(found, "admin", pod(hostNetwork=True)), "the policy is in force", found.report, 60)
        yield found
    finally:
        shell(f"kubectl delete validatingadmissionpolicybinding,validatingadmissionpolicy,namespace {TEAM} --wait=false")
        shell(f"kubectl --namespace {TEAM} delete pods --all --now --wait=false")


def pod(securityContext: Any = None, **spec: Any) -> dict[str, Any]:
    container = {"name": "any", "image": "busybox", "securityContext": securityContext}
    return {"metadata": {"name": "tried"}, "spec": {"containers": [container], **spec}}


def job_pod(template: str = "native_sidecar", **edits: str) -> dict[str, Any]:
    """The pod of a template as the Job controller creates it, with edits of the daemon's container."""
    job = load_job_template(template)
    daemon_of(job).update(edits)
    spec = job["spec"]["template"]["spec"]
    spec["containers"][0]["image"] = "flow"
    return {"metadata": {"name": "tried"}, "spec": spec}


def refusal(namespace: Namespace, user: str, body: dict[str, Any]) -> str:
    """What the API server says to a pod of a user; nothing if it admits the pod. Nothing is created."""
    client = copy.copy(namespace.api)
    if user != "admin":
        client.default_headers = {**client.default_headers, "Impersonate-User": user}
    try:
        kubernetes.client.CoreV1Api(client).create_namespaced_pod(namespace.name, body, dry_run="All")
    except kubernetes.client.ApiException as error:
        return str(error.body)
    return ""


def test_a_run_under_the_policy_with_an_agent_of_few_rights(
    team: Namespace, api: PrefectAPI, small_image: str, readme: Readme
) -> None:
    """One with the policy's image of the daemon, and one with another; the Agent deletes the Job that has ended."""

    def submit(image: str) -> Run:
        template = load_job_template("native_sidecar")
        daemon_of(template)["image"] = image
        config = KubernetesRun(job_template=template).serialize()
        parameters = {"image": small_image, "command": "echo admitted"}
        return start(api, team, parameters=parameters, run_config=config, labels=[TEAM])

    readme("prefect agent kubernetes install --label", HERE)
    readme("kubectl delete role,rolebinding", HERE)
    bad, good = submit("docker:28-dind"), submit("docker:29.9.0-dind")
    good.succeeds("admitted")
    bad.fails()
    assert "only dind-daemon may be privileged" in bad.seen()
    good.wait(lambda: "DELETED" in [event for _, event, _ in team.jobs[good.record.id]], "the Job is deleted", 100)


def test_what_the_policy_admits_and_refuses(team: Namespace, templates: list[str]) -> None:
    assert refusal(team, "admin", pod()) == ""
    for name in templates:
        assert refusal(team, JOB_CONTROLLER, job_pod(name)) == "", name
    for user, body, message in (
        ("admin", job_pod(), "only a Job may have a privileged pod"),
        ("admin", pod(hostNetwork=True), "no namespaces of the node"),
        ("admin", pod(hostPID=True), "no namespaces of the node"),
        ("admin", pod(volumes=[{"name": "v", "hostPath": {"path": "/"}}]), "no hostPath but"),
        ("admin", pod(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}), "no added capabilities"),
        (JOB_CONTROLLER, job_pod(image="docker:28-dind"), "only dind-daemon"),
        (JOB_CONTROLLER, job_pod(name="other"), "only dind-daemon"),
        (JOB_CONTROLLER, pod(securityContext={"privileged": True}), "only dind-daemon"),
    ):
        assert message in refusal(team, user, body), body


def test_the_policy_admits_no_jobs_of_others_and_no_privileged_debugging(team: Namespace) -> None:
    spec = {"template": {"spec": {**pod()["spec"], "restartPolicy": "Never"}}}
    with pytest.raises(kubernetes.client.ApiException, match="only the Agent may create Jobs"):
        team.batch.create_namespaced_job(TEAM, {"metadata": {"name": "tried"}, "spec": spec}, dry_run="All")
    team.core.create_namespaced_pod(TEAM, {**pod(), "metadata": {"name": "debugged"}})
    debugger = {"name": "debug", "image": "busybox", "securityContext": {"privileged": True}}
    with pytest.raises(kubernetes.client.ApiException, match="no privileged debug containers"):
        team.core.patch_namespaced_pod_ephemeralcontainers(
            "debugged", TEAM, {"spec": {"ephemeralContainers": [debugger]}}, dry_run="All"
        )


def test_a_rule_for_the_node_pool(team: Namespace) -> None:
    """Added to the policy of the page."""
    policies = kubernetes.client.AdmissionregistrationV1Api(team.api)
    before = policies.read_validating_admission_policy(TEAM).spec.validations
    rule = {"op": "add", "path": "/spec/validations/-", "value": yaml.safe_load(example("node-pool-rule"))[0]}
    policies.patch_validating_admission_policy(TEAM, [rule])
    try:
        wait_for(lambda: "only on the nodes" in refusal(team, "admin", pod()), "the rule is in force", timeout=60)
        assert refusal(team, "admin", pod(nodeSelector={"dedicated": "containers"})) == ""
    finally:
        with suppress(kubernetes.client.ApiException):
            policies.patch_validating_admission_policy(TEAM, {"spec": {"validations": before}})
