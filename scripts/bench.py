"""What the sidecar costs: `make bench` measures, and writes docs/benchmarks.json and docs/benchmarks.md.

Every ratio is between figures of one run, measured in turn, so that a slow moment of the machine meets both
sides. What needs the kind cluster is in tests/kubernetes/bench_cluster.py, which adds to the same file.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import docker
import psutil

from flows import tasks
from flows.settings import PROJECT, load_job_template
from scripts import run, sidecar

IMAGE = "prefecthq/prefect:1.4.1"
RESULTS = PROJECT / "docs" / "benchmarks.json"
SIZES = [1, 10, 100, 1000]  # MiB of output
ROUNDS = 10
COLUMNS = ["run_running", "image_pulled", "run_finished", "job_complete"]


def say(message: str) -> None:
    """Tell the user what is measured."""
    print(f"bench: {message}", flush=True)


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turn(count: int, **calls: Callable[[], object]) -> dict[str, list[float]]:
    """Time some calls, one after the other and in the opposite order every second time."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(count):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            found[name].append(seconds(calls[name]))
    return found


class _Steps(logging.Handler):
    """When each task started and finished, from Prefect's own log."""

    def __init__(self) -> None:
        super().__init__()
        self.started = 0.0
        self.found: dict[str, list[float]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.endswith("Starting task run..."):
            self.started = record.created
        elif "Finished task run" in message:
            self.found.setdefault(message.split("'")[1], []).append(record.created - self.started)


def in_process(daemon: docker.DockerClient) -> dict[str, Any]:
    """A flow run with its image there, against `docker run` on the same daemon."""
    steps = _Steps()
    logging.getLogger("prefect").addHandler(steps)
    environment = {**os.environ, "DOCKER_HOST": sidecar.DAEMON}
    floor = ["docker", "run", "--rm", IMAGE, "true"]
    found = in_turn(
        ROUNDS,
        docker_run=lambda: subprocess.run(floor, check=True, env=environment),
        flow_run=lambda: run.run(daemon, image=IMAGE, command="true"),
        importing=lambda: subprocess.run([sys.executable, "-c", "import flows.docker_sidecar"], check=True),
    )
    return {**found, "tasks": {name: spans for name, spans in steps.found.items() if name[0].isupper()}}


def daemon_ready(daemon: docker.DockerClient) -> dict[str, list[float]]:
    """From the start of the dind image to a daemon that answers: our arguments against the image's own."""
    image = load_job_template("docker_sidecar")["spec"]["template"]["spec"]["containers"][1]["image"]

    def start(*arguments: str) -> None:
        container = daemon.containers.run(
            image,
            list(arguments),
            detach=True,
            privileged=True,
            environment={"DOCKER_TLS_CERTDIR": "", "DOCKER_HOST": "tcp://127.0.0.1:2375"},
            labels=sidecar.LABELS,
        )
        try:
            sidecar.wait_until(lambda: container.exec_run(["docker", "version"]).exit_code == 0, "it answers")
        finally:
            container.remove(force=True, v=True)

    return in_turn(3, ours=lambda: start("dockerd", "--host=tcp://127.0.0.1:2375"), default=start)


def output(daemon: docker.DockerClient) -> list[dict[str, Any]]:
    """Wait on a container that has written a lot, and get its logs: Prefect's tasks against ours."""
    rows = []
    for size in SIZES:
        say(f"{size} MiB of output")
        script = (
            f"import sys; line = b'x' * 1023 + b'\\n'\nfor _ in range({size} * 1024): sys.stdout.buffer.write(line)"
        )
        container = daemon.containers.run(IMAGE, ["python", "-c", script], detach=True, labels=sidecar.LABELS)
        container.wait()
        row: dict[str, Any] = {"mib": size}
        for number in range(3):
            for how in ("throw_away", "library", "ours")[:: 1 if number % 2 else -1]:
                command = [sys.executable, "-m", "scripts.bench", how, container.id]
                done = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                row.setdefault(how, []).append(json.loads(done.stderr.splitlines()[-1]))
        container.remove()
        rows.append(row)
    return rows


def measure(how: str, container_id: str) -> None:
    """In a process of its own: read a container's output, and print seconds and MiB of growth to stderr."""
    client = docker.APIClient(base_url=sidecar.DAEMON, version="auto")
    at = {"container_id": container_id, "docker_server_url": sidecar.DAEMON}

    def read() -> None:
        if how == "throw_away":
            for _ in client.get(
                f"{client.base_url}/v{client.api_version}/containers/{container_id}/logs",
                params={"follow": True, "stdout": True, "stderr": True},
                stream=True,
            ).iter_content(chunk_size=None):
                pass
            return
        module = tasks if how == "ours" else tasks.prefect_docker
        module.WaitOnContainer().run(**at)
        module.GetContainerLogs().run(**at)

    before = psutil.Process().memory_info().rss
    spent = seconds(read)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": spent, "mib": max(0, peak - before) / 2**20}), file=sys.stderr)


def add(**results: Any) -> None:
    """Add results to those of this machine."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found.update(results)
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def spread(values: list[float]) -> str:
    """A median, and between what."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def times(values: list[float], floor: list[float]) -> float:
    """The median of the ratios round by round: a machine that is slow for a while is so for both sides."""
    return statistics.median(value / least for value, least in zip(values, floor))


def targets(found: dict[str, Any]) -> list[str]:
    """What was aimed at, against what was measured."""
    flow, ready = found["in_process"], found["daemon_ready"]
    above = statistics.median(flow["flow_run"]) - statistics.median(flow["docker_run"])
    over, faster = times(flow["flow_run"], flow["docker_run"]), times(ready["default"], ready["ours"])
    answers, growth = statistics.median(ready["ours"]), found["memory"]["ours"][-1]
    logs = [times(spent(row, "ours"), spent(row, "throw_away")) for row in found["output"]]
    sizes = f"{', '.join(map(str, SIZES[:-1]))} and {SIZES[-1]} MiB"
    rows = [
        (
            "a flow run, over `docker run`",
            "at most 1.5 s more, and 2 times",
            f"{above:.2f} s more, {over:.2f} times",
            above <= 1.5 and over <= 2,
        ),
        (
            "until the daemon answers",
            "under 2.5 s, 6 times faster",
            f"{answers:.2f} s, {faster:.1f} times faster",
            answers < 2.5 and faster >= 6,
        ),
        ("memory for 1000 MiB of output", "at most 64 MiB", f"{growth:.0f} MiB", growth <= 64),
        (
            f"time for {sizes} of output, over reading it once",
            "at most 1.3 times",
            ", ".join(f"{ratio:.2f}" for ratio in logs),
            max(logs) <= 1.3,
        ),
    ]
    if spans := found.get("spans"):
        cold, warm = times(spans["cold"], spans["floor"]), times(spans["warm"], spans["cold"])
        left = sum(row["left"] for row in found["many"])
        rows += [
            ("a Job, no layer on the node, over the floor", "at most 1.25 times", f"{cold:.2f} times", cold <= 1.25),
            ("a Job, layers on the node, over that", "under 0.4 times", f"{warm:.2f} times", warm < 0.4),
            ("pods left of up to 20 runs at once", "none", str(left), left == 0),
        ]
    lines = ["| | target | measured | |", "|---|---|---|---|"]
    return lines + [f"| {what} | {aim} | {seen} | {'met' if met else 'missed'} |" for what, aim, seen, met in rows]


def spent(row: dict[str, Any], how: str) -> list[float]:
    """The times that it took to read a container's output."""
    return [measured["seconds"] for measured in row[how]]


def report() -> str:
    """The results in Markdown."""
    found = json.loads(RESULTS.read_text())
    median = statistics.median
    flow, ready = found["in_process"], found["daemon_ready"]
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. Medians, and in brackets the least and the most; seconds unless it says otherwise.",
        f"Machine: {found['machine']}.",
        "",
        *targets(found),
        "",
        "Of an output of a few MiB a good part is read twice: its end is in the run's logs and in the task's result.",
        "And about 0.03 s go into asking what the container is and how it ended, whatever its output.",
        "",
        "## A flow run, against `docker run`",
        "",
        f"The image is there, the container does nothing; {len(flow['flow_run'])} times in turn.",
        "",
        "| | s |",
        "|---|---|",
        f"| `docker run --rm {IMAGE} true` | {spread(flow['docker_run'])} |",
        f"| the flow, in a process that has imported it | {spread(flow['flow_run'])} |",
        f"| importing it, in a new process | {spread(flow['importing'])} |",
        *(f"| of the flow: {name} | {spread(spans)} |" for name, spans in flow["tasks"].items()),
        "",
        "## Until the daemon answers",
        "",
        "| arguments of the dind image | s |",
        "|---|---|",
        f"| ours | {spread(ready['ours'])} |",
        f"| its own, TLS off | {spread(ready['default'])} |",
        "",
        "## A container that writes a lot",
        "",
        "To wait on it and to get its logs. Growth: of the process, at its peak, over what it had before.",
        "",
        "| output, MiB | Prefect's tasks: s | growth, MiB | ours: s | growth, MiB | read once: s |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["output"]:
        cells = [str(row["mib"])]
        for how in ("library", "ours"):
            cells += [spread(spent(row, how)), f"{median(m['mib'] for m in row[how]):.0f}"]
        lines.append(f"| {' | '.join([*cells, spread(spent(row, 'throw_away'))])} |")
    if "runs" in found:
        lines += ["", "## On the kind cluster", "", *_cluster(found)]
    return "\n".join(lines) + "\n"


def _cluster(found: dict[str, Any]) -> list[str]:
    """What tests/kubernetes/bench_cluster.py has measured."""
    spans, many = found["spans"], found["many"]
    lines = [
        f"Seconds from the Job's creation to its end, with {IMAGE} and a container that does nothing, "
        f"{len(spans['floor'])} times in turn:",
        "",
        "| | s |",
        "|---|---|",
        f"| a bare pod with the same two images, and `docker run` (the floor) | {spread(spans['floor'])} |",
        f"| ours, no layer on the node | {spread(spans['cold'])} |",
        f"| ours, layers on the node | {spread(spans['warm'])} |",
        "",
        "One run of each, those of [timeline.svg](timeline.svg); the published template with its first fault mended:",
        "",
        "| seconds after the Job's creation | run Running | image pulled | run finished | Job complete |",
        "|---|---|---|---|---|",
    ]
    for one in found["runs"]:
        never = f"not after {one['watched']} s"
        cells = [never if one[name] is None else f"{one[name]:.1f}" for name in COLUMNS]
        lines.append(f"| {one['name']} | {' | '.join(cells)} |")
    lines += [
        "",
        "| runs at once, on one node | all Jobs complete after, s | pods left |",
        "|---|---|---|",
    ]
    return lines + [f"| {row['runs']} | {row['seconds']:.1f} | {row['left']} |" for row in many]


def main() -> None:
    """Measure all that needs no cluster."""
    with sidecar.running() as daemon:
        daemon.images.pull(IMAGE)
        version = daemon.version()["Version"]
        memory = psutil.virtual_memory().total >> 30
        add(
            machine=f"{os.cpu_count()} cores, {memory} GiB, Linux {platform.release()}, Docker {version}, "
            f"Python {platform.python_version()}"
        )
        say("a flow run, against `docker run` (30 s)")
        add(in_process=in_process(daemon))
        say("until the daemon answers (a minute)")
        add(daemon_ready=daemon_ready(daemon))
        say("a container that writes a lot (6 minutes)")
        rows = output(daemon)
        growth = {how: [statistics.median(m["mib"] for m in row[how]) for row in rows] for how in ("library", "ours")}
        add(output=rows, memory={"output": SIZES, **growth})
    (PROJECT / "docs" / "benchmarks.md").write_text(report())
    say("written: docs/benchmarks.json, docs/benchmarks.md")


if __name__ == "__main__":
    measure(*sys.argv[1:]) if sys.argv[1:] else main()
