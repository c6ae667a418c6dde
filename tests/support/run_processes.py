"""Processes that run a flow as the one in a pod does, with the tests' Prefect API as backend."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from prefect import Client, Flow
from prefect.engine.state import Submitted
from prefect.storage import Local
from prefect.utilities.configuration import set_temporary_config
from prefect.utilities.storage import extract_flow_from_file

from flows.settings import PROJECT
from tests.support.prefect_api import FlowRun, PrefectAPI

Process = subprocess.Popen[bytes]


@contextmanager
def local_api() -> Iterator[PrefectAPI]:
    """A Prefect API, which the client of this process asks too."""
    settings = {
        "check_cancellation_interval": 0.1,
        "heartbeat_mode": "off",
        "send_flow_run_logs": False,
    }
    with PrefectAPI() as api:
        cloud = {f"cloud.{name}": value for name, value in {"api": api.url, **settings}.items()}
        with set_temporary_config({"backend": "server", **cloud}):
            Client().create_project("demo")
            yield api
    assert api.errors == []


def register(flow: Flow) -> str:
    """Register a flow, and return its id."""
    return str(Client().register(flow, project_name="demo", build=False, no_url=True))


class RunProcesses:
    """Runs of the flow in a script, and their processes, which end with the `with` statement."""

    def __init__(self, api: PrefectAPI, script: Path, docker_host: str) -> None:
        self.api = api
        self.docker_host = docker_host
        self._script = script
        self._processes = ExitStack()

    def __enter__(self) -> "RunProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.close()

    def create_run(self, code: str) -> FlowRun:
        """Create a run of the flow in some code, and let it be Submitted as by an Agent."""
        script = self._script.with_stem(f"flow_{len(self.api.flow_runs)}")  # others read theirs
        script.write_text(code)
        flow = extract_flow_from_file(str(script))
        flow.storage = Local(path=str(script), stored_as_script=True)
        flow.storage.add_flow(flow)
        run = self.api.flow_runs[self.api.create_flow_run(register(flow))]
        self.api.set_state(run.id, Submitted("Submitted for execution"))
        return run

    def start(self, run: FlowRun) -> Process:
        """Start a process for a run, as the Agent's Job does."""
        environment = {
            "DOCKER_HOST": self.docker_host,
            "PYTHONPATH": str(PROJECT),
            "PREFECT__CONTEXT__FLOW_RUN_ID": run.id,
            "PREFECT__ENGINE__FLOW_RUNNER__DEFAULT_CLASS": "prefect.engine.cloud.CloudFlowRunner",
            "PREFECT__CLOUD__HEARTBEAT_MODE": "thread",
            "PREFECT__CLOUD__CHECK_CANCELLATION_INTERVAL": "1",
        }
        command = [sys.executable, "-m", "prefect", "execute", "flow-run"]
        environment = {**os.environ, **self.api.env, **environment}
        process = self._processes.enter_context(subprocess.Popen(command, env=environment))
        self._processes.callback(process.kill)
        return process
