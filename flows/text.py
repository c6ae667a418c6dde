"""Text for messages."""


def abbreviated(text: str, length: int = 80) -> str:
    """A text that is short enough for a message: its start and its end. PostgreSQL, as Prefect's store, refuses NUL."""
    text, half = text.replace("\0", "\ufffd"), length // 2
    return text if len(text) <= length else f"{text[:half]}… ({len(text):,} characters) …{text[-half:]}"
