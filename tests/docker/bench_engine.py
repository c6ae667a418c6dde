"""What a run costs on this machine's engine: `make bench` runs this, `make test` does not."""

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from timeit import timeit
from types import ModuleType

import docker
import prefect.tasks.docker
import pytest
from docker.models.containers import Container

import flows.tasks
from scripts.run import run
from tests.support.bench import ENGINE, OUTPUT, Target, in_turn, publish, spread, table
from tests.support.containers import PREFECT_IMAGE
from tests.support.session import SESSION_LABELS

LIBRARY = "Prefect's tasks"
OURS = "these tasks"
ONCE = "reading it once"
pytestmark = pytest.mark.timeout(1800)


def seconds(call: Callable[[], object]) -> float:
    return timeit(call, number=1)


def test_a_flow_run_and_docker_run(engine: docker.DockerClient) -> None:
    command = ["docker", "run", "--rm", PREFECT_IMAGE, "true"]

    def docker_run() -> None:
        subprocess.run(command, check=True)

    def flow_run() -> None:
        state = run(engine, image=PREFECT_IMAGE, command="true")
        assert state.is_successful()

    flow_run()  # once before it is measured
    found = in_turn(10, {"cli": partial(seconds, docker_run), "flow": partial(seconds, flow_run)})
    cli = median(found["cli"])
    flow = median(found["flow"])
    targets: list[Target] = [
        ("a flow run, more than `docker run`", 1.5, flow - cli, "s"),
        ("a flow run, over `docker run`", 2, flow / cli, "times"),
    ]
    rows = [
        [f"`{' '.join(command)}`", spread(found["cli"])],
        ["the flow, in a process that has imported it", spread(found["flow"])],
    ]
    publish(ENGINE, targets, conditions(engine), *table(["", "s"], *rows))


def conditions(engine: docker.DockerClient) -> str:
    """What this machine is, and what runs on it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    system = f"{os.cpu_count()} cores, {memory} GiB, Linux {platform.release()}"
    version = engine.version()["Version"]
    labels = engine.images.get(PREFECT_IMAGE).labels
    is_stand_in = any("airgap" in label for label in labels)
    origin = "stand-ins" if is_stand_in else "as published"
    return f"""{system}, Docker {version},
Python {platform.python_version()}, images: {origin}. The image is on the engine. Ten rounds."""


def write_output(engine: docker.DockerClient, size: int) -> Container:
    """A container that has written some MiB, in lines of 1 KiB, and has exited."""
    script = f"import os\nfor _ in range({size} * 16): os.write(1, (b'x' * 1023 + b'\\n') * 64)"
    container = engine.containers.run(
        PREFECT_IMAGE, ["python", "-c", script], detach=True, labels=SESSION_LABELS
    )
    container.wait()
    return container


@dataclass
class Reading:
    """What it took to read a container's output."""

    seconds: float
    growth: float  # of the memory of the process, in MiB


def read_by_tasks(tasks: ModuleType, container_id: str) -> None:
    for task in (tasks.WaitOnContainer(), tasks.GetContainerLogs()):
        task.run(container_id=container_id, docker_server_url=os.environ["DOCKER_HOST"])


def read_once(container_id: str) -> None:
    """Read what Docker sends, and make nothing of it."""
    client = docker.from_env().api
    url = f"{client.base_url}/v{client.api_version}/containers/{container_id}/logs"
    response = client.get(url, params={"stdout": 1, "stderr": 1}, stream=True)
    for _ in response.iter_content(chunk_size=None):
        pass


READERS: dict[str, Callable[[str], None]] = {
    LIBRARY: partial(read_by_tasks, prefect.tasks.docker),
    OURS: partial(read_by_tasks, flows.tasks),
    ONCE: read_once,
}


def measure_readers(container: Container) -> dict[str, list[Reading]]:
    """Read a container's output by each reader in turn, three times, in a process each."""
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        calls = {name: partial(pool.apply, read, (name, container.id)) for name in READERS}
        return in_turn(3, calls)


def test_output(engine: docker.DockerClient) -> None:
    """To wait on a container that has written a lot, and to get its logs."""
    rows = []
    targets: list[Target] = []
    for size in (1, 10, 100, 1024):
        container = write_output(engine, size)
        try:
            found = measure_readers(container)
        finally:
            container.remove(force=True)
        cells = []
        for readings in found.values():
            cells.append(spread([reading.seconds for reading in readings]))
            cells.append(spread([reading.growth for reading in readings]))
        rows.append([str(size), *cells])
        growth = median(reading.growth for reading in found[OURS])
        targets.append((f"{size} MiB of output, growth of memory", 8, growth, "MiB"))
    ours = median(reading.seconds for reading in found[OURS])
    once = median(reading.seconds for reading in found[ONCE])
    targets.append((f"1 GiB of output, {OURS} over {ONCE}", 1.15, ours / once, "times"))
    text = """To wait on the container and to get its logs: seconds, and growth of the process's
memory. Three rounds. Up to 10 MiB, `GetContainerLogs` reads most of the output a second time."""
    head = ["MiB of output"]
    for name in READERS:
        head += [f"{name}, s", f"{name}, MiB"]
    publish(OUTPUT, targets, text, *table(head, *rows))


def read(reader: str, container_id: str) -> Reading:
    """Read a container's output in this process, whose own output is discarded."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    memory = memory_of_this_process("VmRSS")
    started = time.perf_counter()
    READERS[reader](container_id)
    spent = time.perf_counter() - started
    return Reading(spent, memory_of_this_process("VmHWM") - memory)


def memory_of_this_process(field: str) -> float:
    """In MiB, now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    [kibibytes] = re.findall(rf"{field}:\s*(\d+) kB", status)
    return int(kibibytes) / 1024
