"""Three floors: tests import scripts, scripts import flows, and no import goes in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from flows.settings import PROJECT

FLOORS = ("flows", "scripts", "tests")  # from the ground up
MODULES: dict[str, Path] = {}
for floor in FLOORS:
    for path in PROJECT.glob(f"{floor}/**/*.py"):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        MODULES[".".join(parts)] = path


def imported_by(path: Path) -> set[str]:
    """The modules of this project that a file imports, also inside of a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & set(MODULES)


IMPORTS = {name: imported_by(path) for name, path in MODULES.items()}


def floor_of(module: str) -> int:
    return FLOORS.index(module.partition(".")[0])


def test_no_module_imports_from_a_floor_above() -> None:
    for module, imported in IMPORTS.items():
        above = [name for name in imported if floor_of(name) > floor_of(module)]
        assert above == [], f"{module} imports them"


def test_no_imports_go_in_a_circle() -> None:
    TopologicalSorter(IMPORTS).prepare()
