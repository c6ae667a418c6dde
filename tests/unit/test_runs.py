"""A process and its run: who is expected to have it, and what a forked child leaves alone."""

import os
from collections.abc import Iterator
from unittest.mock import MagicMock

import prefect
import pytest
from prefect.engine import signals
from prefect.engine.state import Cancelled, Cancelling, Pending, Success

from flows import runs


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[runs.Run]:
    monkeypatch.setattr(runs, "_current", None)
    with prefect.context(running_with_backend=True, logger=MagicMock()):
        found = runs.begin("a run", set())
        found.is_taken = True
        yield found
        found.is_taken = False


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    made = MagicMock()
    monkeypatch.setattr(runs, "RunClient", MagicMock(return_value=made))
    return made


def test_a_process_that_has_just_taken_a_run_does_not_ask(run: runs.Run, client: MagicMock) -> None:
    runs.end_if_taken()
    assert not client.get_flow_run_state.called


def test_a_process_whose_pull_is_retried_asks_before_it_starts_a_container(
    run: runs.Run, client: MagicMock
) -> None:
    runs.expect_others()
    client.get_flow_run_state.return_value = run.claim
    runs.end_if_taken()
    client.get_flow_run_state.return_value = runs.new_claim()
    with pytest.raises(SystemExit):
        runs.end_if_taken()


def test_a_process_that_is_interrupted_too_late_for_prefects_runner_reports_the_cancel(
    run: runs.Run, client: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs.Run, "_end", MagicMock())  # the thread that ends a process
    client.get_flow_run_state.return_value = Cancelling("by hand")
    client.graphql.return_value.data.task_run = []
    run.end_early(Cancelled("by hand"))
    run.at_exit()
    [call] = client.set_flow_run_state.call_args_list
    assert call.args == (run.id, Cancelled("by hand"))


def test_a_process_whose_run_has_come_to_its_end_reports_no_other_one(
    run: runs.Run, client: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs.Run, "_end", MagicMock())
    client.get_flow_run_state.return_value = Success("done")
    run.end_early(Cancelled("by hand"))
    run.at_exit()
    assert not client.set_flow_run_state.called


def test_an_api_that_does_not_answer_is_named(run: runs.Run, client: MagicMock) -> None:
    runs.expect_others()
    client.get_flow_run_state.side_effect = ConnectionError("refused")
    with pytest.raises(signals.FAIL, match=r"Prefect's API does not say .*refused"):
        runs.end_if_taken()


def test_a_forked_child_does_not_have_the_run(run: runs.Run) -> None:
    child = os.fork()
    if child == 0:
        os._exit(int(run.is_taken))
    assert os.waitpid(child, 0)[1] == 0
    assert run.is_taken


def test_a_task_without_a_state_is_pending() -> None:
    assert isinstance(runs.state_of(None), Pending)
