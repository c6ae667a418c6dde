"""A run's parameters, checked before its first task starts."""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import prefect
from docker.errors import InvalidArgument
from prefect.engine.state import Failed, State

from flows.messages import abbreviated, kind
from flows.options import check_words, container_options, environment_strings, host_options
from flows.settings import IMAGE


@dataclass(frozen=True)
class RunParameter:
    """A parameter of a run. Except for a required one, null is as good as nothing."""

    name: str
    check: Callable[[Any], object]  # raises InvalidArgument with a sentence, which holds no value
    allowed: str
    example: str  # as `prefect run --param` takes it: JSON, or text
    required: bool = False


def check_image(image: Any) -> None:
    """Check an image reference."""
    if not isinstance(image, str):
        raise InvalidArgument(f"image is {kind(image)}")
    if not re.fullmatch(IMAGE, image):
        raise InvalidArgument("image is text, and no image reference")


def check_command(command: Any) -> None:
    """Check a command: text that can be split into words, or a list of words."""
    check_words(command, "command")


def check_environment(environment: Any) -> None:
    """Check the names and the types of an environment."""
    environment_strings(environment)


def check_host_config(host_config: Any) -> None:
    """Check the names and the values of Docker's options, at any depth."""
    host_options(host_config)


def check_extra_docker_kwargs(extra_docker_kwargs: Any) -> None:
    """Check the names and the values of Docker's other options, at any depth."""
    container_options(extra_docker_kwargs)


def check_time_limit(time_limit: Any) -> None:
    """Check a number of seconds."""
    if isinstance(time_limit, bool) or not isinstance(time_limit, (int, float)):
        raise InvalidArgument(f"time_limit is {kind(time_limit)}")
    if not 0 < time_limit <= threading.TIMEOUT_MAX:
        raise InvalidArgument("time_limit is not over 0, or far too large")


PARAMETERS = (
    RunParameter(
        name="image",
        check=check_image,
        allowed="an image reference: its name in lower case, without https://",
        example="alpine:3",
        required=True,
    ),
    RunParameter(
        name="command",
        check=check_command,
        allowed="text, a list of words or null",
        example='["sh","-c","echo one"]',
    ),
    RunParameter(
        name="environment",
        check=check_environment,
        allowed="a mapping or a list",
        example='{"NAME":"value"}',
    ),
    RunParameter(
        name="host_config",
        check=check_host_config,
        allowed="a mapping of options",
        example='{"mem_limit":"1g"}',
    ),
    RunParameter(
        name="extra_docker_kwargs",
        check=check_extra_docker_kwargs,
        allowed="a mapping of options",
        example='{"user":"1000"}',
    ),
    RunParameter(
        name="time_limit",
        check=check_time_limit,
        allowed="a number of seconds",
        example="60",
    ),
)


def validate_parameters(parameters: Mapping[str, Any]) -> str | None:
    """Check a run's parameters by name. Return what is wrong and what to give instead, or None.

    The message starts with the parameter's name. It has no value, because values may be secrets.
    """
    for parameter in PARAMETERS:
        if parameter.name not in parameters:
            continue
        value = parameters[parameter.name]
        if value is None and not parameter.required:
            continue
        try:
            parameter.check(value)
        except InvalidArgument as error:
            reason = abbreviated(str(error), 400)
            return f"{reason}; give {parameter.allowed}, e.g. {parameter.example}"
    return None


def fail_on_invalid_parameters(flow: prefect.Flow, old: State, new: State) -> State | None:
    """State handler of the flow: with invalid parameters the run fails before its first task."""
    if not new.is_running():
        return None
    fault = validate_parameters(prefect.context.parameters)
    if fault is None:
        return None
    # the result is by task; without one `flow.run()` would crash
    return Failed(fault, result={})
