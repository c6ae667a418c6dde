"""docs/from-your-flows.md: other flows start the registered flow, and a repository of one's own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prefect.serialization.schedule import ScheduleSchema

from flows.settings import PROJECT
from scripts.registry import REGISTRY
from tests.kubernetes.conftest import Namespace, Run, replaced, shell, start
from tests.support.pages import example
from tests.support.prefect_api import PrefectAPI

Parent = Callable[..., str]
PREFECT = str(Path(sys.executable).with_name("prefect"))


@pytest.fixture
def parent(api: PrefectAPI, deployment: None, tmp_path: Path) -> Parent:
    """Register a flow that starts the registered one; returns its id. It needs neither image nor Agent to run here."""

    def register(source: str) -> str:
        (tmp_path / "parent.py").write_text(source)
        home = str(tmp_path / "home")  # of the storage
        shell("prefect register --project containers --path parent.py", tmp_path, **api.env, PREFECT__HOME_DIR=home)
        return next(reversed(api.flows))

    return register


@contextmanager
def executing(api: PrefectAPI, run: Run, **environment: str) -> Iterator[None]:
    """A flow run's process, as an Agent would start it."""
    environment = {
        **os.environ,
        **api.env,
        "PREFECT__CONTEXT__FLOW_RUN_ID": run.record.id,
        "PREFECT__ENGINE__FLOW_RUNNER__DEFAULT_CLASS": "prefect.engine.cloud.CloudFlowRunner",
        **environment,
    }
    process = subprocess.Popen([PREFECT, "execute", "flow-run"], env=environment, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def children(api: PrefectAPI, parent: Run) -> list[str]:
    """The states of the runs that a run has started."""
    return sorted(run.state for run in api.flow_runs.values() if run.name.startswith(f"{parent.record.name}-"))


def test_a_parent_on_a_schedule_ends_as_its_container_ends(
    api: PrefectAPI, parent: Parent, small_image: str, namespace: Namespace
) -> None:
    """The tests' API has no scheduler. The test does what Prefect Server's does with the stored schedule."""
    parent_id = parent(example("scheduled").replace("alpine:3", small_image))
    schedule = ScheduleSchema().load(api.flows[parent_id].schedule)
    events = schedule.next(10, return_events=True)
    assert {event.parameter_defaults["command"] for event in events} == {"echo every night", "echo every Monday"}

    fails = {"image": small_image, "command": ["sh", "-c", "exit 3"]}
    no_agent = ["executed-by-the-test"]
    good = start(api, namespace, parent_id, parameters=events[0].parameter_defaults, labels=no_agent)
    bad = start(api, namespace, parent_id, parameters=fails, labels=no_agent)
    with executing(api, good), executing(api, bad):
        good.succeeds(events[0].parameter_defaults["command"].removeprefix("echo "))
        bad.fails()
    assert any("exited with code 3" in str(run.message) for run in bad.record.task_runs)
    assert (children(api, good), children(api, bad)) == (["Success"], ["Failed"])


class _Slack(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.messages.append(body.decode())  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()


@pytest.fixture
def slack() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), _Slack) as server:
        server.messages = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def test_a_parent_with_retries_notification_and_results(
    api: PrefectAPI, parent: Parent, small_image: str, namespace: Namespace, slack: HTTPServer
) -> None:
    """Two containers, one of which always fails: it is tried in two runs, and is told of once."""
    fails = '{"image": "alpine:3", "command": ["sh", "-c", "exit 3"]}'
    edits = {"range(30)\n]": f"[22]\n] + [{fails}]", "alpine:3": small_image}
    edits |= {"max_retries=3": "max_retries=1", "minutes=1": "seconds=1"}
    assert all(old in example("parent") for old in edits)
    run = start(api, namespace, parent(replaced(example("parent"), edits)), labels=["executed-by-the-test"])
    url = f"http://127.0.0.1:{slack.server_port}"
    with executing(api, run, PREFECT__CONTEXT__SECRETS__SLACK_WEBHOOK_URL=url):
        run.fails(timeout=240)  # the total misses one of its two
    assert children(api, run) == ["Failed", "Failed", "Success"], run.record
    results = {each.map_index: each.state for each in run.record.task_runs if "run_container" in each.task.slug}
    assert results == {-1: "Mapped", 0: "Success", 1: "Failed"}, run.record
    [message] = slack.messages  # type: ignore[attr-defined]
    assert "exited with code 3" in message


SOURCES = {
    "two_containers": example("two-containers"),
    "build_and_run": example("build-and-run"),
    "parallel": example("parallel"),
    "parallel_processes": replaced(example("parallel"), {'"threads"': '"processes"', "In parallel": "In processes"}),
}
IMPORTS = """
from prefect.run_configs import KubernetesRun
from prefect.storage import Docker
from flows.settings import PROJECT, Settings, load_job_template
settings = Settings.from_environ()
"""
RUN_CONFIG_AND_STORAGE = SOURCES["two_containers"][SOURCES["two_containers"].index("flow.run_config") :]


@pytest.mark.timeout(500)
def test_own_flows_in_a_repository_of_their_own(
    api: PrefectAPI, deployment: None, namespace: Namespace, small_image: str, tmp_path: Path
) -> None:
    shell(example("own-repository").replace("../docker-sidecar-on-kubernetes", str(PROJECT)), tmp_path)
    for module, source in SOURCES.items():
        if "flow.run_config" not in source:
            end = RUN_CONFIG_AND_STORAGE.replace("two_containers", module)
            source += IMPORTS + end.replace("two-containers", module.replace("_", "-"))
        # a tag that the node has not pulled
        (tmp_path / "flows" / f"{module}.py").write_text(source.replace('image_tag="1"', f'image_tag="{uuid.uuid4()}"'))
    modules = " ".join(f"-m flows.{module}" for module in SOURCES)
    register = example("register-own").replace("-m flows.two_containers", modules)
    shell(register, tmp_path, **api.env, FLOW_REGISTRY_URL=REGISTRY)
    ids = [*api.flows][-len(SOURCES) :]
    runs = {name: start(api, namespace, id, parameters={"image": small_image}) for name, id in zip(SOURCES, ids)}
    for run in runs.values():
        run.succeeds()
        assert run.job_ends()[0] == "Complete"
    runs["build_and_run"].logged("hello from an image that this run has built")
    for word in ("apple", "pear", "plum", "cherry"):  # worker processes may end before they have sent their logs
        runs["parallel"].logged(f"hello {word}")
