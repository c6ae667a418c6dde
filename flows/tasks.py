"""Prefect's five Docker tasks, with clear failures, live output and bounded memory.

Each task takes the arguments of Prefect's task of that name, by position or by name, in the constructor or at the
call. They differ from Prefect's in this: an error of Docker or of the connection is one FAIL with its cause in place
of a DockerException, and a task after a failed one ends with the message of the failed one.
"""

from __future__ import annotations

import functools
import inspect
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import docker
import prefect
from docker.errors import APIError, NotFound
from prefect.engine import signals
from prefect.tasks import docker as prefect_docker

from flows.daemon import ERRORS, connect, docker_errors_as_failures, error_message, failure, unreachable
from flows.output import OUTPUT_GRACE_SECONDS, Watch
from flows.parameters import abbreviated, environment_strings
from flows.pull import Pull
from flows.states import all_successful_or_first_failure

PULL_SILENCE_SECONDS = 600  # a pull without any event for so long fails; Docker unpacks a large layer in silence
PROGRESS_SECONDS = 5  # how often a pull reports its progress
STOP_GRACE_SECONDS = 5  # the time between SIGTERM and SIGKILL for a container that is stopped
LOG_BYTES, LOG_LINES = 1 << 20, 10_000  # how much of the end of the output GetContainerLogs returns
LABEL = "prefect.flow-run-id"  # the label of a container that names its flow run

SOCKET = "unix:///var/run/docker.sock"
Options = dict[str, Any] | None


class _DockerTask(prefect.Task):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("trigger", all_successful_or_first_failure)
        super().__init__(*args, **kwargs)


def _run(what: str, required: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate ``run``: the constructor's arguments are its defaults, and an error is a FAIL that says ``what``."""

    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(run).parameters)[1:]

        @functools.wraps(run)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = {**{name: getattr(self, name) for name in names}, **dict(zip(names, args)), **kwargs}
            if not given[required]:
                raise ValueError(f"{type(self).__name__}: {required} must be provided.")
            with docker_errors_as_failures(what, given["docker_server_url"]):
                return run(self, **given)

        return method

    return decorate


class PullImage(_DockerTask, prefect_docker.PullImage):
    """Pull an image, and return its name.

    Prefect's task returns Docker's output as text, and succeeds even if its last line is an error, because Docker
    answers HTTP 200 before the pull starts. This task waits for a daemon that is starting, logs the progress, and
    retries transient errors (registry or daemon unreachable, 5xx, 429). Permanent errors fail at once.
    """

    @_run("Pulling the image", "repository")
    def run(
        self,
        repository: str = "",
        tag: str | None = None,
        docker_server_url: str = SOCKET,
        extra_docker_kwargs: Options = None,
        stream_logs: bool = False,
    ) -> str:
        """Pull ``repository``, which may hold a tag or a digest itself."""
        separator, started = "@" if tag and tag.startswith("sha256:") else ":", time.monotonic()
        image = f"{repository}{separator}{tag}" if tag else repository
        client = connect(docker_server_url, self.logger)
        self.logger.info(f"Pulling {image}")
        options = {"repository": repository, "tag": tag, **(extra_docker_kwargs or {})}
        pull = Pull(client, options, self.logger.debug if stream_logs else lambda _: None)
        pull.start()
        pull.join(PROGRESS_SECONDS)
        while pull.is_alive():
            silence, progress = time.monotonic() - pull.heard, f"Pulling {image}: {pull}"
            if silence >= PROGRESS_SECONDS:
                progress += f"; nothing came for {silence:.0f} s"
            if silence >= PULL_SILENCE_SECONDS:
                raise signals.FAIL(f"{progress}: the registry or the daemon hangs")
            self.logger.info(progress)
            pull.join(PROGRESS_SECONDS)
        if pull.error:
            words = error_message(pull.error, docker_server_url)
            raise pull.failure(f"Pulling {image}: {abbreviated(words, 500)}", pull.error, words)
        if pull.login_fault:
            self.logger.warning(f"Pulling {image}: {pull.login_fault}")
        self.logger.info(f"{pull.outcome or image} ({time.monotonic() - started:.1f} s)")
        return image


class CreateContainer(_DockerTask, prefect_docker.CreateContainer):
    """Create a container, with the flow run's id as a label. Values of its environment become text as in JSON.

    Where Docker's default log driver is json-file, the container gets the driver local: json-file breaks a character
    that it cuts, at every 16 KiB of a line. A ``log_config`` in ``host_config`` is used as it is.
    """

    @_run("Creating the container", "image_name")
    def run(
        self,
        image_name: str = "",
        container_name: str | None = None,
        command: list[str] | str | None = None,
        detach: bool = False,
        entrypoint: list[str] | str | None = None,
        environment: list[str] | dict[str, Any] | None = None,
        volumes: str | list[str] | None = None,
        docker_server_url: str = SOCKET,
        host_config: Options = None,
        extra_docker_kwargs: Options = None,
    ) -> str:
        """Create the container, and return its id."""
        client, extra = connect(docker_server_url), dict(extra_docker_kwargs or {})
        labels = extra.pop("labels", None) or {}
        labels = dict.fromkeys(labels, "") if isinstance(labels, list) else labels
        with suppress(*ERRORS, LookupError):  # of an engine that does not say
            if client.info()["LoggingDriver"] == "json-file":
                # Docker 20.10 stops in the middle of the output when the driver starts a new file
                limits = {"max-size": "1t"} if docker.utils.version_lt(client.api_version, "1.42") else {}
                host_config = {"log_config": {"type": "local", "config": limits}, **(host_config or {})}
        self.logger.debug(f"Creating a container from image {image_name}")
        container = client.create_container(
            image=image_name,
            command=command,
            environment=environment_strings(environment or {}),  # type: ignore[arg-type]
            host_config=None if host_config is None else client.create_host_config(**host_config),
            labels={**labels, LABEL: prefect.context.get("flow_run_id", "")},
            **{"name": container_name, "detach": detach, "entrypoint": entrypoint, "volumes": volumes, **extra},
        )
        self.logger.debug(f"Created container {container['Id']} from image {image_name}")
        for warning in container.get("Warnings") or ():  # such as a limit that the daemon cannot enforce
            self.logger.warning(f"Docker: {warning}")
        return str(container["Id"])


class StartContainer(_DockerTask, prefect_docker.StartContainer):
    """Start a container. The task fails if Docker cannot start it, as when the image has no such command."""

    @_run("Starting the container", "container_id")
    def run(self, container_id: str = "", docker_server_url: str = SOCKET, extra_docker_kwargs: Options = None) -> None:
        """Start the container."""
        self.logger.debug(f"Starting container {container_id}")
        connect(docker_server_url).start(container=container_id, **(extra_docker_kwargs or {}))
        self.logger.debug(f"Started container {container_id}")


class WaitOnContainer(_DockerTask, prefect_docker.WaitOnContainer):
    """Wait on a container, and write its output to the run's logs while it runs.

    Prefect's task logs the output only after a failure, all at once and from memory, and leaves the container running
    when it is interrupted. This task stops the container: on an interruption, on SIGTERM, and at ``time_limit``, the
    seconds that the container may run from the start of the task.
    """

    def __init__(self, *args: Any, time_limit: float | None = None, **kwargs: Any) -> None:
        self.time_limit = time_limit
        super().__init__(*args, **kwargs)

    @_run("Waiting on the container", "container_id")
    def run(
        self,
        container_id: str = "",
        docker_server_url: str = SOCKET,
        raise_on_exit_code: bool = True,
        extra_docker_kwargs: Options = None,
        time_limit: float | None = None,
    ) -> dict[str, Any]:
        """Wait until the container has exited, and return Docker's answer, with the exit code as ``StatusCode``."""
        self.logger.debug(f"Waiting on container {container_id}")
        client, name, state = connect(docker_server_url), f"Container {container_id[:12]}", {}
        try:
            config = client.inspect_container(container_id)["Config"]
            name += f" (image {config['Image']})"
            watch = Watch(client, docker_server_url, container_id, config["Tty"], extra_docker_kwargs or {})
            with self._stopped_if_interrupted(client, container_id, name, watch):
                if not watch.log(self.logger, name, math.inf if time_limit is None else time_limit):
                    raise failure(f"{name} was stopped at its time limit of {time_limit} s")
                if isinstance(watch.result, Exception) and unreachable(watch.result):
                    raise watch.result  # here, so that a container that may still run is stopped
            if isinstance(watch.result, Exception):
                raise watch.result
            result = dict(watch.result)
            with suppress(NotFound):
                state = client.inspect_container(container_id)["State"]
        except NotFound as error:
            result = self._result_of_removed(client, container_id, error)
        except ERRORS as error:
            raise failure(f"{name}: {error_message(error, docker_server_url)}") from None
        code, reason = result.get("StatusCode"), result.get("Error")
        reason = reason.get("Message") if isinstance(reason, dict) else reason
        if raise_on_exit_code and (reason or code):
            memory = ", killed because it exceeded its memory limit (OOMKilled)" if state.get("OOMKilled") else ""
            raise failure(f"{name} exited with code {code}{memory}{f': {reason}' if reason else ''}")
        self.logger.info(f"{name} exited with code {code}")
        return result

    def _result_of_removed(self, client: docker.APIClient, container_id: str, error: NotFound) -> dict[str, Any]:
        """The exit code of a container that was removed, as with auto_remove, from the daemon's recent events."""
        filters = {"container": container_id, "event": "die"}
        for event in client.events(since=1, until=int(time.time()) + 1, filters=filters, decode=True):
            self.logger.warning(f"Container {container_id[:12]} was removed when it exited; output may be missing")
            return {"Error": None, "StatusCode": int(event["Actor"]["Attributes"]["exitCode"])}
        raise error

    @contextmanager
    def _stopped_if_interrupted(
        self, client: docker.APIClient, container_id: str, name: str, watch: Watch
    ) -> Iterator[None]:
        def terminate(*_: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough
            raise failure(f"{name} was stopped because the flow's process got SIGTERM")

        in_main_thread = threading.current_thread() is threading.main_thread()
        previous = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
        try:
            yield
        except BaseException:
            self.logger.warning(f"{name}: stopping it (SIGTERM, and after {STOP_GRACE_SECONDS} s SIGKILL)")
            with suppress(*ERRORS):
                client.stop(container_id, timeout=STOP_GRACE_SECONDS)
            watch.log(self.logger, name, OUTPUT_GRACE_SECONDS)
            raise
        finally:
            if in_main_thread:
                signal.signal(signal.SIGTERM, previous)


class GetContainerLogs(_DockerTask, prefect_docker.GetContainerLogs):
    """Get the end of a container's output: at most 1 MiB and 10,000 lines, or 2,000 of a TTY. A first line says so.

    Prefect's task reads all of the output into memory. This task is Skipped if there is no container, no daemon, or no
    output any more, as with ``auto_remove``. If no container was created, Prefect passes the error as its id.
    """

    @_run("Getting the logs", "container_id")
    def run(
        self, container_id: Any = None, docker_server_url: str = SOCKET, extra_docker_kwargs: Options = None
    ) -> str:
        """Get the logs, stdout and stderr as they came."""
        if isinstance(container_id, BaseException):
            raise signals.SKIP("No container was created, so there are no logs")
        self.logger.debug(f"Gathering logs from container {container_id}")
        pieces, size = deque[bytes](), 0
        try:
            client = connect(docker_server_url)
            tty = client.inspect_container(container_id)["Config"]["Tty"] is True
            lines = LOG_LINES // 5 if tty else LOG_LINES  # the SDK reads a stream of a TTY byte by byte: no stream then
            options = {"tail": lines + 1, "stream": not tty, "follow": False, **(extra_docker_kwargs or {})}
            output: Any = client.logs(container=container_id, **options)
            for piece in output.splitlines(keepends=True) if isinstance(output, bytes) else output:
                pieces.append(piece)
                size += len(piece)
                while size - len(pieces[0]) > LOG_BYTES or len(pieces) > lines + 1:
                    size -= len(pieces.popleft())
        except ERRORS as error:
            if unreachable(error) or (isinstance(error, APIError) and error.status_code in (404, 409)):
                message = abbreviated(error_message(error, docker_server_url), 500)
                raise signals.SKIP(f"No logs: {message}") from None
            raise
        self.logger.debug(f"Gathered logs from container {container_id}")
        text = b"".join(pieces)
        if len(pieces) <= lines and size <= LOG_BYTES:
            return text.decode(errors="replace")
        text = text[-LOG_BYTES:].partition(b"\n")[2] or text[-LOG_BYTES:]
        return f"[cut: the last {len(text):,} bytes follow]\n{text.decode(errors='replace')}"
