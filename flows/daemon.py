"""The Docker daemon that the tasks talk to: the connection, Docker's configuration, and what errors mean."""

import base64
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import docker.auth
import docker.utils
import requests
import urllib3
from docker.errors import (
    APIError,
    DockerException,
    InvalidArgument,
    InvalidConfigFile,
    TLSParameterError,
)
from docker.utils.config import find_config_file
from prefect.engine import signals

DAEMON_SECONDS = 60  # how long PullImage waits for the Docker daemon to answer
warnings.filterwarnings(
    "ignore", module="docker.credentials"
)  # of a helper that is missing: it is an error as well
ERRORS = (DockerException, OSError, urllib3.exceptions.HTTPError)
T = TypeVar("T")


def unavailable(error: BaseException) -> bool:
    """Whether the daemon may only be late: nothing answers, a proxy answers with a 5xx, or certificates are missing."""
    cause = (isinstance(error, DockerException) and error.__cause__) or error
    answered = isinstance(error, APIError) or (
        isinstance(cause, APIError) and cause.is_client_error()
    )
    return not answered and isinstance(
        cause, (OSError, urllib3.exceptions.HTTPError, TLSParameterError)
    )


def error_message(error: Exception, docker_server_url: str) -> str:
    """Docker's own words, or why the daemon does not answer."""
    if not unavailable(error):
        return str(getattr(error, "explanation", None) or error)
    reason = re.sub(
        r".*(\[Errno -?\d+\] |Error\(\d+, ')|\)?['\"][)'\"]*$", "", str(error.__cause__ or error)
    )
    return f"the Docker daemon at {docker_server_url} does not answer ({reason})"


def abbreviated(text: str, length: int = 80) -> str:
    """A text that is short enough for a message: its start and its end. PostgreSQL, as Prefect's store, refuses NUL."""
    text, half = text.replace("\0", "\ufffd"), length // 2
    return (
        text
        if len(text) <= length
        else f"{text[:half]}… ({len(text):,} characters) …{text[-half:]}"
    )


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

    Raises InvalidArgument if the SDK cannot use the options, and what the method raises.
    """
    try:
        return method(*args, **options)
    except ERRORS:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(str(error)) from None


def load_config() -> tuple[dict[str, Any], list[str]]:
    """Docker's configuration, with its logins as kubelet and the Docker CLI read them, and what is wrong with it."""
    path, faults = find_config_file(), []
    try:
        config = json.loads(Path(str(path)).read_text()) if path else {}
        logins = dict(config.get("auths") or {})
    except (AttributeError, OSError, TypeError, ValueError) as error:
        config, logins, faults = (
            {},
            {"": {}},
            [f"{path!r} is no valid Docker configuration ({error})"],
        )
    for registry, login in logins.items():
        try:
            name, password, auth = (
                login.get(key) or "" for key in ("username", "password", "auth")
            )
            if auth or name:
                auth = auth or base64.b64encode(f"{name}:{password}".encode()).decode()
                logins[registry] = {
                    **login,
                    "auth": auth + "===",
                }  # padded, or more than that, which is no matter
            docker.auth.AuthConfig.parse_auth({registry: logins[registry]}, raise_on_error=True)
        except (AttributeError, InvalidConfigFile, TypeError, ValueError):
            logins[registry] = {}
            faults.append(f"the login for {registry!r} in {path!r} is broken, and is left out")
    return {**config, "auths": logins} if logins else config, faults


docker.utils.config.load_general_config = lambda config_path=None: load_config()[
    0
]  # the SDK's fails on one bad login


def registry_login(repository: str) -> tuple[dict[str, Any], str]:
    """The login that Docker's configuration has for an image's registry, if any, and what is wrong with it."""
    (config, faults), login = load_config(), None
    try:
        registry, _ = docker.auth.resolve_repository_name(repository)
        login = docker.auth.load_config(config_dict=config).resolve_authconfig(registry)
    except Exception as error:  # of many types
        faults.append(
            f"no login was sent: {abbreviated(str(error), 200)}, see {find_config_file()!r}"
        )
    return login or {}, "; ".join(faults)


def bypass_proxy(docker_server_url: str) -> None:
    """Never ask a proxy for a daemon on this machine: add its host to the variable that requests reads."""
    address = urlsplit(str(docker.utils.parse_host(docker_server_url)))
    host = address.hostname or "localhost"  # a socket has none
    local = re.match(r"(localhost|127\..*|::1|0\.0\.0\.0)$", host)
    if local and requests.utils.get_environ_proxies(f"http://{address.netloc or host}"):
        os.environ["no_proxy"] = (
            f"{os.environ.get('no_proxy') or os.environ.get('NO_PROXY') or ''},{host}".lstrip(",")
        )


def connect(docker_server_url: str) -> docker.APIClient:
    """Connect to a Docker daemon, with the TLS settings of the environment if it is the one of DOCKER_HOST."""
    bypass_proxy(docker_server_url)
    tls: Any = (
        docker.utils.kwargs_from_env() if docker_server_url == os.environ.get("DOCKER_HOST") else {}
    )
    return docker.APIClient(**{**tls, "base_url": docker_server_url, "version": "auto"})


def wait_for_daemon(docker_server_url: str, logger: Any) -> docker.APIClient:
    """Connect to a Docker daemon that may be starting: wait up to DAEMON_SECONDS, and say so once."""
    deadline = 0.0
    while True:
        try:
            return connect(docker_server_url)
        except DockerException as error:
            if not unavailable(error):
                raise
            if deadline and time.monotonic() > deadline:
                message = f"{error_message(error, docker_server_url)} after {DAEMON_SECONDS} s"
                raise DockerException(
                    f"{message}; see its log (in a pod: of the container dind-daemon)"
                ) from None
        if not deadline:
            deadline = time.monotonic() + DAEMON_SECONDS
            logger.info(
                f"Waiting up to {DAEMON_SECONDS} s for the Docker daemon at {docker_server_url}"
            )
        time.sleep(0.1)
