"""What a run costs on the cluster: `make bench` runs this, `make test` does not."""

from __future__ import annotations

import os
import re
import subprocess
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import docker
import kubernetes.client
import pytest
import yaml

from flows.settings import PROJECT, load_job_template
from scripts import cluster
from scripts.bench import IMAGE, in_turn, publish, spread, table
from tests.kubernetes.conftest import Namespace, Run
from tests.support.waiting import wait_for

Row = dict[str, float]  # of a run, its events in seconds after the Job was created
EVENTS = ("Running", "image pulled", "container exited", "Success", "flow ended", "daemon ended", "Complete")
LIMITS = {"docker_sidecar": {"Success": 0.77, "Complete": 0.92}, "native_sidecar": {"Success": 0.6, "Complete": 0.75}}
BASE = os.environ.get("BENCH_BASE", "9f27d3c")  # the commit with the job templates to compare with
COLD, WARM = "empty store", "layers in the store"
WATCHED = 60  # seconds that a Job is watched that does not end with its run
LABEL = "prefect.io/flow_run_id"
pytestmark = pytest.mark.timeout(5400)


def on_the_node(engine: docker.DockerClient, script: str) -> str:
    """Run a script on the cluster's node, and return its output."""
    status, output = engine.containers.get(cluster.NODE).exec_run(["sh", "-c", script])
    assert status == 0, output.decode()
    return str(output.decode())


def quiet(namespace: Namespace, engine: docker.DockerClient) -> None:
    """Wait until no run is left, and the node has no graph store and nothing to write."""
    namespace.batch.delete_collection_namespaced_job(namespace.name, propagation_policy="Background")
    pods = partial(namespace.core.list_namespaced_pod, namespace.name, label_selector=LABEL)
    wait_for(lambda: not pods().items, "no run is left", namespace.report, 120)
    on_the_node(engine, "rm -rf /var/lib/docker-sidecar-bench-*; sync")


@pytest.fixture
def measure(submit: Callable[..., Run], namespace: Namespace, engine: docker.DockerClient) -> Callable[..., Row]:
    """Run the flow on a template, and say when what happened."""

    def measure(template: dict[str, Any], again: bool = False, ends: bool = True, **parameters: Any) -> Row:
        if not again:
            quiet(namespace, engine)
        run = submit(template, command="true", **parameters)
        assert run.reaches("Success", "Failed").state == "Success", run.seen()
        created, complete = namespace.jobs[run.record.id][0][0], [run.job_ends()[1]] if ends else []
        if not ends:
            time.sleep(WATCHED)
        # from the node, for Kubernetes gives whole seconds
        containers = f"crictl ps --all --quiet --pod $(crictl pods --quiet --label {LABEL}={run.record.id})"
        seen = on_the_node(engine, f"crictl inspect $({containers})")
        ended = sorted(datetime.fromisoformat(f"{t}+00:00") for t in re.findall(r'finishedAt": "(2[^"]{25})', seen))
        run.logged("exited with code")

        def logged(pattern: str) -> datetime:
            return next(log.timestamp for log in run.record.logs if re.search(pattern, str(log.message)))

        states = {state.state: state.timestamp for state in run.record.states}
        times = [states["Running"], logged("(Downloaded newer image|Image is up to date) for")]
        times += [logged("exited with code"), states["Success"], *ended, *complete]
        assert len(times) == (7 if ends else 5), seen
        return {event: (at - created).total_seconds() for event, at in zip(EVENTS, times)}

    return measure


def on_node(name: str) -> dict[str, Any]:
    """A template whose graph store is on the node. One run at a time uses the store, so it needs no slots."""
    template = load_job_template(name)
    [store] = [v for v in template["spec"]["template"]["spec"]["volumes"] if v["name"] == "docker-graph-store"]
    store["hostPath"] = {"path": f"/var/lib/docker-sidecar-bench-{uuid.uuid4()}", "type": "DirectoryOrCreate"}
    del store["emptyDir"]
    return template


def floor(namespace: Namespace, engine: docker.DockerClient) -> Row:
    """Run native_sidecar's pod without an Agent, and with the Docker CLI in place of the flow."""
    quiet(namespace, engine)
    spec = on_node("native_sidecar")["spec"]["template"]["spec"]
    script = f"until docker version; do sleep 0.1; done; docker pull --quiet {IMAGE}; docker run --rm {IMAGE} true"
    spec["containers"][0].update(image=spec["initContainers"][0]["image"], command=["sh", "-ec", script])
    name, started = f"floor-{uuid.uuid4()}", time.monotonic()
    body = {"metadata": {"name": name, "labels": {LABEL: "floor"}}, "spec": spec}
    namespace.core.create_namespaced_pod(namespace.name, body)

    def ended() -> Any:
        statuses = namespace.core.read_namespaced_pod(name, namespace.name).status.container_statuses
        return statuses and statuses[0].state.terminated

    assert wait_for(ended, "the container has run", namespace.report, 120).exit_code == 0, namespace.report()
    spent = time.monotonic() - started
    namespace.core.delete_namespaced_pod(name, namespace.name)
    return {"Complete": spent}


def middle(rows: list[Row], event: str) -> float:
    return median(row[event] for row in rows)


def events(runs: dict[str, list[Row]]) -> list[str]:
    """A table of when what happened."""
    cells = [[name, *(spread([row[e] for row in rows if e in row]) for e in EVENTS)] for name, rows in runs.items()]
    return table(["seconds after the Job was created", *EVENTS], *cells)


def timeline(runs: dict[str, list[Row]]) -> list[str]:
    """The medians as a Gantt chart, drawn by Mermaid."""
    lines = ["```mermaid", '%%{init: {"gantt": {"leftPadding": 230}}}%%', "gantt"]  # room for the names
    lines += ["    dateFormat x", "    axisFormat %s s", "    tickInterval 10second"]
    for name, rows in runs.items():
        ends = [0, *(round(1000 * middle(rows, event)) for event in EVENTS if event in rows[0])]
        parts = [*zip(EVENTS, ends, ends[1:])]
        parts += [] if "Complete" in rows[0] else [("the Job has not ended", ends[-1], ends[-1] + 1000 * WATCHED)]
        lines += [f"    section {name}", *(f"    {what} : {start}, {end}" for what, start, end in parts)]
    return [*lines, "```"]


def test_one_run(measure: Callable[..., Row], namespace: Namespace, engine: docker.DockerClient) -> None:
    def cold_and_warm(name: str) -> list[Row]:
        template = on_node(name)
        return [measure(template, image=IMAGE), measure(template, again=True, image=IMAGE)]

    calls: dict[str, Callable[[], Any]] = {name: partial(cold_and_warm, name) for name in LIMITS}
    found = in_turn(5, {**calls, "floor": partial(floor, namespace, engine)})
    published = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
    options = [f"--registry-mirror={namespace.mirror()}", f"--insecure-registry={namespace.mirror()[7:]}"]
    published["spec"]["template"]["spec"]["containers"][1]["args"] = options
    runs = {"this flow on the published template": [measure(published, ends=False, image=IMAGE)]}
    least, targets = middle(found.pop("floor"), "Complete"), []
    for name, pairs in found.items():
        cold, warm = runs[f"{name}, {COLD}"], runs[f"{name}, {WARM}"] = [list(rows) for rows in zip(*pairs)]
        first, second = middle(cold, "Complete"), middle(warm, "Complete")
        targets.append((f"{name}, {COLD}, over the floor", 1.25, first / least, "times"))
        targets.append((f"{name}, {WARM}, over {COLD}", 0.4, second / first, "times"))
    version = kubernetes.client.VersionApi(namespace.api).get_code().git_version
    text = f"""Kubernetes {version}. {IMAGE}, the container runs `true`, the graph store is on the node. Five rounds;
the published template once, whose Job had not ended {WATCHED} s after the run. The floor is {least:.2f} s: the pod of
native_sidecar, in which the Docker CLI pulls and runs the image, not the flow. Each bar ends with its event."""
    publish("One run on the cluster", targets, text, *events(runs), *timeline(runs))


def test_the_templates_before_and_now(measure: Callable[..., Row]) -> None:
    calls = {}
    for name in LIMITS:
        show = ["git", "show", f"{BASE}:job_templates/{name}.yaml"]
        old = yaml.safe_load(subprocess.run(show, cwd=PROJECT, check=True, stdout=subprocess.PIPE).stdout)
        calls[f"{name}, {BASE}"] = partial(measure, old)
        calls[f"{name}, now"] = partial(measure, load_job_template(name))
    runs, targets, rest = in_turn(10, calls), [], []
    for name, limits in LIMITS.items():
        before, now = runs[f"{name}, {BASE}"], runs[f"{name}, now"]
        for event, limit in limits.items():
            ratio = middle(now, event) / middle(before, event)
            targets.append((f"{name}, until {event}, over {BASE}", limit, ratio, "times"))
        rest.append(f"{name} {spread([row['Complete'] - row['daemon ended'] for row in now])} s")
    text = f"""The templates of commit {BASE} and of now, with the flow of now and a small image. Ten rounds.
After the daemon has ended, kubelet and the Job controller now take: {", ".join(rest)}."""
    publish("The job templates before and now", targets, text, *events(runs))


def test_many_runs_at_once(submit: Callable[..., Run], namespace: Namespace) -> None:
    rows: list[list[str]] = []
    for name in LIMITS:
        for count in (1, 5, 10, 20):
            started = time.monotonic()
            for run in [submit(load_job_template(name), command="true") for _ in range(count)]:
                run.reaches("Success", timeout=600)
                run.job_ends(600)
            rows.append([name, str(count), f"{time.monotonic() - started:.1f}"])
    publish("Many runs at once, on one node", [], *table(["", "runs", "until all Jobs are complete, s"], *rows))
