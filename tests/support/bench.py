"""What the benchmarks share: measuring in turn, and docs/benchmarks.md, which they write.

Figures that are compared are measured in turn, in one run, so that a slow moment of the machine meets all of them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TypeVar

from flows.settings import PROJECT
from scripts.base import CACHE

T = TypeVar("T")
PAGE, SECTIONS = PROJECT / "docs" / "benchmarks.md", CACHE / "benchmarks.json"
ENGINE, CLUSTER, COLD, MANY, OUTPUT = (
    "On your engine",
    "On a cluster",
    "The first pull of an image",
    "Many runs at once, on one node",
    "A container that writes a lot",
)
ORDER = (ENGINE, CLUSTER, COLD, MANY, OUTPUT)  # on the page


def in_turn(rounds: int, measure: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Call each function once a round, in the opposite order every second round, and return what each returned."""
    found: dict[str, list[T]] = {name: [] for name in measure}
    for number in range(rounds):
        for name in list(measure)[:: -1 if number % 2 else 1]:
            found[name].append(measure[name]())
    return found


def spread(values: list[float]) -> str:
    """The median and the range."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "never"


def table(*rows: list[str]) -> list[str]:
    """A table in Markdown, with an empty line before and after it; the first row is its head."""
    return [
        "",
        *(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]),
        "",
    ]


def publish(title: str, targets: Sequence[tuple[str, float, float, str]], *lines: str) -> None:
    """Write a section of docs/benchmarks.md, and its targets: what, at most how much, how much, unit."""
    sections = json.loads(SECTIONS.read_text()) if SECTIONS.exists() else {}
    sections[title] = targets, lines
    SECTIONS.write_text(json.dumps(sections))
    rows, page = [["", "measured", "target", ""]], []
    for name in ORDER:
        targets, text = sections.get(name, ([], []))
        page += [f"## {name}", "", *text, ""] if text else []
        for what, limit, value, unit in targets:
            mark = "met" if value <= limit else "**missed**"
            rows.append([what, f"{value:.2f} {unit}", f"at most {limit:g} {unit}", mark])
    head = [
        "# Benchmarks",
        "",
        "What a run costs, as `make bench` measured it: first in short, then medians with the range.",
    ]
    PAGE.write_text(
        "\n".join([*head, *table(*rows), *page]).replace("\n\n\n", "\n\n").rstrip() + "\n",
        encoding="utf-8",
    )
