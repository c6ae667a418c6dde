"""Measure what the sidecar costs, and write docs/benchmarks.md: `make bench`.

Figures that are compared are measured in turn, in one run, so that a slow moment of the machine meets all of them.
tests/kubernetes/bench_cluster.py measures what needs a cluster, and adds to the same page.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from timeit import timeit
from typing import Any, TypeVar

import docker
import prefect.tasks.docker

import flows.tasks
from flows.settings import PROJECT
from scripts.base import CACHE, DAEMON, LABELS, PREFECT, wait_until
from scripts.engine import running
from scripts.images import provide
from scripts.run import run

T = TypeVar("T")
IMAGE = PREFECT[0]
PAGE, SECTIONS = PROJECT / "docs" / "benchmarks.md", CACHE / "benchmarks.json"
READERS = LIBRARY, OURS, ONCE = "Prefect's tasks", "these tasks", "reading it once"


def in_turn(rounds: int, measure: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Call each function once a round, in the opposite order every second round, and return what each returned."""
    found: dict[str, list[T]] = {name: [] for name in measure}
    for number in range(rounds):
        for name in list(measure)[:: -1 if number % 2 else 1]:
            found[name].append(measure[name]())
    return found


def spread(values: list[float]) -> str:
    """The median and the range."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "never"


def table(*rows: list[str]) -> list[str]:
    """A table in Markdown, with an empty line before and after it; the first row is its head."""
    return ["", *(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]), ""]


def publish(title: str, targets: Sequence[tuple[str, float, float, str]], *lines: str) -> None:
    """Add a section to docs/benchmarks.md, and targets to its first table: what, at most how much, how much, unit."""
    sections = json.loads(SECTIONS.read_text()) if SECTIONS.exists() else {}
    sections[title] = targets, lines
    SECTIONS.write_text(json.dumps(sections))
    rows = [
        [what, f"at most {limit:g} {unit}", f"{value:.2f} {unit}", "met" if value <= limit else "**missed**"]
        for targets, _ in sections.values()
        for what, limit, value, unit in targets
    ]
    page = ["# Benchmarks", "", "Written by `make bench`: medians, with the range in brackets, in seconds."]
    page += table(["", "target", "measured", ""], *rows)
    page += [line for name, (_, text) in sections.items() for line in (f"## {name}", "", *text, "")]
    PAGE.write_text("\n".join(page).replace("\n\n\n", "\n\n").rstrip() + "\n", encoding="utf-8")


def flow_runs(engine: docker.DockerClient) -> None:
    """A flow run and `docker run`, with the image on the engine."""
    command = ["docker", "run", "--rm", IMAGE, "true"]
    calls = {
        "`docker run`": lambda: timeit(lambda: subprocess.run(command, check=True), number=1),
        "the flow": lambda: timeit(lambda: run(engine, image=IMAGE, command="true"), number=1),
    }
    cli, flow = in_turn(10, calls).values()
    targets = [("a flow run, more than `docker run`", 1.5, median(flow) - median(cli), "s")]
    targets.append(("a flow run, over `docker run`", 2, median(flow) / median(cli), "times"))
    rows = [[f"`{' '.join(command)}`", spread(cli)], ["the flow, in a process that has imported it", spread(flow)]]
    publish("A flow run and `docker run`", targets, "The image is on the engine. Ten rounds.", *table(["", "s"], *rows))


def daemon_starts(engine: docker.DockerClient) -> None:
    """From the start of a dind container until its daemon answers."""

    def start(host: str, *arguments: str) -> float:
        environment, started = {"DOCKER_TLS_CERTDIR": "", "DOCKER_HOST": host}, time.perf_counter()
        options: Any = {"detach": True, "privileged": True, "environment": environment, "labels": LABELS}
        container = engine.containers.run(DAEMON, list(arguments), **options)
        try:
            wait_until(lambda: container.exec_run(["docker", "version"]).exit_code == 0, "the daemon answers")
            return time.perf_counter() - started
        finally:
            container.remove(force=True, v=True)

    hosts = {"docker_sidecar": "tcp://127.0.0.1:2375", "native_sidecar": "unix:///var/run/docker.sock"}
    calls = {name: partial(start, host, "dockerd", f"--host={host}") for name, host in hosts.items()}
    found, targets = in_turn(3, {**calls, "the image's own": partial(start, hosts["docker_sidecar"])}), []
    for name in hosts:
        targets.append((f"until the daemon answers, {name}", 2.5, median(found[name]), "s"))
        ratio = median(found[name]) / median(found["the image's own"])
        targets.append((f"the same, over the image's own arguments, {name}", 0.17, ratio, "times"))
    rows = [[name, spread(values)] for name, values in found.items()]
    text = f"After the start of a container from {DAEMON}. Three rounds."
    publish("Until the daemon answers", targets, text, *table(["its arguments", "s"], *rows))


def outputs(engine: docker.DockerClient) -> None:
    """To wait on a container that has written a lot, and to get its logs."""
    rows, growth, targets = [], [], []
    for size in (1, 10, 100, 1000):
        script = f"import os\nfor _ in range({size} * 16): os.write(1, (b'x' * 1023 + b'\\n') * 64)"
        container = engine.containers.run(IMAGE, ["python", "-c", script], detach=True, labels=LABELS)
        try:
            container.wait()
            with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process for each reading
                found = in_turn(3, {reader: partial(pool.apply, read, (reader, container.id)) for reader in READERS})
        finally:
            container.remove(force=True)
        spent, grown = ({name: [pair[i] for pair in pairs] for name, pairs in found.items()} for i in (0, 1))
        rows.append([str(size), *(spread(by[reader]) for reader in READERS for by in (spent, grown))])
        growth.append([round(median(grown[reader])) for reader in (LIBRARY, OURS)])
        ratio = median(spent[OURS]) / median(spent[ONCE])
        targets.append((f"{size} MiB of output, {OURS} over {ONCE}", 1.3, ratio, "times"))
        targets.append((f"{size} MiB of output, growth of memory", 64, median(grown[OURS]), "MiB"))
    library, ours = map(list, zip(*growth))
    text = """To wait on the container and to get its logs: time, and growth of the process's memory. Three rounds.
Up to 10 MiB, `GetContainerLogs` reads most of the output a second time."""
    head = ["MiB of output", *(f"{name}, {unit}" for name in READERS for unit in ("s", "MiB"))]
    chart = ["```mermaid", "xychart-beta", f'    title "Growth of memory: {LIBRARY} (bars), {OURS} (line)"']
    chart += [f'    x-axis "MiB of output" [{", ".join(row[0] for row in rows)}]', '    y-axis "MiB"']
    chart += [f"    bar {library}", f"    line {ours}", "```"]
    publish("A container that writes a lot", targets, text, *table(head, *rows), *chart)


def read(reader: str, container_id: str) -> tuple[float, float]:
    """Read a container's output; returns seconds, and MiB that this process, whose own output is discarded, grew by."""

    def memory(field: str) -> float:
        return int(re.findall(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    client, tasks = docker.from_env().api, flows.tasks if reader == OURS else prefect.tasks.docker
    before, started = memory("VmRSS"), time.perf_counter()
    if reader == ONCE:
        url = f"{client.base_url}/v{client.api_version}/containers/{container_id}/logs"
        for _ in client.get(url, params={"stdout": 1, "stderr": 1}, stream=True).iter_content(chunk_size=None):
            pass
    else:
        for task in (tasks.WaitOnContainer(), tasks.GetContainerLogs()):
            task.run(container_id=container_id, docker_server_url=os.environ["DOCKER_HOST"])
    return time.perf_counter() - started, memory("VmHWM") - before


def main() -> None:
    """Measure what needs no cluster."""
    print("bench: about 5 minutes; starts privileged containers", flush=True)
    with running() as engine:
        provide(engine, IMAGE, DAEMON)
        assert run(engine, image=IMAGE, command="true").is_successful()
        SECTIONS.unlink(missing_ok=True)
        origin = "stand-ins" if any("airgap" in label for label in engine.images.get(IMAGE).labels) else "as published"
        versions = f"Docker {engine.version()['Version']}, Python {platform.python_version()}, images: {origin}."
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
        publish("The machine", [], f"{os.cpu_count()} cores, {memory} GiB, Linux {platform.release()}, {versions}")
        for measure in (flow_runs, daemon_starts, outputs):
            measure(engine)


if __name__ == "__main__":
    main()
