"""The Docker daemon that the tasks talk to: the connection, and what its errors mean."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import docker.utils
import requests
import urllib3
from docker.errors import APIError, DockerException, InvalidArgument, TLSParameterError
from prefect.engine import signals

from flows.docker_config import read_config
from flows.messages import abbreviated, without_passwords

DAEMON_SECONDS = 60  # how long PullImage waits for the Docker daemon to answer
ERRORS = (DockerException, OSError, urllib3.exceptions.HTTPError)
T = TypeVar("T")


def unavailable(error: BaseException) -> bool:
    """Whether the daemon may only be late.

    Nothing answers, a proxy answers with a 5xx, or the certificates are not there yet.
    """
    if isinstance(error, APIError):
        return False
    cause = error
    if isinstance(error, DockerException) and error.__cause__:
        cause = error.__cause__  # the SDK's constructor wraps what went wrong
    if isinstance(cause, APIError):
        return not cause.is_client_error()
    if isinstance(cause, requests.RequestException) and isinstance(cause, ValueError):
        return False  # an address, a header or an answer that will be no better later
    return isinstance(cause, (OSError, urllib3.exceptions.HTTPError, TLSParameterError))


def error_message(error: Exception, docker_server_url: str) -> str:
    """Docker's own words, or why the daemon does not answer. Without a password in an address."""
    if unavailable(error):
        root = _root_cause(error)
        reason = getattr(root, "strerror", None) or root
        message = f"the Docker daemon at {docker_server_url} does not answer ({reason})"
    else:
        message = str(getattr(error, "explanation", None) or error)
    return without_passwords(message)


def _root_cause(error: BaseException) -> BaseException:
    """An error without what requests and urllib3 wrap around it."""
    while True:
        inner = error.__cause__
        if inner is None and not error.__suppress_context__:
            inner = error.__context__
        if inner is None:
            return error
        error = inner


def failure(message: str) -> signals.FAIL:
    """A FAIL with a message that is short enough for the run's logs."""
    return signals.FAIL(abbreviated(message, 500))


@contextmanager
def docker_errors_as_failures(what: str, docker_server_url: str) -> Iterator[None]:
    """Turn an error of Docker or of the connection into one FAIL: ``what`` failed, and why."""
    try:
        yield
    except ERRORS as error:
        raise failure(f"{what}: {error_message(error, docker_server_url)}") from None


def call_sdk(method: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call a method of the Docker SDK with options that a user gave.

    Raises InvalidArgument if the SDK cannot use the options, and what the method raises. The
    message has no value.
    """
    try:
        return method(*args, **options)
    except ERRORS:
        raise
    except (AttributeError, KeyError, TypeError) as error:  # these name types and options
        raise InvalidArgument(str(error)) from None
    except ValueError:
        raise InvalidArgument("an option has a value that the Docker SDK refuses") from None


def _address(docker_server_url: str) -> SplitResult:
    """The parts of a daemon's address. Raises a DockerException, without a password, if it is none.

    The SDK would raise errors of other types, which quote it.
    """
    try:
        address = urlsplit(str(docker.utils.parse_host(docker_server_url)))
        address.port  # noqa: B018 # it is looked at when it is asked for
    except ValueError:
        shown = "DOCKER_HOST, or docker_server_url of a task,"
        raise InvalidArgument(f"{shown} is no address such as tcp://localhost:2375") from None
    return address


def bypass_proxy(docker_server_url: str) -> None:
    """Never ask a proxy for a daemon on this machine.

    Its host is added to the variable that requests reads. Raises a DockerException if the address
    is none.
    """
    address = _address(docker_server_url)
    host = address.hostname or "localhost"  # a socket has none
    if not re.fullmatch(r"localhost|127\..*|::1|0\.0\.0\.0", host):
        return
    if not requests.utils.get_environ_proxies(f"http://{address.netloc or host}"):
        return
    before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{before},{host}" if before else host


class _Client(docker.APIClient):
    """A client with a configuration of ours in place of what Docker's config.json holds.

    The SDK's client reads the file when it is made, and fails on one broken entry.
    """

    def __init__(self, content: dict[str, Any], **options: Any) -> None:
        self._content = content
        super().__init__(**options)

    @property
    def _general_configs(self) -> dict[str, Any]:
        # without any login, the SDK would read the file again; and it takes logins out of this
        return {**self._content, "auths": self._content.get("auths") or {"": {}}}

    @_general_configs.setter
    def _general_configs(self, written: dict[str, Any]) -> None:
        """Leave out what the SDK has read."""


def connect(docker_server_url: str) -> docker.APIClient:
    """Connect to a Docker daemon.

    The TLS settings of the environment are for the daemon of DOCKER_HOST. Raises a DockerException
    if the daemon does not answer.
    """
    bypass_proxy(docker_server_url)
    options: dict[str, Any] = {}
    if docker_server_url == os.environ.get("DOCKER_HOST"):
        options.update(docker.utils.kwargs_from_env())
    options["base_url"] = docker_server_url
    options["version"] = "auto"
    config = read_config()
    if config.written == config.content or not config.path:
        return docker.APIClient(**options)
    return _Client(config.content, **options)


def wait_for_daemon(docker_server_url: str, logger: Any) -> docker.APIClient:
    """Connect to a Docker daemon that may be starting.

    Waits up to DAEMON_SECONDS, and says so once. Raises a DockerException if the daemon does not
    answer by then, or refuses.
    """
    try:
        return connect(docker_server_url)
    except DockerException as error:
        if not unavailable(error):
            raise
    shown = without_passwords(docker_server_url)
    logger.info(f"Waiting up to {DAEMON_SECONDS} s for the Docker daemon at {shown}")
    deadline = time.monotonic() + DAEMON_SECONDS
    while True:
        time.sleep(0.1)
        try:
            return connect(docker_server_url)
        except DockerException as error:
            if not unavailable(error):
                raise
            if time.monotonic() > deadline:
                message = f"{error_message(error, docker_server_url)} after {DAEMON_SECONDS} s"
                advice = "see its log (in a pod: of the container dind-daemon)"
                raise DockerException(f"{message}; {advice}") from None
