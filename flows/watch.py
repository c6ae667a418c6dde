"""A running container: wait for its exit, read its output, and look at its progress bars."""

import math
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import Any

import docker
import requests

from flows.daemon import call_sdk, error_message
from flows.output import BLOCK_BYTES, STDOUT, SYSTEM, OutputLog, newest_states

FLUSH_SECONDS = 1  # how often a running container's output goes to the run's logs
BAR_SECONDS = 3  # how often the state of a progress bar does
OUTPUT_GRACE_SECONDS = 5  # how long a stream of output may pause after the container's exit
ATTACH_SECONDS = 2  # how long the daemon may take to answer an attach, for progress bars
SLOW_BYTES = 250_000  # of output between two flushes; if there is more, nobody looks at bars

Output = Iterator[tuple[int, bytes]]  # pieces, each with the number of its stream


def frames(chunks: Iterable[bytes]) -> Output:
    """Take Docker's multiplexed stream apart, wherever it is cut.

    Yields pieces, each with the number of its stream. Source:
    https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
    """
    buffer = b""
    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) >= start + 8:
            body = start + 8
            end = body + int.from_bytes(buffer[start + 4 : body], "big")
            if end > len(buffer):
                break
            yield buffer[start] or STDOUT, buffer[body:end]
            start = end
        buffer = buffer[start:]


def output(chunks: Iterable[bytes], tty: bool) -> Output:
    """Take an answer with output apart. With a TTY it is the output itself, else it has frames."""
    if not tty:
        return frames(chunks)
    return ((STDOUT, chunk) for chunk in chunks)


def read(client: docker.APIClient, container_id: str, tty: bool, options: dict[str, Any]) -> Output:
    """Read the output that a container has written so far. ``options`` are those of SDK's ``logs``.

    Raises InvalidArgument if the SDK cannot use the options, and an APIError if Docker does not
    hand out the output.
    """
    # The SDK converts the options. Its own reading is slow with a TTY, and has no timeout.
    options = {**options, "container": container_id, "stream": True, "follow": False}
    stream: Any = call_sdk(client.logs, **options)
    sdk: Any = client
    sdk._raise_for_status(stream._response)
    return output(stream._response.iter_content(None), tty)


def open_stream(
    client: docker.APIClient,
    method: str,
    path: str,
    container_id: str,
    params: dict[str, Any],
    timeout: float | None,
) -> requests.Response:
    """Ask Docker for a stream. Raises an APIError if Docker refuses.

    ``timeout`` in seconds is for the answer's head. What follows may take as long as it will.
    """
    sdk: Any = client  # whose own ``attach`` cannot be closed, and whose own ``logs`` is slow
    url = sdk._url(path, container_id)
    response: requests.Response = sdk.request(
        method, url, params=params, stream=True, timeout=timeout
    )
    sdk._raise_for_status(response)
    if timeout:
        sdk._disable_socket_timeout(sdk._get_raw_response_socket(response))
    return response


def end_stream(response: requests.Response | None) -> None:
    """End a stream that another thread reads."""
    if response is not None:
        with suppress(Exception):  # it may have ended by itself
            response.raw.shutdown()


class ProgressBars:
    """The lines that a container has not ended, where they are progress bars.

    Docker's logs have a line when it has ended. Docker's ``attach`` has it at once.
    """

    def __init__(self, client: docker.APIClient, container_id: str, tty: bool) -> None:
        self.wanted = False  # whether there is so little output that it can be read twice
        self._client = client
        self._container_id = container_id
        self._tty = tty
        self._lines: dict[int, bytes] = {}  # by stream
        self._shown: dict[int, str] = {}
        self._due = 0.0  # when bars may be shown again
        self._closed = threading.Event()
        self._response: requests.Response | None = None
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        """Start to look."""
        self._thread.start()

    def close(self) -> None:
        """End the look and its connection, whatever the daemon does."""
        self._closed.set()
        end_stream(self._response)
        if self._thread.is_alive():
            self._thread.join(2 * ATTACH_SECONDS)

    def news(self) -> list[tuple[int, str]]:
        """The newest states of the bars that have changed, each with its stream."""
        if time.monotonic() < self._due:
            return []
        self._due = time.monotonic() + BAR_SECONDS
        changed = []
        for stream, line in list(self._lines.items()):
            state = newest_states(line.decode(errors="replace"))
            if b"\r" in line and state != self._shown.get(stream):
                self._shown[stream] = state
                changed.append((stream, state))
        return changed

    def _look(self) -> None:
        while not self._closed.wait(FLUSH_SECONDS):
            if self.wanted:
                with suppress(Exception):  # what is wrong is said by the thread that reads the logs
                    self._read()
            self._lines.clear()

    def _read(self) -> None:
        """Read what the container writes now, until it ends or is too much."""
        params = {"stdout": 1, "stderr": 1, "stream": 1}
        path = "/containers/{0}/attach"
        response = open_stream(
            self._client, "POST", path, self._container_id, params, ATTACH_SECONDS
        )
        with closing(response):  # an attach that nobody reads would stop the container
            self._response = response
            if self._closed.is_set():  # close() may have looked too early
                return
            chunks = iter(partial(response.raw.read1, BLOCK_BYTES), b"")
            for stream, data in output(chunks, self._tty):
                line = self._lines.get(stream, b"") + data
                self._lines[stream] = line.rpartition(b"\n")[2][-BLOCK_BYTES:]
                if not self.wanted:
                    return


class Watch:
    """A running container, whose output goes to the run's logs until its end.

    ``start()`` starts three threads: one waits for the exit, one reads the output, and one looks at
    progress bars.
    """

    def __init__(
        self,
        client: docker.APIClient,
        docker_server_url: str,
        container_id: str,
        tty: bool,
        log: OutputLog,
        wait_options: dict[str, Any],
    ) -> None:
        self.answer: Any = {}  # Docker's, to the wait
        self.error: Exception | None = None  # of the wait
        self._client = client
        self._docker_server_url = docker_server_url
        self._container_id = container_id
        self._tty = tty
        self._log = log
        self._wait_options = wait_options
        self._bars = ProgressBars(client, container_id, tty)
        self._waited = threading.Event()  # the container has exited, or the wait has failed
        self._output_ended = threading.Event()
        self._heard = 0.0  # when the last output came
        self._response: requests.Response | None = None  # the stream of output
        self._closed = False

    def start(self) -> None:
        """Start to wait and to read. ``close()`` is due afterwards."""
        threading.Thread(target=self._wait, daemon=True).start()
        threading.Thread(target=self._read, daemon=True).start()
        self._bars.start()

    def close(self) -> None:
        """End what has not ended with the container, whatever the daemon does."""
        self._closed = True
        end_stream(self._response)
        self._bars.close()

    def log_until_exit(self, seconds: float) -> bool:
        """Log the output until the container has exited, or the wait has failed.

        Returns False if neither happens within ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while not self._waited.wait(FLUSH_SECONDS):
            logged = self._log.log_while_there_is_room()
            self._bars.wanted = logged < SLOW_BYTES
            for stream, state in self._bars.news():
                self._log.log(stream, state)
            if time.monotonic() > deadline:
                return False
        return True

    def log_the_rest(self, seconds: float = math.inf) -> None:
        """Log what the container has written until its exit. That takes ``seconds`` at most."""
        self._heard = time.monotonic()
        deadline = self._heard + seconds
        while not self._output_ended.wait(FLUSH_SECONDS):
            self._log.log_while_there_is_room()
            now = time.monotonic()
            if now > deadline or now - self._heard > OUTPUT_GRACE_SECONDS:
                self._note("Docker did not end the output after the exit; lines may be missing")
                break
        self._log.log_all()

    def _wait(self) -> None:
        try:
            self.answer = call_sdk(
                self._client.wait, container=self._container_id, **self._wait_options
            )
        except Exception as error:
            self.error = error
        self._waited.set()

    def _read(self) -> None:
        try:
            self._follow()
        except Exception as error:
            self._note(f"output could not be read: {error_message(error, self._docker_server_url)}")
        self._output_ended.set()

    def _follow(self) -> None:
        """Read the output until the container has exited.

        After a stream that breaks, only new output is read: timestamps cannot tell what was lost.
        """
        attempt = 1
        tail = "all"
        while True:
            whole = self._read_stream(tail)
            # Docker reports the exit a little after the end of the stream.
            exited = self._waited.wait(min(attempt, 10))
            if not exited or not whole:
                self._note("Docker ended the output too early; lines may be missing")
            if exited or self._closed:
                return
            attempt += 1
            tail = "0"

    def _read_stream(self, tail: str) -> bool:
        """Read a stream of output until it ends. Returns False if it breaks off."""
        params = {"stdout": 1, "stderr": 1, "follow": 1, "tail": tail}
        path = "/containers/{0}/logs"
        self._response = open_stream(self._client, "GET", path, self._container_id, params, None)
        try:
            for stream, data in output(self._response.iter_content(None), self._tty):
                self._heard = time.monotonic()
                if stream == SYSTEM:
                    data = b"output could not be read: " + data
                self._log.add(stream, data)
        except requests.RequestException:
            return False
        return True

    def _note(self, text: str) -> None:
        """Say in the logs what is wrong with the output, after the output that has come so far."""
        self._log.add(SYSTEM, f"{text}\n".encode())
