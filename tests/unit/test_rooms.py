"""The picture that docs/design.md opens with, against the imports: each arrow leads downwards, and none is missing."""

from __future__ import annotations

import ast
import itertools
import re

from flows.settings import PROJECT

Arrows = set[tuple[str, str]]


def room(module: str) -> str | None:
    """The room that a module is in: `tasks` of flows.tasks, `airgap` of scripts.airgap.images; None if not ours."""
    folder, *names = module.split(".")
    if folder not in ("flows", "scripts") or not names:
        return None
    path = PROJECT / folder / names[0]
    return f"{folder}/{names[0]}" if path.is_dir() or path.with_suffix(".py").is_file() else None


def imports() -> Arrows:
    """From room to room, also where the import is inside a function."""
    found = set()
    for path in [*PROJECT.glob("flows/**/*.py"), *PROJECT.glob("scripts/**/*.py")]:
        here = room(".".join(path.relative_to(PROJECT).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            modules = [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else names
            found |= {(here, there) for there in map(room, modules) if here and there and there != here}
    return found


def drawn() -> Arrows:
    """The arrows of the first Mermaid block, by the names of the boxes."""
    block = (PROJECT / "docs" / "design.md").read_text(encoding="utf-8").partition("```mermaid")[2].partition("```")[0]
    chains = [re.split(r"\s*-->\s*", re.sub(r'\[".*?"\]', "", line.strip())) for line in block.splitlines()]
    return set(itertools.chain(*map(itertools.pairwise, chains)))


def reachable(arrows: Arrows) -> Arrows:
    """All pairs that a walk along the arrows connects."""
    found = set(arrows)
    while more := {(a, d) for a, b in found for c, d in found if b == c} - found:
        found |= more
    return found


def test_there_is_no_circle() -> None:
    assert [a for a, b in reachable(imports()) if a == b] == []


def test_the_picture_shows_the_imports() -> None:
    """An arrow stands for every import that a walk along the arrows can do without: `a --> c` if a --> b --> c."""
    all_imports = reachable(imports())
    inside = {(a, b) for a, b in all_imports if a.split("/")[0] == b.split("/")[0]}
    needed = {(a, b) for a, b in inside if not any((a, c) in inside and (c, b) in inside for _, c in inside)}
    names = {(a.split("/")[1], b.split("/")[1]) for a, b in needed}
    assert drawn() - {("tests", "scripts"), ("scripts", "flows")} == names


def test_folders() -> None:
    """Nothing in flows/ imports scripts/, and nothing there imports tests/."""
    assert {("tests", "scripts"), ("scripts", "flows")} <= drawn()
    folders = {(a.split("/")[0], b.split("/")[0]) for a, b in imports()}
    assert {pair for pair in folders if pair[0] != pair[1]} == {("scripts", "flows")}
    for path in [*PROJECT.glob("flows/**/*.py"), *PROJECT.glob("scripts/**/*.py")]:
        assert not re.search(r"^\s*(from|import) tests\b", path.read_text(encoding="utf-8"), re.MULTILINE), path
