"""A running container's output: read while the container runs, and bounded before it reaches the run's logs."""

from __future__ import annotations

import itertools
import re
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any
from urllib.parse import quote

import docker
import requests
from docker.errors import APIError

# What a batch keeps from its beginning, and from its end.
HEAD_LINES, HEAD_BYTES = 2000, 1 << 18
TAIL_LINES, TAIL_BYTES = 500, 1 << 16
# A longer line is broken.
LINE_BYTES = 1 << 16
# Docker's numbers of the streams. SYSTEM carries Docker's own errors while it reads the output.
STDOUT, STDERR, SYSTEM = 1, 2, 3

_HEADER = struct.Struct(">BxxxL")
_TIMESTAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{9})(Z|[+-]\d\d:\d\d) ")


def frames(chunks: Iterable[bytes], tty: bool) -> Iterator[tuple[int, bytes]]:
    """Take Docker's multiplexed stream apart.

    Args:
        chunks: the bytes, cut anywhere.
        tty: whether the container has a TTY. Then the stream is its output as it is.

    Yields:
        The number of the stream, and the bytes.

    Source: https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
    """
    buffer = b""
    for chunk in chunks:
        if tty:
            yield STDOUT, chunk
            continue
        buffer = buffer + chunk if buffer else chunk
        start = 0
        while len(buffer) - start >= _HEADER.size:
            stream, length = _HEADER.unpack_from(buffer, start)
            end = start + _HEADER.size + length
            if end > len(buffer):
                break
            yield stream or STDOUT, buffer[start + _HEADER.size : end]
            start = end
        buffer = buffer[start:]


def follow(
    client: docker.APIClient, container_id: str, tty: bool, exited: threading.Event
) -> Iterator[tuple[int, bytes]]:
    """Read a container's output until ``exited`` is set.

    A stream that ends while the container runs is opened again after the last line that came.

    Yields:
        The number of the stream, and the bytes.

    Raises:
        APIError: if the output cannot be read, as with the log driver "none".
    """
    url = f"{client.base_url}/v{client.api_version}/containers/{quote(container_id)}/logs"
    params: dict[str, Any] = {"stdout": 1, "stderr": 1, "follow": 1, "timestamps": int(not tty)}
    for attempt in itertools.count(1):
        timestamp = None
        response = client.get(url, params=params, stream=True)
        if not response.ok:
            raise APIError(response.reason, response, response.json().get("message"))
        with suppress(requests.RequestException):  # a connection that breaks is another way for the stream to end
            for stream, data in frames(response.iter_content(chunk_size=None), tty):
                found = _TIMESTAMP.match(data)
                timestamp = found or timestamp
                yield stream, data[found.end() :] if found else data
        # Docker answers after it has handled an exit
        running = not exited.is_set() and client.inspect_container(container_id)["State"].get("Running")
        if exited.wait(min(0.2 * attempt, 30) if running else 2):
            return
        yield SYSTEM, b"Docker ended the stream while the container runs; opening it again\n"
        if timestamp:
            zone = timestamp[3].replace(b"Z", b"+00:00")
            second = datetime.fromisoformat((timestamp[1] + zone).decode()).timestamp()
            params["since"] = f"{second:.0f}.{min(int(timestamp[2]) + 1, 999_999_999):09}"
        else:
            params.setdefault("since", f"{time.time():.9f}")


def _newest(line: bytes) -> bytes:
    """What a terminal shows of a line: a carriage return goes back to the start of the line."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _pieces(line: bytes) -> Iterator[bytes]:
    """Break a long line between characters of UTF-8."""
    while len(line) > LINE_BYTES:
        end = LINE_BYTES
        while end > LINE_BYTES - 4 and line[end] & 0xC0 == 0x80:
            end -= 1
        yield line[:end]
        line = line[end:]
    yield line


class Batch:
    """Lines of output between two looks, with a limit on how many there can be.

    If a container writes faster than Prefect's API can read, lines are dropped from the middle of a batch, and the
    batch says how many. One thread adds, another one takes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unfinished: dict[int, bytes] = {}  # by stream, what has no newline yet
        self._shown: dict[int, bytes] = {}  # by stream, the state of a progress bar that was taken last
        self._clear()

    def _clear(self) -> None:
        self._head: list[tuple[int, bytes]] = []
        self._tail: deque[tuple[int, bytes]] = deque()
        self._head_bytes = self._tail_bytes = self._dropped = 0

    def add(self, stream: int, data: bytes) -> None:
        """Add output of a stream."""
        with self._lock:
            *lines, rest = (self._unfinished.get(stream, b"") + data).split(b"\n")
            for line in lines:
                if (newest := _newest(line)) != self._shown.pop(stream, None):
                    for piece in _pieces(newest):
                        self._add_line(stream, piece)
            if b"\r" in rest:  # a progress bar: only its newest state is kept
                rest = b"\r" + _newest(rest) + b"\r" * rest.endswith(b"\r")
            *pieces, self._unfinished[stream] = _pieces(rest)
            for piece in pieces:
                self._add_line(stream, piece)

    def _add_line(self, stream: int, line: bytes) -> None:
        if not self._tail and len(self._head) < HEAD_LINES and self._head_bytes < HEAD_BYTES:
            self._head.append((stream, line))
            self._head_bytes += len(line)
            return
        self._tail.append((stream, line))
        self._tail_bytes += len(line)
        while len(self._tail) > TAIL_LINES or self._tail_bytes > TAIL_BYTES:
            self._tail_bytes -= len(self._tail.popleft()[1])
            self._dropped += 1

    def take(self, last: bool = False, progress: bool = False) -> list[tuple[int, str]]:
        """Take what has come since the last look.

        Args:
            last: whether this is the last look, which takes a line without a newline as well.
            progress: whether to take the newest state of a progress bar.

        Returns:
            Texts of one or more lines, in order, each with the number of its stream.
        """
        with self._lock:
            for stream, rest in self._unfinished.items():
                newest, wanted = _newest(rest), last or (progress and b"\r" in rest)
                if wanted and newest and newest != self._shown.get(stream):
                    self._add_line(stream, newest)
                    self._shown[stream] = newest
            if last:
                self._unfinished.clear()
            lines, tail, dropped = self._head, self._tail, self._dropped
            self._clear()
        if dropped:
            lines.append((lines[-1][0], f"[{dropped:,} lines dropped here: too many for the run's logs]".encode()))
        texts: list[tuple[int, list[bytes]]] = []
        for stream, line in (*lines, *tail):
            if not texts or texts[-1][0] != stream:
                texts.append((stream, []))
            texts[-1][1].append(line)
        # PostgreSQL, where Prefect keeps the logs, refuses an upload with NUL in it.
        return [(key, b"\n".join(text).decode(errors="replace").replace("\0", "\ufffd")) for key, text in texts]
