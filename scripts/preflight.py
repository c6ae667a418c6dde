"""Check the setup for registering the flow and running it on Kubernetes; changes nothing.

`make preflight` runs it. The environment is that of `flows.settings`, of Prefect, and KUBECONFIG.
"""

import sys

from scripts import given
from scripts.base import NAME, root_cause
from scripts.checks.check import Check, CheckFailed, Finding, Forbidden, Setup
from scripts.checks.job import job_is_admitted
from scripts.checks.kubernetes_api import Refused
from scripts.checks.namespace import (
    agent_has_its_rights,
    cluster_answers,
    daemon_config_is_usable,
    deployed_objects_exist,
    logins_are_usable,
    namespace_exists,
    needed_objects_exist,
)
from scripts.checks.registration import (
    agent_asks_for_runs,
    engine_answers,
    prefect_answers,
    settings_are_valid,
)

PARAMETERS = ("NAMESPACE", "SERVICE_ACCOUNT", "PROJECT")
BLOCKING = ("wrong", "not checked")  # outcomes without which a later check cannot look

CHECKS = (
    Check(name="settings", look=settings_are_valid),
    Check(name="engine", look=engine_answers),
    Check(
        name="cluster",
        look=cluster_answers,
        remedy="start it, or choose another one: KUBECONFIG, kubectl config use-context",
    ),
    Check(
        name="namespace",
        look=namespace_exists,
        needs=("cluster",),
        remedy="kubectl apply -k deploy makes it; or give another NAMESPACE",
    ),
    Check(
        name="Job",
        look=job_is_admitted,
        needs=("settings", "namespace"),
        remedy="correct the template (JOB_TEMPLATE)",
    ),
    Check(
        name="needed objects",
        look=needed_objects_exist,
        needs=("Job",),
        remedy="create them in {namespace}, or correct the template",
    ),
    Check(
        name="Agent's rights",
        look=agent_has_its_rights,
        needs=("namespace",),
        remedy=(
            "kubectl apply -k deploy makes its account and its Role; "
            "or give its own account as SERVICE_ACCOUNT"
        ),
    ),
    Check(name="protection", look=deployed_objects_exist, needs=("namespace",)),
    Check(
        name="ConfigMap",
        look=daemon_config_is_usable,
        needs=("settings", "namespace"),
        remedy=f"kubectl edit configmap {NAME} --namespace {{namespace}}",
    ),
    Check(
        name="Secret",
        look=logins_are_usable,
        needs=("namespace",),
        remedy=(
            f"kubectl delete secret {NAME} --namespace {{namespace}} && "
            f"kubectl create secret docker-registry {NAME} --namespace {{namespace}} …"
        ),
    ),
    Check(
        name="Prefect",
        look=prefect_answers,
        remedy="start it, or set PREFECT__CLOUD__API; prefect backend, prefect auth login",
    ),
    Check(name="Agent", look=agent_asks_for_runs, needs=("settings", "Prefect")),
)


def main() -> None:
    """Run every check, print a line on each, and exit with 0 if and only if nothing is wrong."""
    try:
        place = given.parameters("preflight", PARAMETERS)
    except given.UnknownParameter as error:
        sys.exit(f"preflight: {error}")
    setup = Setup(
        namespace=place.get("NAMESPACE") or "flows",
        account=place.get("SERVICE_ACCOUNT") or "prefect-agent",
        project=place.get("PROJECT", ""),
    )
    outcomes: dict[str, str] = {}
    for check in CHECKS:
        blocked = [name for name in check.needs if outcomes[name] in BLOCKING]
        outcome = "not checked"
        text = f"it needs {' and '.join(blocked)}"
        if not blocked:
            outcome, text = _look(check, setup)
        outcomes[check.name] = outcome
        print(f"{outcome:13}{check.name:17}{' '.join(text.split())}")
    wrong = list(outcomes.values()).count("wrong")
    if wrong:
        sys.exit(f"preflight: {wrong} wrong")


def _look(check: Check, setup: Setup) -> tuple[str, str]:
    """The outcome of a check, and what to say: a line, whatever a file or an answer holds."""
    try:
        return "fine", check.look(setup)
    except Exception as error:
        finding = _finding(error)
    remedy = finding.remedy
    if not remedy and isinstance(finding, CheckFailed):
        remedy = check.remedy.format(namespace=setup.namespace, account=setup.account)
    if not remedy and isinstance(finding, Forbidden):
        remedy = "have an admin run make preflight"
    if remedy:
        return finding.outcome, f"{finding} → {remedy}"
    return finding.outcome, str(finding)


def _finding(error: Exception) -> Finding:
    """What an error means: it may be a finding, a refusal of the API server, or anything else."""
    if isinstance(error, Finding):
        return error
    if isinstance(error, Refused) and error.status == 403:
        return Forbidden(str(error))
    cause = root_cause(error)
    return CheckFailed(str(cause) or type(cause).__name__)


if __name__ == "__main__":
    main()
