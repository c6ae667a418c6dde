"""Run the flow in this process, on a daemon at tcp://localhost:2375: `make run`."""

from __future__ import annotations

import os
import sys
import uuid
from typing import Any

import docker
from prefect.engine.state import State

from flows.docker_sidecar import flow
from flows.parameters import fault
from flows.tasks import LABEL
from scripts import sidecar


def parameters() -> dict[str, str]:
    """The flow's parameters from IMAGE and COMMAND; what is not set has the flow's default."""
    found = {name.lower(): os.environ[name] for name in ("IMAGE", "COMMAND") if name in os.environ}
    if what := fault(found):
        sys.exit(f"run: {what}")
    return found


def run(daemon: docker.DockerClient, **parameters: Any) -> State:
    """Run the flow with these parameters, and remove its container from the daemon."""
    run_id = str(uuid.uuid4())
    try:
        state = flow.run(parameters=parameters, flow_run_id=run_id)
        assert state is not None  # None is for flows with a schedule
        return state
    finally:
        for container in daemon.containers.list(all=True, filters={"label": f"{LABEL}={run_id}"}):
            container.remove(force=True)


def main() -> None:
    """Run, show the logs, and exit with 0 if and only if the run succeeded."""
    given = parameters()
    try:
        with sidecar.running() as daemon:
            state = run(daemon, **given)
    except sidecar.SidecarError as error:
        sys.exit(f"run: {error}")
    except KeyboardInterrupt:
        sys.exit("run: interrupted; nothing was left running")
    if not state.is_successful():
        sys.exit(f"Flow run FAILED: {state.message}")
    print("Flow run SUCCESS")


if __name__ == "__main__":
    main()
