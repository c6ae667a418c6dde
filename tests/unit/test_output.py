"""Docker's stream taken apart, and a bound on what a run's logs get of it."""

from __future__ import annotations

import itertools
import json
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import prefect
import psutil
import pytest
import requests
from prefect.utilities.configuration import set_temporary_config
from prefect.utilities.logging import LogManager

from flows.output import LINE_LENGTH, WAITING_BYTES, Batch, as_sent, frames
from flows.tasks import WaitOnContainer
from tests.support.fake_docker import ID, FakeDocker, frame
from tests.support.waiting import wait_for

STREAM = frame(1, b"out\n") + frame(2, b"") + frame(2, b"err\n") + frame(1, b"\0\1") + frame(0, b"x") + frame(2, b"")
PARTS = [(1, b"out\n"), (2, b""), (2, b"err\n"), (1, b"\0\1"), (1, b"x"), (2, b"")]


@pytest.mark.parametrize("first", range(len(STREAM) + 1))
def test_frames_are_found_wherever_the_stream_is_cut(first: int) -> None:
    for second in range(first, len(STREAM) + 1):
        chunks = [STREAM[:first], STREAM[first:second], STREAM[second:]]
        assert list(frames(chunks, tty=False)) == PARTS


def test_frames_are_found_in_single_bytes_and_as_soon_as_they_are_whole() -> None:
    read = []
    chunks = (read.append(byte) or bytes([byte]) for byte in STREAM)  # type: ignore[func-returns-value]
    parts = frames(chunks, tty=False)
    assert next(parts) == PARTS[0]
    assert len(read) == len(frame(1, b"out\n"))
    assert list(parts) == PARTS[1:]


def test_a_stream_that_breaks_off_gives_its_whole_frames() -> None:
    assert list(frames([STREAM[:-1]], tty=False)) == PARTS[:-1]
    assert list(frames([], tty=False)) == []


def test_a_tty_has_no_frames() -> None:
    chunks = [STREAM[:5], STREAM[5:]]
    assert list(frames(chunks, tty=True)) == [(1, chunk) for chunk in chunks]


def take_all(batch: Batch) -> list[tuple[int, str]]:
    """All that waits, with the lines that have not ended; texts of one stream in one."""
    texts: list[tuple[int, str]] = []
    while batch.blocks:
        texts += batch.take()
    groups = itertools.groupby(texts + batch.rest(), key=lambda text: text[0])
    return [(stream, "\n".join(text for _, text in group)) for stream, group in groups]


def take(*data: tuple[int, bytes]) -> list[tuple[int, str]]:
    batch = Batch()
    for stream, piece in data:
        batch.add(stream, piece)
    return take_all(batch)


OUT, ERR = 1, 2


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ([], []),
        ([(OUT, b"")], []),
        ([(OUT, b"a\nb\n")], [(OUT, "a\nb")]),
        ([(OUT, b"\na\n\n")], [(OUT, "\na\n")]),
        ([(OUT, b"a"), (OUT, b"b\nc"), (OUT, b"d")], [(OUT, "ab\ncd")]),
        ([(OUT, b"a\r\nb\r"), (OUT, b"\nc\rd\r\n")], [(OUT, "a\nb\nd")]),
        ([(OUT, b"a\n"), (ERR, b"b\n"), (ERR, b"c\n"), (OUT, b"d\n")], [(OUT, "a"), (ERR, "b\nc"), (OUT, "d")]),
        ([(OUT, b"a"), (ERR, b"b\n"), (OUT, b"c\n")], [(ERR, "b"), (OUT, "ac")]),  # in the order of their ends
        ([(OUT, b"\xe2\x82"), (OUT, b"\xac\n")], [(OUT, "€")]),
        ([(OUT, b"\xff\xe2\x82\n")], [(OUT, "\ufffd\ufffd")]),
    ],
)
def test_texts(data: list[tuple[int, bytes]], texts: list[tuple[int, str]]) -> None:
    assert take(*data) == texts


def test_a_line_is_taken_once_and_when_it_is_whole() -> None:
    batch = Batch()
    batch.add(OUT, b"a\nb")
    assert batch.take() == [(OUT, "a")]
    assert not batch.blocks
    batch.add(OUT, b"c\nd")
    assert batch.take() == [(OUT, "bc")]
    assert batch.rest() == [(OUT, "d")]
    assert batch.rest() == []


def numbered(count: int) -> list[str]:
    return [f"line {number:09}" for number in range(count)]


@pytest.mark.parametrize("count", [10_000, 70_000, 100_000, 300_000])
def test_the_middle_is_dropped_and_counted(count: int) -> None:
    batch, lines = Batch(), numbered(count)
    for line in lines:
        batch.add(OUT, f"{line}\n".encode())
    text = "\n".join(text for _, text in take_all(batch)).split("\n")
    notes = [line for line in text if "dropped" in line]
    if count <= 70_000:
        assert text == lines
    else:
        [note] = notes
        kept, dropped = text.index(note), int(note[1:].split()[0].replace(",", ""))
        assert text[:kept] + text[kept + 1 :] == lines[:kept] + lines[kept + dropped :]
        assert kept + dropped < count, "the end is kept"
        assert 0.4 < kept / (len(text) - 1) < 0.6


@pytest.mark.parametrize("line", ["7", "", "\U0001f40b" * 100], ids=["short", "empty", "emoji"])
def test_what_fits_is_whole(line: str) -> None:
    """`seq 10000`, and the like: there is no other cost than that of the bytes."""
    batch, count = Batch(), WAITING_BYTES * 9 // 10 // len(f"{line}\n".encode())
    for _ in range(min(count, 50_000)):
        batch.add(OUT, f"{line}\n".encode())
    assert "\n".join(text for _, text in take_all(batch)).split("\n") == [line] * min(count, 50_000)


def test_after_a_gap_lines_are_whole_again() -> None:
    batch = Batch()
    for line in numbered(200_000):
        batch.add(OUT, f"{line}\n".encode())
    assert "dropped" in str(take_all(batch))
    batch.add(OUT, b"a\nb\n")
    assert take_all(batch) == [(OUT, "a\nb")]


@pytest.mark.parametrize("length", [0, 1000, 1 << 14])
@pytest.mark.parametrize("streams", [(OUT,), (OUT, ERR)], ids=["one stream", "two in turn"])
def test_however_much_comes_memory_is_bounded(length: int, streams: tuple[int, ...]) -> None:
    batch, line = Batch(), b"x" * length + b"\n"
    batch.add(OUT, b"first\n")
    tracemalloc.start()
    try:
        for _ in range(2 * WAITING_BYTES // (length + 300)):
            for stream in streams:
                batch.add(stream, line)
        batch.add(OUT, b"last\n")
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 2 * WAITING_BYTES
    texts = take_all(batch)
    assert texts[0][1].startswith("first")
    assert texts[-1][1].endswith("last")


def test_old_states_of_a_progress_bar_are_not_kept() -> None:
    batch = Batch()
    for number in range(5000):
        batch.add(ERR, b"\r%08d" % number * 10)
    assert take_all(batch) == [(ERR, "00004999")]


@pytest.mark.parametrize("text", ["日本語" * 6000, "é" * 32_000, "a" + "\U0001f40b" * 10_000, "abc" * 20_000])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_long_line_is_whole(text: str, end: bytes) -> None:
    data, step = text.encode() + end, 1 << 14
    assert take(*((OUT, data[start : start + step]) for start in range(0, len(data), step))) == [(OUT, text)]


def test_a_line_that_does_not_end_is_broken() -> None:
    batch = Batch()
    for _ in range(100):
        batch.add(OUT, b"x" * (1 << 14))
    batch.add(OUT, b"\n")
    lines = "\n".join(text for _, text in take_all(batch)).split("\n")
    assert max(map(len, lines)) <= LINE_LENGTH + (1 << 15)


@pytest.mark.parametrize(
    ("text", "size"), [("a", 1), ("\n", 3), ('"', 4), ("\\", 4), ("\x1b", 7), ("ж", 7), ("語", 7), ("\U0001f40b", 14)]
)
def test_bytes_as_they_are_sent(text: str, size: int) -> None:
    sent = requests.Request("POST", "http://api", json={"variables": json.dumps({"logs": [text * 100]})}).prepare()
    without = requests.Request("POST", "http://api", json={"variables": json.dumps({"logs": [""]})}).prepare()
    assert len(sent.body) - len(without.body) == size * 100 == as_sent(text * 100) - as_sent("")


# ------------------------------------------------------------------- a run's logs, through Prefect's own client


class API(ThreadingHTTPServer):
    """Takes logs as Prefect Server does: 413 above 5 MB, and NUL is an error. It can be down."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.up, self.sizes, self.messages, self.refused = threading.Event(), list[int](), list[str](), list[int]()


class _Handler(BaseHTTPRequestHandler):
    server: API

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.sizes.append(len(body))
        logs = json.loads(json.loads(body)["variables"])["input"]["logs"]
        if not self.server.up.is_set() or len(body) > 5_000_000 or "\0" in str([log["message"] for log in logs]):
            self.server.refused.append(len(body))
            self.send_response(413)
            self.end_headers()
            return
        self.server.messages += [log["message"] for log in logs]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": {"write_run_logs": {"success": true}}}')

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[API]:
    """Uploads come every second, and output is handed on more often: as much as in five seconds in a run."""
    manager = LogManager()
    monkeypatch.setattr("flows.output.FLUSH_SECONDS", 0.1)
    monkeypatch.setattr("prefect.utilities.logging.LOG_MANAGER", manager)
    monkeypatch.setattr("flows.output.LOG_MANAGER", manager)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with API() as api:
        threading.Thread(target=api.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        settings: dict[str, Any] = {
            "backend": "server",
            "cloud.send_flow_run_logs": True,
            "cloud.logging_heartbeat": 1,
            "cloud.api": f"http://{api.server_name}",
        }
        settings["cloud.api"] += f":{api.server_port}"
        with set_temporary_config(settings), prefect.context(running_with_backend=True, flow_run_id="r"):
            yield api
            api.up.set()
            manager.stop()
        api.shutdown()


def flood(data: bytes, seconds: float, *last: Any) -> Iterator[Any]:
    """Output as fast as it is taken, for some seconds."""
    end, chunk = time.monotonic() + seconds, frame(1, data) * 10
    while time.monotonic() < end:
        yield chunk
    yield frame(1, b"the end\n")
    yield from last


LINES = {"ASCII": b"x" * 1000, "Cyrillic": ("ж" * 500).encode(), "quotes": b'"' * 1000, "NUL": b"\0" * 1000}


@pytest.mark.parametrize("alphabet", ["Cyrillic", "quotes", "NUL"])
def test_an_upload_is_well_below_what_prefect_server_refuses(api: API, alphabet: str) -> None:
    api.up.set()
    with FakeDocker() as fake:
        fake.exited.clear()
        fake.streams = [flood(LINES[alphabet] + b"\n", 2.5, fake.exited.set)]
        WaitOnContainer(docker_server_url=fake.url).run(container_id=ID)
    wait_for(lambda: any("exited with code 0" in message for message in api.messages), "the last log has arrived")
    assert api.refused == []
    assert max(api.sizes) < 3_500_000
    output = "\n".join(api.messages)
    assert "the end" in output
    assert "lines dropped here" in output


def test_containers_share_an_upload(api: API) -> None:
    api.up.set()

    def run() -> None:
        with FakeDocker() as fake, prefect.context(context):
            fake.exited.clear()
            fake.streams = [flood(LINES["Cyrillic"] + b"\n", 2.5, fake.exited.set)]
            WaitOnContainer(docker_server_url=fake.url).run(container_id=ID)

    context = prefect.context.copy()
    with ThreadPoolExecutor() as pool:
        for result in [pool.submit(run) for _ in range(3)]:
            result.result()
    wait_for(lambda: sum("exited with code 0" in message for message in api.messages) == 3, "the last logs arrived")
    assert api.refused == []
    assert max(api.sizes) < 4_000_000


def test_an_api_that_is_down_while_the_container_writes(api: API, recwarn: pytest.WarningsRecorder) -> None:
    """Memory is bounded, and when the API is back it is said what was dropped."""
    process = psutil.Process()
    before = process.memory_info().rss
    with FakeDocker() as fake:
        fake.exited.clear()

        def back() -> None:
            assert process.memory_info().rss - before < 64 << 20
            api.up.set()
            wait_for(lambda: api.messages, "the API takes logs")

        fake.streams = [flood(LINES["ASCII"] + b"\n", 4, back, frame(1, b"after it\n"), fake.exited.set)]
        WaitOnContainer(docker_server_url=fake.url).run(container_id=ID)
    wait_for(lambda: any("exited with code 0" in message for message in api.messages), "the last log has arrived")
    assert api.refused, "it was down"
    assert max(api.sizes) < 3_500_000
    output = "\n".join(api.messages)
    assert "lines dropped here" in output
    assert "after it" in output
