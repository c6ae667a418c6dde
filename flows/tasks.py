"""Prefect's five Docker tasks, with clear failures, live output and bounded memory.

Each task takes the arguments of Prefect's task of that name, by position or by name, in the constructor or at the
call. They differ from Prefect's in this: an error of Docker or of the connection is one FAIL with its cause in place
of a DockerException, and a task after a failed one ends with the message of the failed one.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import signal
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Optional
from urllib.parse import urlsplit

import docker
import docker.utils
import pendulum
import prefect
import requests
import urllib3
from docker.errors import APIError, DockerException, InvalidConfigFile, NotFound
from docker.utils.config import find_config_file
from prefect.engine import signals
from prefect.engine.state import Failed, Pending, Queued, State
from prefect.tasks import docker as prefect_docker

from flows.output import STDOUT, SYSTEM, Batch, ProgressBar, follow
from flows.parameters import abbreviated, environment_strings

DAEMON_SECONDS = 60  # how long PullImage waits for the Docker daemon to answer
PULL_RETRY_SECONDS = (3, 10, 30)  # the pauses before the retries of a pull
PULL_SILENCE_SECONDS = 600  # a pull without any event for so long fails; Docker unpacks a large layer in silence
PROGRESS_SECONDS = 5  # how often a pull reports its progress
FLUSH_SECONDS = 1  # how often a running container's output goes to the run's logs; a progress bar every third time
OUTPUT_GRACE_SECONDS = 5  # how long a stream of output may pause after the container's exit
STOP_GRACE_SECONDS = 5  # the time between SIGTERM and SIGKILL for a container that is stopped
LOG_BYTES, LOG_LINES = 1 << 20, 10_000  # how much of the end of the output GetContainerLogs returns
LABEL = "prefect.flow-run-id"  # the label of a container that names its flow run

SOCKET = "unix:///var/run/docker.sock"
Options = Optional[dict[str, Any]]

_ERRORS = (DockerException, OSError, urllib3.exceptions.HTTPError)
# Words of Docker 20.10 and 29, without the names of images, hosts and files around them. Transient ones win.
_NAMES = r'"[^"]*"|\bfor \S+|\S*[/%@.:]\w\S*'
_TRANSIENT = r"(?i)(?<!\S)(429|50[0-4])\b|too ?many ?requests|time(d )?out|connection (refused|reset)|\bEOF\b"
_DENIED = r"(?i)(?<!permission )denied|unauthorized|authentication required|basic auth|insufficient_scope"
_PERMANENT = (
    r"(?i)not found|(manifest|name) unknown|unknown blob|no matching manifest|forbidden|bad request|invalid reference"
    r"|unsupported|no space left|permission denied|x509|\btls: |HTTP response to HTTPS client"
)


def all_successful_or_first_failure(upstream_states: Mapping[Any, State]) -> bool:
    """Trigger: run if all upstream tasks succeeded. Otherwise fail with the message of the first one that did not."""
    for state in upstream_states.values():
        if not state.is_successful():
            raise signals.TRIGGERFAIL(state.message)
    return True


def fail_with_cause(flow: prefect.Flow, state: State, reference_states: set[State]) -> State | None:
    """Terminal state handler: a failed run's message is its cause, not "some reference tasks failed"."""
    causes = sorted({str(task.message) for task in reference_states if task.is_failed()})
    return Failed("; ".join(causes), result=state.result) if state.is_failed() else None


def start_over_after_restart(flow: prefect.Flow, old: State, new: State) -> State | None:
    """State handler of the flow: a restarted run runs all of its tasks again.

    Prefect keeps tasks that had succeeded, but the image and the container went with the daemon of the first pod.
    The state Queued makes Prefect read the states of the tasks again, and go on in this process.
    """
    if not new.is_running() or not prefect.context.get("running_with_backend"):
        return None
    client = prefect.Client()
    runs = client.get_flow_run_info(prefect.context.flow_run_id).task_runs
    if not any(run.state.is_finished() for run in runs):
        return None
    prefect.context.logger.info("The run was restarted and has a new Docker daemon: all tasks run again")
    for run in runs:
        client.set_task_run_state(run.id, Pending("The run was restarted"))
    return Queued("The run was restarted", state=old)


def _unreachable(error: Exception) -> bool:
    cause = error.__cause__ or error
    return not isinstance(error, APIError) and isinstance(cause, (OSError, urllib3.exceptions.HTTPError))


def error_message(error: Exception, docker_server_url: str) -> str:
    """Docker's own words, or why the daemon does not answer."""
    if isinstance(error, APIError):
        return str(error.explanation or error)
    if not _unreachable(error):
        return str(error)
    reason = re.split(r"\[Errno \d+\] |Error\(\d+, '", str(error.__cause__ or error))[-1].rstrip("'\")")
    return f"the Docker daemon at {docker_server_url} does not answer ({reason})"


def failure(message: str) -> signals.FAIL:
    """A FAIL with a message that is short enough for the run's logs."""
    return signals.FAIL(abbreviated(message, 500))


@contextmanager
def docker_errors_as_failures(what: str, docker_server_url: str) -> Iterator[None]:
    """Turn an error of Docker or of the connection into one FAIL: ``what`` failed, and why."""
    try:
        yield
    except (*_ERRORS, TypeError, ValueError) as error:
        raise failure(f"{what}: {error_message(error, docker_server_url)}") from None


def bypass_proxy(docker_server_url: str) -> None:
    """Never ask a proxy for a daemon on this machine: add its host to the variable that requests reads."""
    address = urlsplit(str(docker.utils.parse_host(docker_server_url)))
    host = address.hostname or "localhost"  # a socket has none
    local = re.match(r"(localhost|127\..*|::1|0\.0\.0\.0)$", host)
    if local and requests.utils.get_environ_proxies(f"http://{address.netloc or host}"):
        for name in [name for name in ("no_proxy", "NO_PROXY") if os.environ.get(name)] or ["no_proxy"]:
            if os.environ.get(name) != "*":
                os.environ[name] = f"{os.environ.get(name, '')},{host}".lstrip(",")


def connect(docker_server_url: str, logger: Any = None) -> docker.APIClient:
    """Connect to a Docker daemon, with the TLS settings of the environment if it is the one of DOCKER_HOST.

    With a logger, wait up to DAEMON_SECONDS for a daemon that is starting, and say so once.
    """
    bypass_proxy(docker_server_url)
    tls = docker.utils.kwargs_from_env() if docker_server_url == os.environ.get("DOCKER_HOST") else {}
    options: dict[str, Any] = {**tls, "base_url": docker_server_url, "version": "auto"}
    deadline, waiting = time.monotonic() + DAEMON_SECONDS, False
    while True:
        try:
            return docker.APIClient(**options)
        except (AttributeError, InvalidConfigFile, LookupError, TypeError, ValueError) as error:
            raise DockerException(f"{find_config_file()!r} is no valid Docker configuration ({error})") from None
        except DockerException as error:
            if logger is None or not _unreachable(error):
                raise
            if time.monotonic() > deadline:
                message = f"{error_message(error, docker_server_url)} after {DAEMON_SECONDS} s"
                raise DockerException(f"{message}; see its log (in a pod: of the container dind-daemon)") from None
        if not waiting:
            logger.info(f"Waiting up to {DAEMON_SECONDS} s for the Docker daemon at {docker_server_url}")
        waiting = True
        time.sleep(0.1)


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


class _Pull(threading.Thread):
    """A pull in a thread, and what its events say. An event may lack anything."""

    def __init__(self, client: docker.APIClient, options: dict[str, Any], log: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self.outcome = self.login_fault = ""
        self.error: Exception | None = None
        self.heard = time.monotonic()  # when the last event came
        self.done = threading.Event()
        self._client, self._options, self._log, self._context = client, options, log, prefect.context.copy()
        self._layers: dict[str, str] = {}  # id: status
        self._received: dict[str, float] = {}  # id: bytes

    def run(self) -> None:
        """Pull, and add the events."""
        try:
            with prefect.context(self._context):  # a thread has none: what it logs would not reach the run's logs
                for event in self._events():
                    self._add(event if isinstance(event, dict) else {})
        except Exception as error:
            self.error = error
        self.done.set()

    def _events(self) -> Any:
        """Pull with the login that Docker's configuration names, or without one if its credential helper fails."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the SDK's own, of a helper that is missing
                return self._client.pull(stream=True, decode=True, **self._options)
        except Exception as error:
            if isinstance(error, (APIError, OSError)) or "auth_config" in self._options:
                raise
            self.login_fault = f"no login was sent: {abbreviated(str(error), 200)}, see {find_config_file()!r}"
            return self._client.pull(stream=True, decode=True, auth_config={}, **self._options)

    def _add(self, event: dict[str, Any]) -> None:
        self.heard = time.monotonic()
        if error := event.get("error") or event.get("errorDetail"):
            words = str(error.get("message") if isinstance(error, dict) else error)
            raise APIError(words, explanation=words)
        status, layer = (value if isinstance(value := event.get(key), str) else "" for key in ("status", "id"))
        if status:
            self._log(status)
        if status.startswith("Status: "):
            self.outcome = status[len("Status: ") :]
        elif status and layer and not status.startswith("Pulling from"):
            self._layers[layer] = status
        if status == "Downloading" and isinstance(detail := event.get("progressDetail"), dict):
            current = detail.get("current")
            self._received[layer] = current if isinstance(current, (int, float)) else 0

    def __str__(self) -> str:
        layers = [f"{count} {status.lower()}" for status, count in Counter(list(self._layers.values())).items()]
        return ", ".join([*layers, f"{sum(list(self._received.values())) / 1e6:.1f} MB received"])


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
        image, started = f"{repository}:{tag}" if tag else repository, time.monotonic()
        client = connect(docker_server_url, self.logger)
        self.logger.info(f"Pulling {image}")
        options = {"repository": repository, "tag": tag, **(extra_docker_kwargs or {})}
        pull = _Pull(client, options, self.logger.debug if stream_logs else lambda _: None)
        pull.start()
        while not pull.done.wait(PROGRESS_SECONDS):
            silence, progress = time.monotonic() - pull.heard, f"Pulling {image}: {pull}"
            if silence >= PROGRESS_SECONDS:
                progress += f"; nothing came for {silence:.0f} s"
            if silence >= PULL_SILENCE_SECONDS:
                raise signals.FAIL(f"{progress}: the registry or the daemon hangs")
            self.logger.info(progress)
        if pull.error:
            raise self._signal(image, pull.error, error_message(pull.error, docker_server_url), pull.login_fault)
        if pull.login_fault:
            self.logger.warning(f"Pulling {image}: {pull.login_fault}")
        self.logger.info(f"{pull.outcome or image} ({time.monotonic() - started:.1f} s)")
        return image

    def _signal(self, image: str, error: Exception, words: str, login_fault: str) -> signals.PrefectStateSignal:
        """RETRY after a transient error, FAIL after a permanent one or the last retry."""
        message, words = f"Pulling {image}: {abbreviated(words, 500)}", re.sub(_NAMES, " ", words[-2000:])
        transient, denied = re.search(_TRANSIENT, words), re.search(_DENIED, words)
        if denied and not transient:
            remedy = "for a private image: `docker login`, or the Secret docker-sidecar on Kubernetes"
            message += f" ({login_fault or remedy})"
        refused = error.is_client_error() if isinstance(error, APIError) else not _unreachable(error)
        permanent = not transient and (refused or denied or re.search(_PERMANENT, words))
        attempt = prefect.context.get("task_run_count", 1)
        if permanent or attempt > len(PULL_RETRY_SECONDS):
            return signals.FAIL(message)
        pause = PULL_RETRY_SECONDS[attempt - 1]
        message += f"; retry {attempt} of {len(PULL_RETRY_SECONDS)} in {pause} s"
        return signals.RETRY(message, start_time=pendulum.now("utc").add(seconds=pause))


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
        values: Any = environment_strings(environment) if isinstance(environment, dict) else environment
        with suppress(*_ERRORS, LookupError):  # of an engine that does not say
            if client.info()["LoggingDriver"] == "json-file":
                host_config = {"log_config": {"type": "local"}, **(host_config or {})}
        self.logger.debug(f"Creating a container from image {image_name}")
        container = client.create_container(
            image=image_name,
            name=container_name,
            command=command,
            detach=detach,
            entrypoint=entrypoint,
            environment=values,
            volumes=volumes,
            host_config=None if host_config is None else client.create_host_config(**host_config),
            labels={**labels, LABEL: prefect.context.get("flow_run_id", "")},
            **extra,
        )
        self.logger.debug(f"Created container {container['Id']} from image {image_name}")
        return str(container["Id"])


class StartContainer(_DockerTask, prefect_docker.StartContainer):
    """Start a container. The task fails if Docker cannot start it, as when the image has no such command."""

    @_run("Starting the container", "container_id")
    def run(self, container_id: str = "", docker_server_url: str = SOCKET, extra_docker_kwargs: Options = None) -> None:
        """Start the container."""
        self.logger.debug(f"Starting container {container_id}")
        connect(docker_server_url).start(container=container_id, **(extra_docker_kwargs or {}))
        self.logger.debug(f"Started container {container_id}")


class _Watch:
    """A running container: one thread waits for its exit, another one reads its output."""

    def __init__(self, client: docker.APIClient, container_id: str, tty: bool, options: dict[str, Any]) -> None:
        self.result: Any = None  # of the wait: Docker's answer, or an error
        self._batch, self._bar = Batch(), ProgressBar(client, container_id)
        self._exited, self._over = threading.Event(), threading.Event()  # over: exited, and the output is read
        self._heard = time.monotonic()  # when the last output came, or the exit

        def wait() -> None:
            try:
                self.result = client.wait(container=container_id, **options)
            except Exception as error:
                self.result = error
            self._heard = time.monotonic()
            self._exited.set()

        def read() -> None:
            try:
                for stream, data in follow(client, container_id, tty, self._exited):
                    self._heard = time.monotonic()
                    self._batch.add(stream, data)
            except Exception as error:
                self._batch.add(SYSTEM, error_message(error, client.base_url).encode() + b"\n")
            self._exited.wait()
            self._over.set()

        for target in (wait, read):
            threading.Thread(target=target, daemon=True).start()

    def log(self, logger: Any, name: str, seconds: float) -> bool:
        """Log the output until the container has exited; return False if that takes longer than ``seconds``."""
        deadline, looks = time.monotonic() + seconds, 0
        while True:
            looks += 1
            over, exited = self._over.wait(FLUSH_SECONDS), self._exited.is_set()
            silence = time.monotonic() - self._heard
            if exited and not over and silence > OUTPUT_GRACE_SECONDS:
                self._batch.add(SYSTEM, b"Docker did not end the stream after the exit")
                over = True
            texts = self._batch.take(last=over)
            if looks % 3 == 0:
                texts += self._bar.changes(not exited and silence > 3 * FLUSH_SECONDS)
            for stream, text in texts:
                text = f"{name}: output could not be read: {text}" if stream == SYSTEM else text
                (logger.info if stream == STDOUT else logger.warning)(text)
            if over or (not exited and time.monotonic() > deadline):
                return over


class WaitOnContainer(_DockerTask, prefect_docker.WaitOnContainer):
    """Wait on a container, and write its output to the run's logs while it runs.

    Prefect's task logs the output only after a failure, all at once and from memory. It leaves the container running
    when it is interrupted; this task stops it, also if the process gets SIGTERM, or at ``time_limit``: the seconds
    that the container may run, from the start of the task.
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
            watch = _Watch(client, container_id, config["Tty"], extra_docker_kwargs or {})
            with self._stopped_if_interrupted(client, container_id, name, watch):
                if not watch.log(self.logger, name, math.inf if time_limit is None else time_limit):
                    raise failure(f"{name} was stopped at its time limit of {time_limit:g} s")
            if isinstance(watch.result, Exception):
                raise watch.result
            result = dict(watch.result)
            with suppress(NotFound):
                state = client.inspect_container(container_id)["State"]
        except NotFound as error:
            result = self._result_of_removed(client, container_id, error)
        except _ERRORS as error:
            raise failure(f"{name}: {error_message(error, docker_server_url)}") from None
        code, reason = result.get("StatusCode"), result.get("Error")
        if raise_on_exit_code and (reason or code):
            memory = ", killed because it exceeded its memory limit (OOMKilled)" if state.get("OOMKilled") else ""
            raise failure(f"{name} exited with code {code}{memory}{f': {reason}' if reason else ''}")
        self.logger.info(f"{name} exited with code {code}")
        return result

    def _result_of_removed(self, client: docker.APIClient, container_id: str, error: NotFound) -> dict[str, Any]:
        """The exit code of a container that is gone, as with auto_remove. The daemon remembers its last events."""
        filters = {"container": container_id, "event": "die"}
        for event in client.events(since=1, until=int(time.time()) + 1, filters=filters, decode=True):
            self.logger.warning(f"Container {container_id[:12]} was removed when it exited; output may be missing")
            return {"Error": None, "StatusCode": int(event["Actor"]["Attributes"]["exitCode"])}
        raise error

    @contextmanager
    def _stopped_if_interrupted(
        self, client: docker.APIClient, container_id: str, name: str, watch: _Watch
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
            with suppress(*_ERRORS):
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
        except _ERRORS as error:
            if _unreachable(error) or (isinstance(error, APIError) and error.status_code in (404, 409)):
                message = abbreviated(error_message(error, docker_server_url), 500)
                raise signals.SKIP(f"No logs: {message}") from None
            raise
        self.logger.debug(f"Gathered logs from container {container_id}")
        text = b"".join(pieces)
        if len(pieces) <= lines and size <= LOG_BYTES:
            return text.decode(errors="replace")
        text = text[-LOG_BYTES:].partition(b"\n")[2] or text[-LOG_BYTES:]
        return f"[cut: what follows is the end, {len(text):,} bytes]\n{text.decode(errors='replace')}"
