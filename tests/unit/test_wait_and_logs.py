"""The wait and the logs, on a fake of Docker: what a real daemon cannot be brought to do."""

import json
import logging
import re
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from prefect import Flow
from prefect.engine import signals
from prefect.engine.results import PrefectResult
from prefect.engine.task_runner import TaskRunner
from prefect.utilities.configuration import set_temporary_config

from flows import tasks
from flows.tasks import GetContainerLogs, WaitOnContainer
from tests.support.fake_docker import ID, FakeDocker, frame
from tests.support.waiting import wait_for


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def output(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the container wrote."""
    of_the_task = ("Container ", "Exited with code ")
    return [line for line in lines(caplog) if not line.startswith(of_the_task)]


def warning(caplog: pytest.LogCaptureFixture) -> str:
    [warned] = lines(caplog, logging.WARNING)
    return warned


def wait(fake: FakeDocker, **options: Any) -> Any:
    return WaitOnContainer(container_id=ID, docker_server_url=fake.url).run(**options)


def logs(fake: FakeDocker, **options: Any) -> str:
    task = GetContainerLogs(docker_server_url=fake.url)
    return str(task.run(container_id=ID, extra_docker_kwargs=options))


def break_off() -> None:
    raise ConnectionResetError


# --------------------------------------------------------------------------------------- the wait


def test_a_container_that_is_gone_without_a_trace(fake: FakeDocker) -> None:
    fake.gone = True
    with pytest.raises(signals.FAIL, match="No such container"):
        wait(fake)
    with pytest.raises(signals.SKIP, match="No such container"):
        GetContainerLogs(docker_server_url=fake.url).run(container_id=ID)


def test_a_container_that_is_removed_at_its_exit(fake: FakeDocker) -> None:
    fake.result = {"StatusCode": 3}
    fake.exited.clear()

    def remove() -> None:
        wait_for(lambda: fake.asked("POST /containers/wait"), "the exit is waited for")
        fake.gone = True

    fake.streams = [[remove, fake.exited.set]]
    with pytest.raises(signals.FAIL, match="Exited with code 3"):
        wait(fake)


@pytest.mark.parametrize("end", [[b""], [break_off]], ids=["ends", "breaks"])
def test_after_a_stream_that_breaks_new_output_is_read(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture, end: list[Any]
) -> None:
    """No clock, this machine's or the daemon's, decides what is read: nothing comes twice."""
    fake.exited.clear()
    fake.streams = [[frame(1, b"one\n"), *end], [frame(1, b"two\n"), fake.exited.set]]
    assert wait(fake)["StatusCode"] == 0
    assert output(caplog) == ["one", "two"]
    assert "lines may be missing" in warning(caplog)
    first, second = fake.asked("GET /containers/logs")
    assert (first["tail"], second["tail"]) == ("all", "0")
    assert not {"since", "until"} & {*first, *second}


def test_a_stream_that_breaks_after_the_exit(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no new output then, so it is not read again."""
    fake.streams = [[frame(1, b"one\n"), break_off]] * 3
    assert wait(fake)["StatusCode"] == 0
    assert output(caplog) == ["one"]
    assert "lines may be missing" in warning(caplog)
    assert len(fake.asked("GET /containers/logs")) == 1


@pytest.mark.parametrize("drips", [False, True], ids=["stalls", "drips"])
def test_getting_the_logs_is_bounded_in_time(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, drips: bool
) -> None:
    monkeypatch.setattr("flows.tasks.READ_SECONDS", 0.3)
    monkeypatch.setattr("flows.tasks.READ_SECONDS", 0.3)
    pause = fake.closing.wait if not drips else lambda: fake.closing.wait(0.05)
    fake.end = (item for _ in range(100) for item in (frame(1, b"one\n"), pause))
    started = time.monotonic()
    with pytest.raises(signals.SKIP, match=r"No logs: .*(timed out|did not end)"):
        GetContainerLogs(docker_server_url=fake.url).run(container_id=ID)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "says", ["output could not be read: Error grabbing logs", "Docker did not end the output"]
)
def test_output_that_does_not_end_well(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, says: str
) -> None:
    """The run ends all the same, when the container has exited."""
    monkeypatch.setattr("flows.watch.OUTPUT_GRACE_SECONDS", 0.2)
    fake.streams = [
        [
            frame(1, b"one\n"),
            frame(3, b"Error grabbing logs\n") if "read" in says else fake.closing.wait,
        ]
    ]
    started = time.monotonic()
    assert wait(fake)["StatusCode"] == 0
    assert time.monotonic() - started < 3
    assert "one" in lines(caplog)
    assert says in warning(caplog)


def test_a_wait_that_fails_stops_the_container(fake: FakeDocker) -> None:
    """Else the container would run on, whatever its time limit."""
    fake.exited.clear()
    fake.streams = [[frame(1, b"up\n"), fake.exited.wait]]
    with pytest.raises(signals.FAIL, match="timed out"):
        wait(fake, extra_docker_kwargs={"timeout": 0.3}, time_limit=60)
    assert fake.asked("POST /containers/stop")


def writes_on(fake: FakeDocker) -> Iterator[Any]:
    """Lines, until the container is stopped."""
    while not fake.exited.wait(0.05):
        yield frame(1, b"on\n")


def test_a_wait_that_docker_refuses_stops_the_container(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, although the container goes on and writes."""
    fake.exited.clear()
    fake.wait_refusal = 'invalid condition: "nonsense"'
    fake.streams = [writes_on(fake)]
    started = time.monotonic()
    with pytest.raises(signals.FAIL, match="invalid condition"):
        wait(fake, extra_docker_kwargs={"condition": "nonsense"}, time_limit=30)
    assert time.monotonic() - started < 10
    assert len(fake.asked("POST /containers/stop")) == 1
    assert "stopping it" in warning(caplog)


@pytest.mark.parametrize("condition", [None, "not-running"])
def test_a_wait_before_the_start_fails(fake: FakeDocker, condition: str | None) -> None:
    """Docker would answer 0 at once."""
    fake.started = False
    with pytest.raises(signals.FAIL, match=r"^Not started: container .*upstream_tasks"):
        wait(fake, extra_docker_kwargs={"condition": condition})
    assert not fake.asked("POST /containers/wait")


def test_a_wait_for_the_start_may_come_before_it(fake: FakeDocker) -> None:
    fake.started = False
    assert wait(fake, extra_docker_kwargs={"condition": "next-exit"})["StatusCode"] == 0


def test_a_child_that_is_killed_for_its_memory_is_a_warning(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture
) -> None:
    fake.out_of_memory = True
    assert wait(fake)["StatusCode"] == 0
    assert warning(caplog).startswith("Exited with code 0 (OOMKilled): container c0ffeec0ffee")


EXIT = "Exited with code 0: container c0ffeec0ffee (image app:1): the shim is gone"


def test_what_docker_says_of_the_exit_fails_the_wait(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture
) -> None:
    fake.result = {"StatusCode": 0, "Error": {"Message": "the shim is gone"}}
    with pytest.raises(signals.FAIL, match=f"^{re.escape(EXIT)}$"):
        wait(fake)
    assert lines(caplog) == []
    wait(fake, raise_on_exit_code=False)
    assert lines(caplog) == [EXIT]


@pytest.mark.parametrize(
    ("time_limit", "message"),
    [
        (None, "Exited with code 137 (OOMKilled): container"),
        (0.1, "Stopped at its time limit of 0.1 s: container"),
    ],
)
def test_the_cause_stands_where_prefects_ui_shows_it(
    fake: FakeDocker, time_limit: float | None, message: str
) -> None:
    """It shows 40 characters of a run's message."""
    if time_limit:
        fake.exited.clear()
    fake.out_of_memory = True
    fake.result = {"StatusCode": 137}
    with pytest.raises(signals.FAIL) as failure:
        wait(fake, time_limit=time_limit)
    assert str(failure.value)[:40] == message[:40]


# ---------------------------------------------------------------------------------------- retries


@pytest.fixture
def retries_by_default() -> Iterator[None]:
    """As with PREFECT__TASKS__DEFAULTS__MAX_RETRIES=2."""
    settings = {"tasks.defaults.max_retries": 2, "tasks.defaults.retry_delay": timedelta(0)}
    with set_temporary_config(settings):
        yield


@pytest.mark.usefixtures("retries_by_default")
def test_a_wait_is_not_repeated_whatever_the_default_is(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture
) -> None:
    fake.result = {"StatusCode": 1}
    fake.streams = [[frame(1, b"once\n")] for _ in range(3)]
    with Flow("fails") as flow:
        WaitOnContainer(docker_server_url=fake.url)(ID)
    assert flow.run().is_failed()
    assert len(fake.asked("POST /containers/wait")) == 1
    assert lines(caplog).count("once") == 1


@pytest.mark.usefixtures("retries_by_default")
@pytest.mark.parametrize(
    "name",
    ["PullImage", "CreateContainer", "StartContainer", "WaitOnContainer", "GetContainerLogs"],
)
def test_retries_are_those_that_the_constructor_asks_for(name: str) -> None:
    task = getattr(tasks, name)
    assert task().max_retries == 0
    assert task(max_retries=3, retry_delay=timedelta(seconds=1)).max_retries == 3


# --------------------------------------------------------------------------------------- the logs


def test_the_end_of_the_output_is_returned(fake: FakeDocker) -> None:
    fake.end = [frame(1, b"%d\n" % number) for number in range(10_001)]
    note, *found = logs(fake).splitlines()
    assert note.startswith("[cut: the last ")
    assert found == [str(number) for number in range(1, 10_001)]


def test_a_tail_of_ones_own_is_what_is_returned(fake: FakeDocker) -> None:
    fake.end = [frame(1, b"%d\n" % number) for number in range(15_000)]
    assert logs(fake, tail="all").splitlines() == [str(number) for number in range(15_000)]
    [asked] = fake.asked("GET /containers/logs")
    assert asked["tail"] == "all"


def test_options_of_the_logs_are_converted_as_by_the_sdk(fake: FakeDocker) -> None:
    since = datetime(2026, 1, 2, 3, 4, 5)
    logs(fake, since=since, until=1_800_000_000.5, stderr=False, timestamps=True, follow=True)
    [asked] = fake.asked("GET /containers/logs")
    assert (asked["since"], asked["until"]) == ("1767323045", "1800000000.5")
    assert (asked["stdout"], asked["stderr"], asked["timestamps"]) == ("1", "0", "1")
    assert asked["follow"] == "0", "it would wait for the container"


@pytest.mark.parametrize("options", [{"since": "yesterday"}, {"no_such": 1}], ids=str)
def test_options_that_the_logs_do_not_have_are_a_failure(
    fake: FakeDocker, options: dict[str, Any]
) -> None:
    with pytest.raises(signals.FAIL, match=r"^Getting the logs: .*(since|no_such)"):
        logs(fake, **options)


@pytest.mark.parametrize("text", ["x", "ж", "\U0001f40b", '"', "\0"], ids=ascii)
@pytest.mark.parametrize("length", [80, 2_000_000], ids=["lines", "one line"])
def test_what_is_returned_fits_into_a_state(fake: FakeDocker, text: str, length: int) -> None:
    """Prefect Server refuses a state of more than 1,000,000 bytes of JSON."""
    line = f"{text * length}\n".encode()
    fake.end = [frame(1, line) * (2_000_000 // len(line) + 1)]
    task = GetContainerLogs(ID, fake.url, {"tail": "all"}, result=PrefectResult())
    with set_temporary_config({"flows.checkpointing": True}):
        state = TaskRunner(task).run()
    assert state.is_successful()
    assert state.result.startswith("[cut: the last ")
    size = len(json.dumps(state.serialize()))
    assert size <= 1_000_000
    assert size > 900_000 or length > 80, "it is as much as fits"
