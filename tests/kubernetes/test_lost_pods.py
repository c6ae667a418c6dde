"""A run with two pods, and a run that is deleted: on a real cluster, with a real Agent."""

from collections.abc import Iterator

import pytest

from flows.settings import load_job_template
from scripts import cluster
from tests.support.kubectl import kubectl
from tests.support.prefect_api import PrefectAPI
from tests.support.submitted_runs import FOREVER, Submit, SubmittedRun
from tests.support.templates import Template

LABEL = "docker-sidecar-tests-lost-pods"


@pytest.fixture
def waiting() -> Iterator[Template]:
    """A job template whose pods wait until the node gets a label."""
    template = load_job_template("native_sidecar")
    template["spec"]["template"]["spec"]["nodeSelector"] = {LABEL: "yes"}
    yield template
    kubectl(f"label node {cluster.NODE} {LABEL}-")


def complete_jobs(run: SubmittedRun) -> set[str]:
    """The names of a run's Jobs that were seen Complete."""
    names = set()
    for event in run.namespace.jobs.get(run.record.id, []):
        for condition in event.job.status.conditions or []:
            if condition.type == "Complete" and condition.status == "True":
                names.add(event.job.metadata.name)
    return names


@pytest.mark.timeout(600)
def test_a_run_with_two_pods_runs_its_container_once(
    submit: Submit, api: PrefectAPI, waiting: Template
) -> None:
    """Lazarus reschedules a run whose pod waits for a node, and the Agent makes a second Job."""
    run = submit(waiting, command=["sh", "-c", "echo ran; sleep 5"])
    run.wait(lambda: len(run.pods()) == 1, "the first pod waits", 120)
    run.reaches("Submitted")
    api.lose_heartbeats(run.record.id)
    run.wait(lambda: len(run.pods()) == 2, "the second pod waits", 180)
    kubectl(f"label node {cluster.NODE} {LABEL}=yes")
    run.succeeds("ran")
    run.wait(lambda: len(complete_jobs(run)) == 2, "both Jobs are Complete", 120)
    assert run.logs().splitlines().count("ran") == 1, run.seen()
    assert "Failed" not in [entry.state for entry in run.record.states], run.seen()
    assert run.record.state == "Success", run.seen()


def test_a_run_that_is_deleted_while_its_container_runs_ends(
    submit: Submit, api: PrefectAPI
) -> None:
    run = submit("native_sidecar", command=FOREVER)
    run.container_writes("up")
    api.delete(run.record.id)
    how, _ = run.job_ends(75)  # the process within a minute, and then the pod
    assert how == "Complete", run.seen()
