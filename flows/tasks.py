"""Prefect's five Docker tasks, with clear failures, live output and bounded memory.

Each task takes the arguments of Prefect's task of that name, by position or by name, in the constructor or at the
call. They differ from Prefect's in this: an error of Docker or of the connection is one FAIL with its cause in place
of a DockerException, and a task after a failed one ends with the message of the failed one.
"""

import functools
import inspect
import math
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import prefect
from docker.errors import DockerException, InvalidArgument
from prefect.engine import signals
from prefect.tasks import docker as prefect_docker

from flows import daemon
from flows.daemon import ERRORS, abbreviated, connect, error_message, failure
from flows.output import OUTPUT_GRACE_SECONDS, READ_SECONDS, Watch, read
from flows.parameters import environment_strings
from flows.pull import Pull
from flows.states import all_successful_or_first_failure

PULL_SILENCE_SECONDS = (
    600  # a pull without any event for so long fails; Docker unpacks a large layer in silence
)
PROGRESS_SECONDS = 5  # how often a pull reports its progress
STOP_GRACE_SECONDS = 5  # the time between SIGTERM and SIGKILL for a container that is stopped
LOG_BYTES, LOG_LINES = 1 << 20, 10_000  # how much of the end of the output GetContainerLogs returns
LABEL = "prefect.flow-run-id"  # the label of a container that names its flow run


class _DockerTask(prefect.Task):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("trigger", all_successful_or_first_failure)
        super().__init__(*args, **kwargs)


def _run(
    what: str, theirs: type[prefect.Task]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate ``run``: it takes the arguments of Prefect's, of which the first is required. An error is a FAIL."""

    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(theirs.run)
        ours = [
            each
            for each in inspect.signature(run).parameters.values()
            if each.kind is each.KEYWORD_ONLY
        ]
        _, *names = (*signature.parameters, *(each.name for each in ours))

        @functools.wraps(run)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = {
                **{name: getattr(self, name) for name in names},
                **dict(zip(names, args)),
                **kwargs,
            }
            if not given[names[0]]:
                raise ValueError(f"{type(self).__name__}: {names[0]} must be provided.")
            given["extra_docker_kwargs"] = given["extra_docker_kwargs"] or {}
            with daemon.docker_errors_as_failures(what, given["docker_server_url"]):
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
    def run(self, repository: str, tag: Any, docker_server_url: str, **rest: Any) -> str:
        """Pull ``repository``, which may hold a tag or a digest itself."""
        separator, started = (
            "@" if tag and str(tag).startswith("sha256:") else ":",
            time.monotonic(),
        )
        image = f"{repository}{separator}{tag}" if tag else repository
        client = daemon.wait_for_daemon(docker_server_url, self.logger)
        self.logger.info(f"Pulling {image}")
        options = {"repository": repository, "tag": tag, **rest["extra_docker_kwargs"]}
        pull = Pull(client, options, self.logger.debug if rest["stream_logs"] else lambda _: None)
        pull.start()
        pull.join(PROGRESS_SECONDS)
        while pull.is_alive():
            silence = time.monotonic() - pull.heard
            progress = (
                f"{pull}; nothing came for {silence:.0f} s"
                if silence >= PROGRESS_SECONDS
                else str(pull)
            )
            if silence >= PULL_SILENCE_SECONDS:
                pull.error = DockerException(f"{progress}: the registry or the daemon hangs")
                break
            self.logger.info(f"Pulling {image}: {progress}")
            pull.join(PROGRESS_SECONDS)
        if isinstance(pull.error, ERRORS):
            words = error_message(pull.error, docker_server_url)
            with suppress(*ERRORS):
                if "platform" not in options and client.inspect_image(image):  # type: ignore[no-untyped-call]
                    self.logger.warning(
                        f"Pulling {image}: {abbreviated(words, 300)}; the image on the daemon is used"
                    )
                    return image
            raise pull.signal(image, words)
        if pull.error:
            raise pull.error
        if pull.login_fault:
            self.logger.warning(f"Pulling {image}: {pull.login_fault}")
        self.logger.info(f"{pull.outcome or image} ({time.monotonic() - started:.1f} s)")
        return image


class CreateContainer(_DockerTask, prefect_docker.CreateContainer):
    """Create a container, with the flow run's id as a label. Values of its environment become text as in JSON.

    A restart policy is refused: WaitOnContainer could not tell an exit from a restart. auto_remove is left out: with
    the container, its exit code and its output would go.
    """

    @_run("Creating the container", prefect_docker.CreateContainer)
    def run(
        self,
        image_name: str,
        docker_server_url: str,
        extra_docker_kwargs: dict[str, Any],
        **rest: Any,
    ) -> str:
        """Create the container, and return its id."""
        options = {**rest, "environment": environment_strings(rest["environment"] or {})}
        options["name"] = options.pop("container_name")
        client = connect(docker_server_url)
        options["host_config"] = client.create_host_config(**(options["host_config"] or {}))
        options.update(extra_docker_kwargs)
        host_config = options["host_config"] or {}
        policy = (host_config.get("RestartPolicy") or {}).get("Name")
        if policy not in (None, "", "no"):
            raise InvalidArgument(
                f"the restart policy {policy!r} hides the container's exit; use Prefect's retries"
            )
        if host_config.pop("AutoRemove", False):
            self.logger.warning(
                "auto_remove is left out: the container is needed for its exit code and its output"
            )
        labels = options.get("labels") or {}
        labels = labels if isinstance(labels, dict) else dict.fromkeys(labels, "")
        options["labels"] = {**labels, LABEL: prefect.context.get("flow_run_id", "")}
        container = client.create_container(image_name, **options)
        for warning in (
            container.get("Warnings") or ()
        ):  # such as a limit that the daemon cannot enforce
            self.logger.warning(f"Docker: {warning}")
        return str(container["Id"])


class StartContainer(_DockerTask, prefect_docker.StartContainer):
    """Start a container. The task fails if Docker cannot start it, as when the image has no such command."""

    @_run("Starting the container", prefect_docker.StartContainer)
    def run(
        self, container_id: str, docker_server_url: str, extra_docker_kwargs: dict[str, Any]
    ) -> None:
        """Start the container."""
        connect(docker_server_url).start(container=container_id, **extra_docker_kwargs)


class WaitOnContainer(_DockerTask, prefect_docker.WaitOnContainer):
    """Wait on a container, and write its output to the run's logs while it runs.

    Prefect's task logs the output only after a failure, all at once and from memory, and leaves the container running
    when it is interrupted. This task stops the container: on an interruption, and at ``time_limit``, the seconds that
    the container may run from the start of the task.
    """

    def __init__(self, *args: Any, time_limit: Any = None, **kwargs: Any) -> None:
        self.time_limit = time_limit
        super().__init__(*args, **kwargs)

    @_run("Waiting on the container", prefect_docker.WaitOnContainer)
    def run(
        self, container_id: str, docker_server_url: str, *, time_limit: Any = None, **rest: Any
    ) -> Any:
        """Wait until the container has exited, and return Docker's answer, with the exit code as ``StatusCode``."""
        client = connect(docker_server_url)
        config = client.inspect_container(container_id)["Config"]
        name = f"Container {container_id[:12]} (image {config['Image']})"
        watch = Watch(
            client, docker_server_url, container_id, config["Tty"], rest["extra_docker_kwargs"]
        )
        try:
            if not watch.log_until_exit(
                self.logger, name, math.inf if time_limit is None else time_limit
            ):
                raise failure(f"{name} was stopped at its time limit of {time_limit} s")
            if isinstance(watch.result, Exception):
                raise watch.result
        except BaseException as error:  # the container may still run
            if isinstance(
                error, SystemExit
            ):  # a process pool's answer to SIGTERM, which may come twice
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.logger.warning(
                f"{name}: stopping it (SIGTERM, and after {STOP_GRACE_SECONDS} s SIGKILL)"
            )
            with suppress(*ERRORS):
                client.stop(container_id, timeout=STOP_GRACE_SECONDS)
            watch.log_until_exit(self.logger, name, OUTPUT_GRACE_SECONDS)
            raise
        code, reason = (
            watch.result.get("StatusCode"),
            (watch.result.get("Error") or {}).get("Message"),
        )
        if rest["raise_on_exit_code"] and (reason or code):
            memory = ""
            with suppress(*ERRORS):  # the container may have been removed since
                if client.inspect_container(container_id)["State"]["OOMKilled"]:
                    memory = ", killed because it exceeded its memory limit (OOMKilled)"
            raise failure(
                f"{name} exited with code {code}{memory}{f': {reason}' if reason else ''}"
            )
        self.logger.info(f"{name} exited with code {code}")
        return watch.result


class GetContainerLogs(_DockerTask, prefect_docker.GetContainerLogs):
    """Get the end of a container's output: at most 1 MiB and 10,000 lines. A first line says if there was more.

    Prefect's task reads all of the output into memory. This task is Skipped, with the reason, if no container was
    created (Prefect passes the error as its id) or if Docker does not hand out its output.
    """

    @_run("Getting the logs", prefect_docker.GetContainerLogs)
    def run(
        self, container_id: Any, docker_server_url: str, extra_docker_kwargs: dict[str, Any]
    ) -> str:
        """Get the logs, stdout and stderr as they came."""
        if isinstance(container_id, BaseException):
            raise signals.SKIP("No container was created, so there are no logs")
        text, lines, deadline = bytearray(), 0, time.monotonic() + READ_SECONDS
        options = {"tail": LOG_LINES + 1, **extra_docker_kwargs, "follow": 0}
        try:
            client = connect(docker_server_url)
            tty = client.inspect_container(container_id)["Config"]["Tty"] is True
            for _, piece in read(client, container_id, tty, **options):
                text += piece
                del text[: -LOG_BYTES - 1]  # with one byte more, which says that it is cut
                lines += (
                    piece.count(b"\n") if tty else 1
                )  # Docker breaks a long line, and counts it as many
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the output did not end within {READ_SECONDS} s")
        except ERRORS as error:
            raise signals.SKIP(
                abbreviated(f"No logs: {error_message(error, docker_server_url)}", 500)
            ) from None
        if lines <= LOG_LINES and len(text) <= LOG_BYTES:
            return text.decode(errors="replace")
        text = text[-LOG_BYTES:].partition(b"\n")[2] or text[-LOG_BYTES:]
        return f"[cut: the last {len(text):,} bytes follow]\n{text.decode(errors='replace')}"
