"""Text for messages and logs."""

from __future__ import annotations


def without_nul(text: str) -> str:
    """A text that PostgreSQL takes: Prefect keeps logs and states there, and PostgreSQL refuses NUL."""
    return text.replace("\0", "\ufffd")


def abbreviated(text: str, length: int = 80) -> str:
    """A text that is short enough for a message: its start and its end, without NUL."""
    text, half = without_nul(text), length // 2
    return text if len(text) <= length else f"{text[:half]}… ({len(text):,} characters) …{text[-half:]}"
