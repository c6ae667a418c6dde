"""Docker's stream taken apart, and a bound on what a run's logs get of it."""

from __future__ import annotations

import tracemalloc

import pytest

from flows.output import HEAD, LINE_COST, LINE_LENGTH, TAIL, Batch, frames
from tests.support.fake_docker import frame

STREAM = frame(1, b"out\n") + frame(2, b"") + frame(2, b"err\n") + frame(1, b"\0\1") + frame(0, b"x") + frame(2, b"")
PARTS = [(1, b"out\n"), (2, b""), (2, b"err\n"), (1, b"\0\1"), (1, b"x"), (2, b"")]


@pytest.mark.parametrize("first", range(len(STREAM) + 1))
def test_frames_are_found_wherever_the_stream_is_cut(first: int) -> None:
    for second in range(first, len(STREAM) + 1):
        chunks = [STREAM[:first], STREAM[first:second], STREAM[second:]]
        assert list(frames(chunks, tty=False)) == PARTS


def test_frames_are_found_in_single_bytes_and_as_soon_as_they_are_whole() -> None:
    read = []
    chunks = (read.append(byte) or bytes([byte]) for byte in STREAM)  # type: ignore[func-returns-value]
    parts = frames(chunks, tty=False)
    assert next(parts) == PARTS[0]
    assert len(read) == len(frame(1, b"out\n"))
    assert list(parts) == PARTS[1:]


def test_a_stream_that_breaks_off_gives_its_whole_frames() -> None:
    assert list(frames([STREAM[:-1]], tty=False)) == PARTS[:-1]
    assert list(frames([], tty=False)) == []


def test_a_tty_has_no_frames() -> None:
    chunks = [STREAM[:5], STREAM[5:]]
    assert list(frames(chunks, tty=True)) == [(1, chunk) for chunk in chunks]


def take(*data: tuple[int, bytes]) -> list[tuple[int, str]]:
    batch = Batch()
    for stream, piece in data:
        batch.add(stream, piece)
    return batch.take(last=True)


OUT, ERR = 1, 2


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ([], []),
        ([(OUT, b"")], []),
        ([(OUT, b"a\nb\n")], [(OUT, "a\nb")]),
        ([(OUT, b"\na\n\n")], [(OUT, "\na\n")]),
        ([(OUT, b"a"), (OUT, b"b\nc"), (OUT, b"d")], [(OUT, "ab\ncd")]),
        ([(OUT, b"a\r\nb\r"), (OUT, b"\nc\rd\r\n")], [(OUT, "a\nb\nd")]),
        ([(OUT, b"a\n"), (ERR, b"b\n"), (ERR, b"c\n"), (OUT, b"d\n")], [(OUT, "a"), (ERR, "b\nc"), (OUT, "d")]),
        ([(OUT, b"a"), (ERR, b"b\n"), (OUT, b"c\n")], [(ERR, "b"), (OUT, "ac")]),  # in the order of their ends
        ([(OUT, b"\xe2\x82"), (OUT, b"\xac\n")], [(OUT, "€")]),
        ([(OUT, b"\xff\xe2\x82\n")], [(OUT, "\ufffd\ufffd")]),
        ([(OUT, b"a\0b\n")], [(OUT, "a\ufffdb")]),
    ],
)
def test_texts(data: list[tuple[int, bytes]], texts: list[tuple[int, str]]) -> None:
    assert take(*data) == texts


def test_a_line_is_taken_once_and_when_it_is_whole() -> None:
    batch = Batch()
    batch.add(OUT, b"a\nb")
    assert batch.take() == [(OUT, "a")]
    assert batch.take() == []
    batch.add(OUT, b"c\nd")
    assert batch.take() == [(OUT, "bc")]
    assert batch.take(last=True) == [(OUT, "d")]
    assert batch.take(last=True) == []


@pytest.mark.parametrize("more", [0, 1, 100_000])
def test_the_middle_is_dropped_and_counted(more: int) -> None:
    size = LINE_COST + len("line 123456")
    first, last = -(-HEAD // size), TAIL // size
    lines = [f"line {number:06}" for number in range(first + last + more)]
    ((_, text),) = take((OUT, "\n".join(lines).encode()))
    note = [f"[{more:,} lines dropped here: too many for the run's logs]"] if more else []
    assert text.split("\n") == lines[:first] + note + lines[-last:]


def test_the_next_batch_is_whole_again() -> None:
    batch = Batch()
    batch.add(OUT, b"x\n" * 9999)
    assert "dropped" in batch.take()[0][1]
    batch.add(OUT, b"a\nb\n")
    assert batch.take() == [(OUT, "a\nb")]


@pytest.mark.parametrize("length", [0, 1000, LINE_LENGTH, 2 * TAIL])
def test_however_much_comes_memory_and_text_are_bounded(length: int) -> None:
    bound = HEAD + TAIL + 2 * LINE_LENGTH
    batch = Batch()
    batch.add(OUT, b"first\n")
    line = b"x" * length + b"\n"
    tracemalloc.start()
    try:
        for _ in range(min(20_000, 10 * bound // len(line))):
            batch.add(ERR, line)
        batch.add(OUT, b"x" * length + b"last\n")
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 2 * bound
    texts = batch.take(last=True)
    assert sum(len(text) for _, text in texts) < bound
    assert texts[0] == (OUT, "first")
    assert texts[-1][0] == OUT
    assert texts[-1][1].endswith("last")


def test_row_04_old_states_of_a_progress_bar_take_no_memory() -> None:
    batch = Batch()
    tracemalloc.start()
    try:
        for number in range(5000):
            batch.add(ERR, b"\r%08d" % number * 10)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 10_000
    assert batch.take() == []
    assert batch.take(last=True) == [(ERR, "00004999")]


@pytest.mark.parametrize("text", ["日本語" * 6000, "é" * 100_001, "a" + "\U0001f40b" * 40_000, "abc" * LINE_LENGTH])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_row_13_a_long_line_loses_nothing(text: str, end: bytes) -> None:
    data, step = text.encode() + end, 1 << 14
    ((_, taken),) = take(*((OUT, data[start : start + step]) for start in range(0, len(data), step)))
    assert taken.replace("\n", "") == text
    assert max(len(line) for line in taken.split("\n")) <= LINE_LENGTH
