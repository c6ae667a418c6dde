"""The user's Docker engine, found as `docker` finds it, and what to do if it does not answer."""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import docker
import docker.utils
from docker.context import ContextAPI
from docker.errors import TLSParameterError

from flows.daemon import bypass_proxy
from scripts.base import ANSWER_SECONDS, CACHE, SetupError, root_cause

SECONDS = 600  # the time limit of a request
OWN_SOCKET = f"unix://{CACHE}/dockerd/docker.sock"  # of a dockerd that scripts/airgap/ starts
NOBODY_LISTENS = (FileNotFoundError, ConnectionRefusedError)

# What to do if nobody listens on a socket. The first pattern that its URL matches counts.
_START = (
    (r"^unix:///run/podman/", "Start Podman's: sudo systemctl start podman.socket"),
    (
        r"podman",
        "Start Podman's: systemctl --user start podman.socket, or on a Mac podman machine start",
    ),
    (
        r"/\.docker/|desktop",
        "Start Docker Desktop, or choose another engine: docker context use default",
    ),
    (r"/run/user/", "Start yours: systemctl --user start docker"),
    (r"^unix:///(var/)?run/docker\.sock", "Start it: sudo systemctl start docker"),
    (r"^unix:", "Start the engine there, or choose another one: docker context ls"),
)


def connect(base_url: str, **options: Any) -> docker.DockerClient:
    """A client of the Docker engine at a URL. Raises one of base.UNREACHABLE if none answers."""
    bypass_proxy(base_url)
    client = docker.DockerClient(base_url, timeout=ANSWER_SECONDS, **options)
    client.ping()
    client.api.timeout = SECONDS
    return client


def find() -> docker.DockerClient | None:
    """The user's engine: of DOCKER_HOST, else of the current Docker context, else the usual one.

    None if the user has chosen no engine, and nobody listens at the usual socket.
    Raises SetupError if an engine is chosen and does not answer: what was seen, and what to do.
    """
    chosen = os.environ.get("DOCKER_HOST", "")
    url = chosen
    try:
        if chosen:
            options = docker.utils.kwargs_from_env()
        else:
            options = ContextAPI.kwargs_from_context()
        url = str(options.get("base_url", ""))
        if not url:
            raise LookupError("there is no such context")
        client = connect(**options)
    except Exception as error:  # the SDK raises errors of many types
        if _is_usual(chosen, url) and isinstance(root_cause(error), NOBODY_LISTENS):
            return None
        raise SetupError(_no_answer(error, chosen, url)) from None
    os.environ["DOCKER_HOST"] = url  # for the flow, and for programs started from here
    if not chosen:
        _set_tls(options.get("tls"))
    return client


def _is_usual(chosen: str, url: str) -> bool:
    """Whether an engine is one that nobody has chosen, so that another one may take its place."""
    if chosen:
        return chosen == OWN_SOCKET
    return bool(url == ContextAPI.DEFAULT_CONTEXT.Host)


def _set_tls(tls: Any) -> None:
    """Set what DOCKER_HOST needs besides, from a context with TLS."""
    if tls and tls.cert:
        os.environ["DOCKER_CERT_PATH"] = str(Path(tls.cert[0]).parent)
        os.environ["DOCKER_TLS_VERIFY"] = "1" if tls.verify else ""


def _no_answer(error: Exception, chosen: str, url: str) -> str:
    """That a chosen engine does not answer: where, why, and what to do."""
    where = url or "the current Docker context"
    if chosen:
        where = f"DOCKER_HOST={chosen}"
    cause = root_cause(error)
    reason = getattr(cause, "strerror", None) or str(error)
    return f"no Docker engine answers at {where}: {reason}. {_advice(error, url)}"


def _advice(error: Exception, url: str) -> str:
    """What to do about an engine that does not answer."""
    cause = root_cause(error)
    if isinstance(error, LookupError):
        return "`docker context ls` lists them, and `docker context use NAME` chooses one"
    if url.startswith("ssh:"):
        return (
            "This project does not use ssh. Forward the engine's socket: "
            f"ssh -fNL /tmp/docker.sock:/var/run/docker.sock {url}, "
            "then export DOCKER_HOST=unix:///tmp/docker.sock"
        )
    if isinstance(cause, PermissionError):
        return _permission_advice(url)
    if isinstance(cause, NOBODY_LISTENS) and url.startswith(("unix:", "http+unix:")):
        return _start_advice(url)
    if isinstance(cause, TLSParameterError) or "SSL" in str(error) or "HTTPS" in str(error):
        return (
            "For TLS set DOCKER_TLS_VERIFY=1, and DOCKER_CERT_PATH "
            "to a folder with ca.pem, cert.pem and key.pem"
        )
    return "`docker version` must answer. Start that engine, or unset DOCKER_HOST"


def _permission_advice(url: str) -> str:
    if "podman" in url:
        return (
            "Use Podman's socket of your own: systemctl --user start podman.socket, "
            "then export DOCKER_HOST=unix://$XDG_RUNTIME_DIR/podman/podman.sock"
        )
    return (
        "Your user may not use that socket. Join its group: "
        "sudo usermod -aG docker $USER, then log out and in again"
    )


def _start_advice(url: str) -> str:
    for pattern, advice in _START:
        if re.search(pattern, url):
            return advice
    return "`docker version` must answer"


def how_to_get_one() -> str:
    """What to say to a user who has chosen no engine, and has none at the usual socket."""
    advice = (
        "no Docker engine answers. Start one (`docker version` must answer), or set DOCKER_HOST. "
        "docs/before-you-start.md, Your machine, says where to get one"
    )
    if not shutil.which("podman"):
        return advice
    if sys.platform == "darwin":
        return (
            f"{advice}. With Podman: podman machine start, then export DOCKER_HOST="
            "unix://$(podman machine inspect --format '{{.ConnectionInfo.PodmanSocket.Path}}')"
        )
    return (
        f"{advice}. With Podman: systemctl --user start podman.socket, "
        "then export DOCKER_HOST=unix://$XDG_RUNTIME_DIR/podman/podman.sock"
    )
