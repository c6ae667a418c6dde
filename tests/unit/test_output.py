"""Output on its way to a run's logs: whole lines, a bound, uploads that Prefect Server takes."""

import itertools
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prefect
import psutil
import pytest
import requests
from prefect import Client, Flow
from prefect.utilities import logging as prefect_logging
from prefect.utilities.configuration import set_temporary_config

from flows.output import (
    BLOCK_BYTES,
    LINE_BYTES,
    STDERR,
    STDOUT,
    SYSTEM,
    WAITING_BLOCKS,
    OutputLog,
    as_sent,
    newest_lines,
    record_as_sent,
)
from flows.tasks import WaitOnContainer
from tests.support.fake_docker import ID, FakeDocker, frame
from tests.support.prefect_api import FlowRun, PrefectAPI
from tests.support.waiting import wait_for

LONG_LINE = "語".encode() * 21_000
PARTS_OF_LONG_LINE = [LONG_LINE[start : start + 10_000] for start in range(0, 63_000, 10_000)]
DROPPED = "lines dropped here"


class Logger:
    """Keeps what is logged: level and text."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, str]] = []

    def info(self, text: str) -> None:
        self.logged.append(("info", text))

    def warning(self, text: str) -> None:
        self.logged.append(("warning", text))

    def lines(self) -> list[str]:
        return [line for _, text in self.logged for line in text.split("\n")]


def logged(*pieces: tuple[int, bytes]) -> list[tuple[str, str]]:
    """What is logged of some pieces of output, each at a time. Texts of one level are joined."""
    logger = Logger()
    log = OutputLog(logger, "Container c0ffee")
    for stream, data in pieces:
        log.add(stream, data)
        log.log_while_there_is_room()
    log.log_all()
    groups = itertools.groupby(logger.logged, key=lambda entry: entry[0])
    return [(level, "\n".join(text for _, text in group)) for level, group in groups]


# ------------------------------------------------------------------------------------- whole lines


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([b""], None),
        ([b"a\nb\n"], "a\nb"),
        ([b"\na\n\n"], "\na\n"),
        ([b"no newline"], "no newline"),
        ([b"a", b"b\nc", b"d"], "ab\ncd"),
        ([b"a\r\nb\r", b"\nc\rd\r\n"], "a\nb\nd"),
        ([b"\xe2\x82", b"\xac\n"], "€"),
        ([b"\xff\xe2\x82\n"], "\ufffd\ufffd"),
        ([b"a\0b\n"], "a\ufffdb"),
        (PARTS_OF_LONG_LINE, "語" * 21_000),
        ([b"\r%08d" % number * 10 for number in range(5000)], "00004999"),
    ],
    ids=[
        "nothing",
        "lines",
        "empty lines",
        "no newline",
        "a line in parts",
        "a carriage return in parts",
        "a character in parts",
        "not UTF-8",
        "NUL",
        "a long line in parts",
        "a progress bar",
    ],
)
def test_lines_are_whole(pieces: list[bytes], text: str | None) -> None:
    expected = [] if text is None else [("info", text)]
    assert logged(*((STDOUT, piece) for piece in pieces)) == expected


def test_stdout_and_stderr_are_in_the_order_of_their_ends() -> None:
    pieces = [(STDOUT, b"a\n"), (STDERR, b"b\n"), (STDERR, b"c\n"), (STDOUT, b"d\n")]
    assert logged(*pieces) == [("info", "a"), ("warning", "b\nc"), ("info", "d")]
    pieces = [(STDOUT, b"a"), (STDERR, b"b\n"), (STDOUT, b"c\n")]
    assert logged(*pieces) == [("warning", "b"), ("info", "ac")]


def test_what_is_wrong_with_the_output_names_the_container() -> None:
    assert logged((SYSTEM, b"it broke\n")) == [("warning", "Container c0ffee: it broke")]


def test_a_line_is_logged_once_and_when_it_is_whole() -> None:
    logger = Logger()
    log = OutputLog(logger, "")
    log.add(STDOUT, b"a\nb")
    log.log_while_there_is_room()
    assert logger.lines() == ["a"]
    log.add(STDOUT, b"c\nd")
    log.log_while_there_is_room()
    assert logger.lines() == ["a", "bc"]
    log.log_all()
    log.log_all()
    assert logger.lines() == ["a", "bc", "d"]


def test_a_line_that_does_not_end_is_broken() -> None:
    [(_, text)] = logged(*[(STDOUT, b"x" * BLOCK_BYTES)] * 60)
    assert max(map(len, text.split("\n"))) <= LINE_BYTES + BLOCK_BYTES
    assert text.count("x") == 60 * BLOCK_BYTES


# --------------------------------------------------------------------------------------- the bound


def one_stream(count: int) -> Iterator[tuple[int, bytes]]:
    return ((STDOUT, b"line %09d\n" % number) for number in range(count))


def two_streams(count: int) -> Iterator[tuple[int, bytes]]:
    return ((1 + number % 2, b"line %09d\n" % number) for number in range(count))


def as_from_a_terminal(count: int) -> Iterator[tuple[int, bytes]]:
    """Cut anywhere, and not where lines end."""
    data = b"".join(data for _, data in one_stream(count))
    return ((STDOUT, data[start : start + 10_007]) for start in range(0, len(data), 10_007))


@pytest.mark.parametrize("output", [one_stream, two_streams, as_from_a_terminal])
@pytest.mark.parametrize(("count", "fits"), [(4_000, True), (200_000, False)])
def test_the_newest_lines_survive(
    output: Callable[[int], Iterator[tuple[int, bytes]]], count: int, fits: bool
) -> None:
    logger = Logger()
    log = OutputLog(logger, "")
    for stream, data in output(count):
        log.add(stream, data)
    log.log_all()
    lines = [f"line {number:09}" for number in range(count)]
    found = logger.lines()
    if fits:
        assert found == lines
    else:
        assert DROPPED in found[0]
        assert found[2:] == lines[-len(found) + 2 :], "after the part of a line that was cut"
        assert len(found) > 4_000
    logger.logged.clear()
    log.add(STDOUT, b"a\nb\n")
    log.log_all()
    assert logger.lines() == ["a", "b"], "nothing was dropped since"


def test_lines_before_a_gap_are_not_joined_to_those_behind_it() -> None:
    logger = Logger()
    log = OutputLog(logger, "")
    log.add(STDOUT, b"half a li")
    log.log_while_there_is_room()
    for _ in range(WAITING_BLOCKS + 1):
        log.add(STDERR, b"x" * (BLOCK_BYTES - 1) + b"\n")
    log.add(STDOUT, b"whole\n")
    log.log_all()
    assert logger.logged[0] == ("info", "half a li")
    assert DROPPED in logger.logged[1][1]
    assert logger.logged[-1] == ("info", "whole")


@pytest.mark.parametrize("data", [b"\n", b"x" * 1_000_000], ids=["empty lines", "large pieces"])
def test_memory_is_bounded(data: bytes) -> None:
    """Empty lines on two streams in turn take more memory than they have bytes."""
    log = OutputLog(Logger(), "")
    tracemalloc.start()
    for stream in [STDOUT, STDERR] * 20_000 if len(data) == 1 else [STDOUT] * 20:
        log.add(stream, data)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 2 * WAITING_BLOCKS * BLOCK_BYTES


# ------------------------------------------------------------------------------------ what is sent


@pytest.mark.parametrize("text", ["plain\n", 'say "\\n"', "ж語", "\U0001f40b", "\x1b\0", ""])
def test_text_is_counted_as_prefects_client_sends_it(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    sent: list[Any] = []

    def keep(session: requests.Session, *_: Any, json: Any, **__: Any) -> requests.Response:
        sent.append(json)
        answer = requests.Response()
        answer.status_code = 200
        answer._content = b'{"data": {"write_run_logs": {"success": true}}}'
        return answer

    monkeypatch.setattr(requests.Session, "post", keep)
    for message in ("", text):
        Client(api_server="http://127.0.0.1:1").write_run_logs([{"message": message}])
    empty, full = [len(json.dumps(body)) for body in sent]
    assert full - empty == as_sent(text) - as_sent("")


def test_prefects_log_manager_counts_as_it_is_sent() -> None:
    assert prefect_logging.getlogsize is record_as_sent


def test_the_newest_lines_that_fit() -> None:
    lines = [f"line {number} ж" for number in range(1000)]
    text = "\n".join(lines)
    assert newest_lines(text, as_sent(text)) == text
    newest = newest_lines(text, 2_000)
    assert 1_900 < as_sent(newest) <= 2_000
    assert newest.split("\n") == lines[-newest.count("\n") - 1 :]


@pytest.mark.parametrize("end", ["", "\n"])
def test_of_one_long_line_the_end_fits(end: str) -> None:
    newest = newest_lines("x" * 5_000 + "\U0001f40b" * 5_000 + end, 2_000)
    assert 1_900 < as_sent(newest) <= 2_000
    assert set(newest) == {"\U0001f40b", *end}


# ------------------------------------------------------- a run's logs, through Prefect's own client


@dataclass
class Uploads:
    """How Prefect's own client sends the logs of a run to its API."""

    run: FlowRun
    down: bool = False  # whether the API is
    pause: Callable[[], object] = lambda: None  # what an upload waits for
    sizes: list[int] = field(default_factory=list)  # in bytes

    def output(self) -> str:
        return "\n".join(log.message for log in self.run.logs)

    def lines(self) -> list[str]:
        return self.output().split("\n")


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Uploads]:
    """Uploads come more often than in a pod, and so does output: the ratio is about the same."""
    manager = prefect_logging.LogManager()
    send = requests.Session.send
    monkeypatch.setattr("flows.watch.FLUSH_SECONDS", 0.03)
    monkeypatch.setattr("prefect.utilities.logging.LOG_MANAGER", manager)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))

    def see(
        session: requests.Session, request: requests.PreparedRequest, **options: Any
    ) -> requests.Response:
        if request.url.startswith(api.url) and b"write_run_logs" in request.body:
            uploads.sizes.append(len(request.body))
            uploads.pause()
            if uploads.down:
                raise requests.ConnectionError("the API is down")
        return send(session, request, **options)

    settings = {
        "backend": "server",
        "cloud.send_flow_run_logs": True,
        "cloud.logging_heartbeat": 0.2,
    }
    with PrefectAPI() as api, set_temporary_config({**settings, "cloud.api": api.url}):
        Client().create_project("demo")
        flow_id = Client().register(Flow("logs"), project_name="demo", build=False, no_url=True)
        uploads = Uploads(api.flow_runs[api.create_flow_run(flow_id)])
        monkeypatch.setattr(requests.Session, "send", see)
        with prefect.context(running_with_backend=True, flow_run_id=uploads.run.id):
            yield uploads
            manager.stop()


def run_container(*output: Any) -> None:
    with FakeDocker() as fake:
        fake.exited.clear()
        fake.streams = [[*output, frame(1, b"the end\n"), fake.exited.set]]
        WaitOnContainer(docker_server_url=fake.url).run(container_id=ID)


def run_containers(*outputs: list[Any]) -> None:
    """Run containers at once, as mapped tasks on threads do."""

    def run(output: list[Any]) -> None:
        with prefect.context(context):
            run_container(*output)

    context = prefect.context.copy()
    with ThreadPoolExecutor() as pool:
        list(pool.map(run, outputs))


def burst(name: str, text: str, megabytes: int) -> list[bytes]:
    """Numbered lines of about 1000 bytes each, faster than they can be logged."""
    filling = text * (990 // len(text.encode()))
    chunks = []
    for start in range(0, megabytes * 1000, 1000):
        lines = [f"{name} {number} {filling}\n" for number in range(start, start + 1000)]
        chunks.append(b"".join(frame(1, line.encode()) for line in lines))
    return chunks


def test_uploads_are_well_below_what_prefect_server_refuses(uploads: Uploads) -> None:
    """Three containers write at once, in alphabets that take more bytes when they are sent."""
    run_containers(*(burst("a", text, 20) for text in ("ж\U0001f40b", '"\\', "\0\x1b")))
    prefect_logging.LOG_MANAGER.stop()
    assert max(uploads.sizes) < 4_000_000
    assert uploads.output().count("Exited with code 0") == 3
    assert uploads.output().count("\nthe end") == 3
    assert DROPPED in uploads.output()


@pytest.mark.parametrize(("containers", "text"), [(1, "ж"), (4, "x")], ids=["Cyrillic", "ASCII"])
def test_the_end_is_never_lost_while_uploads_make_progress(
    uploads: Uploads, containers: int, text: str
) -> None:
    uploads.pause = lambda: time.sleep(0.3)
    names = [f"container-{number}" for number in range(containers)]
    run_containers(*(burst(name, text, 13) for name in names))
    prefect_logging.LOG_MANAGER.stop()
    for name in names:
        numbers = [int(line.split()[1]) for line in uploads.lines() if line.startswith(name)]
        assert numbers[-1000:] == list(range(12_000, 13_000))
    assert uploads.lines().count("the end") == containers
    assert max(uploads.sizes) < 4_500_000


def test_an_api_that_is_down_while_the_container_writes(
    uploads: Uploads, recwarn: pytest.WarningsRecorder
) -> None:
    """Memory is bounded, and when the API is back the log says that lines were dropped."""
    process = psutil.Process()
    grown: list[int] = []
    uploads.down = True
    before = process.memory_info().rss

    def back() -> None:
        wait_for(lambda: len(uploads.sizes) > 1, "the API was asked again")
        grown.append(process.memory_info().rss - before)
        uploads.down = False
        wait_for(lambda: uploads.run.logs, "the API takes logs")

    output = frame(1, b"x" * 999 + b"\n") * 1000
    run_container(*[output] * 100, back, frame(1, b"after it\n"))
    prefect_logging.LOG_MANAGER.stop()
    assert grown[0] < 64 << 20
    assert max(uploads.sizes) < 3_500_000
    assert DROPPED in uploads.output()
    assert "\nafter it\nthe end" in uploads.output()
