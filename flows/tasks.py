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
from docker.errors import DockerException, InvalidArgument
from prefect.engine import signals
from prefect.tasks import docker as prefect_docker
from prefect.utilities.tasks import defaults_from_attrs

from flows.daemon import (
    ERRORS,
    call_sdk,
    connect,
    docker_errors_as_failures,
    error_message,
    failure,
    wait_for_daemon,
)
from flows.docker_config import read_config, registry_login
from flows.messages import abbreviated
from flows.options import (
    container_options,
    environment_strings,
    host_options,
    pull_options,
    volume_folders,
)
from flows.output import OutputLog, newest_lines
from flows.pull import NOT_HERE, Cause, Pull, cause_of, pull_signal, was_pulled
from flows.runs import LABEL as LABEL
from flows.runs import STOP_GRACE_SECONDS as STOP_GRACE_SECONDS
from flows.runs import end_if_taken, expect_others
from flows.states import all_successful_or_first_failure
from flows.watch import OUTPUT_GRACE_SECONDS, Watch, read

PULL_SILENCE_SECONDS = 600  # Docker unpacks a large layer in silence; a longer one fails the pull
PROGRESS_SECONDS = 5  # how often a pull reports its progress
READ_SECONDS = 15  # how long GetContainerLogs may read, and how long it waits for each piece
LOG_BYTES = 990_000  # of JSON that GetContainerLogs returns; Prefect Server takes 1 MB for a state
LOG_LINES = 10_000  # the same, in lines
WAITS_FOR_A_START = ("next-exit", "removed")  # conditions of Docker's wait
LOCAL_DOCKER = "unix:///var/run/docker.sock"  # the default of Prefect's tasks


class _DockerTask(prefect.Task):
    """What the five tasks have in common.

    After a failed task they fail with its message. They are not retried, whatever the default of
    Prefect's configuration is: a second wait would log the output twice. PullImage retries by
    itself. ``max_retries`` in the constructor holds.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("trigger", all_successful_or_first_failure)
        kwargs.setdefault("max_retries", 0)
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
        with docker_errors_as_failures("Pulling the image", docker_server_url):
            options = pull_options(extra_docker_kwargs or {})
            config = read_config()
            if options.get("auth_config") is None:
                options["auth_config"] = registry_login(config, repository)
            for fault in config.faults:
                self.logger.warning(f"Pulling {image}: {fault}")
            client = wait_for_daemon(docker_server_url, self.logger)
        self.logger.info(f"Pulling {image}")
        pull = Pull(
            client,
            {"repository": repository, "tag": tag, **options},
            self.logger if stream_logs else None,
        )
        pull.start()
        self._log_progress(pull, image)
        if isinstance(pull.error, ERRORS):
            message = error_message(pull.error, docker_server_url)
            cause = cause_of(pull.error, message)
            if options.get("platform") or not self._is_on_daemon(client, image, cause):
                login_sent = bool(options["auth_config"])
                problem = pull_signal(image, message, cause, login_sent, config.faults)
                if isinstance(problem, signals.RETRY):
                    expect_others()
                raise problem
            message = abbreviated(message, 300)
            self.logger.warning(f"Pulling {image}: {message}; the image on the daemon is used")
            return image
        if pull.error:
            raise pull.error
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

    def _is_on_daemon(self, client: docker.APIClient, image: str, cause: Cause) -> bool:
        """Whether the daemon has an image that may be used in place of the registry's.

        That is so if the registry was not reached, or if the image was never pulled from it.
        """
        if cause.reached and cause.name not in NOT_HERE:
            return False
        with suppress(*ERRORS):
            found: dict[str, Any] = client.inspect_image(image)  # type: ignore[no-untyped-call]
            return not cause.reached or not was_pulled(found, image)
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
                "volumes": volume_folders(volumes, "volumes"),
            }
            options.update(container_options(extra_docker_kwargs or {}))
            options["labels"] = self._with_run_label(options.get("labels") or {})
            client = connect(docker_server_url)
            self.logger.debug(f"Creating a container from the image {image_name}")
            options["host_config"] = call_sdk(client.create_host_config, **host)
            container = call_sdk(client.create_container, image=image_name, **options)
        for warning in container.get("Warnings") or ():  # such as a limit it cannot enforce
            self.logger.warning(f"Docker: {warning}")
        self.logger.debug(f"Created the container {container['Id']}")
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
        end_if_taken()
        with docker_errors_as_failures("Starting the container", docker_server_url):
            client = connect(docker_server_url)
            self.logger.debug(f"Starting the container {container_id}")
            call_sdk(client.start, container=container_id, **(extra_docker_kwargs or {}))
        self.logger.debug(f"Started the container {container_id}")


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
        not 0 (unless ``raise_on_exit_code`` is false), if the container was not started or was
        stopped at its time limit, or if Docker does not answer, and ValueError without an id.
        """
        if not container_id:
            raise ValueError("WaitOnContainer: container_id must be provided.")
        options = extra_docker_kwargs or {}
        with docker_errors_as_failures("Waiting on the container", docker_server_url):
            client = connect(docker_server_url)
            container = client.inspect_container(container_id)
            name = f"{container_id[:12]} (image {container['Config']['Image']})"
            waits_for_a_start = options.get("condition") in WAITS_FOR_A_START
            if container["State"]["Status"] == "created" and not waits_for_a_start:
                advice = "the wait needs upstream_tasks=[started], the task that starts it"
                raise failure(f"Not started: container {name}; {advice}")
            self.logger.debug(f"Waiting on the container {container_id}")
            log = OutputLog(self.logger, f"Container {name}")
            tty = container["Config"]["Tty"]
            watch = Watch(client, docker_server_url, container_id, tty, log, options)
            self._log_until_exit(watch, client, container_id, name, time_limit)
        self._report_exit(watch.answer, client, container_id, name, raise_on_exit_code)
        return watch.answer

    def _log_until_exit(
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
            watch.start()
            if not watch.log_until_exit(seconds):
                raise failure(f"Stopped at its time limit of {time_limit} s: container {name}")
            if watch.error:
                raise watch.error
            watch.log_the_rest()
        except BaseException as error:  # the container may still run
            if isinstance(error, SystemExit):  # of a process pool that got SIGTERM, maybe twice
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.logger.warning(
                f"Container {name}: stopping it (SIGTERM, and after {STOP_GRACE_SECONDS} s SIGKILL)"
            )
            with suppress(*ERRORS):
                client.stop(container_id, timeout=STOP_GRACE_SECONDS)
            watch.log_the_rest(OUTPUT_GRACE_SECONDS)
            raise
        finally:
            watch.close()

    def _report_exit(
        self,
        answer: dict[str, Any],
        client: docker.APIClient,
        container_id: str,
        name: str,
        raise_on_exit_code: bool,
    ) -> None:
        """Log the exit, or fail with it. The cause comes first: Prefect's UI cuts long messages."""
        code = answer.get("StatusCode")
        reason = answer.get("Error")
        if isinstance(reason, dict):
            reason = reason.get("Message")
        out_of_memory = self._is_out_of_memory(client, container_id)
        message = f"Exited with code {code}: container {name}"
        if out_of_memory:
            message = f"Exited with code {code} (OOMKilled): container {name}"
            message += " exceeded its memory limit"
        if reason:
            message += f": {reason}"
        if raise_on_exit_code and (reason or code):
            raise failure(message)
        if out_of_memory:  # a child was killed, and the container went on without it
            self.logger.warning(message)
        else:
            self.logger.info(message)

    def _is_out_of_memory(self, client: docker.APIClient, container_id: str) -> bool:
        """Whether a process of the container was killed because of the memory limit."""
        with suppress(*ERRORS):  # the container may have been removed since
            return client.inspect_container(container_id)["State"]["OOMKilled"] is True
        return False


class GetContainerLogs(_DockerTask, prefect_docker.GetContainerLogs):
    """Get the end of a container's output: as much as a state of Prefect Server can hold.

    That is about 960 kB of ASCII, or 280 kB of Cyrillic. Unless ``extra_docker_kwargs`` has a
    ``tail``, it is at most 10,000 lines. A first line says if there was more. Prefect's task reads
    all of the output into memory. This task is Skipped, with the reason, if no container was
    created (Prefect passes the error as its id) or if Docker does not hand out its output.
    """

    @defaults_from_attrs("container_id", "docker_server_url", "extra_docker_kwargs")
    def run(
        self,
        container_id: Any = None,
        docker_server_url: str = LOCAL_DOCKER,
        extra_docker_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Get the logs, stdout and stderr as they came.

        Raises SKIP with the reason if there are none to get, FAIL if the SDK cannot use
        ``extra_docker_kwargs``, and ValueError without an id.
        """
        if not container_id:
            raise ValueError("GetContainerLogs: container_id must be provided.")
        if isinstance(container_id, BaseException):
            raise signals.SKIP("No container was created, so there are no logs")
        options = {"tail": LOG_LINES + 1, **(extra_docker_kwargs or {})}
        try:
            client = connect(docker_server_url)
            self.logger.debug(f"Getting the logs of the container {container_id}")
            data, lines = self._read(client, container_id, options)
            self.logger.debug(f"Got the logs of the container {container_id}")
        except InvalidArgument as error:
            raise failure(f"Getting the logs: {error}") from None
        except ERRORS as error:
            message = f"No logs: {error_message(error, docker_server_url)}"
            raise signals.SKIP(abbreviated(message, 500)) from None
        text = data.decode(errors="replace")
        newest = text
        if lines > LOG_LINES and options["tail"] == LOG_LINES + 1:
            newest = text.partition("\n")[2]
        newest = newest_lines(newest, LOG_BYTES)
        if newest == text:
            return text
        return f"[cut: the last {len(newest.encode()):,} bytes follow]\n{newest}"

    def _read(
        self, client: docker.APIClient, container_id: str, options: dict[str, Any]
    ) -> tuple[bytes, int]:
        """The end of the output, and how many lines all of it has, as Docker counts them."""
        client.timeout = READ_SECONDS
        deadline = time.monotonic() + READ_SECONDS
        tty = client.inspect_container(container_id)["Config"]["Tty"] is True
        end = bytearray()
        lines = 0
        for _, piece in read(client, container_id, tty, options):
            end += piece
            del end[:-LOG_BYTES]  # more does not fit, in any alphabet
            lines += piece.count(b"\n") if tty else 1  # Docker counts parts of a long line
            if time.monotonic() > deadline:
                raise TimeoutError(f"the output did not end within {READ_SECONDS} s")
        return bytes(end), lines
