"""Build backend that builds nothing: the flow's image is built from this folder, so a wheel would be of no use."""

from typing import Any


def build_wheel(*_: Any) -> str:
    """Refuse, with what to do."""
    raise SystemExit("This project is used from its folder: clone it and run `make`. See docs/own-flow.md to reuse it.")


build_sdist = build_editable = build_wheel
