"""What a run costs on the cluster: `make bench` runs this if there can be a cluster, and `make test` does not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from flows.settings import PROJECT
from scripts import bench, cluster
from tests.conftest import PREFECT
from tests.kubernetes.conftest import Namespace, Run
from tests.kubernetes.test_production import on_node_storage
from tests.support.waiting import wait_for

Submit = Callable[..., Run]
ROUNDS = 5
WATCHED = 90  # seconds, of a Job that never ends
EVENTS = ("daemon_ready", "run_running", "image_pulled", "container_finished", "run_finished", "job_complete")


def events(run: Run, namespace: Namespace) -> dict[str, float | None]:
    """When what happened, in seconds since the Job was created."""
    created = namespace.jobs[run.record.id][0][0]
    states = {state.state: state.timestamp for state in run.record.states}

    def logged(pattern: str) -> datetime | None:
        return next((log.timestamp for log in run.record.logs if re.search(pattern, str(log.message))), None)

    ended = namespace.job_ended(run.record.id)
    at = {
        "run_running": states.get("Running"),
        "image_pulled": logged("(Downloaded newer image|Image is up to date) for"),
        "container_finished": logged("exited with code"),
        "run_finished": states.get("Success") or states.get("Failed"),
        "job_complete": ended[1] if ended else None,
        "daemon_ready": daemon_ready(run, namespace),
    }
    return {name: (at[name] - created).total_seconds() if at[name] else None for name in EVENTS}


def daemon_ready(run: Run, namespace: Namespace) -> datetime | None:
    """When dockerd answered, if the Agent has not deleted the pod yet."""
    for pod in namespace.pods(run.record.id):
        log = namespace.core.read_namespaced_pod_log(pod.metadata.name, namespace.name, container="dind-daemon")
        if ready := re.search(r'time="([^"]+)" .*API listen on .*2375', log):
            return datetime.fromisoformat(ready[1][:26]).replace(tzinfo=timezone.utc)
    return None


def floor(template: dict[str, Any], namespace: Namespace) -> float:
    """Seconds that a bare pod takes with the template's images and volumes: no Agent, no flow, no gate."""
    pod = template["spec"]["template"]["spec"]
    _, daemon = pod["containers"]
    del daemon["command"]
    daemon["args"] = ["dockerd", "--host=tcp://127.0.0.1:2375", "--config-file=/config/daemon.json"]
    script = (
        f"until docker version; do sleep 0.1; done >/dev/null 2>&1; docker pull -q {PREFECT}; docker run {PREFECT} true"
    )
    client = {"name": "client", "image": daemon["image"], "command": ["sh", "-ec", script], "env": daemon["env"]}
    started = time.monotonic()
    name = namespace.core.create_namespaced_pod(
        namespace.name, {"metadata": {"generateName": "floor-"}, "spec": {**pod, "containers": [client, daemon]}}
    ).metadata.name

    def ended() -> Any:
        found = namespace.core.read_namespaced_pod(name, namespace.name)
        statuses = [s.state.terminated for s in found.status.container_statuses or [] if s.name == "client"]
        return statuses[0] if statuses else None

    terminated = wait_for(ended, "the container is run", namespace.report, 120)
    spent = time.monotonic() - started
    namespace.core.delete_namespaced_pod(name, namespace.name, grace_period_seconds=0)
    assert terminated.exit_code == 0
    return spent


def complete(run: Run, namespace: Namespace, name: str) -> dict[str, Any]:
    assert run.reaches("Success", "Failed").state == "Success", run.seen()
    run.job_ends()
    run.logged("exited with code")
    return {"name": name, "outcome": run.record.state, "watched": WATCHED, **events(run, namespace)}


@pytest.fixture
def quiet(namespace: Namespace, agent: str, engine: docker.DockerClient) -> Callable[[], None]:
    """Wait until no pod but the Agent's is there and the disk has nothing to write: a pull meets only itself."""

    def others() -> list[str]:
        names = [pod.metadata.name for pod in namespace.core.list_namespaced_pod(namespace.name).items]
        return [name for name in names if name != agent]

    def wait() -> None:
        namespace.batch.delete_collection_namespaced_job(namespace.name, propagation_policy="Background")
        wait_for(lambda: not others(), "all pods are gone", namespace.report, 120)
        script = "rm -rf /var/lib/docker-sidecar-*; sync"
        assert engine.containers.get(cluster.NODE).exec_run(["sh", "-c", script]).exit_code == 0

    return wait


@pytest.mark.timeout(2400)
def test_one_run(submit: Submit, namespace: Namespace, quiet: Callable[[], None]) -> None:
    """Cold, warm and the floor in turn, all on node storage; then the published template, which never ends."""
    spans: dict[str, list[float]] = {"floor": [], "cold": [], "warm": []}
    kept: dict[str, dict[str, Any]] = {}

    def bare() -> None:
        quiet()
        spans["floor"].append(floor(on_node_storage(), namespace))

    def ours() -> None:
        quiet()
        template = on_node_storage()
        for name in ("cold", "warm"):
            kept[name] = complete(submit(template, image=PREFECT, command="true"), namespace, name)
            spans[name].append(kept[name]["job_complete"])

    for number in range(ROUNDS):
        for measure in (bare, ours)[:: 1 if number % 2 else -1]:
            measure()
    quiet()
    template = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
    registry = namespace.mirror().partition("://")[2]
    daemon = template["spec"]["template"]["spec"]["containers"][1]
    daemon["args"] = [f"--insecure-registry={registry}", f"--registry-mirror=http://{registry}"]
    run = submit(template, image=PREFECT, command="true")
    run.reaches("Success", "Failed")
    run.logged("exited with code")
    end = namespace.jobs[run.record.id][0][0] + timedelta(seconds=WATCHED)
    wait_for(lambda: datetime.now(timezone.utc) > end, "it has been watched", run.seen, WATCHED)
    assert namespace.job_ended(run.record.id) is None
    published = {"name": "published", "outcome": "Success, and the Job never ends", "watched": WATCHED}
    bench.add(runs=[{**published, **events(run, namespace)}, kept["cold"], kept["warm"]], spans=spans)


@pytest.mark.timeout(1200)
def test_many_runs_at_once(submit: Submit, namespace: Namespace) -> None:
    rows = []
    for count in (1, 5, 10, 20):
        started = time.monotonic()
        runs = [submit(command="true") for _ in range(count)]
        for run in runs:
            run.reaches("Success", timeout=600)
            run.job_ends(600)
        spent = time.monotonic() - started
        for run in runs:
            run.wait(lambda run=run: not namespace.pods(run.record.id), "the pod is gone", 150)
        left = sum(len(namespace.pods(run.record.id)) for run in runs)
        rows.append({"runs": count, "seconds": spent, "left": left})
    bench.add(many=rows)
    (PROJECT / "docs" / "benchmarks.md").write_text(bench.report())
