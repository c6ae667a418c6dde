"""What a run costs on the cluster: `make bench` runs this, `make test` does not."""

import json
import re
import time
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
from tests.support.bench import CLUSTER, COLD, MANY, in_turn, publish, spread, table
from tests.support.containers import PREFECT_IMAGE
from tests.support.kubectl import on_node
from tests.support.namespaces import Namespace
from tests.support.provided_cluster import SMALL_IMAGE
from tests.support.submitted_runs import Submit
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
pytestmark = pytest.mark.timeout(5400)


@pytest.fixture
def quiet(namespace: Namespace) -> Callable[[], None]:
    """Wait until no run is left, and the node has no store and nothing to write."""

    def quiet() -> None:
        namespace.batch.delete_collection_namespaced_job(
            namespace.name, propagation_policy="Background"
        )
        wait_for(lambda: not namespace.pods(LABEL), "no run is left", namespace.report, 120)
        on_node("sh", "-c", "rm -rf /var/lib/docker-sidecar-bench-*; sync")

    return quiet


@pytest.fixture
def measure(submit: Submit, namespace: Namespace, quiet: Callable[[], None]) -> Callable[..., Row]:
    """Run the flow on a template, and say when what happened."""

    def measure(template: dict[str, Any], again: bool = False, **parameters: Any) -> Row:
        if not again:
            quiet()
        run = submit(template, command="true", **parameters)
        run.succeeds()
        created = namespace.job_created(run.record.id)
        _, complete = run.job_ends()
        # from the node, for Kubernetes gives whole seconds
        containers = (
            f"crictl ps --all --quiet --pod $(crictl pods --quiet --label {LABEL}={run.record.id})"
        )
        seen = on_node("sh", "-c", f"crictl inspect $({containers})")
        ended = sorted(
            datetime.fromisoformat(f"{t}+00:00")
            for t in re.findall(r'finishedAt": "(2[^"]{25})', seen)
        )
        run.logged("exited with code")

        def logged(pattern: str) -> datetime:
            return next(
                log.timestamp for log in run.record.logs if re.search(pattern, str(log.message))
            )

        states = {state.state: state.timestamp for state in run.record.states}
        times = [states["Running"], logged("(Downloaded newer image|Image is up to date) for")]
        times += [logged("exited with code"), states["Success"], *ended, complete]
        assert len(times) == len(EVENTS), seen
        return {event: (at - created).total_seconds() for event, at in zip(EVENTS, times)}

    return measure


def template(name: str) -> dict[str, Any]:
    """A template; if it keeps its layers on the node, then in a folder of this run's own."""
    text, path = json.dumps(load_job_template(name)), "/var/lib/docker-sidecar"
    return dict(json.loads(text.replace(path, f"{path}-bench-{uuid.uuid4()}")))


def plain(namespace: Namespace, spec: dict[str, Any]) -> Row:
    """Run a Job without an Agent and without the flow."""
    name, started = f"plain-{uuid.uuid4()}", time.monotonic()
    pod = {"metadata": {"labels": {LABEL: name}}, "spec": {**spec, "restartPolicy": "Never"}}
    body = {
        "metadata": {"name": name, "labels": {LABEL: name}},
        "spec": {"backoffLimit": 0, "template": pod},
    }
    namespace.batch.create_namespaced_job(namespace.name, body)
    how, _ = wait_for(lambda: namespace.job_ended(name), "the Job has ended", namespace.report, 120)
    assert how == "Complete", namespace.report()
    return {"Complete": time.monotonic() - started}


def events(runs: dict[str, list[Row]]) -> list[str]:
    """A table of when what happened."""
    cells = [
        [name, *(spread([row[e] for row in rows if e in row]) for e in EVENTS)]
        for name, rows in runs.items()
    ]
    return table(["seconds after the Job was created", *EVENTS], *cells)


def middle(rows: list[Row], event: str) -> float:
    return median(row[event] for row in rows)


def timeline(runs: dict[str, list[Row]]) -> list[str]:
    """The medians as a Gantt chart, drawn by Mermaid."""
    lines = [
        "```mermaid",
        '%%{init: {"gantt": {"leftPadding": 230}}}%%',
        "gantt",
    ]  # room for the names
    lines += ["    dateFormat x", "    axisFormat %s s"]
    for name, rows in runs.items():
        ends = [0, *(round(1000 * middle(rows, event)) for event in EVENTS)]
        parts = zip(EVENTS, ends, ends[1:])
        lines += [
            f"    section {name}",
            *(f"    {what} : {start}, {end}" for what, start, end in parts),
        ]
    return [*lines, "```"]


def test_a_run_and_a_plain_job(
    measure: Callable[..., Row], namespace: Namespace, templates: list[str]
) -> None:
    image = f"{registry.REGISTRY}/{SMALL_IMAGE}"  # as the node calls it
    spec = {"containers": [{"name": "plain", "image": image, "command": ["true"]}]}
    calls: dict[str, Callable[[], Row]] = {
        name: partial(measure, template(name)) for name in templates
    }
    runs = in_turn(5, {**calls, "a plain Job": partial(plain, namespace, spec)})
    job = runs.pop("a plain Job")
    least = median(row["Complete"] for row in job)
    targets = [
        (f"{name}, Complete, more than a plain Job", 5, middle(runs[name], "Complete") - least, "s")
        for name in runs
    ]
    if "gvisor_sidecar" in runs:
        ratio = middle(runs["gvisor_sidecar"], "Success") / middle(
            runs["native_sidecar"], "Success"
        )
        targets.append(("gvisor_sidecar, until Success, over native_sidecar", 2, ratio, "times"))
    version = kubernetes.client.VersionApi(namespace.api).get_code().git_version
    text = f"""Kubernetes {version}, a small image, the container runs `true`. Five rounds. A plain Job with the same
image takes {spread([row["Complete"] for row in job])} s until it is Complete. Each bar ends with its event."""
    publish(CLUSTER, targets, text, *events(runs), *timeline(runs))


def test_the_first_pull(
    measure: Callable[..., Row],
    namespace: Namespace,
    quiet: Callable[[], None],
    templates: list[str],
) -> None:
    def floor() -> Row:
        """Pull and run by the Docker CLI, in native_sidecar's pod."""
        quiet()
        spec = template("native_sidecar")["spec"]["template"]["spec"]
        script = f"until docker version; do sleep 0.1; done; docker pull --quiet {PREFECT_IMAGE}; docker run --rm {PREFECT_IMAGE} true"
        spec["containers"][0].update(
            image=spec["initContainers"][0]["image"], command=["sh", "-ec", script]
        )
        return plain(namespace, spec)

    def cold_and_warm(name: str) -> list[Row]:
        job = template(name)
        rows = [measure(job, image=PREFECT_IMAGE)]
        return (
            [*rows, measure(job, again=True, image=PREFECT_IMAGE)]
            if name == "kept_layers"
            else rows
        )

    calls: dict[str, Callable[[], Any]] = {name: partial(cold_and_warm, name) for name in templates}
    found = in_turn(5, {**calls, "floor": floor})
    least, runs, targets = middle(found.pop("floor"), "Complete"), {}, []
    for name, pairs in found.items():
        runs[name], *warm = [list(rows) for rows in zip(*pairs)]
        if warm:
            [runs[f"{name}, again"]] = warm
            ratio = middle(warm[0], "Complete") / middle(runs[name], "Complete")
            targets.append((f"{name}, a second run over the first", 0.4, ratio, "times"))
        if name != "gvisor_sidecar":
            ratio = middle(runs[name], "Complete") / least
            targets.append((f"{name}, first pull, over the floor", 1.25, ratio, "times"))
    text = f"""{PREFECT_IMAGE}, the container runs `true`. Five rounds. The floor is {least:.2f} s: the pod of native_sidecar,
in which the Docker CLI pulls and runs the image, not the flow."""
    publish(COLD, targets, text, *events(runs), *timeline(runs))


def test_many_runs_at_once(submit: Submit, templates: list[str]) -> None:
    rows: list[list[str]] = []
    for name in templates:
        for count in (1, 5, 10, 20):
            started = time.monotonic()
            for run in [submit(name, command="true") for _ in range(count)]:
                run.reaches("Success", timeout=600)
                run.job_ends(600)
            rows.append([name, str(count), f"{time.monotonic() - started:.1f}"])
    publish(MANY, [], *table(["", "runs", "until all Jobs are complete, s"], *rows))
