"""The Docker daemon that the tasks talk to: the connection, and what its errors mean."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import docker
import docker.utils
import requests
import urllib3
from docker.errors import APIError, DockerException, InvalidConfigFile
from docker.utils.config import find_config_file
from prefect.engine import signals

from flows.parameters import abbreviated

DAEMON_SECONDS = 60  # how long PullImage waits for the Docker daemon to answer
ERRORS = (DockerException, OSError, urllib3.exceptions.HTTPError)


def unreachable(error: BaseException) -> bool:
    """Whether the daemon did not answer, in contrast to an answer that is an error."""
    cause = error.__cause__ or error
    answered = isinstance(error, APIError) or (isinstance(cause, APIError) and cause.is_client_error())
    return not answered and isinstance(cause, (OSError, urllib3.exceptions.HTTPError))


def error_message(error: Exception, docker_server_url: str) -> str:
    """Docker's own words, or why the daemon does not answer."""
    if isinstance(error, APIError):
        return str(error.explanation or error)
    if not unreachable(error):
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
    except (*ERRORS, TypeError, ValueError) as error:
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
            if logger is None or not unreachable(error):
                raise
            if time.monotonic() > deadline:
                message = f"{error_message(error, docker_server_url)} after {DAEMON_SECONDS} s"
                raise DockerException(f"{message}; see its log (in a pod: of the container dind-daemon)") from None
        if not waiting:
            logger.info(f"Waiting up to {DAEMON_SECONDS} s for the Docker daemon at {docker_server_url}")
        waiting = True
        time.sleep(0.1)
