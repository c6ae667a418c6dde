"""A run's parameters, checked before its first task starts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import docker.constants
import docker.types
import prefect
from prefect.engine.state import Failed, State

from flows.settings import is_image


def abbreviated(text: str, length: int = 80) -> str:
    """A text that is short enough for a message: its start and its end."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}… ({len(text):,} characters) …{text[-half:]}"


def environment_strings(environment: Mapping[str, Any]) -> dict[str, str | None]:
    """An environment as Docker takes it: true, false and numbers as JSON writes them.

    None stays: Docker removes the variable that the image sets.

    Raises:
        ValueError: if Docker cannot hold a name or a value. The message never has a value: values are secrets.
    """
    for name, value in environment.items():
        shown = abbreviated(repr(str(name).partition("=")[0]))
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise ValueError(f"environment has the name {shown}: a name is text, not empty, without '=' or NUL")
        if not isinstance(value, (str, int, float, type(None))) or "\0" in str(value):
            raise ValueError(f"environment[{shown}] is not text without NUL, a number, true, false or null")
    return {
        name: value if value is None or isinstance(value, str) else json.dumps(value)
        for name, value in environment.items()
    }


def _command_fault(command: Any) -> str | None:
    as_json = """--param command='["sh","-c","echo one"]'"""
    if isinstance(command, str):
        try:
            words = shlex.split(command)  # as the Docker SDK does
        except ValueError as error:
            return f"command is {abbreviated(repr(command))}: {error}; close it, or give a list of words: {as_json}"
        if words and words[0].startswith("[") and words[0] != "[":
            return f"command is {abbreviated(repr(command))}, a list that is not JSON; give {as_json}"
    elif command is not None and not (isinstance(command, list) and all(isinstance(word, str) for word in command)):
        return f"command is {abbreviated(repr(command))}; give a string, a list of words or null, as in {as_json}"
    return None


def _host_config_fault(host_config: Any) -> str | None:
    if not isinstance(host_config, dict):
        given = abbreviated(repr(host_config))
        return f"""host_config is {given}; give a mapping, as in --param host_config='{{"mem_limit":"1g"}}'"""
    for options in (*({key: value} for key, value in host_config.items()), host_config):
        try:
            docker.types.HostConfig(version=docker.constants.DEFAULT_DOCKER_API_VERSION, **options)
        except Exception as error:  # the SDK raises errors of many types
            what = f"host_config[{abbreviated(repr(next(iter(options))))}]" if len(options) == 1 else "host_config"
            return f"{what}: {abbreviated(str(error).replace('HostConfig.__init__() ', ''), 200)}"
    return None


def validate_parameters(parameters: Mapping[str, Any]) -> str | None:
    """Check a run's parameters.

    Args:
        parameters: the flow's parameters by name. A parameter that is missing has its default.

    Returns:
        What is wrong, and what to give instead; None if nothing is wrong.
    """
    image, time_limit = parameters.get("image", "default"), parameters.get("time_limit")
    environment, host_config = parameters.get("environment"), parameters.get("host_config")
    if not isinstance(image, str) or not is_image(image):
        return f"image is {abbreviated(repr(image))}; give an image reference (name, name:tag, name@sha256:…)"
    if fault := _command_fault(parameters.get("command")):
        return fault
    if environment is not None and not isinstance(environment, dict):
        kind = type(environment).__name__
        return f"""environment is of type {kind}; give a mapping, as in --param environment='{{"NAME":"value"}}'"""
    try:
        environment_strings(environment or {})
    except ValueError as error:
        return str(error)
    if time_limit is not None and not (type(time_limit) in (int, float) and time_limit > 0):
        given = abbreviated(repr(time_limit))
        return f"time_limit is {given}; give the seconds that the container may run, as in --param time_limit=60"
    return None if host_config is None else _host_config_fault(host_config)


def fail_on_invalid_parameters(flow: prefect.Flow, old: State, new: State) -> State | None:
    """State handler of the flow: with invalid parameters the run fails before its first task."""
    fault = validate_parameters(prefect.context.parameters) if new.is_running() else None
    if fault is None:
        return None
    prefect.context.logger.error(fault)
    return Failed(fault, result={})  # by task; without it `flow.run()` would crash
