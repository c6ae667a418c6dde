"""deploy/ as an admin has it: a copy of the folder, with a test's own settings and components."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from flows.settings import PROJECT


def copy_of_deploy(folder: Path, settings: Mapping[str, str], *components: str) -> Path:
    """Copy deploy/ into a folder, change settings.yaml, and choose components.

    `kubectl apply -k deploy` then works in that folder.
    """
    for name in ("deploy", "job_templates"):
        shutil.copytree(PROJECT / name, folder / name)
    change_settings(folder / "deploy" / "settings.yaml", settings)
    choose_components(folder / "deploy" / "kustomization.yaml", components)
    return folder


def change_settings(path: Path, settings: Mapping[str, str]) -> None:
    text = path.read_text()
    for name, value in settings.items():
        line = re.compile(rf"^  {name}: .*$", re.MULTILINE)
        assert line.search(text), f"{name} is no setting"
        text = line.sub(f"  {name}: {value}", text)
    path.write_text(text)


def choose_components(path: Path, components: tuple[str, ...]) -> None:
    """Take away the `#` before a component, as an admin does."""
    text = path.read_text()
    for name in components:
        line = f"# - components/{name} "
        assert line in text, f"{name} is no component"
        text = text.replace(line, f"- components/{name} ")
    path.write_text(text)
