"""Prefect's five Docker tasks, with clear failures, live output and bounded memory.

Each task takes the arguments of Prefect's task of that name, in the constructor or at the call.
They differ from Prefect's in this: an error of Docker or of the connection is one FAIL with its
cause in place of a DockerException, and a task after a failed one ends with that one's message.
"""

import math
import signal
import time
from contextlib import suppress
from typing import Any

import docker
import prefect
from docker.errors import DockerException
from prefect.engine import signals
from prefect.tasks import docker as prefect_docker
from prefect.utilities.tasks import defaults_from_attrs

from flows.daemon import (
    ERRORS,
    abbreviated,
    call_sdk,
    connect,
    docker_errors_as_failures,
    error_message,
    failure,
    wait_for_daemon,
)
from flows.options import container_options, environment_strings, host_options
from flows.output import OUTPUT_GRACE_SECONDS, READ_SECONDS, Watch, read
from flows.pull import Pull
from flows.states import all_successful_or_first_failure

PULL_SILENCE_SECONDS = 600  # Docker unpacks a large layer in silence; a longer one fails the pull
PROGRESS_SECONDS = 5  # how often a pull reports its progress
STOP_GRACE_SECONDS = 5  # the time between SIGTERM and SIGKILL for a container that is stopped
LOG_BYTES = 1 << 20  # how much of the end of the output GetContainerLogs returns
LOG_LINES = 10_000  # the same, in lines
LABEL = "prefect.flow-run-id"  # the label of a container that names its flow run
LOCAL_DOCKER = "unix:///var/run/docker.sock"  # the default of Prefect's tasks


class _DockerTask(prefect.Task):
    """What the five tasks have in common: after a failed task they fail with its message."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("trigger", all_successful_or_first_failure)
        super().__init__(*args, **kwargs)


def _image_reference(repository: str, tag: Any) -> str:
    """The name of an image. A tag may be a digest, and the repository may hold a tag itself."""
    if not tag:
        return repository
    if str(tag).startswith("sha256:"):
        return f"{repository}@{tag}"
    return f"{repository}:{tag}"


class PullImage(_DockerTask, prefect_docker.PullImage):
    """Pull an image, and return its name.

    Prefect's task returns Docker's output as text, and succeeds even if its last line is an error,
    because Docker answers HTTP 200 before the pull starts. This task waits for a daemon that is
    starting, logs the progress, and retries transient errors (registry or daemon unreachable, 5xx,
    429). Permanent errors fail at once.
    """

    @defaults_from_attrs(
        "repository", "tag", "docker_server_url", "extra_docker_kwargs", "stream_logs"
    )
    def run(
        self,
        repository: str | None = None,
        tag: str | None = None,
        docker_server_url: str = LOCAL_DOCKER,
        extra_docker_kwargs: dict[str, Any] | None = None,
        stream_logs: bool = False,
    ) -> str:
        """Pull ``repository``, which may hold a tag or a digest itself.

        Returns the image's name. Raises FAIL, or RETRY after a transient error, and ValueError
        without a repository.
        """
        if not repository:
            raise ValueError("PullImage: repository must be provided.")
        started = time.monotonic()
        image = _image_reference(repository, tag)
        options = {"repository": repository, "tag": tag, **(extra_docker_kwargs or {})}
        with docker_errors_as_failures("Pulling the image", docker_server_url):
            client = wait_for_daemon(docker_server_url, self.logger)
        self.logger.info(f"Pulling {image}")
        pull = Pull(client, options, self.logger if stream_logs else None)
        pull.start()
        self._log_progress(pull, image)
        if isinstance(pull.error, ERRORS):
            reason = error_message(pull.error, docker_server_url)
            if not self._is_on_daemon(client, image, options):
                raise pull.signal(image, reason)
            reason = abbreviated(reason, 300)
            self.logger.warning(f"Pulling {image}: {reason}; the image on the daemon is used")
            return image
        if pull.error:
            raise pull.error
        if pull.login_fault:
            self.logger.warning(f"Pulling {image}: {pull.login_fault}")
        seconds = time.monotonic() - started
        self.logger.info(f"{pull.outcome or image} ({seconds:.1f} s)")
        return image

    def _log_progress(self, pull: Pull, image: str) -> None:
        """Log a pull's progress until it has ended, or has been silent for too long."""
        pull.join(PROGRESS_SECONDS)
        while pull.is_alive():
            silence = time.monotonic() - pull.heard
            progress = str(pull)
            if silence >= PROGRESS_SECONDS:
                progress += f"; nothing came for {silence:.0f} s"
            if silence >= PULL_SILENCE_SECONDS:
                pull.error = DockerException(f"{progress}: the registry or the daemon hangs")
                return
            self.logger.info(f"Pulling {image}: {progress}")
            pull.join(PROGRESS_SECONDS)

    def _is_on_daemon(self, client: docker.APIClient, image: str, options: dict[str, Any]) -> bool:
        """Whether the daemon has the image. Of which platform it is, is not known."""
        if "platform" in options:
            return False
        with suppress(*ERRORS):
            return bool(client.inspect_image(image))  # type: ignore[no-untyped-call]
        return False


class CreateContainer(_DockerTask, prefect_docker.CreateContainer):
    """Create a container, with the flow run's id as a label.

    Values of its environment become text as in JSON. A restart policy is refused: WaitOnContainer
    could not tell an exit from a restart. auto_remove is left out: with the container, its exit
    code and its output would go.
    """

    @defaults_from_attrs(
        "image_name",
        "container_name",
        "command",
        "detach",
        "entrypoint",
        "environment",
        "volumes",
        "docker_server_url",
        "host_config",
        "extra_docker_kwargs",
    )
    def run(
        self,
        image_name: str | None = None,
        container_name: str | None = None,
        command: list[str] | str | None = None,
        detach: bool = False,
        entrypoint: list[str] | str | None = None,
        environment: list[str] | dict[str, Any] | None = None,
        volumes: list[str] | str | None = None,
        docker_server_url: str = LOCAL_DOCKER,
        host_config: dict[str, Any] | None = None,
        extra_docker_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Create the container, and return its id.

        Raises FAIL if Docker refuses the container or an option, and ValueError without an image.
        """
        if not image_name:
            raise ValueError("CreateContainer: image_name must be provided.")
        with docker_errors_as_failures("Creating the container", docker_server_url):
            host = self._host_options(host_config or {})
            options: dict[str, Any] = {
                "name": container_name,
                "command": command,
                "detach": detach,
                "entrypoint": entrypoint,
                "environment": environment_strings(environment or {}),
                "volumes": volumes,
            }
            options.update(container_options(extra_docker_kwargs or {}))
            options["labels"] = self._with_run_label(options.get("labels") or {})
            client = connect(docker_server_url)
            options["host_config"] = call_sdk(client.create_host_config, **host)
            container = call_sdk(client.create_container, image=image_name, **options)
        for warning in container.get("Warnings") or ():  # such as a limit it cannot enforce
            self.logger.warning(f"Docker: {warning}")
        return str(container["Id"])

    def _host_options(self, host_config: dict[str, Any]) -> dict[str, Any]:
        """The checked options for the host, without auto_remove."""
        options = host_options(host_config)
        if options.pop("auto_remove", False):
            self.logger.warning(
                "auto_remove is left out: the container is needed for its exit code and its output"
            )
        return options

    def _with_run_label(self, labels: dict[str, str] | list[str]) -> dict[str, str]:
        """A container's labels, and the one that names the flow run."""
        if not isinstance(labels, dict):
            labels = dict.fromkeys(labels, "")
        return {**labels, LABEL: prefect.context.get("flow_run_id", "")}


class StartContainer(_DockerTask, prefect_docker.StartContainer):
    """Start a container.

    The task fails if Docker cannot start it, as when the image has no such command.
    """

    @defaults_from_attrs("container_id", "docker_server_url", "extra_docker_kwargs")
    def run(
        self,
        container_id: str | None = None,
        docker_server_url: str = LOCAL_DOCKER,
        extra_docker_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Start the container. Raises FAIL if Docker cannot, and ValueError without an id."""
        if not container_id:
            raise ValueError("StartContainer: container_id must be provided.")
        with docker_errors_as_failures("Starting the container", docker_server_url):
            client = connect(docker_server_url)
            call_sdk(client.start, container=container_id, **(extra_docker_kwargs or {}))


class WaitOnContainer(_DockerTask, prefect_docker.WaitOnContainer):
    """Wait on a container, and write its output to the run's logs while it runs.

    Prefect's task logs the output only after a failure, all at once and from memory, and leaves the
    container running when it is interrupted. This task stops the container: on an interruption, and
    at ``time_limit``, the seconds that the container may run from the start of the task.
    """

    def __init__(
        self,
        container_id: str | None = None,
        docker_server_url: str = LOCAL_DOCKER,
        raise_on_exit_code: bool = True,
        extra_docker_kwargs: dict[str, Any] | None = None,
        time_limit: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.time_limit = time_limit
        super().__init__(
            container_id=container_id,
            docker_server_url=docker_server_url,
            raise_on_exit_code=raise_on_exit_code,
            extra_docker_kwargs=extra_docker_kwargs,
            **kwargs,
        )

    @defaults_from_attrs(
        "container_id",
        "docker_server_url",
        "raise_on_exit_code",
        "extra_docker_kwargs",
        "time_limit",
    )
    def run(
        self,
        container_id: str | None = None,
        docker_server_url: str = LOCAL_DOCKER,
        raise_on_exit_code: bool = True,
        extra_docker_kwargs: dict[str, Any] | None = None,
        time_limit: float | None = None,
    ) -> Any:
        """Wait until the container has exited.

        Returns Docker's answer, with the exit code as ``StatusCode``. Raises FAIL if the code is
        not 0 (unless ``raise_on_exit_code`` is false), if the container was stopped at its time
        limit, or if Docker does not answer, and ValueError without an id.
        """
        if not container_id:
            raise ValueError("WaitOnContainer: container_id must be provided.")
        with docker_errors_as_failures("Waiting on the container", docker_server_url):
            client = connect(docker_server_url)
            config = client.inspect_container(container_id)["Config"]
            name = f"Container {container_id[:12]} (image {config['Image']})"
            watch = Watch(
                client, docker_server_url, container_id, config["Tty"], extra_docker_kwargs or {}
            )
            self._wait(watch, client, container_id, name, time_limit)
        code = watch.result.get("StatusCode")
        reason = (watch.result.get("Error") or {}).get("Message")
        if raise_on_exit_code and (reason or code):
            memory = self._memory_cause(client, container_id)
            raise failure(
                f"{name} exited with code {code}{memory}{f': {reason}' if reason else ''}"
            )
        self.logger.info(f"{name} exited with code {code}")
        return watch.result

    def _wait(
        self,
        watch: Watch,
        client: docker.APIClient,
        container_id: str,
        name: str,
        time_limit: float | None,
    ) -> None:
        """Log the output until the exit. Stop the container if that is interrupted or fails."""
        seconds = math.inf if time_limit is None else time_limit
        try:
            if not watch.log_until_exit(self.logger, name, seconds):
                raise failure(f"{name} was stopped at its time limit of {time_limit} s")
            if isinstance(watch.result, Exception):
                raise watch.result
        except BaseException as error:  # the container may still run
            if isinstance(error, SystemExit):  # of a process pool that got SIGTERM, maybe twice
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.logger.warning(
                f"{name}: stopping it (SIGTERM, and after {STOP_GRACE_SECONDS} s SIGKILL)"
            )
            with suppress(*ERRORS):
                client.stop(container_id, timeout=STOP_GRACE_SECONDS)
            watch.log_until_exit(self.logger, name, OUTPUT_GRACE_SECONDS)
            raise

    def _memory_cause(self, client: docker.APIClient, container_id: str) -> str:
        """What to add to an exit's message if the container exceeded its memory limit."""
        with suppress(*ERRORS):  # the container may have been removed since
            if client.inspect_container(container_id)["State"]["OOMKilled"]:
                return ", killed because it exceeded its memory limit (OOMKilled)"
        return ""


class GetContainerLogs(_DockerTask, prefect_docker.GetContainerLogs):
    """Get the end of a container's output: at most 1 MiB and 10,000 lines.

    A first line says if there was more. Prefect's task reads all of the output into memory. This
    task is Skipped, with the reason, if no container was created (Prefect passes the error as its
    id) or if Docker does not hand out its output.
    """

    @defaults_from_attrs("container_id", "docker_server_url", "extra_docker_kwargs")
    def run(
        self,
        container_id: Any = None,
        docker_server_url: str = LOCAL_DOCKER,
        extra_docker_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Get the logs, stdout and stderr as they came.

        Raises SKIP with the reason if there are none to get, and ValueError without an id.
        """
        if not container_id:
            raise ValueError("GetContainerLogs: container_id must be provided.")
        if isinstance(container_id, BaseException):
            raise signals.SKIP("No container was created, so there are no logs")
        text = bytearray()
        lines = 0
        deadline = time.monotonic() + READ_SECONDS
        options = {"tail": LOG_LINES + 1, **(extra_docker_kwargs or {}), "follow": 0}
        try:
            client = connect(docker_server_url)
            tty = client.inspect_container(container_id)["Config"]["Tty"] is True
            for _, piece in read(client, container_id, tty, **options):
                text += piece
                del text[: -LOG_BYTES - 1]  # with one byte more, which says that it is cut
                lines += piece.count(b"\n") if tty else 1  # Docker counts parts of a long line
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the output did not end within {READ_SECONDS} s")
        except ERRORS as error:
            message = f"No logs: {error_message(error, docker_server_url)}"
            raise signals.SKIP(abbreviated(message, 500)) from None
        if lines <= LOG_LINES and len(text) <= LOG_BYTES:
            return text.decode(errors="replace")
        text = text[-LOG_BYTES:].partition(b"\n")[2] or text[-LOG_BYTES:]
        return f"[cut: the last {len(text):,} bytes follow]\n{text.decode(errors='replace')}"
