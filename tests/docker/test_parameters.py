"""Parameters that only a real daemon can prove: Docker's other options, and variables of the flow's own environment."""

from __future__ import annotations

from collections.abc import Callable

import docker
import pytest

from tests.docker.conftest import Outcome

FlowRun = Callable[..., Outcome]


def test_dockers_other_options(flow_run: FlowRun, image: str) -> None:
    """The command is the entrypoint's arguments."""
    extra = {"entrypoint": ["sh", "-c", 'echo "$0 $1 $(id -u) $(hostname) $(pwd)"'], "labels": ["ours"]}
    extra |= {"user": "1234", "hostname": "somewhere", "working_dir": "/tmp"}
    run = flow_run(image=image, command=["one", "two"], extra_docker_kwargs=extra)
    assert run.state.is_successful(), run.state.message
    assert run.output("INFO") == "one two 1234 somewhere /tmp"


def test_a_variable_by_its_name(flow_run: FlowRun, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value reaches the container, and neither a log nor a state."""
    monkeypatch.setenv("API_KEY", "hunter2")
    script = 'test "$API_KEY" = hunt"er2" && test "$B" = c'
    run = flow_run(image=image, command=["sh", "-c", script], environment=["API_KEY", "B=c"])
    assert run.state.is_successful(), run.state.message
    assert not run.naming("hunter2")
    assert "hunter2" not in str({name: state.serialize() for name, state in run.tasks.items()})


def test_a_variable_that_the_flow_does_not_have(
    flow_run: FlowRun, image: str, daemon: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("API_KEY", raising=False)
    run = flow_run(image=image, command=["true"], environment=["API_KEY"])
    assert run.state.is_failed()
    assert "API_KEY is not set in the flow's environment" in run.state.message
