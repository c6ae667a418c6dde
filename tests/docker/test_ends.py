"""A run's container runs once, and ends with its run: processes as in a pod, on a real daemon."""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker.models.containers import Container
from prefect.engine.state import Failed, Submitted

from flows.runs import LABEL, Run
from flows.states import SIGTERM_CAUSE
from tests.support.daemons import Daemon
from tests.support.prefect_api import FlowRun, PrefectAPI
from tests.support.run_processes import Process, RunProcesses, local_api
from tests.support.waiting import wait_for

pytestmark = pytest.mark.filterwarnings("ignore:No result handler")
POINTS = 3  # random points at which a run of each kind is ended
SPAN = 6  # seconds after the start of a run in which they are
FLOW = """
import os
from prefect import Flow
from prefect.executors import DaskExecutor, LocalDaskExecutor, LocalExecutor
from flows.states import fail_with_cause, handle_pod_lifecycle
from flows.tasks import CreateContainer, PullImage, StartContainer, WaitOnContainer

url = os.environ["DOCKER_HOST"]
with Flow(
    "ends", state_handlers=[handle_pod_lifecycle], terminal_state_handler=fail_with_cause
) as flow:
    pulled = PullImage(docker_server_url=url)(repository="{image}")
    for _ in range({containers}):
        container_id = CreateContainer(docker_server_url=url)(
            image_name="{image}", command=["sh", "-c", {script!r}], upstream_tasks=[pulled]
        )
        started = StartContainer(docker_server_url=url)(container_id=container_id)
        WaitOnContainer(docker_server_url=url)(container_id, upstream_tasks=[started])
flow.executor = {executor}
"""
FOREVER = "trap 'echo saving; exit' TERM; echo up; while :; do sleep 0.1; done"
EXECUTORS = {
    "one task at a time": "LocalExecutor()",
    "threads": "LocalDaskExecutor('threads', num_workers=4)",
    "processes": "LocalDaskExecutor('processes', num_workers=4)",
    "Dask in this process": "DaskExecutor(cluster_kwargs={'processes': False})",
    "Dask": "DaskExecutor(cluster_kwargs={'n_workers': 2, 'dashboard_address': None})",
}


@pytest.fixture
def api() -> Iterator[PrefectAPI]:
    with local_api() as api:
        yield api


@pytest.fixture
def processes(api: PrefectAPI, sidecar: Daemon, tmp_path: Path) -> Iterator[RunProcesses]:
    with RunProcesses(api, tmp_path / "flow.py", sidecar.url) as processes:
        yield processes
        for run_id in api.flow_runs:
            for container in containers_of(run_id, sidecar.client):
                container.remove(force=True)


def containers_of(run_id: str, client: docker.DockerClient) -> list[Container]:
    found: list[Container] = client.containers.list(
        all=True, filters={"label": f"{LABEL}={run_id}"}
    )
    return found


def running(run: FlowRun, client: docker.DockerClient) -> list[str]:
    found = containers_of(run.id, client)
    return [container.status for container in found if container.status == "running"]


def code(image: str, executor: str = "LocalExecutor()", script: str = FOREVER, n: int = 2) -> str:
    return FLOW.format(image=image, executor=executor, script=script, containers=n)


def reschedule(api: PrefectAPI, run: FlowRun) -> None:
    """Lazarus reschedules a run, and the Agent makes a second Job."""
    api.lose_heartbeats(run.id)
    api.set_state(run.id, Submitted("Submitted for execution", state=None))


def ends(process: Process, run: FlowRun, client: docker.DockerClient, within: float = 25) -> float:
    """Wait until a process has ended, and no container of its run runs; return how long it took."""
    began = time.monotonic()
    wait_for(lambda: process.poll() is not None, "the process ends", lambda: run, within)
    assert running(run, client) == [], run
    return time.monotonic() - began


@pytest.mark.timeout(300)
def test_a_rescheduled_run_whose_pods_start_together_runs_its_container_once(
    processes: RunProcesses, api: PrefectAPI, sidecar: Daemon, image: str
) -> None:
    gaps = [0, 0, 0.1, 0.3, 0.5, 1, 2, 3, 4, 5]
    pairs = []
    for gap in gaps:
        run = processes.create_run(code(image, script="sleep 3", n=1))
        reschedule(api, run)
        first = processes.start(run)
        time.sleep(gap)
        pairs.append((run, first, processes.start(run)))
    for run, first, second in pairs:
        assert (first.wait(120), second.wait(120)) == (0, 0), run
        assert run.state == "Success", run
        assert len(containers_of(run.id, sidecar.client)) == 1, run


def wait_until_it_runs(run: FlowRun) -> None:
    wait_for(lambda: run.state == "Running", "the run starts", lambda: run, 60)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("end", ["SIGTERM", "cancel"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_no_container_outlives_its_run(
    processes: RunProcesses,
    api: PrefectAPI,
    sidecar: Daemon,
    image: str,
    executor: str,
    end: str,
) -> None:
    for _ in range(POINTS):
        point = random.uniform(0, SPAN)  # noqa: S311 # no secret
        run = processes.create_run(code(image, EXECUTORS[executor]))
        process = processes.start(run)
        wait_until_it_runs(run)
        time.sleep(point)
        if end == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        else:
            api.cancel(run.id)
        seconds = ends(process, run, sidecar.client)
        print(f"{executor}, {end} after {point:.2f} s: ended in {seconds:.1f} s")
        expected = ("Failed", SIGTERM_CAUSE) if end == "SIGTERM" else ("Cancelled", run.message)
        assert (run.state, run.message) == expected, run


def test_a_start_that_is_on_the_way_at_an_early_end_comes_to_nothing(
    sidecar: Daemon, image: str
) -> None:
    """The process that has asked for it may be killed before Docker answers."""
    run = Run("on-the-way", {sidecar.url}, is_taken=True)
    sidecar.client.images.pull(image)
    sidecar.client.containers.create(image, "sleep 60", labels={LABEL: run.id})
    run.stop_containers()
    assert len(containers_of(run.id, sidecar.client)) == 1, "an ordinary end leaves it alone"
    run.is_ending_early = True
    run.stop_containers()
    assert containers_of(run.id, sidecar.client) == []


@pytest.mark.timeout(300)
def test_a_run_that_is_deleted_ends(
    processes: RunProcesses, api: PrefectAPI, sidecar: Daemon, image: str
) -> None:
    run = processes.create_run(code(image))
    process = processes.start(run)
    wait_for(lambda: running(run, sidecar.client), "the container runs", lambda: run, 60)
    api.delete(run.id)
    before = api.requests
    ends(process, run, sidecar.client, within=60)
    assert process.returncode == 0
    assert api.requests - before < 100


@pytest.mark.timeout(300)
@pytest.mark.parametrize("executor", ["one task at a time", "processes", "Dask in this process"])
def test_a_run_that_somebody_has_set_to_failed_ends(
    processes: RunProcesses, api: PrefectAPI, sidecar: Daemon, image: str, executor: str
) -> None:
    run = processes.create_run(code(image, EXECUTORS[executor]))
    process = processes.start(run)
    wait_for(lambda: running(run, sidecar.client), "a container runs", lambda: run, 60)
    api.set_state(run.id, Failed("by hand"))
    ends(process, run, sidecar.client, within=60)
    assert process.returncode == 0, "its Job is Complete: the Agent fails no restarted run for it"
    assert (run.state, run.message) == ("Failed", "by hand")


@pytest.mark.timeout(300)
def test_the_first_process_of_a_run_that_was_restarted_meanwhile_ends(
    processes: RunProcesses, api: PrefectAPI, sidecar: Daemon, image: str
) -> None:
    run = processes.create_run(code(image, n=1))
    first = processes.start(run)
    wait_for(lambda: running(run, sidecar.client), "the container runs", lambda: run, 60)
    api.set_state(run.id, Failed("by hand"))
    api.restart(run.id)
    api.set_state(run.id, Submitted("Submitted for execution"))
    second = processes.start(run)
    wait_for(lambda: first.poll() is not None, "the first process ends", lambda: run, 90)
    assert first.returncode == 0
    wait_for(lambda: len(running(run, sidecar.client)) == 1, "the second runs", lambda: run, 60)
    assert second.poll() is None
    assert run.state == "Running", run


@pytest.mark.timeout(300)
@pytest.mark.parametrize("moment", ["at the start", "while it runs", "at the exit", "any"])
def test_ten_seconds_without_what_is_behind_apollo(
    processes: RunProcesses, api: PrefectAPI, sidecar: Daemon, image: str, moment: str
) -> None:
    script = "echo first; sleep 4; echo last; exit 3"
    run = processes.create_run(code(image, script=script, n=1))
    process = processes.start(run)
    wait_for(lambda: run.state == "Running", "the process has the run", lambda: run, 60)
    if moment == "any":
        time.sleep(random.uniform(0, SPAN))  # noqa: S311 # no secret
    elif moment != "at the start":
        wait_for(lambda: running(run, sidecar.client), "the container runs", lambda: run, 60)
    if moment == "at the exit":
        wait_for(lambda: not running(run, sidecar.client), "it has ended", lambda: run, 60)
    api.is_broken = True
    time.sleep(10)
    api.is_broken = False
    assert process.wait(60) == 0
    assert run.state == "Failed", run
    assert "code 3" in str(run.message), run
    lines = "\n".join(str(log.message) for log in run.logs).split("\n")
    assert lines.count("first") == lines.count("last") == 1, lines
