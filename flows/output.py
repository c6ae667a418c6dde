"""A running container's output: taken apart, and bounded before it reaches the run's logs."""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator

HEAD_LINES, HEAD_BYTES = 2000, 1 << 18
"""What is kept from the beginning of a batch …"""

TAIL_LINES, TAIL_BYTES = 500, 1 << 16
"""… and from its end."""

LINE_BYTES = 1 << 14
"""A longer line is broken; Docker's own log drivers do so at the same length."""

_HEADER = struct.Struct(">BxxxL")


def frames(chunks: Iterable[bytes], tty: bool) -> Iterator[tuple[bool, bytes]]:
    """Take Docker's multiplexed stream apart.

    Args:
        chunks: the bytes, cut anywhere.
        tty: whether the container has a TTY; then the stream is its output as it is.

    Yields:
        Whether it is stderr, and the bytes.

    Source: https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
    """
    if tty:
        yield from ((False, chunk) for chunk in chunks)
        return
    buffer = b""
    for chunk in chunks:
        buffer = buffer + chunk if buffer else chunk
        start = 0
        while len(buffer) - start >= _HEADER.size:
            stream, length = _HEADER.unpack_from(buffer, start)
            end = start + _HEADER.size + length
            if end > len(buffer):
                break
            yield stream == 2, buffer[start + _HEADER.size : end]
            start = end
        buffer = buffer[start:]


class Batch:
    """Lines of output between two looks, with a limit on how many there can be.

    A container that writes faster than a person, or Prefect's API, can read loses lines from the middle of a
    batch, and the batch says how many: its first and its last lines are always there. One thread adds, another
    takes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unfinished = {False: b"", True: b""}  # by stream, what has no newline yet
        self._clear()

    def _clear(self) -> None:
        self._head: list[tuple[bool, bytes]] = []
        self._tail: deque[tuple[bool, bytes]] = deque()
        self._head_bytes = self._tail_bytes = self._left_out = 0

    def add(self, stderr: bool, data: bytes) -> None:
        """Add output of a stream."""
        with self._lock:
            *lines, rest = (self._unfinished[stderr] + data).split(b"\n")
            for line in lines:
                for start in range(0, len(line) or 1, LINE_BYTES):
                    self._add_line(stderr, line[start : start + LINE_BYTES])
            while len(rest) >= LINE_BYTES:
                self._add_line(stderr, rest[:LINE_BYTES])
                rest = rest[LINE_BYTES:]
            self._unfinished[stderr] = rest

    def _add_line(self, stderr: bool, line: bytes) -> None:
        if not self._tail and len(self._head) < HEAD_LINES and self._head_bytes < HEAD_BYTES:
            self._head.append((stderr, line))
            self._head_bytes += len(line)
            return
        self._tail.append((stderr, line))
        self._tail_bytes += len(line)
        while len(self._tail) > TAIL_LINES or self._tail_bytes > TAIL_BYTES:
            self._tail_bytes -= len(self._tail.popleft()[1])
            self._left_out += 1

    def take(self, last: bool = False) -> list[tuple[bool, str]]:
        """Take what has come since the last look.

        Args:
            last: whether this is the last look, which takes a line without a newline as well.

        Returns:
            Texts of one or more lines, in order, each with whether it is stderr.
        """
        with self._lock:
            if last:
                for stderr, rest in self._unfinished.items():
                    if rest:
                        self._add_line(stderr, rest)
                    self._unfinished[stderr] = b""
            lines, tail, left_out = self._head, self._tail, self._left_out
            self._clear()
        if left_out:
            note = f"[{left_out:,} lines left out here: more than the run's logs can take]".encode()
            lines.append((lines[-1][0], note))
        texts: list[tuple[bool, list[bytes]]] = []
        for stderr, line in (*lines, *tail):
            if not texts or texts[-1][0] != stderr:
                texts.append((stderr, []))
            texts[-1][1].append(line.rstrip(b"\r"))
        # NUL can be in no text of PostgreSQL, where Prefect keeps the logs: the whole upload would be refused
        return [(e, b"\n".join(text).decode(errors="replace").replace("\0", "\ufffd")) for e, text in texts]
