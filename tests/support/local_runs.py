"""Runs of the flow in this process, and what they were seen to do."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from prefect.engine.state import State


@dataclass
class Outcome:
    """A finished flow run: its state, and what it logged."""

    state: State
    records: list[logging.LogRecord]

    @property
    def tasks(self) -> dict[str, State]:
        """The state of each task, by its name."""
        return {task.name: state for task, state in self.state.result.items()}

    def output(self, level: str) -> str:
        """What the container wrote, from the run's logs: on stdout INFO, on stderr WARNING."""
        lines = []
        for record in self.records:
            message = record.getMessage()
            is_of_the_wait = record.name == "prefect.WaitOnContainer"
            is_of_the_task = message.startswith(("Container ", "Exited with code "))
            if is_of_the_wait and record.levelname == level and not is_of_the_task:
                lines.append(message)
        return "\n".join(lines)

    def naming(self, words: str) -> list[str]:
        """The log lines that name something."""
        messages = [record.getMessage() for record in self.records]
        return [message for message in messages if words in message]

    def warnings(self) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelname == "WARNING"]


# Runs the flow with parameters; see the fixture `flow_run`.
RunFlow = Callable[..., Outcome]
# Does something as soon as a run has logged a pattern; see the fixture `when_logged`.
WhenLogged = Callable[[str, Callable[[], object]], None]
