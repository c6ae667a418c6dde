"""A running container's output: read while the container runs, and bounded before it reaches the run's logs."""

from __future__ import annotations

import codecs
import itertools
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import docker
import requests
from docker.errors import create_api_error_from_http_exception

from flows.daemon import ERRORS, error_message, unreachable

FLUSH_SECONDS = 1  # how often a running container's output goes to the run's logs; a progress bar every third time
OUTPUT_GRACE_SECONDS = 5  # how long a stream of output may pause after the container's exit
HEAD, TAIL = 1 << 18, 1 << 17  # what a batch keeps from its beginning and from its end: characters
LINE_COST = 128  # a line counts as so many characters more, so that short lines are bounded too
LINE_LENGTH = 1 << 16  # a longer line is broken
END = 1 << 12  # how much of the end of the output is compared with what Docker has, to know that nothing is missing
# Docker's numbers of the streams. SYSTEM carries what is wrong with the output itself.
STDOUT, STDERR, SYSTEM = 1, 2, 3

_HEADER = struct.Struct(">BxxxL")


def frames(chunks: Iterable[bytes], tty: bool) -> Iterator[tuple[int, bytes]]:
    """Take Docker's multiplexed stream apart: yield the number of the stream, and the bytes.

    The chunks may be cut anywhere. With a TTY, the stream is the container's output as it is.
    Source: https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
    """
    buffer = b""
    for chunk in chunks:
        if tty:
            yield STDOUT, chunk
            continue
        buffer, start = buffer + chunk, 0
        while len(buffer) - start >= _HEADER.size:
            stream, length = _HEADER.unpack_from(buffer, start)
            end = start + _HEADER.size + length
            if end > len(buffer):
                break
            yield stream or STDOUT, buffer[start + _HEADER.size : end]
            start = end
        buffer = buffer[start:]


def read(client: docker.APIClient, container_id: str, tty: bool, **params: Any) -> Iterator[tuple[int, bytes]]:
    """Read a container's output, as ``frames`` yields it. Raises an APIError if there is none to read."""
    url = f"{client.base_url}/v{client.api_version}/containers/{quote(container_id)}/logs"
    response = client.get(url, params={"stdout": 1, "stderr": 1, **params}, stream=True)
    try:
        response.raise_for_status()
    except requests.HTTPError as error:
        create_api_error_from_http_exception(error)  # raises it
    return frames(response.iter_content(chunk_size=None), tty)


def follow(
    client: docker.APIClient, container_id: str, tty: bool, exited: threading.Event
) -> Iterator[tuple[int, bytes]]:
    """Read a container's output until the container has exited (``exited`` is set) and the output has ended.

    A stream that ends earlier is opened again.
    """
    params: dict[str, Any] = {"follow": 1}
    end, heard = b"", 0.0
    for attempt in itertools.count(1):
        last_time = attempt > 1 and exited.is_set()
        output = read(client, container_id, tty, **params)
        with suppress(requests.RequestException):  # a connection that breaks is another way for the stream to end
            for stream, data in output:
                end, heard = (end + data)[-END:], time.time()
                yield stream, b"output could not be read: " + data if stream == SYSTEM else data
        # Docker reports the exit a little after the end of the stream
        if exited.wait(min(attempt, 10)) and (last_time or is_end(client, container_id, tty, end)):
            return
        yield SYSTEM, b"Docker ended the output too early; lines may be missing or come twice\n"
        params = {"follow": 1, **({"tail": 1000} if exited.is_set() else {"since": f"{heard:.9f}"})}


def is_end(client: docker.APIClient, container_id: str, tty: bool, end: bytes) -> bool:
    """Whether a container's output ends with ``end``, the last END bytes. True if Docker cannot say."""
    last = b""
    with suppress(*ERRORS):
        for _, data in read(client, container_id, tty, tail=100):
            last = (last + data)[-END:]
        return end.endswith(last)
    return True


def newest_state(line: str) -> str:
    """What a terminal shows of a line: a carriage return goes back to the start of the line."""
    return line.rstrip("\r").rpartition("\r")[2]


class ProgressBar:
    """The newest state of a line that a container rewrites by carriage returns.

    Docker's logs have a line only when it has ended. Docker's "attach" has it at once, but only from the call on.
    """

    def __init__(self, client: docker.APIClient, container_id: str) -> None:
        self._client, self._container_id = client, container_id
        self._thread, self._wanted = threading.Thread(), False
        self._lines: dict[int, bytes] = {}  # by stream, the line that has not ended
        self._shown: list[tuple[int, str]] = []

    def changes(self, wanted: bool) -> list[tuple[int, str]]:
        """Return the states that are new since the last call, with the number of the stream.

        A thread reads the output while ``wanted`` is true.
        """
        self._wanted = wanted
        if wanted and not self._thread.is_alive():
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        lines = [(stream, line.decode(errors="replace").rstrip("\r")) for stream, line in list(self._lines.items())]
        shown, self._shown = self._shown, [(stream, newest_state(line)) for stream, line in lines if "\r" in line]
        return [state for state in self._shown if wanted and state not in shown]

    def _read(self) -> None:
        with suppress(Exception):  # follow() reports what is wrong
            options: Any = {"stdout": True, "stderr": True, "stream": True, "logs": False, "demux": True}
            pairs: Any = self._client.attach(self._container_id, **options)
            for pair in itertools.takewhile(lambda _: self._wanted, pairs):
                for stream, data in zip((STDOUT, STDERR), pair):
                    line = self._lines.get(stream, b"") + (data or b"")
                    self._lines[stream] = line.rpartition(b"\n")[2][-LINE_LENGTH:]
            pairs.close()
        self._lines.clear()


class Batch:
    """Lines of output between two flushes, with a limit on how many there can be.

    If a container writes faster than Prefect's API can read, lines are dropped from the middle of a batch, and the
    batch says how many. One thread adds, another one takes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._decoders: dict[int, Any] = defaultdict(lambda: codecs.getincrementaldecoder("utf-8")("replace"))
        self._unfinished: dict[int, str] = defaultdict(str)  # by stream, the line that has not ended
        self._clear()

    def _clear(self) -> None:
        self._head: list[tuple[int, str]] = []
        self._tail: deque[tuple[int, str]] = deque()
        self._head_size = self._tail_size = self._dropped = 0

    def add(self, stream: int, data: bytes) -> None:
        """Add output of a stream."""
        with self._lock:
            *lines, rest = (self._unfinished[stream] + self._decoders[stream].decode(data)).split("\n")
            for line in lines:
                self._add_line(stream, newest_state(line))
            rest = rest[rest.rstrip("\r").rfind("\r") + 1 :]  # older states of a progress bar are not kept
            while len(rest) > LINE_LENGTH:
                self._add_line(stream, rest[:LINE_LENGTH])
                rest = rest[LINE_LENGTH:]
            self._unfinished[stream] = rest

    def _add_line(self, stream: int, line: str) -> None:
        for start in range(0, len(line) or 1, LINE_LENGTH):
            piece = line[start : start + LINE_LENGTH]
            if not self._tail and self._head_size < HEAD:
                self._head.append((stream, piece))
                self._head_size += len(piece) + LINE_COST
                continue
            self._tail.append((stream, piece))
            self._tail_size += len(piece) + LINE_COST
            while self._tail_size > TAIL:
                self._tail_size -= len(self._tail.popleft()[1]) + LINE_COST
                self._dropped += 1

    def take(self, last: bool = False) -> list[tuple[int, str]]:
        """Take the lines that have ended since the last flush; at the ``last`` one, the unfinished ones too.

        Returns texts of one or more lines, in order, each with the number of its stream.
        """
        with self._lock:
            for stream, rest in self._unfinished.items() if last else ():
                if rest := newest_state(rest + self._decoders[stream].decode(b"", final=True)):
                    self._add_line(stream, rest)
                self._unfinished[stream] = ""
            lines, tail, dropped = self._head, self._tail, self._dropped
            self._clear()
        if dropped:
            lines.append((lines[-1][0], f"[{dropped:,} lines dropped here: too many for the run's logs]"))
        groups = itertools.groupby([*lines, *tail], key=lambda line: line[0])
        # PostgreSQL, where Prefect keeps the logs, refuses an upload with NUL in it.
        return [(stream, "\n".join(line for _, line in group).replace("\0", "\ufffd")) for stream, group in groups]


class Watch:
    """A running container: one thread waits for its exit, another one reads its output."""

    def __init__(
        self, client: docker.APIClient, docker_server_url: str, container_id: str, tty: bool, options: dict[str, Any]
    ) -> None:
        self.result: Any = None  # of the wait: Docker's answer, or an error
        self._batch, self._bar = Batch(), ProgressBar(client, container_id)
        self._exited, self._over = threading.Event(), threading.Event()  # over: exited, and the output is read
        self._heard = time.monotonic()  # when the last output came, or the exit

        def wait() -> None:
            try:
                self.result = client.wait(container=container_id, **options)
            except Exception as error:
                self.result = error
                if unreachable(error):  # whether the container runs is not known, so nothing is waited for
                    self._over.set()
            self._heard = time.monotonic()
            self._exited.set()

        def read() -> None:
            try:
                for stream, data in follow(client, container_id, tty, self._exited):
                    self._heard = time.monotonic()
                    self._batch.add(stream, data)
            except Exception as error:
                words = error_message(error, docker_server_url)
                self._batch.add(SYSTEM, f"output could not be read: {words}\n".encode())
            self._exited.wait()
            self._over.set()

        for target in (wait, read):
            threading.Thread(target=target, daemon=True).start()

    def log(self, logger: Any, name: str, seconds: float) -> bool:
        """Log the output until the container has exited; return False if that takes longer than ``seconds``."""
        deadline, flushes = time.monotonic() + seconds, 0
        while True:
            flushes += 1
            over, exited = self._over.wait(FLUSH_SECONDS), self._exited.is_set()
            if exited and not over and time.monotonic() - self._heard > OUTPUT_GRACE_SECONDS:
                self._batch.add(SYSTEM, b"Docker did not end the output after the exit; lines may be missing")
                over = True
            texts = self._batch.take(last=over)
            if flushes % 3 == 0:
                texts += self._bar.changes(not exited and sum(len(text) for _, text in texts) < LINE_LENGTH)
            for stream, text in texts:
                text = f"{name}: {text}" if stream == SYSTEM else text
                (logger.info if stream == STDOUT else logger.warning)(text)
            if over or (not exited and time.monotonic() > deadline):
                return over
