"""Docker's config.json: logins, headers and proxies, without what would stop the Docker SDK.

One broken entry costs that entry only. The faults are said in words for the run's logs.
"""

import base64
import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker.auth
import requests
from docker.errors import DockerException
from docker.utils.config import find_config_file

from flows.messages import abbreviated, kind, plain

HELPER_SECONDS = 30  # how long a credential helper may take
# What the SDK sets itself: as for the Docker CLI, a header of the file does not replace it.
OWN_HEADERS = (
    "connection",
    "content-length",
    "content-type",
    "host",
    "transfer-encoding",
    "upgrade",
    "x-registry-auth",
    "x-registry-config",
)
PROXIES = ("httpProxy", "httpsProxy", "ftpProxy", "noProxy", "allProxy")


@dataclass
class DockerConfig:
    """Docker's configuration as the SDK takes it, and what is wrong with the file."""

    path: str = ""  # empty if there is no file
    written: Any = None  # what the file holds
    content: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add_fault(self, what: str) -> None:
        """Remember what is wrong, with the name of the file."""
        self.faults.append(f"{self.path}: {what}")


def read_config() -> DockerConfig:
    """Read the file that the Docker CLI would read. Never raises: faults are in the answer."""
    found = find_config_file()
    if found is None:
        return DockerConfig()
    path = str(found)
    config = DockerConfig(path=path)
    try:
        config.written = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        config.add_fault(f"is no valid Docker configuration, and is not used ({reason})")
        return config
    if not isinstance(config.written, dict):
        what = kind(config.written)
        config.add_fault(f"is no valid Docker configuration, and is not used (it is {what})")
        return config
    config.content = dict(config.written)
    _clean(config, "HttpHeaders", _header)
    _clean(config, "proxies", _proxies)
    _clean(config, "credHelpers", _text)
    _clean(config, "auths", usable_login)
    store = config.content.get("credsStore")
    if store is not None and not isinstance(store, str):
        config.add_fault(f"credsStore is {kind(store)}, not text, and is left out")
        del config.content["credsStore"]
    return config


def _clean(config: DockerConfig, name: str, usable: Callable[[str, Any], Any]) -> None:
    """Replace a mapping of the configuration by what is usable of it."""
    if name not in config.content:
        return
    section = config.content.pop(name)
    if section is None:  # as good as nothing
        return
    if not isinstance(section, dict):
        config.add_fault(f"{name} is {kind(section)}, not a mapping, and is left out")
        return
    config.content[name] = {}
    for key, value in section.items():
        try:
            config.content[name][key] = usable(key, value)
        except ValueError as error:
            shown = abbreviated(repr(key))
            config.add_fault(f"{name}[{shown}] {error}, and is left out")


def _text(_: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"is {kind(value)}, not text")
    return value


def _header(name: str, value: Any) -> str:
    """A header that can be sent to the daemon."""
    text = _text(name, value)
    if name.lower() in OWN_HEADERS:
        raise ValueError("is set by the Docker SDK itself")
    try:
        requests.utils.check_header_validity((name, text))
        name.encode("ascii")
        text.encode("latin-1")
    except (requests.exceptions.InvalidHeader, UnicodeEncodeError):
        raise ValueError("is no valid header") from None
    return text


def _proxies(_: str, value: Any) -> dict[str, str]:
    """The proxies that containers get, by the name that Docker's documentation gives them."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"is {kind(value)}, not a mapping")
    spellings = {plain(name): name for name in PROXIES}
    proxies = {}
    for name, address in value.items():
        spelling = spellings.get(plain(name))
        if spelling is None:
            raise ValueError(f"has a name that is none of {', '.join(PROXIES)}")
        if address is not None:
            proxies[spelling] = _text(name, address)
    return proxies


def usable_login(registry: str, entry: Any) -> dict[str, Any]:
    """A login as the SDK takes it, which kubelet and the Docker CLI take as well.

    They take ``username`` and ``password`` in place of ``auth``, and ``auth`` without its padding.
    Raises ValueError, without a value, if it is none.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"is {kind(entry)}, not a login")
    login = dict(entry)
    auth = entry.get("auth")
    username = entry.get("username")
    if not auth and username:
        pair = f"{username}:{entry.get('password') or ''}"
        login["auth"] = base64.b64encode(pair.encode()).decode()
    elif isinstance(auth, str) and len(auth.strip()) % 4:
        login["auth"] = f"{auth}==="  # more padding than needed does no harm
    if not entry.get("identitytoken"):
        login.pop("identitytoken", None)
    try:
        docker.auth.AuthConfig.parse_auth({registry: login}, raise_on_error=True)
    except (DockerException, AttributeError, TypeError, ValueError):
        raise ValueError("is a broken login: auth is not the base64 of USER:PASSWORD") from None
    return login


def registry_login(config: DockerConfig, repository: str) -> dict[str, Any]:
    """The login for an image's registry, or an empty one. What is wrong is added to the faults."""
    try:
        registry, _ = docker.auth.resolve_repository_name(repository)
    except DockerException:  # Docker has the last word on names
        return {}
    auths = docker.auth.AuthConfig.parse_auth(config.content.get("auths") or {})
    known = docker.auth.AuthConfig({**config.content, "auths": auths})
    helper = known.get_credential_store(registry)
    if helper:
        known.pop("credsStore", None)
        known.pop("credHelpers", None)
        try:
            login = _helper_login(f"docker-credential-{helper}", registry)
        except ValueError as error:
            config.add_fault(f"no login was sent: {error}")
            return {}
        if login:
            return login
    return known.resolve_authconfig(registry) or {}


def _helper_login(program: str, registry: str) -> dict[str, Any] | None:
    """Ask a credential helper, as the Docker CLI does. None if it has no login for the registry.

    Source: https://github.com/docker/docker-credential-helpers#development
    """
    server = registry
    if registry == docker.auth.INDEX_NAME:
        server = docker.auth.INDEX_URL
    try:
        answer = subprocess.run(
            [program, "get"], input=server.encode(), capture_output=True, timeout=HELPER_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{program} did not answer within {HELPER_SECONDS} s") from None
    except OSError as error:
        raise ValueError(f"{program} cannot be run ({error.strerror})") from None
    if answer.returncode != 0:
        if b"credentials not found" in answer.stdout:
            return None
        raise ValueError(f"{program} failed with exit code {answer.returncode}")
    try:
        found = json.loads(answer.stdout)
        username = found["Username"]
        secret = found["Secret"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{program} did not answer with a login") from None
    if not username and not secret:
        return None
    if username == docker.auth.TOKEN_USERNAME:
        return {"ServerAddress": server, "IdentityToken": secret}
    return {"ServerAddress": server, "Username": username, "Password": secret}
