"""A run's parameters, checked before its first task starts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import docker.constants
import docker.types
import prefect
from prefect.engine.state import Failed, State

from flows.settings import is_image
from flows.text import abbreviated


def environment_strings(environment: Mapping[str, Any]) -> dict[str, str | None]:
    """An environment as Docker takes it: true, false and numbers as JSON writes them.

    None stays: Docker removes the variable that the image sets. Raises a ValueError on a name or a value that Docker
    cannot hold. Its message never has a value: values are secrets.
    """
    strings = {}
    for name, value in environment.items():
        shown = abbreviated(repr(str(name).partition("=")[0]))
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise ValueError(f"environment has the name {shown}: a name is text, not empty, without '=' or NUL")
        if not isinstance(value, (str, int, float, type(None))) or "\0" in str(value):
            raise ValueError(f"environment[{shown}] is not text without NUL, a number, true, false or null")
        strings[name] = value if value is None or isinstance(value, str) else json.dumps(value)
    return strings


def _is_command(command: Any) -> bool:
    if isinstance(command, str):
        first = next(iter(shlex.split(command)), "")  # as the Docker SDK does
        return first == "[" or not first.startswith("[")  # a list that is not JSON
    return isinstance(command, list) and all(isinstance(word, str) for word in command)


def _is_environment(environment: Any) -> bool:
    return isinstance(environment, dict) and environment_strings(environment) is not None


def _is_host_config(host_config: Any) -> bool:
    version = docker.constants.DEFAULT_DOCKER_API_VERSION
    return isinstance(host_config, dict) and docker.types.HostConfig(version=version, **host_config) is not None


def _is_time_limit(seconds: Any) -> bool:
    return type(seconds) in (int, float) and seconds > 0


# By name: a check, which may raise an error that says more, and what is allowed.
_PARAMETERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image": (lambda name: isinstance(name, str) and is_image(name), "an image reference (name, name:tag, …)"),
    "command": (_is_command, """a string, a list of words or null, as in --param command='["sh","-c","echo one"]'"""),
    "environment": (_is_environment, """a mapping, as in --param environment='{"NAME":"value"}'"""),
    "host_config": (_is_host_config, """a mapping, as in --param host_config='{"mem_limit":"1g"}'"""),
    "time_limit": (_is_time_limit, "the seconds that the container may run, as in --param time_limit=60"),
}


def validate_parameters(parameters: Mapping[str, Any]) -> str | None:
    """Check a run's parameters by name. Return what is wrong and what to give instead, or None."""
    for name, (is_valid, allowed) in _PARAMETERS.items():
        value, reason = parameters.get(name), ""
        if name not in parameters or (value is None and name != "image"):
            continue
        try:
            if is_valid(value):
                continue
        except Exception as error:  # the SDK raises errors of many types
            reason = f": {abbreviated(str(error).replace('HostConfig.__init__() ', ''), 200)}"
        given = f"of type {type(value).__name__}" if name == "environment" else abbreviated(repr(value))
        return f"{name} is {given}{reason}; give {allowed}"
    return None


def fail_on_invalid_parameters(flow: prefect.Flow, old: State, new: State) -> State | None:
    """State handler of the flow: with invalid parameters the run fails before its first task."""
    fault = validate_parameters(prefect.context.parameters) if new.is_running() else None
    if fault is None:
        return None
    prefect.context.logger.error(fault)
    return Failed(fault, result={})  # by task; without it `flow.run()` would crash
