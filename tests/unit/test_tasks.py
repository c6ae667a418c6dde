"""The tasks on a fake daemon: what a real one cannot be brought to do, and what needs none."""

import inspect
import json
import logging
from typing import Any

import pytest
from prefect import Flow
from prefect.engine import signals
from prefect.tasks import docker as prefect_docker

from flows import tasks
from flows.tasks import (
    CreateContainer,
    GetContainerLogs,
    PullImage,
    StartContainer,
    WaitOnContainer,
)
from tests.support.fake_docker import ID, FakeDocker

NAMES = ("PullImage", "CreateContainer", "StartContainer", "WaitOnContainer", "GetContainerLogs")
REQUIRED = dict(
    zip(NAMES, ("repository", "image_name", "container_id", "container_id", "container_id"))
)


# Arguments


@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_are_prefects(name: str) -> None:
    ours, theirs = getattr(tasks, name), getattr(prefect_docker, name)
    expected = list(inspect.signature(theirs.run).parameters)
    assert list(inspect.signature(ours.run).parameters)[: len(expected)] == expected
    constructor = list(inspect.signature(theirs).parameters)[:-1]  # and **kwargs
    values = [f"value {number}" for number in range(len(constructor))]
    by_position, by_name = ours(*values), ours(**dict(zip(constructor, values)))
    for argument, value in zip(constructor, values):
        assert getattr(by_position, argument) == getattr(by_name, argument) == value


def test_a_flow_as_for_prefects_tasks(fake: FakeDocker) -> None:
    with Flow("like Prefect's") as flow:
        image = PullImage("app", "1", fake.url, stream_logs=True)()
        container = CreateContainer(
            docker_server_url=fake.url, extra_docker_kwargs={"labels": ["a"]}
        )(image)
        started = StartContainer(docker_server_url=fake.url)(container)
        WaitOnContainer(docker_server_url=fake.url, time_limit=60)(
            container, upstream_tasks=[started]
        )
        get_logs = GetContainerLogs(docker_server_url=fake.url, extra_docker_kwargs={"tail": 5})
        get_logs(container, upstream_tasks=[started])
    state = flow.run()
    assert state.is_successful(), state.result
    [create] = fake.asked("POST /containers/create")
    body = json.loads(create["body"])
    assert body["Image"] == "app:1"
    assert set(body["Labels"]) == {"a", tasks.LABEL}
    assert "5" in [query.get("tail") for query in fake.asked("GET /containers/logs")]


@pytest.mark.parametrize("policy", [None, {}, {"Name": ""}, {"Name": "no"}], ids=str)
def test_no_restart_policy_and_no_log_driver(
    fake: FakeDocker, policy: dict[str, str] | None
) -> None:
    """The log driver is Docker's default, and the log-opts of the daemon hold."""
    CreateContainer(docker_server_url=fake.url).run(
        image_name="app:1", host_config={"restart_policy": policy}
    )
    [create] = fake.asked("POST /containers/create")
    assert "LogConfig" not in json.loads(create["body"])["HostConfig"]


APP, CONTAINER = {"image_name": "app:1"}, {"container_id": ID}
NO_SUCH = {"extra_docker_kwargs": {"no_such": 1}}
ALWAYS = {"Name": "always", "MaximumRetryCount": 3}


@pytest.mark.parametrize(
    ("task", "arguments", "says"),
    [
        (
            CreateContainer,
            {**APP, "host_config": {"restart_policy": ALWAYS}},
            "restart_policy is not allowed.*Prefect's retries",
        ),
        (
            CreateContainer,
            {**APP, "extra_docker_kwargs": {"host_config": {"RestartPolicy": ALWAYS}}},
            "host_config is a parameter of its own",
        ),
        (
            CreateContainer,
            {**APP, "environment": {"TOKEN": ["hunter2"]}},
            r"environment\['TOKEN'\]",
        ),
        (CreateContainer, {**APP, "environment": ["A=1", "=hunter2"]}, "starts with ="),
        # what the SDK finds wrong
        (CreateContainer, {**APP, "host_config": {"mem_limit": "1x"}}, "mem_limit is text"),
        (CreateContainer, {**APP, "host_config": {"restart_policy": 5}}, "restart"),
        (CreateContainer, {**APP, "host_config": {"no_such": 1}}, "no_such"),
        (CreateContainer, {**APP, **NO_SUCH}, "no_such"),
        (StartContainer, {**CONTAINER, **NO_SUCH}, "no longer supported"),
        (PullImage, {"repository": "app:1", **NO_SUCH}, "no_such"),
        (WaitOnContainer, {**CONTAINER, **NO_SUCH}, "no_such"),
    ],
)
def test_wrong_arguments_are_a_failure(
    fake: FakeDocker, task: Any, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(signals.FAIL, match=says) as failure:
        task(docker_server_url=fake.url).run(**arguments)
    assert "hunter2" not in str(failure.value)
    assert not fake.asked("POST /containers/create")


@pytest.mark.parametrize(
    ("ours", "task"),
    [
        ("flows.tasks.environment_strings", CreateContainer),
        ("flows.tasks.connect", StartContainer),
        ("flows.tasks.Watch", WaitOnContainer),
        ("flows.tasks.Pull", PullImage),
    ],
)
def test_a_bug_stays_a_bug(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, ours: str, task: Any
) -> None:
    error = TypeError("'NoneType' object is not subscriptable")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ours, fail)
    with pytest.raises(TypeError) as raised:
        task(docker_server_url=fake.url).run(**{REQUIRED[task.__name__]: ID})
    assert raised.value is error
    assert raised.traceback[-1].name == "fail"


@pytest.mark.parametrize(("name", "argument"), REQUIRED.items())
def test_a_missing_argument_is_a_value_error(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture, name: str, argument: str
) -> None:
    with caplog.at_level(logging.DEBUG):
        for given in ({}, {argument: None}, {argument: ""}):
            with pytest.raises(ValueError, match=argument):
                getattr(tasks, name)(docker_server_url=fake.url).run(**given)
    assert fake.requests == []
    assert [record for record in caplog.records if record.name.startswith("prefect")] == []
