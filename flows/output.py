"""A container's output on its way to the run's logs: bounded, and made of whole lines.

Output waits here while Prefect's queue of logs is full. If too much waits, the oldest is dropped.
So the newest lines, which name the cause of a failure, are always logged.
"""

import codecs
import json
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prefect.utilities import logging as prefect_logging
from prefect.utilities.logging import LOG_OVERHEAD

BLOCK_BYTES = 1 << 14  # of output that waits and is dropped together, about
WAITING_BLOCKS = 80  # that wait for room in Prefect's queue; then the oldest is dropped
QUEUE_BYTES = 2_500_000  # as sent; while more is in Prefect's queue, output waits here
LINE_BYTES = 1 << 16  # a longer line is broken
CHARACTER_BYTES = 14  # that a character takes as sent, at most: an emoji

# Docker's numbers of the streams. SYSTEM says what is wrong with the output.
STDOUT = 1
STDERR = 2
SYSTEM = 3


def as_sent(text: str) -> int:
    """How many bytes of a request to Prefect's API a text takes: it is JSON in JSON, in ASCII."""
    encoded = json.dumps(text)
    return len(encoded) + encoded.count('"') + encoded.count("\\")


def record_as_sent(log: dict[str, Any]) -> int:
    """How many bytes of an upload a log record takes."""
    return as_sent(log["message"]) + LOG_OVERHEAD


# Prefect's LogManager makes uploads of 3 MB, but it counts characters. 3 million characters that
# are not ASCII are up to 40 MB. Prefect Server refuses more than 5 MB, and LogManager repeats such
# an upload forever. So let it count bytes.
prefect_logging.getlogsize = record_as_sent


def newest_lines(text: str, limit: int) -> str:
    """The last lines of a text: at most ``limit`` bytes, as they are sent. Of one line its end."""
    if as_sent(text) <= limit:
        return text
    room = limit
    kept: list[str] = []
    for line in reversed(text.split("\n")):
        room -= as_sent(line)
        if room < 0:
            break
        kept.append(line)
    if not any(kept):
        length = (limit - as_sent("")) // CHARACTER_BYTES
        return text[-length:]
    kept.reverse()
    return "\n".join(kept)


@dataclass
class Piece:
    """Output of one stream."""

    stream: int
    data: bytearray = field(default_factory=bytearray)


@dataclass
class Block:
    """Output in the order in which it came. It is logged as a whole, or dropped as a whole."""

    pieces: list[Piece] = field(default_factory=list)
    size: int = 0  # in bytes, with what the log records of the pieces take
    after_gap: bool = False  # whether output that came just before was dropped

    def add(self, stream: int, data: bytes) -> None:
        """Add output of a stream."""
        if not self.pieces or self.pieces[-1].stream != stream:
            self.pieces.append(Piece(stream))
            self.size += LOG_OVERHEAD
        self.pieces[-1].data += data
        self.size += len(data)


class Waiting:
    """Output that waits for room in Prefect's queue. One thread adds, another one takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: deque[Block] = deque(maxlen=WAITING_BLOCKS)
        self._dropped = False  # whether output before the oldest block was dropped

    def add(self, stream: int, data: bytes) -> None:
        """Add output of a stream. If too much waits, the oldest block is dropped."""
        with self._lock:
            if not self._blocks or self._blocks[-1].size >= BLOCK_BYTES:
                if len(self._blocks) == self._blocks.maxlen:
                    self._dropped = True
                self._blocks.append(Block())
            self._blocks[-1].add(stream, data)

    def take(self) -> Block | None:
        """Take the oldest block, if there is one."""
        with self._lock:
            if not self._blocks:
                return None
            block = self._blocks.popleft()
            block.after_gap = self._dropped
            self._dropped = False
            return block


class Lines:
    """Makes text of output. For each stream, a line that has not ended waits for its end."""

    def __init__(self) -> None:
        self._unfinished: dict[int, bytes] = {}

    def add(self, stream: int, data: bytes) -> str | None:
        """Add output of a stream, and return the lines that have ended, or None."""
        data = self._unfinished.pop(stream, b"") + data
        ended, newline, unfinished = data.rpartition(b"\n")
        unfinished = unfinished[_start_of_newest_state(unfinished) :]
        if len(unfinished) > LINE_BYTES:
            text, length = codecs.utf_8_decode(data, "replace", False)
            self._unfinished[stream] = data[length:]  # the bytes of half a character
            return newest_states(text)
        self._unfinished[stream] = unfinished
        if not newline:
            return None
        return newest_states(ended.decode(errors="replace"))

    def rest(self) -> Iterator[tuple[int, str]]:
        """Take the lines that have not ended, each with its stream."""
        unfinished = self._unfinished
        self._unfinished = {}
        for stream, line in unfinished.items():
            text = newest_states(line.decode(errors="replace"))
            if text:
                yield stream, text


def _start_of_newest_state(line: bytes) -> int:
    """Where the newest state of a progress bar starts. The older ones need not be kept."""
    return line.rstrip(b"\r").rfind(b"\r") + 1


def newest_states(text: str) -> str:
    """What a terminal shows of some lines: a carriage return goes back to the start of the line."""
    if "\r" not in text:
        return text
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(lines)


class OutputLog:
    """Writes a container's output to the run's logs. One thread adds it, another one logs it."""

    def __init__(self, logger: Any, container: str) -> None:
        self._logger = logger
        self._container = container  # how messages about the output name it
        self._waiting = Waiting()
        self._lines = Lines()

    def add(self, stream: int, data: bytes) -> None:
        """Add output of a stream."""
        for start in range(0, len(data), BLOCK_BYTES):
            self._waiting.add(stream, data[start : start + BLOCK_BYTES])

    def log_while_there_is_room(self) -> int:
        """Log what waits until Prefect's queue is full, and return how many bytes that were."""
        room = QUEUE_BYTES - _bytes_in_prefects_queue()
        logged = 0
        while logged < room:
            block = self._waiting.take()
            if block is None:
                break
            logged += self._log_block(block)
        return logged

    def log_all(self) -> None:
        """Log all that waits, at the container's end. Prefect's LogManager uploads it in parts."""
        block = self._waiting.take()
        while block is not None:
            self._log_block(block)
            block = self._waiting.take()
        for stream, text in self._lines.rest():
            self.log(stream, text)

    def _log_block(self, block: Block) -> int:
        """Log a block, and return how many bytes of an upload it is."""
        logged = 0
        if block.after_gap:
            for stream, text in self._lines.rest():
                logged += self.log(stream, text)
            note = "[lines dropped here: the output is too fast for the run's logs]"
            logged += self.log(block.pieces[0].stream, note)
        for piece in block.pieces:
            ended = self._lines.add(piece.stream, bytes(piece.data))
            if ended is not None:
                logged += self.log(piece.stream, ended)
        return logged

    def log(self, stream: int, text: str) -> int:
        """Log a text at the level of its stream, and return how many bytes of an upload it is."""
        text = text.replace("\0", "\ufffd")  # PostgreSQL, as Prefect's store, refuses NUL
        if stream == SYSTEM:
            text = f"{self._container}: {text}"
        if stream == STDOUT:
            self._logger.info(text)
        else:
            self._logger.warning(text)
        return as_sent(text) + LOG_OVERHEAD


def _bytes_in_prefects_queue() -> int:
    """How many bytes wait for an upload, as they are sent, from all containers of this process."""
    manager = prefect_logging.LOG_MANAGER
    with manager.queue.mutex:
        queued = list(manager.queue.queue)
    return manager.pending_length + sum(map(record_as_sent, queued))
