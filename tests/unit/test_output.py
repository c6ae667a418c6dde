"""Docker's stream taken apart, and a bound on what a run's logs get of it."""

import itertools
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prefect
import psutil
import pytest
import requests
from prefect import Client, Flow
from prefect.utilities.configuration import set_temporary_config
from prefect.utilities.logging import LogManager

from flows.output import LINE_LENGTH, WAITING_BYTES, Batch, frames
from flows.tasks import WaitOnContainer
from tests.support.fake_docker import ID, FakeDocker, frame
from tests.support.prefect_api import FlowRun, PrefectAPI
from tests.support.waiting import wait_for

STREAM = (
    frame(1, b"out\n")
    + frame(2, b"")
    + frame(2, b"err\n")
    + frame(1, b"\0\1")
    + frame(0, b"x")
    + frame(2, b"")
)
PARTS = [(1, b"out\n"), (2, b""), (2, b"err\n"), (1, b"\0\1"), (1, b"x"), (2, b"")]
OUT, ERR = 1, 2
LONG = "語".encode() * 21_000


def test_frames_are_found_wherever_the_stream_is_cut() -> None:
    for first, second in itertools.combinations_with_replacement(range(len(STREAM) + 1), 2):
        chunks = [STREAM[:first], STREAM[first:second], STREAM[second:]]
        assert list(frames(chunks)) == PARTS


def test_frames_come_when_they_are_whole() -> None:
    chunks = iter([STREAM[:12], STREAM[12:]])
    assert next(frames(chunks)) == PARTS[0]
    assert next(chunks) == STREAM[12:], "it has not been read"
    assert list(frames([STREAM[:-1]])) == PARTS[:-1], "the stream breaks off"


def take_all(batch: Batch) -> list[tuple[int, str]]:
    """All that waits, with the lines that have not ended; texts of one stream in one."""
    texts: list[tuple[int, str]] = []
    while batch.blocks:
        texts += batch.take()
    groups = itertools.groupby(texts + batch.rest(), key=lambda text: text[0])
    return [(stream, "\n".join(text for _, text in group)) for stream, group in groups]


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ([], []),
        ([(OUT, b"")], []),
        ([(OUT, b"a\nb\n")], [(OUT, "a\nb")]),
        ([(OUT, b"\na\n\n")], [(OUT, "\na\n")]),
        ([(OUT, b"a"), (OUT, b"b\nc"), (OUT, b"d")], [(OUT, "ab\ncd")]),
        ([(OUT, b"a\r\nb\r"), (OUT, b"\nc\rd\r\n")], [(OUT, "a\nb\nd")]),
        (
            [(OUT, b"a\n"), (ERR, b"b\n"), (ERR, b"c\n"), (OUT, b"d\n")],
            [(OUT, "a"), (ERR, "b\nc"), (OUT, "d")],
        ),
        (
            [(OUT, b"a"), (ERR, b"b\n"), (OUT, b"c\n")],
            [(ERR, "b"), (OUT, "ac")],
        ),  # in the order of their ends
        ([(OUT, b"\xe2\x82"), (OUT, b"\xac\n")], [(OUT, "€")]),
        ([(OUT, b"\xff\xe2\x82\n")], [(OUT, "\ufffd\ufffd")]),
        (
            [(OUT, LONG[start : start + (1 << 14)]) for start in range(0, len(LONG), 1 << 14)],
            [(OUT, "語" * 21_000)],
        ),
        (
            [(ERR, b"\r%08d" % number * 10) for number in range(5000)],
            [(ERR, "00004999")],
        ),  # of a progress bar
    ],
    ids=range(12),
)
def test_texts(data: list[tuple[int, bytes]], texts: list[tuple[int, str]]) -> None:
    batch = Batch()
    for stream, piece in data:
        batch.add(stream, piece)
    assert take_all(batch) == texts


def test_a_line_is_taken_once_and_when_it_is_whole() -> None:
    batch = Batch()
    batch.add(OUT, b"a\nb")
    assert batch.take() == [(OUT, "a")]
    assert not batch.blocks
    batch.add(OUT, b"c\nd")
    assert batch.take() == [(OUT, "bc")]
    assert batch.rest() == [(OUT, "d")]
    assert batch.rest() == []


@pytest.mark.parametrize(("count", "fits"), [(80_000, True), (300_000, False)])
def test_what_is_too_much_is_dropped_from_the_middle_and_counted(count: int, fits: bool) -> None:
    batch, lines = Batch(), [f"line {number:09}" for number in range(count)]
    for line in lines:
        batch.add(OUT, f"{line}\n".encode())
    text = take_all(batch)[0][1].split("\n")
    notes = [line for line in text if "dropped" in line]
    if fits:
        assert text == lines
    else:
        [note] = notes
        kept, dropped = text.index(note), int(note[1:].split()[0].replace(",", ""))
        assert text[:kept] + text[kept + 1 :] == lines[:kept] + lines[kept + dropped :]
        assert kept + dropped < count, "the end is kept"
        assert 0.4 < kept / (len(text) - 1) < 0.6
    batch.add(OUT, b"a\nb\n")
    assert take_all(batch) == [(OUT, "a\nb")], "lines are whole again"


def test_however_much_comes_memory_is_bounded() -> None:
    """Also for empty lines on two streams in turn, which take more memory than they have bytes."""
    batch = Batch()
    tracemalloc.start()
    for stream in [OUT, ERR] * (WAITING_BYTES // 150):
        batch.add(stream, b"\n")
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 2 * WAITING_BYTES
    assert "lines dropped here" in str(take_all(batch))


def test_a_line_that_does_not_end_is_broken() -> None:
    batch = Batch()
    for _ in range(60):
        batch.add(OUT, b"x" * (1 << 14))
    [(_, text)] = take_all(batch)
    assert max(map(len, text.split("\n"))) <= LINE_LENGTH + (1 << 15)
    assert text.count("x") == 60 << 14


# ------------------------------------------------------------------- a run's logs, through Prefect's own client


@dataclass
class Uploads:
    """How Prefect's own client sends the logs of a run to its API."""

    run: FlowRun
    down: bool = False  # whether the API is
    sizes: list[int] = field(default_factory=list)  # in bytes

    def output(self) -> str:
        return "\n".join(log.message for log in self.run.logs)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Uploads]:
    """Uploads come more often than in a pod, and so does output: the ratio is about the same."""
    manager, send = LogManager(), requests.Session.send
    monkeypatch.setattr("flows.output.FLUSH_SECONDS", 0.03)
    monkeypatch.setattr(
        "flows.output.UPLOAD_SECONDS", 60
    )  # a busy machine takes a while for so much
    monkeypatch.setattr("prefect.utilities.logging.LOG_MANAGER", manager)
    monkeypatch.setattr("flows.output.LOG_MANAGER", manager)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))

    def see(
        session: requests.Session, request: requests.PreparedRequest, **options: Any
    ) -> requests.Response:
        if request.url.startswith(api.url) and b"write_run_logs" in request.body:
            uploads.sizes.append(len(request.body))
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


def megabytes(count: int, text: str) -> list[bytes]:
    """Output in lines of 1000 bytes, faster than it can be logged."""
    line = text.encode() * (1000 // len(text.encode())) + b"\n"
    return [frame(1, line) * 1000] * count


def test_uploads_are_well_below_what_prefect_server_refuses(uploads: Uploads) -> None:
    """Three containers write at once, in alphabets that take more bytes when they are sent."""

    def run(text: str) -> None:
        with prefect.context(context):
            run_container(*megabytes(20, text))

    context = prefect.context.copy()
    with ThreadPoolExecutor() as pool:
        list(pool.map(run, ("ж\U0001f40b", '"\\', "\0\x1b")))
    wait_for(
        lambda: uploads.output().count("exited with code 0") == 3,
        "the last logs arrive",
        uploads.output,
    )
    assert max(uploads.sizes) < 4_000_000
    assert uploads.output().count("\nthe end") == 3
    assert "lines dropped here" in uploads.output()


def test_an_api_that_is_down_while_the_container_writes(
    uploads: Uploads, recwarn: pytest.WarningsRecorder
) -> None:
    """Memory is bounded, and when the API is back the log says that lines were dropped."""
    process, grown, uploads.down = psutil.Process(), list[int](), True
    before = process.memory_info().rss

    def back() -> None:
        wait_for(lambda: len(uploads.sizes) > 1, "the API was asked again")
        grown.append(process.memory_info().rss - before)
        uploads.down = False
        wait_for(lambda: uploads.run.logs, "the API takes logs")

    run_container(*megabytes(100, "x"), back, frame(1, b"after it\n"))
    wait_for(
        lambda: "exited with code 0" in uploads.output(), "the last log arrives", uploads.output
    )
    assert grown[0] < 64 << 20
    assert max(uploads.sizes) < 3_500_000
    assert "lines dropped here" in uploads.output()
    assert "\nafter it\nthe end" in uploads.output()
