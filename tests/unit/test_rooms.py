"""The picture that docs/design.md opens with, against the imports: each arrow leads downwards, and none is missing."""

import ast
import itertools
import re
from pathlib import Path

from flows.settings import PROJECT

# Each file's room: ("flows", "tasks") of flows/tasks.py, ("scripts", "airgap") of scripts/airgap/images.py.
PATHS = [path for folder in ("flows", "scripts") for path in PROJECT.glob(f"{folder}/**/*.py")]
ROOMS = {path: path.relative_to(PROJECT).with_suffix("").parts[:2] for path in PATHS}


def imports(path: Path) -> set[tuple[str, ...]]:
    """The rooms that a file imports, also inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found |= {tuple(f"{module}{alias.name}".split(".")[:2]) for alias in node.names}
    return {there for there in found if there in ROOMS.values() or there[0] == "tests"} - {
        ROOMS[path]
    }


def drawn() -> set[tuple[str, str]]:
    """The arrows of the first Mermaid block, by the names of the boxes."""
    block = (
        (PROJECT / "docs" / "design.md")
        .read_text(encoding="utf-8")
        .partition("```mermaid")[2]
        .partition("```")[0]
    )
    chains = [
        re.split(r"\s*-->\s*", re.sub(r'\[".*?"\]', "", line.strip()))
        for line in block.splitlines()
    ]
    return set(itertools.chain(*map(itertools.pairwise, chains)))


def test_the_picture_shows_the_imports() -> None:
    """An arrow stands for every import that a walk along the arrows can do without: `a --> c` if a --> b --> c."""
    walks = {(here, there) for path, here in ROOMS.items() for there in imports(path)}
    assert {(a[0], b[0]) for a, b in walks} == {
        ("flows", "flows"),
        ("scripts", "scripts"),
        ("scripts", "flows"),
    }
    while longer := {(a, d) for a, b in walks for c, d in walks if b == c} - walks:
        walks |= longer
    assert [a for a, b in walks if a == b] == [], "there is no circle"
    needed = {
        (a, b) for a, b in walks if not any((a, c) in walks and (c, b) in walks for _, c in walks)
    }
    inside = {(a[1], b[1]) for a, b in needed if a[0] == b[0]}
    assert drawn() == {("tests", "scripts"), ("scripts", "flows")} | inside
