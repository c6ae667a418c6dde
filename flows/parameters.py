"""A run's parameters, checked before its first task starts."""

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import prefect
from docker.constants import DEFAULT_DOCKER_API_VERSION as VERSION
from docker.errors import InvalidArgument
from docker.types import ContainerConfig, HostConfig
from prefect.engine.state import Failed, State

from flows.daemon import abbreviated
from flows.settings import IMAGE


def environment_strings(environment: Mapping[str, Any] | list[str]) -> dict[str, str | None]:
    """An environment as Docker takes it: true, false and numbers as JSON writes them.

    In a list, ``NAME`` alone has the value that the flow's process has, as with ``docker run --env``. In a mapping,
    None stays: Docker removes the variable that the image sets. Raises InvalidArgument on a name or a value that Docker
    cannot hold, or that the flow does not have. Its message never has a value: values are secrets.
    """
    if isinstance(environment, list):
        items = [
            item.partition("=") if isinstance(item, str) else ("", "", "") for item in environment
        ]
        for name in (name for name, equals, _ in items if name and not equals):
            if name.startswith("PREFECT__") or name not in os.environ:
                raise InvalidArgument(
                    f"{abbreviated(name)} is not set in the flow's environment, or is Prefect's own"
                )
        environment = {
            name: value if equals else os.environ.get(name) for name, equals, value in items
        }
    if not isinstance(environment, Mapping):
        raise InvalidArgument("environment is neither a mapping nor a list")
    strings = {}
    for name, value in environment.items():
        shown = abbreviated(repr(str(name).partition("=")[0]))
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise InvalidArgument(
                f"environment has the name {shown}: a name is text, not empty, without '=' or NUL"
            )
        if not isinstance(value, (str, int, float, type(None))) or "\0" in str(value):
            raise InvalidArgument(
                f"environment[{shown}] is not text without NUL, a number, true, false or null"
            )
        strings[name] = value if value is None or isinstance(value, str) else json.dumps(value)
    return strings


def _is_command(command: Any) -> bool:
    if isinstance(command, str):
        first = next(iter(shlex.split(command)), "")  # as the Docker SDK does
        return first == "[" or not first.startswith("[")  # a list that is not JSON
    return isinstance(command, list) and all(isinstance(word, str) for word in command)


def _is_extra(extra: Any) -> bool:
    named = {
        name: extra[name] for name in extra if name not in ("name", "platform", "use_config_proxy")
    }
    ours: dict[str, Any] = dict.fromkeys(
        ("command", "environment", "host_config")
    )  # must not be given twice
    return isinstance(ContainerConfig(VERSION, "image", **ours, **named)["Labels"] or {}, dict)


# By name: a check, which returns False or raises an error that says more, what is allowed, and an example.
_PARAMETERS: dict[str, tuple[Callable[[Any], object], str, str]] = {
    "image": (
        lambda it: isinstance(it, str) and bool(re.fullmatch(IMAGE, it)),
        "an image reference",
        "alpine:3",
    ),
    "command": (_is_command, "a string, a list of words or null", """'["sh","-c","echo one"]'"""),
    "environment": (
        environment_strings,
        "a mapping or a list",
        """'{"NAME":"value"}' or '["NAME"]'""",
    ),
    "host_config": (
        lambda it: HostConfig(VERSION, **it),
        "a mapping of options",
        """'{"mem_limit":"1g"}'""",
    ),
    "extra_docker_kwargs": (_is_extra, "a mapping of options", """'{"user":"1000"}'"""),
    "time_limit": (lambda it: type(it) in (int, float) and it > 0, "the seconds", "60"),
}


def validate_parameters(parameters: Mapping[str, Any]) -> str | None:
    """Check a run's parameters by name. Return what is wrong and what to give instead, or None."""
    for name, (check, allowed, example) in _PARAMETERS.items():
        value, reason = parameters.get(name), ""
        if name not in parameters or (value is None and name != "image"):
            continue
        try:
            if check(value) is not False:
                continue
        except Exception as error:  # the SDK raises errors of many types
            reason = f": {abbreviated(str(error).split('() ', 1)[-1], 200)}"
        given = (
            f"of type {type(value).__name__}" if name == "environment" else abbreviated(repr(value))
        )
        return f"{name} is {given}{reason}; give {allowed}, as in --param {name}={example}"
    return None


def fail_on_invalid_parameters(flow: prefect.Flow, old: State, new: State) -> State | None:
    """State handler of the flow: with invalid parameters the run fails before its first task."""
    fault = validate_parameters(prefect.context.parameters) if new.is_running() else None
    return (
        Failed(fault, result={}) if fault else None
    )  # by task; without it `flow.run()` would crash
