"""docs/admission.md: a namespace that holds only these pods, with an Agent that has few rights."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

import docker
import kubernetes.utils
import pytest
import yaml
from prefect.run_configs import KubernetesRun

from flows.settings import load_job_template
from scripts import cluster
from tests.support.kubectl import NAMESPACE
from tests.support.namespaces import Namespace
from tests.support.pages import example
from tests.support.prefect_api import PrefectAPI
from tests.support.readme import readme
from tests.support.shell import replaced, shell
from tests.support.submitted_runs import SubmittedRun, start
from tests.support.templates import daemon_of
from tests.support.waiting import wait_for

TEAM = f"{NAMESPACE}-team"
Body = dict[str, Any]
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


POLICY = {"admission-policy.yaml": here(example("admission-policy"))}


@pytest.fixture(scope="module")
def team(engine: docker.DockerClient, api: PrefectAPI) -> Iterator[Namespace]:
    """A second namespace, as docs/operations.md adds one."""
    readme("kubectl create namespace", HERE)
    readme("kubectl label namespace", HERE)
    found = Namespace(cluster.api(), TEAM)
    kubernetes.utils.create_from_dict(found.api, cluster.daemon_config(engine, TEAM))
    readme(
        "kubectl apply --filename agent-role.yaml", {"agent-role.yaml": here(example("agent-role"))}
    )
    readme("kubectl apply --filename admission-policy.yaml", POLICY)
    try:
        wait_for(
            lambda: "no namespaces" in tried(pod(hostNetwork=True)),
            "the policy is in force",
            found.report,
            60,
        )
        yield found
    finally:
        kinds = "validatingadmissionpolicybinding,validatingadmissionpolicy,namespace"
        shell(f"kubectl delete {kinds} {TEAM} --wait=false")
        shell(f"kubectl --namespace {TEAM} delete pods --all --force --wait=false")


def pod(securityContext: Any = None, **spec: Any) -> Body:
    container = {"name": "any", "image": "busybox", "securityContext": securityContext}
    metadata = {"name": "tried"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"containers": [container], **spec},
    }


def job_pod(template: str = "native_sidecar", **edits: str) -> Body:
    """The pod of a template as the Job controller creates it, with edits of the daemon's container."""
    job = load_job_template(template)
    daemon_of(job).update(edits)
    spec = job["spec"]["template"]["spec"]
    spec["containers"][0]["image"] = "flow"
    return {**pod(), "spec": spec}


def tried(body: Body, user: str = "") -> str:
    """What the API server says to a pod of the administrator, or of a user; nothing is created."""
    options = f"--namespace {TEAM} --dry-run=server" + (f" --as={user}" if user else "")
    return shell(f"kubectl create {options} --filename - || true", stdin=json.dumps(body))


def test_a_run_under_the_policy_with_an_agent_of_few_rights(
    team: Namespace, api: PrefectAPI, small_image: str
) -> None:
    """One with the policy's image of the daemon, and one with another; the Agent deletes the Job that has ended."""

    def submit(image: str) -> SubmittedRun:
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
    good.wait(
        lambda: team.job_deleted(good.record.id),
        "the Job is deleted",
        100,
    )


def test_what_the_policy_admits_and_refuses(team: Namespace, templates: list[str]) -> None:
    assert "created" in tried(pod())
    for name in templates:
        assert "created" in tried(job_pod(name), JOB_CONTROLLER), name
    for body, user, message in (
        (job_pod(), "", "only a Job may have a privileged pod"),
        (pod(hostNetwork=True), "", "no namespaces of the node"),
        (pod(hostPID=True), "", "no namespaces of the node"),
        (pod(volumes=[{"name": "v", "hostPath": {"path": "/"}}]), "", "no hostPath but"),
        (
            pod(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}),
            "",
            "no added capabilities",
        ),
        (job_pod(image="docker:28-dind"), JOB_CONTROLLER, "only dind-daemon"),
        (job_pod(name="other"), JOB_CONTROLLER, "only dind-daemon"),
        (pod(securityContext={"privileged": True}), JOB_CONTROLLER, "only dind-daemon"),
    ):
        assert message in tried(body, user), body
    spec = {"template": {"spec": {**pod()["spec"], "restartPolicy": "Never"}}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "tried"}, "spec": spec}
    assert "only the Agent may create Jobs" in tried(job)
    shell(f"kubectl --namespace {TEAM} run debugged --image busybox")
    debug = f"kubectl --namespace {TEAM} debug debugged --image busybox --profile sysadmin || true"
    assert "no privileged debug containers" in shell(debug)


@pytest.mark.parametrize(
    ("rule", "refused", "message", "admitted"),
    [
        (
            "node-pool-rule",
            pod(),
            "only on the nodes",
            pod(nodeSelector={"dedicated": "containers"}),
        ),
        ("gvisor-rule", job_pod(), "only gVisor", job_pod("gvisor_sidecar")),
    ],
    ids=["node pool", "gVisor"],
)
def test_a_rule_more(
    team: Namespace, rule: str, refused: Body, message: str, admitted: Body
) -> None:
    """Added to the policy of the page."""
    added = [
        {"op": "add", "path": "/spec/validations/-", "value": yaml.safe_load(example(rule))[0]}
    ]
    shell(
        f"kubectl patch validatingadmissionpolicy {TEAM} --type json --patch {shlex.quote(json.dumps(added))}"
    )
    try:
        wait_for(
            lambda: message in tried(refused, JOB_CONTROLLER), "the rule is in force", timeout=60
        )
        assert "created" in tried(admitted, JOB_CONTROLLER)
    finally:
        readme("kubectl apply --filename admission-policy.yaml", POLICY)
