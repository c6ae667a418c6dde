"""The parameters that stand on make's command line, as in `make run IMAGE=alpine:3`.

The Makefile hands them on in one variable, GIVEN, as make writes them for a make that it starts:
blanks and backslashes have a backslash before them, and `$` is doubled. So `$`, quotes and
newlines arrive as they were written. Variables of the environment do not count.
"""

import difflib
import os
import re
from collections.abc import Sequence

# A word of GIVEN: what ends at a blank that has no backslash before it.
_WORD = re.compile(r"(?:\\.|[^\\ \t])+", re.DOTALL)
_QUOTED = re.compile(r"\\(.)|\$(\$)", re.DOTALL)
SIMILAR = 0.4  # of 1: how much a name must be like another one to be suggested


class UnknownParameter(Exception):
    """A name on make's command line that the target does not know. The message has the nearest."""


def parameters(target: str, known: Sequence[str]) -> dict[str, str]:
    """The parameters on make's command line, by name.

    Args:
        target: the target of make, for the message.
        known: the names that the target takes.

    Raises:
        UnknownParameter: if there is another one. Otherwise the target would do something else.
    """
    found = {}
    for name, value in _variables(os.environ.get("GIVEN", "")).items():
        if name in os.environ:
            continue  # a setting, as JOB_TEMPLATE: make exports it
        if name not in known:
            raise UnknownParameter(_unknown(target, name, known))
        found[name] = value
    return found


def _variables(text: str) -> dict[str, str]:
    """The variables of what make calls MAKEOVERRIDES."""
    found = {}
    for word in _WORD.findall(text):
        name, _, value = _QUOTED.sub(r"\1\2", word).partition("=")
        found[name.removesuffix(":")] = value  # NAME:=VALUE is the same here
    return found


def _unknown(target: str, name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=SIMILAR)
    guess = f" Do you mean {nearest[0]}?" if nearest else ""
    return f"`make {target}` has no parameter {name}.{guess} It has {', '.join(known)}"
