"""Run the flow in this process, on this machine's Docker engine: `make run`."""

import json
import shlex
import sys
import uuid
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import docker
from docker.errors import APIError, InvalidArgument
from prefect.engine.state import State

from flows.parameters import PARAMETERS, RunParameter
from flows.settings import Settings, SettingsError
from flows.tasks import LABEL
from scripts import engine, given
from scripts.base import SetupError, clean_up_on_signals

NAMES = tuple(parameter.name.upper() for parameter in PARAMETERS)


class InvalidParameter(Exception):
    """A parameter that cannot be used: what was seen, and what to give."""


def parameters() -> dict[str, Any]:
    """The flow's parameters, from make's command line. What is not there has the flow's default.

    Raises:
        InvalidParameter: if the flow refuses one.
        given.UnknownParameter: if there is no such parameter.
    """
    texts = given.parameters("run", NAMES)
    found = {}
    for parameter in PARAMETERS:
        name = parameter.name.upper()
        if name in texts:
            found[parameter.name] = _value(parameter, texts[name])
    return found


def _value(parameter: RunParameter, text: str) -> Any:
    """What a text stands for: its JSON if the parameter takes that, else the text itself."""
    note = ""
    meanings: list[Any] = [text]
    try:
        decoded = json.loads(text)
        if not isinstance(decoded, str):  # a command in quotes is a command with quotes
            meanings.insert(0, decoded)
    except ValueError as error:
        if text.startswith(("{", "[")):
            note = f" (it is not JSON: {error})"
    problems = []
    for meaning in meanings:
        problem = _problem(parameter, meaning)
        if problem is None:
            return meaning
        problems.append(problem)
    raise InvalidParameter(f"{problems[0]}{note}; {_instead(parameter)}")


def _problem(parameter: RunParameter, value: Any) -> str | None:
    """What the flow finds wrong with a value, under the name that the parameter has here."""
    if value is None and not parameter.required:
        return None
    try:
        parameter.check(value)
    except InvalidArgument as error:
        return str(error).replace(parameter.name, parameter.name.upper(), 1)
    return None


def _instead(parameter: RunParameter) -> str:
    example = shlex.quote(parameter.example)
    return f"give {parameter.allowed}, as in make run {parameter.name.upper()}={example}"


def run(client: docker.DockerClient, **parameters: Any) -> State:
    """Run the flow on the engine of DOCKER_HOST; remove its container and that one's volumes."""
    from flows.docker_sidecar import flow  # which reads DOCKER_HOST

    run_id = str(uuid.uuid4())
    try:
        return flow.run(parameters=parameters, flow_run_id=run_id)  # type: ignore[return-value] # None: with a schedule
    finally:
        ours: dict[str, Any] = {"label": f"{LABEL}={run_id}"}
        for container in client.containers.list(all=True, filters=ours, ignore_removed=True):
            with suppress(APIError):  # somebody else may remove it
                container.remove(force=True, v=True)  # v: the volumes that have no name


def running_engine() -> AbstractContextManager[docker.DockerClient]:
    """The user's engine, or a dockerd that ends with the block."""
    clean_up_on_signals()
    client = engine.find()
    if client is not None:
        return nullcontext(client)
    from scripts.airgap import dockerd  # only who has no engine needs to know how one is made

    return dockerd.running()


def main() -> None:
    """Run, show the logs, and exit with 0 if and only if the run succeeded."""
    try:
        values = parameters()
        Settings.from_environ()  # a fault there must not start an engine first
        with running_engine() as client:
            state = run(client, **values)
    except (given.UnknownParameter, InvalidParameter, SettingsError, SetupError) as error:
        sys.exit(f"run: {error}")
    except KeyboardInterrupt:
        sys.exit("run: interrupted; nothing was left running")
    if not state.is_successful():
        sys.exit(f"Flow run FAILED: {state.message}")
    print("Flow run SUCCESS")


if __name__ == "__main__":
    main()
