"""The Job of a run: the Agent's own code makes it, and the API server tries it."""

from types import SimpleNamespace
from typing import Any

import prefect
from prefect.agent.kubernetes import KubernetesAgent
from prefect.run_configs import KubernetesRun
from prefect.storage import Docker
from prefect.utilities.graphql import GraphQLResult

from flows.settings import Settings
from scripts.checks.changes import changes_of_job, changes_of_pod
from scripts.checks.check import CheckFailed, Forbidden, Setup, Unsure
from scripts.checks.kubernetes_api import Refused, namespaced

TTL = 120  # the Agent looks at Jobs once a minute; one that has gone by then cannot fail its run
CONTROLLERS = ("kube-system", "job-controller")  # who creates the pods of Jobs
DRY_RUN = {"dryRun": "All", "fieldValidation": "Strict"}
FIND_WEBHOOK = (
    "exempt these pods from what does it: "
    "kubectl get mutatingwebhookconfigurations; kubectl get mutatingadmissionpolicies"
)


def job_is_admitted(setup: Setup) -> str:
    """The API server admits the Job and its pod, and changes nothing that the run needs."""
    path = setup.settings.job_template_path
    if path:
        raise Unsure(
            f"the Agent reads {path} at each run; "
            "give a copy of that file as JOB_TEMPLATE to check it"
        )
    job = _render(setup.settings)
    setup.pod = job["spec"]["template"]
    answer = _try_job(setup, job)
    _refuse_changes(changes_of_job(job["spec"], answer["spec"]))
    _check_time_to_live(answer["spec"])
    pod = _try_pod(setup, answer)
    _refuse_changes(changes_of_pod(setup.pod["spec"], pod["spec"]))
    return f"{setup.namespace!r} admits the Job and its pod (a dry run; neither was created)"


def _render(settings: Settings) -> Any:
    """The Job, with what the Agent's own code needs of an Agent and of a run to make it."""
    storage = Docker(
        registry_url=settings.registry_url,
        image_name=settings.image_name,
        image_tag=settings.image_tag,
    )
    flow = {
        "id": "preflight",
        "core_version": prefect.__version__,
        "storage": storage.serialize(),
    }
    agent: Any = SimpleNamespace(
        env_vars={},
        labels=[],
        log_to_cloud=True,
        flow_run_api_key=None,
        service_account_name=None,
        image_pull_secrets=None,
        _get_run_config=lambda *_: KubernetesRun(job_template=settings.job_template),
    )
    run = GraphQLResult(id="preflight", flow=GraphQLResult(flow))
    return KubernetesAgent.generate_job_spec(agent, run)


def _try_job(setup: Setup, job: Any) -> Any:
    """The API server's answer to the Job: to the Agent if the user may ask as the Agent."""
    here = setup.namespace
    user = ""
    if setup.api.may_impersonate(here, setup.account) and _agent_may_create_jobs(setup):
        user = setup.agent
    elif not setup.api.may("create", "jobs", here, group="batch"):
        raise Forbidden(f"you may neither create Jobs in {here!r} nor ask as {setup.agent}")
    return _try(setup, f"/apis/batch/v1/{namespaced(here)}/jobs", job, user)


def _agent_may_create_jobs(setup: Setup) -> bool:
    try:
        return setup.api.account_may("create jobs", setup.namespace, setup.account)
    except Refused:  # the check of the Agent's rights says so
        return False


def _try_pod(setup: Setup, job: Any) -> Any:
    """The API server's answer to the Job's pod: Pod Security and quotas do not look at Jobs."""
    here = setup.namespace
    template = job["spec"]["template"]
    metadata = {"generateName": "preflight-"}
    for name in ("labels", "annotations", "finalizers"):
        if name in template["metadata"]:
            metadata[name] = template["metadata"][name]
    user = ""
    if setup.api.may_impersonate(*CONTROLLERS):
        user = f"system:serviceaccount:{':'.join(CONTROLLERS)}"
    elif not setup.api.may("create", "pods", here):
        raise Forbidden(
            f"you may not create pods in {here!r}: the Job is fine, its pod was not tried"
        )
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    return _try(setup, f"/api/v1/{namespaced(here)}/pods", pod, user)


def _try(setup: Setup, path: str, body: Any, user: str) -> Any:
    """A dry run. Raises what a refusal means, which depends on who was refused."""
    try:
        return setup.api.post(path, body, user, **DRY_RUN)
    except Refused as refused:
        seen = str(refused)
    if "does not support dry run" in seen:
        raise Unsure(f"a dry run is not possible here: {seen}")
    if " cannot create resource " in seen:
        raise Forbidden(seen)
    if "violates PodSecurity" in seen:
        label = "pod-security.kubernetes.io/enforce=privileged"
        raise CheckFailed(seen, f"kubectl label --overwrite namespace {setup.namespace} {label}")
    if "RuntimeClass" in seen and "not found" in seen:
        raise CheckFailed(seen, "install its runtime, or use another JOB_TEMPLATE")
    if "exceeded quota" in seen:
        raise CheckFailed(seen, "use another NAMESPACE, or have that allowed")
    if "ValidatingAdmissionPolicy" in seen or "denied the request" in seen:
        if user:
            raise CheckFailed(seen, "correct the template (JOB_TEMPLATE), or have that allowed")
        raise Unsure(
            f"{seen}. That is for you; it may not be for the Agent",
            f"have somebody check it who may impersonate {setup.agent}",
        )
    raise CheckFailed(seen)


def _refuse_changes(changes: list[str]) -> None:
    if changes:
        raise CheckFailed(
            f"the cluster changes what is asked for: {'; '.join(changes)}", FIND_WEBHOOK
        )


def _check_time_to_live(spec: Any) -> None:
    seconds = spec.get("ttlSecondsAfterFinished")
    if seconds is not None and seconds < TTL:
        raise CheckFailed(
            f"ttlSecondsAfterFinished is {seconds}: "
            "a Job may go before the Agent has seen how it ended",
            f"leave it out, or set {TTL} or more",
        )
