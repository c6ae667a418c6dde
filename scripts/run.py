"""Run the flow in this process, on this machine's Docker engine: `make run`."""

import json
import os
import re
import sys
import uuid
from contextlib import suppress
from typing import Any

import docker
from docker.errors import APIError
from prefect.engine.state import State

from flows.parameters import validate_parameters
from flows.settings import Settings, SettingsError
from flows.tasks import LABEL
from scripts import engine
from scripts.base import SetupError

JSON = ("ENVIRONMENT", "HOST_CONFIG", "EXTRA_DOCKER_KWARGS", "TIME_LIMIT")


def parameters() -> dict[str, Any]:
    """The flow's parameters, from variables that the Makefile sets: IMAGE, COMMAND, and those of JSON in JSON.

    COMMAND is a string, or a list or null in JSON. What is not set has the flow's default.
    """
    found: dict[str, Any] = {}
    notes = {}
    for name in ("IMAGE", "COMMAND", *JSON):
        if (value := os.environ.get(name)) is None:
            continue
        found[name.lower()] = value
        if name in JSON or (
            name == "COMMAND" and (value == "null" or value.lstrip().startswith("["))
        ):
            try:
                found[name.lower()] = json.loads(value)
            except ValueError as error:  # it is text then; a command may be the program [
                notes[name.lower()] = f" ({name} is not JSON: {error})"
    if problem := validate_parameters(found):
        name = re.split(r"\W", problem, maxsplit=1)[0]
        sys.exit(f"run: {problem}{notes.get(name, '')}")
    return found


def run(client: docker.DockerClient, **parameters: Any) -> State:
    """Run the flow on the engine that DOCKER_HOST names, and remove its container."""
    from flows.docker_sidecar import flow  # which reads DOCKER_HOST

    run_id = str(uuid.uuid4())
    try:
        return flow.run(parameters=parameters, flow_run_id=run_id)  # type: ignore[return-value] # None: with a schedule
    finally:
        ours: dict[str, Any] = {"label": f"{LABEL}={run_id}"}
        for container in client.containers.list(all=True, filters=ours, ignore_removed=True):
            with suppress(APIError):  # somebody else may remove it
                container.remove(force=True)


def main() -> None:
    """Run, show the logs, and exit with 0 if and only if the run succeeded."""
    given = parameters()
    try:
        Settings.from_environ()  # a fault there must not start an engine first
        with engine.running() as client:
            state = run(client, **given)
    except (SettingsError, SetupError) as error:
        sys.exit(f"run: {error}")
    except KeyboardInterrupt:
        sys.exit("run: interrupted; nothing was left running")
    if not state.is_successful():
        sys.exit(f"Flow run FAILED: {state.message}")
    print("Flow run SUCCESS")


if __name__ == "__main__":
    main()
