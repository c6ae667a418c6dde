"""Prefect's five Docker tasks, with clear failures, live output and bounded memory.

Each task takes the arguments of Prefect's task of that name, by position or by name, in the constructor or at the
call. They differ from Prefect's in this: an error of Docker or of the connection is one FAIL with its cause in place
of a DockerException, and a task after a failed one ends with the message of the failed one.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import docker
import prefect
from docker.errors import DockerException, NotFound
from prefect.engine import signals
from prefect.tasks import docker as prefect_docker

from flows.daemon import (
    ERRORS,
    connect,
    docker_errors_as_failures,
    error_message,
    failure,
    unavailable,
    wait_for_daemon,
)
from flows.output import OUTPUT_GRACE_SECONDS, READ_SECONDS, Watch, read
from flows.parameters import environment_strings
from flows.pull import Pull
from flows.states import all_successful_or_first_failure
from flows.text import abbreviated

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


def _run(what: str, theirs: type[prefect.Task]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate ``run``: it takes the arguments of Prefect's task of that name, with the constructor's as defaults.

    The first one is required. An error is a FAIL that says ``what`` failed.
    """

    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(theirs.run)
        ours = [each for each in inspect.signature(run).parameters.values() if each.kind is each.KEYWORD_ONLY]
        _, *names = (*signature.parameters, *(each.name for each in ours))

        @functools.wraps(run)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = {**{name: getattr(self, name) for name in names}, **dict(zip(names, args)), **kwargs}
            if not given[names[0]]:
                raise ValueError(f"{type(self).__name__}: {names[0]} must be provided.")
            with docker_errors_as_failures(what, given["docker_server_url"]):
                return run(self, **given)

        method.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *ours])  # type: ignore
        return method

    return decorate


class PullImage(_DockerTask, prefect_docker.PullImage):
    """Pull an image, and return its name.

    Prefect's task returns Docker's output as text, and succeeds even if its last line is an error, because Docker
    answers HTTP 200 before the pull starts. This task waits for a daemon that is starting, logs the progress, and
    retries transient errors (registry or daemon unreachable, 5xx, 429). Permanent errors fail at once.
    """

    @_run("Pulling the image", prefect_docker.PullImage)
    def run(
        self, repository: str, tag: Any, docker_server_url: str, extra_docker_kwargs: Options, stream_logs: bool
    ) -> str:
        """Pull ``repository``, which may hold a tag or a digest itself."""
        separator, started = "@" if tag and tag.startswith("sha256:") else ":", time.monotonic()
        image = f"{repository}{separator}{tag}" if tag else repository
        client = wait_for_daemon(docker_server_url, self.logger)
        self.logger.info(f"Pulling {image}")
        options = {"repository": repository, "tag": tag, **(extra_docker_kwargs or {})}
        pull = Pull(client, options, self.logger.debug if stream_logs else lambda _: None)
        pull.start()
        pull.join(PROGRESS_SECONDS)
        while pull.is_alive():
            silence, progress = time.monotonic() - pull.heard, str(pull)
            if silence >= PROGRESS_SECONDS:
                progress += f"; nothing came for {silence:.0f} s"
            if silence >= PULL_SILENCE_SECONDS:
                pull.error = DockerException(f"{progress}: the registry or the daemon hangs")
                break
            self.logger.info(f"Pulling {image}: {progress}")
            pull.join(PROGRESS_SECONDS)
        if pull.error and not isinstance(pull.error, ERRORS):
            raise pull.error
        if pull.error:
            words = error_message(pull.error, docker_server_url)
            message, signal = pull.signal(f"Pulling {image}: {abbreviated(words, 300)}", pull.error, words)
            with suppress(*ERRORS):
                if "platform" not in options and client.inspect_image(image):  # type: ignore[no-untyped-call]
                    self.logger.warning(f"{message}; the run goes on with the image that the daemon has")
                    return image
            raise signal
        if pull.login_fault:
            self.logger.warning(f"Pulling {image}: {pull.login_fault}")
        self.logger.info(f"{pull.outcome or image} ({time.monotonic() - started:.1f} s)")
        return image


class CreateContainer(_DockerTask, prefect_docker.CreateContainer):
    """Create a container, with the flow run's id as a label. Values of its environment become text as in JSON.

    A restart policy is refused: WaitOnContainer could not tell an exit from a restart.
    """

    @_run("Creating the container", prefect_docker.CreateContainer)
    def run(
        self, image_name: str, docker_server_url: str, host_config: Options, extra_docker_kwargs: Options, **rest: Any
    ) -> str:
        """Create the container, and return its id."""
        policy = (host_config or {}).get("restart_policy") or {}
        if isinstance(policy, dict) and policy.get("Name") not in (None, "", "no"):
            words = f"the restart policy {policy['Name']!r} hides the container's exit; use Prefect's retries"
            raise failure(f"Creating the container: host_config: {words}")
        try:
            rest["environment"] = environment_strings(rest["environment"] or {})
        except ValueError as error:
            raise failure(f"Creating the container: {error}") from None
        rest["name"] = rest.pop("container_name")
        labels = (extra_docker_kwargs or {}).get("labels") or {}
        labels = labels if isinstance(labels, dict) else dict.fromkeys(labels, "")
        labels = {**labels, LABEL: prefect.context.get("flow_run_id", "")}
        client = connect(docker_server_url)
        if host_config is not None:
            rest["host_config"] = client.create_host_config(**host_config)
        container = client.create_container(image_name, **{**rest, **(extra_docker_kwargs or {}), "labels": labels})
        self.logger.debug(f"Created container {container['Id']} from image {image_name}")
        for warning in container.get("Warnings") or ():  # such as a limit that the daemon cannot enforce
            self.logger.warning(f"Docker: {warning}")
        return str(container["Id"])


class StartContainer(_DockerTask, prefect_docker.StartContainer):
    """Start a container. The task fails if Docker cannot start it, as when the image has no such command."""

    @_run("Starting the container", prefect_docker.StartContainer)
    def run(self, container_id: str, docker_server_url: str, extra_docker_kwargs: Options) -> None:
        """Start the container."""
        connect(docker_server_url).start(container=container_id, **(extra_docker_kwargs or {}))
        self.logger.debug(f"Started container {container_id}")


class WaitOnContainer(_DockerTask, prefect_docker.WaitOnContainer):
    """Wait on a container, and write its output to the run's logs while it runs.

    Prefect's task logs the output only after a failure, all at once and from memory, and leaves the container running
    when it is interrupted. This task stops the container: on an interruption, and at ``time_limit``, the seconds that
    the container may run from the start of the task.
    """

    def __init__(self, *args: Any, time_limit: float | None = None, **kwargs: Any) -> None:
        self.time_limit = time_limit
        super().__init__(*args, **kwargs)

    @_run("Waiting on the container", prefect_docker.WaitOnContainer)
    def run(
        self,
        container_id: str,
        docker_server_url: str,
        raise_on_exit_code: bool,
        *,
        time_limit: Any = None,
        **rest: Any,
    ) -> dict[str, Any]:
        """Wait until the container has exited, and return Docker's answer, with the exit code as ``StatusCode``."""
        client, name, state = connect(docker_server_url), f"Container {container_id[:12]}", {}
        try:
            config = client.inspect_container(container_id)["Config"]
            name += f" (image {config['Image']})"
            watch = Watch(client, docker_server_url, container_id, config["Tty"], rest["extra_docker_kwargs"] or {})
            try:
                if not watch.log_until_exit(self.logger, name, math.inf if time_limit is None else time_limit):
                    raise failure(f"{name} was stopped at its time limit of {time_limit} s")
                if isinstance(watch.result, Exception) and unavailable(watch.result):
                    raise watch.result  # here, so that a container that may still run is stopped
            except BaseException:
                self.logger.warning(f"{name}: stopping it (SIGTERM, and after {STOP_GRACE_SECONDS} s SIGKILL)")
                with suppress(*ERRORS):
                    client.stop(container_id, timeout=STOP_GRACE_SECONDS)
                watch.log_until_exit(self.logger, name, OUTPUT_GRACE_SECONDS)
                raise
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


class GetContainerLogs(_DockerTask, prefect_docker.GetContainerLogs):
    """Get the end of a container's output: at most 1 MiB and 10,000 lines. A first line says if there was more.

    Prefect's task reads all of the output into memory. This task is Skipped, with the reason, if no container was
    created (Prefect passes the error as its id) or if Docker does not hand out its output.
    """

    @_run("Getting the logs", prefect_docker.GetContainerLogs)
    def run(self, container_id: Any, docker_server_url: str, extra_docker_kwargs: Options) -> str:
        """Get the logs, stdout and stderr as they came."""
        if isinstance(container_id, BaseException):
            raise signals.SKIP("No container was created, so there are no logs")
        pieces, lines, size, deadline = deque[bytes](), 0, 0, time.monotonic() + READ_SECONDS
        options = {"tail": LOG_LINES + 1, **(extra_docker_kwargs or {}), "follow": 0}
        try:
            client = connect(docker_server_url)
            tty = client.inspect_container(container_id)["Config"]["Tty"] is True
            for _, piece in read(client, container_id, tty, **options):
                pieces.append(piece)
                size += len(piece)
                lines += piece.count(b"\n") if tty else 1  # Docker breaks a long line, and counts it as many
                while size - len(pieces[0]) > LOG_BYTES:
                    size -= len(pieces.popleft())
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the output did not end within {READ_SECONDS} s")
        except ERRORS as error:
            raise signals.SKIP(abbreviated(f"No logs: {error_message(error, docker_server_url)}", 500)) from None
        text = b"".join(pieces)
        if lines <= LOG_LINES and size <= LOG_BYTES:
            return text.decode(errors="replace")
        text = text[-LOG_BYTES:].partition(b"\n")[2] or text[-LOG_BYTES:]
        return f"[cut: the last {len(text):,} bytes follow]\n{text.decode(errors='replace')}"
