"""What a task has logged, from pytest's capture."""

import logging

import pytest


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    """The messages of a level and above."""
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def warning(caplog: pytest.LogCaptureFixture) -> str:
    """The only warning."""
    [warned] = lines(caplog, logging.WARNING)
    return warned
