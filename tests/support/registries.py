"""Registries for tests: one inside of a daemon, and one that asks for a password."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import docker
import pytest
from docker.models.containers import Container

import scripts.registry
from scripts.base import REGISTRY_IMAGE
from tests.support.containers import running_container
from tests.support.waiting import wait_for

# Where a daemon reaches the registry that runs in that daemon, and the volume that it keeps.
INNER_REGISTRY = "localhost:5055"
INNER_STORE = {"docker-sidecar-tests-registry": {"bind": "/var/lib/registry"}}

# The user, and the password "password", as bcrypt has it.
HTPASSWD = "user:$2b$05$YgkE/uhk8SIDXkewhKhhpu49zzgu.Nt1jTgkrF7U6pEsmjYs/T.yK"
ASKS_FOR_A_PASSWORD = {
    "REGISTRY_AUTH": "htpasswd",
    "REGISTRY_AUTH_HTPASSWD_REALM": "tests",
    "REGISTRY_AUTH_HTPASSWD_PATH": "/htpasswd",
}
SERVE = "exec registry serve /etc/distribution/config.yml"
SERVE_WHEN_THERE_IS_A_CERTIFICATE = f"until [ -e /cert ]; do sleep 0.1; done; {SERVE}"


@contextmanager
def private_registry(
    client: docker.DockerClient, tls: dict[str, str] | None = None, **options: Any
) -> Iterator[Container]:
    """A registry, in a container on an engine, that lets in only user with the password "password".

    With TLS it does not start before the certificate is there.
    """
    serve = SERVE_WHEN_THERE_IS_A_CERTIFICATE if tls else SERVE
    options["entrypoint"] = ["sh", "-euc", f"echo '{HTPASSWD}' >/htpasswd; {serve}"]
    options["environment"] = {**ASKS_FOR_A_PASSWORD, **(tls or {})}
    with running_container(client, REGISTRY_IMAGE, **options) as container:
        if not tls:
            wait_until_it_listens(container)
        yield container


def wait_until_it_listens(registry: Container) -> None:
    wait_for(lambda: b"listening on" in registry.logs(), "the registry listens", registry.logs)


def login(password: str = "password") -> dict[str, str]:
    """The user's login, as Docker's config.json has it."""
    return {"auth": base64.b64encode(f"user:{password}".encode()).decode()}


def push_to_inner_registry(client: docker.DockerClient, image: str, name: str) -> str:
    """Push an image of a daemon to INNER_REGISTRY, and return its name there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.registry, "REGISTRY", INNER_REGISTRY)
        path = scripts.registry.push(client, image, name)
    return f"{INNER_REGISTRY}/{path}"
