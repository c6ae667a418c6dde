"""The recipe's five Docker tasks, as subclasses of Prefect's where those fall short.

All of them fail with Docker's own words as the state's message, which Prefect logs once and without a
traceback, and hand the message of a failed task on to those that come after it, so that the run ends with
its cause.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import docker
import pendulum
import prefect
import requests
from docker.errors import APIError, DockerException
from prefect.engine import signals
from prefect.engine.state import Failed, State
from prefect.tasks import docker as prefect_docker
from prefect.utilities.tasks import defaults_from_attrs

from flows.output import Batch, frames

STOP_GRACE_SECONDS = 5
"""How long an interrupted container has between SIGTERM and SIGKILL."""

PULL_RETRY_SECONDS = (3, 10, 30)
"""The pauses before a pull is tried again; their number is the number of retries."""

PROGRESS_SECONDS = 5
"""How often a pull reports its progress."""

FLUSH_SECONDS = 1
"""How often a running container's output is written to the run's logs."""

LOG_BYTES, LOG_LINES = 1 << 20, 10_000
"""How much of a container's output GetContainerLogs returns, counted from its end."""

LABEL = "prefect.flow-run-id"
"""The label that says which flow run a container belongs to."""

# What a registry or daemon says when another try would end the same way.
_FINAL = re.compile(
    r"not found|manifest unknown|no matching manifest|unknown blob|denied|unauthorized|authentication required"
    r"|no basic auth|invalid reference|unsupported|no space left",
    re.IGNORECASE,
)

_CREDENTIALS = re.compile(r"denied|unauthorized|authentication required|no basic auth", re.IGNORECASE)
_REMEDY = (
    " (if it is a private image: `docker login`, or on Kubernetes a Secret named docker-sidecar of type "
    "kubernetes.io/dockerconfigjson)"
)

_Errors = (DockerException, requests.RequestException)


def stop_at_the_cause(upstream_states: Mapping[Any, State]) -> bool:
    """Trigger: run if all upstream tasks succeeded; otherwise fail with the first one's message.

    Prefect's ``all_successful`` says only that some upstream task failed.

    Raises:
        TRIGGERFAIL: with the message of a failed upstream state.
    """
    for state in upstream_states.values():
        if not state.is_successful():
            raise signals.TRIGGERFAIL(state.message)
    return True


def fail_with_the_cause(flow: prefect.Flow, state: State, reference_states: set[State]) -> State | None:
    """Terminal state handler: a failed run's message is its cause, not "some reference tasks failed"."""
    causes = sorted({str(task.message) for task in reference_states if task.is_failed()})
    return Failed("; ".join(causes), result=state.result) if state.is_failed() else None


def _words(error: Exception, docker_server_url: str) -> str:
    """What went wrong, in Docker's own words where there are any."""
    if isinstance(error, APIError):
        return str(error.explanation or error)
    cause = str(error).replace("Error while fetching server API version: ", "")
    return f"the Docker daemon at {docker_server_url} does not answer ({cause})"


class _DockerTask(prefect.Task):
    """What the five tasks share."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("trigger", stop_at_the_cause)
        super().__init__(**kwargs)

    @contextmanager
    def failing(self, what: str, docker_server_url: str) -> Iterator[None]:
        """Turn an error of Docker or of the connection into one message: ``what``, and why."""
        try:
            yield
        except (*_Errors, ValueError) as error:
            why = str(error) if type(error) is ValueError else _words(error, docker_server_url)
            raise signals.FAIL(f"{what}: {why}") from None


class PullImage(_DockerTask, prefect_docker.PullImage):
    """Pull an image: errors in the middle of Docker's stream fail, progress is logged, passing errors are retried.

    Prefect's task returns Docker's output as text even if its last line is an error, because Docker answers
    HTTP 200 before it starts to pull. Arguments as for ``prefect.tasks.docker.PullImage``.
    """

    @defaults_from_attrs("repository", "tag", "docker_server_url", "extra_docker_kwargs")
    def run(
        self,
        repository: str | None = None,
        tag: str | None = None,
        docker_server_url: str = "unix:///var/run/docker.sock",
        extra_docker_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Pull ``repository``, which may hold a tag or a digest itself.

        Returns:
            The reference of the image that was pulled.

        Raises:
            RETRY: if the registry or the daemon may answer later.
            FAIL: if it will not, or did not after all retries.
        """
        image = f"{repository}:{tag}" if tag else str(repository)
        try:
            self._pull(docker.APIClient(base_url=docker_server_url, version="auto"), image, extra_docker_kwargs)
        except _Errors as error:
            message = f"Pulling {image}: {_words(error, docker_server_url)}"
            final = isinstance(error, APIError) and (
                _FINAL.search(message) or (error.is_client_error() and error.status_code != 429)
            )
            message += _REMEDY if _CREDENTIALS.search(message) else ""
            attempt = prefect.context.get("task_run_count", 1)
            if final or attempt > len(PULL_RETRY_SECONDS):
                raise signals.FAIL(message) from None
            pause = PULL_RETRY_SECONDS[attempt - 1]
            message += f"; retry {attempt} of {len(PULL_RETRY_SECONDS)} in {pause} s"
            raise signals.RETRY(message, start_time=pendulum.now("utc").add(seconds=pause)) from None
        return image

    def _pull(self, client: docker.APIClient, image: str, extra_docker_kwargs: dict[str, Any] | None) -> None:
        layers: dict[str, bool] = {}  # id: done
        received: dict[str, tuple[int, int]] = {}  # id: bytes so far, bytes in all
        outcome = ""
        started = reported = time.monotonic()
        self.logger.info(f"Pulling {image}")
        for event in client.pull(image, stream=True, decode=True, **(extra_docker_kwargs or {})):
            if "error" in event:
                raise APIError(event["error"], explanation=event["error"])
            status, layer, detail = (
                event.get("status", ""),
                event.get("id"),
                event.get("progressDetail") or {},
            )
            if layer and not status.startswith("Pulling from"):
                layers[layer] = status in ("Pull complete", "Already exists")
            if status == "Downloading" and "total" in detail:
                received[layer] = detail["current"], detail["total"]
            if status == "Download complete" and layer in received:  # Docker does not report the last bytes
                received[layer] = received[layer][1], received[layer][1]
            outcome = status.replace("Status: ", "") if status.startswith("Status: ") else outcome
            if time.monotonic() - reported >= PROGRESS_SECONDS:
                reported = time.monotonic()
                self.logger.info(f"Pulling {image}: {_progress(layers, received)}")
        seconds = f"{time.monotonic() - started:.1f} s"
        self.logger.info(f"{outcome or image} ({_progress(layers, received) + ', ' if layers else ''}{seconds})")


def _progress(layers: Mapping[str, bool], received: Mapping[str, tuple[int, int]]) -> str:
    so_far, total = (sum(column) / 1e6 for column in zip(*received.values())) if received else (0, 0)
    return f"{sum(layers.values())} of {len(layers)} layers done, {so_far:.1f} of {total:.1f} MB received"


class CreateContainer(_DockerTask, prefect_docker.CreateContainer):
    """Create a container that carries the flow run's id as a label.

    Arguments as for ``prefect.tasks.docker.CreateContainer``.
    """

    def run(self, **kwargs: Any) -> str:  # type: ignore[override]
        """Create the container.

        Returns:
            The id of the container.

        Raises:
            FAIL: if Docker refuses.
        """
        with self.failing("Creating the container", kwargs.get("docker_server_url") or self.docker_server_url):
            extra = kwargs.pop("extra_docker_kwargs", None) or self.extra_docker_kwargs or {}
            labels = {**(extra.get("labels") or {}), LABEL: prefect.context.get("flow_run_id", "")}
            extra = {**extra, "labels": labels}
            return str(super().run(extra_docker_kwargs=extra, **kwargs))


class StartContainer(_DockerTask, prefect_docker.StartContainer):
    """Start a container. Arguments as for ``prefect.tasks.docker.StartContainer``."""

    def run(self, **kwargs: Any) -> None:
        """Start the container.

        Raises:
            FAIL: if Docker cannot start it, as when the image has no such command.
        """
        with self.failing("Starting the container", kwargs.get("docker_server_url") or self.docker_server_url):
            super().run(**kwargs)


class _Stop(BaseException):
    """A reason to stop a container, in words that follow "was stopped"."""


def _output(client: docker.APIClient, container_id: str, tty: bool, **options: Any) -> Iterator[tuple[bool, bytes]]:
    """A container's output in pieces, each with whether it is stderr, which ``APIClient.logs()`` does not tell."""
    response = client.get(
        f"{client.base_url}/v{client.api_version}/containers/{container_id}/logs",
        params={"stdout": True, "stderr": True, **options},
        stream=True,
    )
    if not response.ok:
        raise APIError(response.reason, response, response.json().get("message"))
    yield from frames(response.iter_content(chunk_size=None), tty)


class WaitOnContainer(_DockerTask, prefect_docker.WaitOnContainer):
    """Wait on a container, and write its output to the run's logs while it runs.

    Prefect's task shows the output only after a failure, all at once and from memory, and leaves the container
    running when it is interrupted. Arguments as for ``prefect.tasks.docker.WaitOnContainer``.
    """

    @defaults_from_attrs("container_id", "docker_server_url", "raise_on_exit_code")
    def run(
        self,
        container_id: str | None = None,
        docker_server_url: str = "unix:///var/run/docker.sock",
        raise_on_exit_code: bool = True,
        time_limit: float | None = None,
    ) -> dict[str, Any]:
        """Wait until the container has exited. If the wait is cut short, by whatever, the container is stopped.

        Args:
            container_id: the container.
            docker_server_url: where the Docker daemon is.
            raise_on_exit_code: whether another exit code than 0 is a failure.
            time_limit: seconds after which the container is stopped, and the task fails.

        Returns:
            Docker's answer, with the exit code as ``StatusCode``.

        Raises:
            FAIL: if the exit code is not zero or cannot be told, at the time limit, or if the process got SIGTERM.
        """
        name = f"Container {str(container_id)[:12]}"
        with self.failing(name, docker_server_url):
            client = docker.APIClient(base_url=docker_server_url, version="auto")
            config = client.inspect_container(str(container_id))["Config"]
            name += f" (image {config['Image']})"
        with (
            self.failing(name, docker_server_url),
            self._stopped_if_interrupted(client, str(container_id), name),
        ):
            unread = self._follow(client, str(container_id), config["Tty"], time_limit)
            result = dict(client.wait(str(container_id)))
            state = client.inspect_container(str(container_id))["State"]
        if unread:
            self.logger.warning(f"{name}: not all of its output is shown: {_words(unread, docker_server_url)}")
        if raise_on_exit_code and (result.get("Error") or result.get("StatusCode")):
            memory = ", killed because it exceeded its memory limit (OOMKilled)" if state["OOMKilled"] else ""
            reason = f": {result['Error']}" if result.get("Error") else ""
            raise signals.FAIL(f"{name} exited with code {result.get('StatusCode')}{memory}{reason}")
        self.logger.info(f"{name} exited with code {result.get('StatusCode')}")
        return result

    def _follow(
        self, client: docker.APIClient, container_id: str, tty: bool, time_limit: float | None
    ) -> Exception | None:
        """Log the container's output until it has ended; return why its output could not be read, if it could not.

        A thread reads, so that this one can log what came when nothing more comes, and can be interrupted.
        """
        batch, done = Batch(), threading.Event()
        errors: list[Exception] = []

        def read() -> None:
            try:
                with suppress(*_Errors):  # run() meets them as well
                    try:
                        for stderr, data in _output(client, container_id, tty, follow=True):
                            batch.add(stderr, data)
                    except (*_Errors, ValueError) as error:
                        errors.append(error)
                    client.wait(container_id)  # whether or not its output can be read
            finally:
                done.set()

        threading.Thread(target=read, daemon=True).start()

        def log(last: bool = False) -> None:
            for stderr, text in batch.take(last):
                (self.logger.warning if stderr else self.logger.info)(text)

        started = time.monotonic()
        try:
            while not done.wait(FLUSH_SECONDS):
                log()
                if time_limit is not None and time.monotonic() - started > time_limit:
                    raise _Stop(f"at its time limit of {time_limit:g} s")
        finally:
            log(last=True)
        return errors[0] if errors else None

    @contextmanager
    def _stopped_if_interrupted(self, client: docker.APIClient, container_id: str, name: str) -> Iterator[None]:
        def terminate(*_: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough
            raise _Stop("because the flow's process got SIGTERM")

        in_main_thread = threading.current_thread() is threading.main_thread()
        previous = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
        try:
            yield
        except BaseException as error:
            if not isinstance(error, _Errors):  # then the daemon is gone, and the container with it
                self.logger.warning(f"{name}: stopping it (SIGTERM, and after {STOP_GRACE_SECONDS} s SIGKILL)")
            with suppress(*_Errors):
                client.stop(container_id, timeout=STOP_GRACE_SECONDS)
            if isinstance(error, _Stop):
                raise signals.FAIL(f"{name} was stopped {error}") from None
            raise
        finally:
            if in_main_thread:
                signal.signal(signal.SIGTERM, previous)


class GetContainerLogs(_DockerTask, prefect_docker.GetContainerLogs):
    """Get the end of a container's output, at most 1 MiB and 10,000 lines of it.

    Prefect's task reads everything into memory, twice. Arguments as for ``prefect.tasks.docker.GetContainerLogs``.
    """

    @defaults_from_attrs("container_id", "docker_server_url")
    def run(
        self,
        container_id: str | Exception | None = None,
        docker_server_url: str = "unix:///var/run/docker.sock",
    ) -> str:
        """Get the logs.

        Args:
            container_id: the container; when it could not be created, Prefect passes the error in its place.
            docker_server_url: where the Docker daemon is.

        Returns:
            The output, stdout and stderr as they came; if it was cut, a first line says so.

        Raises:
            SKIP: if no container was created, or its daemon is gone; then WaitOnContainer has said why.
            FAIL: if Docker refuses.
        """
        if not isinstance(container_id, str):
            raise signals.SKIP("No container was created, so there are no logs")
        pieces: deque[bytes] = deque()
        try:
            client = docker.APIClient(base_url=docker_server_url, version="auto")
            tty = client.inspect_container(container_id)["Config"]["Tty"]
            # where a few long lines are enough, no more are read; of a TTY's it cannot be told how many they were
            for tail in (LOG_LINES + 1,) if tty else (LOG_LINES // 5, LOG_LINES + 1):
                pieces.clear()
                size = lines = 0
                for _, piece in _output(client, container_id, tty, tail=tail):
                    pieces.append(piece)
                    size += len(piece)
                    lines += piece.count(b"\n") if tty else 1  # Docker breaks a line at 16 KiB, and counts its parts
                    while size - len(pieces[0]) > LOG_BYTES:
                        size -= len(pieces.popleft())
                if size > LOG_BYTES or lines < tail:
                    break
        except APIError as error:
            raise signals.FAIL(f"Getting the logs of container {container_id[:12]}: {_words(error, '')}") from None
        except _Errors as error:
            raise signals.SKIP(f"No logs: {_words(error, docker_server_url)}") from None
        output = b"".join(pieces)
        if lines <= LOG_LINES and size <= LOG_BYTES:
            return output.decode(errors="replace")
        output = output[-LOG_BYTES:].partition(b"\n")[2] or output[-LOG_BYTES:]
        return f"[cut: what follows is the end, {len(output):,} bytes]\n{output.decode(errors='replace')}"
