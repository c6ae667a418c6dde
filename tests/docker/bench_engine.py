"""What a run costs on this machine's engine: `make bench` runs this, `make test` does not."""

import os
import platform
import re
import subprocess
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from timeit import timeit

import docker
import prefect.tasks.docker
import pytest
from docker.models.containers import Container

import flows.tasks
from scripts.run import run
from tests.support.bench import ENGINE, OUTPUT, in_turn, publish, spread, table
from tests.support.containers import PREFECT_IMAGE
from tests.support.session import SESSION_LABELS

READERS = LIBRARY, OURS, ONCE = "Prefect's tasks", "these tasks", "reading it once"
pytestmark = pytest.mark.timeout(1800)


def test_a_flow_run_and_docker_run(engine: docker.DockerClient) -> None:
    command = ["docker", "run", "--rm", PREFECT_IMAGE, "true"]
    calls = {
        "`docker run`": lambda: timeit(lambda: subprocess.run(command, check=True), number=1),
        "the flow": lambda: timeit(
            lambda: run(engine, image=PREFECT_IMAGE, command="true"), number=1
        ),
    }
    assert run(engine, image=PREFECT_IMAGE, command="true").is_successful()
    cli, flow = in_turn(10, calls).values()
    targets = [("a flow run, more than `docker run`", 1.5, median(flow) - median(cli), "s")]
    targets.append(("a flow run, over `docker run`", 2, median(flow) / median(cli), "times"))
    rows = [
        [f"`{' '.join(command)}`", spread(cli)],
        ["the flow, in a process that has imported it", spread(flow)],
    ]
    origin = (
        "stand-ins"
        if any("airgap" in label for label in engine.images.get(PREFECT_IMAGE).labels)
        else "as published"
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    version = engine.version()["Version"]
    text = f"""{os.cpu_count()} cores, {memory} GiB, Linux {platform.release()}, Docker {version},
Python {platform.python_version()}, images: {origin}. The image is on the engine. Ten rounds."""
    publish(ENGINE, targets, text, *table(["", "s"], *rows))


def write_output(engine: docker.DockerClient, size: int) -> Container:
    """A container that has written some MiB, in lines of 1 KiB, and has exited."""
    script = f"import os\nfor _ in range({size} * 16): os.write(1, (b'x' * 1023 + b'\\n') * 64)"
    container = engine.containers.run(
        PREFECT_IMAGE, ["python", "-c", script], detach=True, labels=SESSION_LABELS
    )
    container.wait()
    return container


def test_output(engine: docker.DockerClient) -> None:
    """To wait on a container that has written a lot, and to get its logs."""
    rows, targets = [], []
    seconds: dict[str, list[float]] = {}
    for size in (1, 10, 100, 1024):
        container = write_output(engine, size)
        try:
            with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process each
                calls = {
                    reader: partial(pool.apply, read, (reader, container.id)) for reader in READERS
                }
                found = in_turn(3, calls)
        finally:
            container.remove(force=True)
        cells = []
        for reader in READERS:
            seconds[reader] = [spent for spent, _ in found[reader]]
            grown = [growth for _, growth in found[reader]]
            cells += [spread(seconds[reader]), spread(grown)]
            if reader == OURS:
                what = f"{size} MiB of output, growth of memory"
                targets.append((what, 8, median(grown), "MiB"))
        rows.append([str(size), *cells])
    ratio = median(seconds[OURS]) / median(seconds[ONCE])
    targets.append((f"1 GiB of output, {OURS} over {ONCE}", 1.15, ratio, "times"))
    text = """To wait on the container and to get its logs: seconds, and growth of the process's
memory. Three rounds. Up to 10 MiB, `GetContainerLogs` reads most of the output a second time."""
    head = ["MiB of output", *(f"{name}, {unit}" for name in READERS for unit in ("s", "MiB"))]
    publish(OUTPUT, targets, text, *table(head, *rows))


def read(reader: str, container_id: str) -> tuple[float, float]:
    """Read a container's output; returns seconds, and MiB that this process grew by.

    The process's own output is discarded.
    """

    def memory(field: str) -> float:
        return (
            int(re.findall(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])
            / 1024
        )

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    client, tasks = docker.from_env().api, flows.tasks if reader == OURS else prefect.tasks.docker
    before, started = memory("VmRSS"), time.perf_counter()
    if reader == ONCE:
        url = f"{client.base_url}/v{client.api_version}/containers/{container_id}/logs"
        for _ in client.get(url, params={"stdout": 1, "stderr": 1}, stream=True).iter_content(
            chunk_size=None
        ):
            pass
    else:
        for task in (tasks.WaitOnContainer(), tasks.GetContainerLogs()):
            task.run(container_id=container_id, docker_server_url=os.environ["DOCKER_HOST"])
    return time.perf_counter() - started, memory("VmHWM") - before
