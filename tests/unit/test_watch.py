"""A running container on a fake of Docker: its stream taken apart, and its progress bars."""

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from flows.tasks import WaitOnContainer
from flows.watch import ATTACH_SECONDS, frames
from tests.support.fake_docker import ID, FakeDocker, frame
from tests.support.waiting import wait_for

STREAM = (
    frame(1, b"out\n")
    + frame(2, b"")
    + frame(2, b"err\n")
    + frame(1, b"\0\1")
    + frame(0, b"x")
    + frame(2, b"")
)
PARTS = [(1, b"out\n"), (2, b""), (2, b"err\n"), (1, b"\0\1"), (1, b"x"), (2, b"")]


def test_frames_are_found_wherever_the_stream_is_cut() -> None:
    for first, second in itertools.combinations_with_replacement(range(len(STREAM) + 1), 2):
        chunks = [STREAM[:first], STREAM[first:second], STREAM[second:]]
        assert list(frames(chunks)) == PARTS


def test_frames_come_when_they_are_whole() -> None:
    chunks = iter([STREAM[:12], STREAM[12:]])
    assert next(frames(chunks)) == PARTS[0]
    assert next(chunks) == STREAM[12:], "it has not been read"
    assert list(frames([STREAM[:-1]])) == PARTS[:-1], "the stream breaks off"


# ----------------------------------------------------------------------------------- progress bars


@pytest.fixture
def bars(fake: FakeDocker, monkeypatch: pytest.MonkeyPatch) -> FakeDocker:
    """A container that runs until it has been attached to for a while."""
    monkeypatch.setattr("flows.watch.BAR_SECONDS", 0.1)
    fake.exited.clear()
    return fake


def attached(fake: FakeDocker) -> int:
    return len(fake.asked("POST /containers/attach"))


def run(fake: FakeDocker, *output: Any) -> None:
    fake.streams = [[*output, fake.exited.set]]
    WaitOnContainer(docker_server_url=fake.url).run(container_id=ID)


def watchers() -> list[str]:
    """The threads that watch a container. Those of the fake answer a request each."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if "(_look)" in name or "(_wait)" in name or "(_read)" in name]


def connections(fake: FakeDocker) -> int:
    gc.collect()  # a client closes its connections when it goes
    found = psutil.Process().net_connections("tcp")
    ours = [each for each in found if each.raddr and each.raddr.port == fake.server_port]
    return len([each for each in ours if each.status == psutil.CONN_ESTABLISHED])


def test_a_bar_is_shown_while_its_line_has_not_ended(
    bars: FakeDocker, caplog: pytest.LogCaptureFixture
) -> None:
    """Docker's logs have nothing of it yet."""
    bars.attached = [frame(2, b"\r 1%\r 10%"), frame(1, b"no bar"), bars.exited.wait]
    shown = lambda: wait_for(lambda: " 10%" in caplog.messages, "it is shown")  # noqa: E731
    some_looks_later = lambda: bars.closing.wait(0.5)  # noqa: E731
    run(bars, shown, some_looks_later)
    assert [message for message in caplog.messages if "%" in message] == [" 10%"]
    assert "no bar" not in caplog.messages


def test_a_bar_is_shown_again_when_it_has_changed(
    bars: FakeDocker, caplog: pytest.LogCaptureFixture
) -> None:
    def shown(state: str) -> Any:
        return lambda: wait_for(lambda: state in caplog.messages, f"{state} is shown")

    bars.attached = [frame(2, b"\r10%"), shown("10%"), frame(2, b"\r20%"), bars.exited.wait]
    run(bars, shown("20%"))
    assert [message for message in caplog.messages if "%" in message] == ["10%", "20%"]


def test_fast_output_is_not_read_twice(bars: FakeDocker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.watch.SLOW_BYTES", 0)  # so that any output is fast
    run(bars, lambda: bars.closing.wait(0.5))
    assert attached(bars) == 0


def test_output_that_becomes_fast_is_read_once(
    bars: FakeDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_on() -> Iterator[bytes]:
        while not bars.closing.wait(0.01):
            yield frame(1, b"x" * 1000)

    def become_fast() -> None:
        wait_for(lambda: attached(bars), "it is attached to")
        monkeypatch.setattr("flows.watch.SLOW_BYTES", 0)

    bars.attached = write_on()
    run(bars, become_fast, lambda: wait_for(bars.detached.is_set, "the second stream is closed"))


@pytest.mark.parametrize("answer", ["never", "head", "output", "end"])
def test_no_thread_and_no_connection_outlives_the_container(bars: FakeDocker, answer: str) -> None:
    """Whatever the daemon answers to an attach, and whether it ends it or not."""
    answers: dict[str, Any] = {
        "never": None,
        "head": [bars.closing.wait],
        "output": [frame(1, b"out"), bars.closing.wait],
        "end": [],
    }
    bars.attached = answers[answer]
    before = connections(bars)
    for number in range(3):
        bars.exited.clear()
        run(bars, lambda: wait_for(lambda: attached(bars) > number, "it is attached to"))  # noqa: B023
    wait_for(lambda: watchers() == [], "the threads have ended", watchers, timeout=1)
    wait_for(lambda: connections(bars) == before, "connections are closed", timeout=1)


def test_a_stream_that_does_not_end_is_closed(
    fake: FakeDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.watch.OUTPUT_GRACE_SECONDS", 0.1)
    before = connections(fake)
    run(fake, frame(1, b"out\n"), fake.exited.set, fake.closing.wait)
    wait_for(lambda: watchers() == [], "the threads have ended", watchers, timeout=1)
    wait_for(lambda: connections(fake) == before, "connections are closed", timeout=1)


def test_a_daemon_that_does_not_answer_an_attach_holds_nothing_up(bars: FakeDocker) -> None:
    bars.attached = None
    started = time.monotonic()
    run(bars, lambda: wait_for(lambda: attached(bars), "it is attached to"))
    assert time.monotonic() - started < ATTACH_SECONDS + 1
