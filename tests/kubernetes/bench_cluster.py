"""What a run costs on the cluster: `make bench` runs this, `make test` does not."""

import re
import uuid
from collections.abc import Callable
from datetime import datetime
from functools import partial
from statistics import median
from typing import Any

import kubernetes.client
import pytest

from flows.settings import load_job_template
from scripts import registry
from tests.support.bench import CLUSTER, COLD, MANY, Target, in_turn, publish, spread, table
from tests.support.containers import PREFECT_IMAGE
from tests.support.kubectl import on_node
from tests.support.namespaces import Namespace
from tests.support.provided_cluster import SMALL_IMAGE
from tests.support.submitted_runs import Submit, SubmittedRun
from tests.support.waiting import wait_for

Row = dict[str, float]  # of a run, its events in seconds after the Job was created
EVENTS = (
    "Running",
    "image pulled",
    "container exited",
    "Success",
    "flow ended",
    "daemon ended",
    "Complete",
)
LABEL = "prefect.io/flow_run_id"
PLAIN = "a plain Job"
BY_HAND = "the Docker CLI"
AGAIN = "kept_layers, again"
STORE = "/var/lib/docker-sidecar"  # of kept_layers, on the node
pytestmark = pytest.mark.timeout(5400)


@pytest.fixture
def quiet(namespace: Namespace) -> Callable[[], None]:
    """Wait until no run is left, and the node has nothing to write."""

    def quiet() -> None:
        namespace.batch.delete_collection_namespaced_job(
            namespace.name, propagation_policy="Background"
        )
        wait_for(lambda: not namespace.pods(LABEL), "no run is left", namespace.report, 120)
        on_node("sync")

    return quiet


@pytest.fixture
def measure(submit: Submit, namespace: Namespace, quiet: Callable[[], None]) -> Callable[..., Row]:
    """Run the flow on a template, and say when what happened."""

    def measure(template: dict[str, Any], **parameters: Any) -> Row:
        quiet()
        run = submit(template, command="true", **parameters)
        run.succeeds()
        _, complete = run.job_ends()
        run.logged("xited with code")
        states = {state.state: state.timestamp for state in run.record.states}
        flow_ended, daemon_ended = ends_of_containers(run)
        times = {
            "Running": states["Running"],
            "image pulled": logged_at(run, "(Downloaded newer image|Image is up to date) for"),
            "container exited": logged_at(run, "xited with code"),
            "Success": states["Success"],
            "flow ended": flow_ended,
            "daemon ended": daemon_ended,
            "Complete": complete,
        }
        created = namespace.job_created(run.record.id)
        return {event: (time - created).total_seconds() for event, time in times.items()}

    return measure


def logged_at(run: SubmittedRun, pattern: str) -> datetime:
    """When the run first logged something like this."""
    for log in run.record.logs:
        if re.search(pattern, str(log.message)):
            return log.timestamp
    raise AssertionError(f"{pattern} is not in the logs: {run.seen()}")


def ends_of_containers(run: SubmittedRun) -> list[datetime]:
    """When the containers of a run's pod ended, from the node: Kubernetes gives whole seconds."""
    pod = f"$(crictl pods --quiet --label {LABEL}={run.record.id})"
    containers = f"$(crictl ps --all --quiet --pod {pod})"
    inspected = on_node("sh", "-c", f"crictl inspect {containers}")
    ended = re.findall(r'finishedAt": "(2[^"]{25})', inspected)
    return sorted(datetime.fromisoformat(f"{time}+00:00") for time in ended)


def plain(namespace: Namespace, spec: dict[str, Any]) -> Row:
    """Run a Job without an Agent and without the flow."""
    name = f"plain-{uuid.uuid4()}"
    labels = {LABEL: name}
    pod = {"metadata": {"labels": labels}, "spec": {**spec, "restartPolicy": "Never"}}
    body: Any = {
        "metadata": {"name": name, "labels": labels},
        "spec": {"backoffLimit": 0, "template": pod},
    }
    namespace.batch.create_namespaced_job(namespace.name, body)
    how, ended = wait_for(
        lambda: namespace.job_ended(name), "the Job has ended", namespace.report, 120
    )
    assert how == "Complete", namespace.report()
    return {"Complete": (ended - namespace.job_created(name)).total_seconds()}


def events(runs: dict[str, list[Row]]) -> list[str]:
    """A table of when what happened."""
    rows = []
    for name, measured in runs.items():
        cells = [spread([row[event] for row in measured if event in row]) for event in EVENTS]
        rows.append([name, *cells])
    return table(["seconds after the Job was created", *EVENTS], *rows)


def middle(rows: list[Row], event: str) -> float:
    return median(row[event] for row in rows)


def ratio(runs: dict[str, list[Row]], name: str, other: str, event: str) -> float:
    """How many times as long one takes as another, until an event."""
    return middle(runs[name], event) / middle(runs[other], event)


def test_a_run_and_a_plain_job(
    measure: Callable[..., Row], namespace: Namespace, templates: list[str]
) -> None:
    image = f"{registry.REGISTRY}/{SMALL_IMAGE}"  # as the node calls it
    spec = {"containers": [{"name": "plain", "image": image, "command": ["true"]}]}
    calls: dict[str, Callable[[], Row]] = {
        name: partial(measure, load_job_template(name)) for name in templates
    }
    calls[PLAIN] = partial(plain, namespace, spec)
    measure(load_job_template("kept_layers"))  # once before it is measured
    runs = in_turn(5, calls)
    targets: list[Target] = []
    for name in templates:
        more = middle(runs[name], "Complete") - middle(runs[PLAIN], "Complete")
        targets.append((f"{name}, Complete, more than {PLAIN}", 5, more, "s"))
    for name, limit in (("gvisor_sidecar", 2), ("kept_layers", 1.05)):
        if name in runs:
            times = ratio(runs, name, "native_sidecar", "Success")
            targets.append((f"{name}, until Success, over native_sidecar", limit, times, "times"))
    version = kubernetes.client.VersionApi(namespace.api).get_code().git_version
    text = f"""Kubernetes {version}, a small image, the container runs `true`.
Five rounds. kept_layers has the layer of an earlier run."""
    publish(CLUSTER, targets, text, *events(runs))


def test_the_first_pull(
    measure: Callable[..., Row],
    namespace: Namespace,
    quiet: Callable[[], None],
    templates: list[str],
) -> None:
    def by_hand() -> Row:
        """Pull and run by the Docker CLI, in native_sidecar's pod."""
        quiet()
        spec = load_job_template("native_sidecar")["spec"]["template"]["spec"]
        script = f"""
            until docker version; do sleep 0.1; done
            docker pull --quiet {PREFECT_IMAGE}
            docker run --rm {PREFECT_IMAGE} true
        """
        daemon_image = spec["initContainers"][0]["image"]
        spec["containers"][0].update(image=daemon_image, command=["sh", "-ec", script])
        return plain(namespace, spec)

    again: list[Row] = []

    def first_of_two() -> Row:
        """The first run on an empty store; the second one goes to ``again``."""
        job = load_job_template("kept_layers")
        quiet()
        on_node("rm", "-rf", STORE)
        first = measure(job, image=PREFECT_IMAGE)
        again.append(measure(job, image=PREFECT_IMAGE))
        return first

    calls: dict[str, Callable[[], Row]] = {
        name: partial(measure, load_job_template(name), image=PREFECT_IMAGE) for name in templates
    }
    calls["kept_layers"] = first_of_two
    runs = in_turn(5, {**calls, BY_HAND: by_hand})
    runs[AGAIN] = again
    targets = [
        (
            "native_sidecar, first pull, over the Docker CLI in the same pod",
            1.25,
            ratio(runs, "native_sidecar", BY_HAND, "Complete"),
            "times",
        ),
        (
            "kept_layers, a second run over the first",
            0.4,
            ratio(runs, AGAIN, "kept_layers", "Complete"),
            "times",
        ),
    ]
    text = f"""{PREFECT_IMAGE}, the container runs `true`. Five rounds. *{BY_HAND}* is a Job with
the pod of native_sidecar, in which the Docker CLI pulls and runs the image, and no flow does.
Most of a pull is unpacking, by the disk and the CPUs of the node: the ranges are wide."""
    publish(COLD, targets, text, *events(runs))


def seconds_until_all_end(runs: list[SubmittedRun]) -> float:
    """From the creation of the first Job to the end of the last one."""
    created, ended = [], []
    for run in runs:
        run.reaches("Success", timeout=600)
        ended.append(run.job_ends(600)[1])
        created.append(run.namespace.job_created(run.record.id))
    return (max(ended) - min(created)).total_seconds()


def test_many_runs_at_once(submit: Submit, templates: list[str]) -> None:
    counts = (1, 5, 10, 20)
    rows = []
    for name in templates:
        seconds = []
        for count in counts:
            runs = [submit(name, command="true") for _ in range(count)]
            seconds.append(f"{seconds_until_all_end(runs):.1f}")
        rows.append([name, *seconds])
    text = """Seconds from the creation of the first Job to the end of the last one, on one node.
One round. Before that, the Agent looks for runs every 0.25 to 10 s."""
    publish(MANY, [], text, *table(["runs", *map(str, counts)], *rows))
