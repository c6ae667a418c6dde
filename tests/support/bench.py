"""What the benchmarks share: measuring in turn, and docs/benchmarks.md, which they write.

Figures that are compared are measured in turn, in one run. So a slow moment of the machine meets
all of them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TypeVar

from flows.settings import PROJECT
from scripts.base import CACHE

Result = TypeVar("Result")
Target = tuple[str, float, float, str]  # what, at most how much, how much, unit
PAGE = PROJECT / "docs" / "benchmarks.md"
SECTIONS = CACHE / "benchmarks.json"
ENGINE = "On your engine"
CLUSTER = "On a cluster"
COLD = "The first pull of an image"
MANY = "Many runs at once, on one node"
OUTPUT = "A container that writes a lot"
ORDER = (ENGINE, CLUSTER, COLD, MANY, OUTPUT)  # on the page
HEAD = """# Benchmarks

What a run costs, as `make bench` measured it on one machine, in one run: first in short, then
medians with the range.

On the cluster there is one clock: seconds since Kubernetes created the Job. Before that, the Agent
looks for runs every 0.25 to 10 s. That is the same for all templates, and not counted."""


def in_turn(rounds: int, measure: Mapping[str, Callable[[], Result]]) -> dict[str, list[Result]]:
    """Call each function once a round, and return what each returned.

    Every second round has the opposite order.
    """
    found: dict[str, list[Result]] = {name: [] for name in measure}
    for number in range(rounds):
        names = list(measure)
        if number % 2:
            names.reverse()
        for name in names:
            found[name].append(measure[name]())
    return found


def spread(values: list[float]) -> str:
    """The median and the range; nothing of nothing."""
    if not values:
        return ""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(*rows: list[str]) -> list[str]:
    """A table in Markdown, with an empty line before and after it; the first row is its head."""
    head, *body = rows
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    return ["", *lines, ""]


def publish(title: str, targets: Sequence[Target], *lines: str) -> None:
    """Write a section of docs/benchmarks.md, and its targets."""
    sections = json.loads(SECTIONS.read_text()) if SECTIONS.exists() else {}
    sections[title] = targets, lines
    SECTIONS.write_text(json.dumps(sections))
    rows = [["", "measured", "target", ""]]
    text: list[str] = []
    for name in ORDER:
        if name in sections:
            targets, lines = sections[name]
            rows += [verdict(*target) for target in targets]
            text += [f"## {name}", "", *lines, ""]
    page = "\n".join([HEAD, *table(*rows), *text])
    PAGE.write_text(page.replace("\n\n\n", "\n\n").rstrip() + "\n", encoding="utf-8")


def verdict(what: str, limit: float, value: float, unit: str) -> list[str]:
    """A row of the table of targets."""
    mark = "met" if value <= limit else "**missed**"
    return [what, f"{value:.2f} {unit}", f"at most {limit:g} {unit}", mark]
