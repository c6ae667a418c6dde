"""Words of messages: short, and without a value that may be a secret."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any


def abbreviated(text: str, length: int = 80) -> str:
    """A text that is short enough for a message: its start and its end.

    NUL is replaced, because PostgreSQL, as Prefect's store, refuses it.
    """
    text = text.replace("\0", "\ufffd")
    if len(text) <= length:
        return text
    half = length // 2
    return f"{text[:half]}… ({len(text):,} characters) …{text[-half:]}"


def without_passwords(text: str) -> str:
    """A text without the user and the password that an address in it may hold."""
    return re.sub(r"//[^\s/@]+@", "//…@", text)


def kind(value: Any) -> str:
    """What a value is, in words that fit JSON, ``prefect run --param`` and Prefect's UI."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"of type {type(value).__name__}"


def plain(name: str) -> str:
    """A name without what differs between spellings: read_only and ReadOnly are the same."""
    return name.replace("_", "").replace("-", "").casefold()


def nearest(name: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown name: the nearest one, or all if none is near."""
    spellings = {plain(each): each for each in known}
    found = difflib.get_close_matches(plain(name), spellings, n=1)
    if found:
        return f"did you mean {spellings[found[0]]}?"
    return f"known: {', '.join(spellings.values())}"
