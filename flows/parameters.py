"""What a run may be given, checked before any of its tasks starts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import prefect
from prefect.engine.state import Failed, State

from flows.settings import is_image


def fault(parameters: Mapping[str, Any]) -> str | None:
    """What is wrong with a run's parameters, and what to give instead; None if nothing is.

    Args:
        parameters: of the flow, by name; what is not in it has its default.
    """
    image, command = parameters.get("image", "default"), parameters.get("command")
    environment, time_limit = parameters.get("environment"), parameters.get("time_limit")
    if not isinstance(image, str) or not is_image(image):
        return f"image is {image!r}; give an image reference (name, name:tag, name@sha256:…)"
    if isinstance(command, str):
        try:
            shlex.split(command)  # as docker does
        except ValueError as error:
            return f"command is {command!r}: {error}; close it, or give a list of words"
    elif command is not None and not (isinstance(command, list) and all(isinstance(word, str) for word in command)):
        return f"command is {command!r}; give a string, a list of words, or null for the image's own"
    if environment is not None and not isinstance(environment, dict):
        return f"environment is {environment!r}; give a mapping of names to values"
    if time_limit is not None and not (type(time_limit) in (int, float) and time_limit > 0):
        return f"time_limit is {time_limit!r}; give a number of seconds, or leave it out"
    return None


def refuse_faulty_parameters(flow: prefect.Flow, old: State, new: State) -> State | None:
    """State handler of the flow: a run with faulty parameters fails in place of starting its tasks."""
    what = fault(prefect.context.parameters) if new.is_running() else None
    if what is None:
        return None
    prefect.context.logger.error(what)
    return Failed(what, result={})  # by task; without it `flow.run()` would crash
