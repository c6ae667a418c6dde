"""A running container's output: read while the container runs, and bounded before it reaches the run's logs."""

import codecs
import itertools
import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import docker
import requests
from prefect.utilities.logging import LOG_MANAGER, LOG_OVERHEAD

from flows.daemon import call_sdk, error_message, unavailable

FLUSH_SECONDS = 1  # how often a running container's output goes to the run's logs; a progress bar every third time
OUTPUT_GRACE_SECONDS = 5  # how long a stream of output may pause after the container's exit
READ_SECONDS = (
    15  # how long the output of a container that has exited may take, and each piece of it
)
UPLOAD_SECONDS = (
    10  # how long the last output waits for Prefect's next upload of logs, which is every 5 s
)
UPLOAD_BYTES = 2_500_000  # at most in an upload, as sent; over 5 MB, Prefect Server refuses it and all later ones
WAITING_BYTES = 5 << 18  # of output that waits for an upload; more is dropped, from the middle
BLOCK = 1 << 14  # bytes of output that become one record of the run's logs, about
LINE_LENGTH = 1 << 16  # bytes; a longer line is broken
STDOUT, STDERR, SYSTEM = (
    1,
    2,
    3,
)  # Docker's numbers of the streams; SYSTEM says what is wrong with the output
Output = Iterator[tuple[int, bytes]]  # pieces, each with the number of its stream


def frames(chunks: Iterable[bytes]) -> Output:
    """Take Docker's multiplexed stream apart, wherever it is cut: yield the number of the stream, and the bytes.

    Source: https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
    """
    buffer = b""
    for chunk in chunks:
        buffer, start = buffer + chunk, 0
        while len(buffer) >= (body := start + 8):
            end = body + int.from_bytes(buffer[start + 4 : body], "big")
            if end > len(buffer):
                break
            yield buffer[start] or STDOUT, buffer[body:end]
            start = end
        buffer = buffer[start:]


def read(client: docker.APIClient, container_id: str, tty: bool, **params: Any) -> Output:
    """Read a container's output, with a TTY as it is, else by frames. Raises an APIError if there is none to read."""
    url = client._url("/containers/{0}/logs", container_id)  # type: ignore[attr-defined]
    timeout = None if params.get("follow") else READ_SECONDS
    response = client.get(
        url, params={"stdout": 1, "stderr": 1, **params}, stream=True, timeout=timeout
    )
    client._raise_for_status(response)  # type: ignore[attr-defined]
    return (
        ((STDOUT, chunk) for chunk in response.iter_content(None))
        if tty
        else frames(response.iter_content(None))
    )


def follow(
    client: docker.APIClient, container_id: str, tty: bool, exited: threading.Event
) -> Output:
    """Read a container's output until the container has exited (``exited`` is set) and the output has ended.

    After a stream that breaks, only new output is read, because timestamps cannot tell what was lost.
    """
    for attempt in itertools.takewhile(
        lambda attempt: attempt == 1 or not exited.is_set(), itertools.count(1)
    ):
        output, broken = (
            read(client, container_id, tty, follow=1, tail="all" if attempt == 1 else 0),
            True,
        )
        with suppress(requests.RequestException):
            for stream, data in output:
                yield stream, b"output could not be read: " + data if stream == SYSTEM else data
            broken = False
        if (
            not exited.wait(min(attempt, 10)) or broken
        ):  # Docker reports the exit a little after the end of the stream
            yield SYSTEM, b"Docker ended the output too early; lines may be missing\n"


def newest_state(line: str) -> str:
    """What a terminal shows of a line: a carriage return goes back to the start of the line."""
    return line.rstrip("\r").rpartition("\r")[2]


def as_sent(value: Any) -> int:
    """How many bytes of an upload a text or a record is: Prefect encodes JSON twice, in ASCII."""
    text = json.dumps(value)
    return len(text) + text.count('"') + text.count("\\")


class Batch:
    """Output that waits for the run's logs, in blocks: [stream, bytes, how many lines were dropped before it].

    If a container writes faster than Prefect's API takes logs, blocks are dropped from the middle. One thread adds,
    another one takes.
    """

    def __init__(self) -> None:
        self._lock, self._size, self.blocks = threading.Lock(), 0, deque[list[Any]]()
        self._unfinished: dict[int, bytes] = {}  # by stream, the line that has not ended

    def add(self, stream: int, data: bytes) -> None:
        """Add output of a stream."""
        with self._lock:
            if not self.blocks or self.blocks[-1][0] != stream or len(self.blocks[-1][1]) >= BLOCK:
                self.blocks.append([stream, bytearray(), 0])
                self._size += LOG_OVERHEAD  # of its record, and about that of its objects
            self.blocks[-1][1] += data
            self._size += len(data)
            while self._size > WAITING_BYTES and len(self.blocks) > 1:
                middle = (len(self.blocks) - 1) // 2
                _, old, dropped = self.blocks[middle]
                del self.blocks[middle]
                self._size -= len(old) + LOG_OVERHEAD
                self.blocks[middle][2] += dropped + (
                    old.count(b"\n") or 1
                )  # of a long line, a part

    def take(self) -> list[tuple[int, str]]:
        """Take the oldest block: texts of whole lines, in order, each with the number of its stream."""
        with self._lock:
            stream, data, dropped = self.blocks.popleft()
            self._size -= len(data) + LOG_OVERHEAD
        note = f"[{dropped:,} lines dropped here: too many for the run's logs]"
        texts = [*self.rest(), (stream, note)] if dropped else []
        body, newline, rest = (self._unfinished.pop(stream, b"") + data).rpartition(b"\n")
        rest = rest[
            rest.rstrip(b"\r").rfind(b"\r") + 1 :
        ]  # older states of a progress bar are not kept
        if len(rest) > LINE_LENGTH:
            body, newline, rest = body + newline + rest, b"", b""
        text, length = codecs.utf_8_decode(body, "replace", bool(newline))
        self._unfinished[stream] = body[length:] + rest  # of a long line, half a character
        if text or newline:
            texts.append(
                (stream, "\n".join(map(newest_state, text.split("\n"))) if "\r" in text else text)
            )
        return texts

    def rest(self) -> list[tuple[int, str]]:
        """Take the lines that have not ended."""
        lines = [
            (stream, newest_state(line.decode(errors="replace")))
            for stream, line in self._unfinished.items()
        ]
        self._unfinished.clear()
        return [(stream, line) for stream, line in lines if line]


class Watch:
    """A running container: threads wait for its exit, read its output, and look at its progress bars."""

    _handing_on = (
        threading.Lock()
    )  # one for all containers of this process: they share Prefect's uploads

    def __init__(
        self, client: docker.APIClient, url: str, container_id: str, tty: bool, options: Any
    ) -> None:
        self.result: Any = None  # of the wait: Docker's answer, or an error
        self._batch, self._slow = (
            Batch(),
            False,
        )  # slow: the output is little enough to look at it twice
        self._bars: dict[int, bytes] = defaultdict(bytes)  # by stream, the line that has not ended
        self._exited, self._over = (
            threading.Event(),
            threading.Event(),
        )  # over: exited, and the output is read
        self._heard = time.monotonic()  # when the last output came, or the exit

        def wait_for_exit() -> None:
            try:
                self.result = call_sdk(client.wait, container=container_id, **options)
            except Exception as error:
                self.result = error
                if unavailable(
                    error
                ):  # whether the container runs is not known, so nothing is waited for
                    self._over.set()
            self._heard = time.monotonic()
            self._exited.set()

        def read_output() -> None:
            try:
                for stream, data in follow(client, container_id, tty, self._exited):
                    self._heard = time.monotonic()
                    self._batch.add(stream, data)
            except Exception as error:
                self._batch.add(
                    SYSTEM, f"output could not be read: {error_message(error, url)}\n".encode()
                )
            self._exited.wait()
            self._over.set()

        def look_at_bars() -> (
            None
        ):  # Docker's logs have a line when it has ended, its "attach" has it at once
            while not self._over.wait(FLUSH_SECONDS):
                if not self._slow:
                    continue
                with suppress(Exception):  # read_output() reports what is wrong
                    pairs: Any = client.attach(container_id, stream=True, demux=True)
                    for pair in itertools.takewhile(lambda _: self._slow, pairs):
                        for stream, data in zip((STDOUT, STDERR), pair):
                            self._bars[stream] = (self._bars[stream] + (data or b"")).rpartition(
                                b"\n"
                            )[2][-BLOCK:]
                    pairs._response.close()  # its own close() leaves the connection open, and the container then hangs
                self._bars.clear()

        self._threads = [
            threading.Thread(target=it, daemon=True)
            for it in (look_at_bars, read_output, wait_for_exit)
        ]

    def log_until_exit(self, logger: Any, name: str, seconds: float) -> bool:
        """Log the output until the container has exited; return False if that takes longer than ``seconds``."""

        def log(*texts: tuple[int, str]) -> None:
            for stream, text in texts:
                text = (f"{name}: {text}" if stream == SYSTEM else text).replace(
                    "\0", "\ufffd"
                )  # see abbreviated()
                (logger.info if stream == STDOUT else logger.warning)(text)

        while (
            self._threads
        ):  # here, in the try of the caller, who stops the container if interrupted
            self._threads.pop().start()
        deadline, flushes, shown = (
            time.monotonic() + seconds,
            itertools.count(1),
            list[tuple[int, str]](),
        )
        while not self._over.wait(FLUSH_SECONDS):
            self._slow, exited = self._hand_on(log) > 0.9 * UPLOAD_BYTES, self._exited.is_set()
            if exited and time.monotonic() - self._heard > OUTPUT_GRACE_SECONDS:
                log((SYSTEM, "Docker did not end the output after the exit; lines may be missing"))
                break
            if not exited and time.monotonic() > deadline:
                return False
            if not exited and next(flushes) % 3 == 0:
                lines = [
                    (stream, line.decode(errors="replace").rstrip("\r"))
                    for stream, line in [*self._bars.items()]
                ]
                old, shown = (
                    shown,
                    [(stream, newest_state(line)) for stream, line in lines if "\r" in line],
                )
                log(*(state for state in shown if state not in old))
        deadline = time.monotonic() + UPLOAD_SECONDS
        while self._hand_on(log) <= 0 and self._batch.blocks and time.monotonic() < deadline:
            time.sleep(FLUSH_SECONDS)
        log(*self._batch.rest())
        if self._batch.blocks:
            log((SYSTEM, "Prefect's API takes no logs; the last lines are dropped"))
        return True

    def _hand_on(self, log: Callable[..., None]) -> int:
        """Log output while Prefect's next upload of logs has room; return how many bytes are left."""
        with self._handing_on:
            with LOG_MANAGER.queue.mutex:
                waiting = [*LOG_MANAGER.pending_logs, *LOG_MANAGER.queue.queue]
            room = UPLOAD_BYTES - sum(map(as_sent, waiting))
            while self._batch.blocks and room > 0:
                texts = self._batch.take()
                log(*texts)
                room -= sum(as_sent(text) + LOG_OVERHEAD for _, text in texts)
        return room
