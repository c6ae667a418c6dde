"""Three floors: tests import scripts, scripts import flows, and no import goes in a circle."""

import ast
import itertools
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from flows.settings import PROJECT
from tests.support import pages

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


Graph = dict[str, set[str]]


def reached(graph: Graph, start: str) -> set[str]:
    """What a node leads to, by whatever path."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - found
        found |= new
        waiting.extend(new)
    return found


def drawn(floor: str) -> Graph:
    """The arrows of the picture in docs/design.md, within one of its boxes."""
    [picture] = [block.text for block in pages.blocks() if f"subgraph {floor}" in block.text]
    box = picture.partition(f"subgraph {floor}\n")[2].partition("\n    end")[0]
    arrows: Graph = {}
    for line in box.splitlines():
        nodes = re.sub(r'\[".*?"\]', "", line).split("-->")
        for node, next_node in itertools.pairwise(nodes):
            arrows.setdefault(node.strip(), set()).add(next_node.strip())
    return arrows


def node_of(module: str) -> str:
    """How the picture calls a module: all checks are one node."""
    if ".checks." in module:
        return "checks"
    return module.rpartition(".")[2]


@pytest.mark.parametrize("floor", ["flows", "scripts"])
def test_the_picture_shows_the_imports(floor: str) -> None:
    imports: Graph = {}
    for module, imported in IMPORTS.items():
        if module.startswith(f"{floor}.") and not module.endswith("__init__"):
            within = {node_of(each) for each in imported if each.startswith(f"{floor}.")}
            imports.setdefault(node_of(module), set()).update(within - {node_of(module)})
    arrows = drawn(floor)
    assert {*arrows, *itertools.chain(*arrows.values())} == set(imports)
    for node in imports:
        assert reached(arrows, node) == reached(imports, node), node
