"""Docker's stream taken apart, and a bound on what a run's logs get of it."""

from __future__ import annotations

import struct
import tracemalloc

import pytest

from flows.output import HEAD_BYTES, HEAD_LINES, LINE_BYTES, TAIL_BYTES, TAIL_LINES, Batch, frames


def frame(stream: int, data: bytes) -> bytes:
    return struct.pack(">BxxxL", stream, len(data)) + data


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


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_long_line_is_broken_and_loses_nothing(end: bytes) -> None:
    data = bytes(range(ord("a"), ord("z"))) * (3 * LINE_BYTES // 25)
    ((_, text),) = take((OUT, data + end))
    assert max(len(line) for line in text.split("\n")) == LINE_BYTES
    assert text.replace("\n", "") == data.decode()


@pytest.mark.parametrize("more", [0, 1, 100_000])
def test_the_middle_is_dropped_and_counted(more: int) -> None:
    lines = [f"line {number}" for number in range(HEAD_LINES + TAIL_LINES + more)]
    ((_, text),) = take((OUT, "\n".join(lines).encode()))
    note = [f"[{more:,} lines dropped here: too many for the run's logs]"] if more else []
    assert text.split("\n") == lines[:HEAD_LINES] + note + lines[-TAIL_LINES:]


def test_the_next_batch_is_whole_again() -> None:
    batch = Batch()
    batch.add(OUT, b"x\n" * 9999)
    assert "dropped" in batch.take()[0][1]
    batch.add(OUT, b"a\nb\n")
    assert batch.take() == [(OUT, "a\nb")]


@pytest.mark.parametrize("length", [0, 10, 1000, LINE_BYTES, 2 * TAIL_BYTES])
def test_however_much_comes_memory_and_text_are_bounded(length: int) -> None:
    bound = HEAD_BYTES + TAIL_BYTES + 2 * LINE_BYTES
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
    assert used < bound + (HEAD_LINES + TAIL_LINES) * 200  # of Python's own for each line
    texts = batch.take(last=True)
    assert sum(len(text) for _, text in texts) < bound + HEAD_LINES + TAIL_LINES
    assert texts[0] == (OUT, "first")
    assert texts[-1][0] == OUT
    assert texts[-1][1].endswith("last")


def test_row_04_the_newest_state_of_a_progress_bar() -> None:
    batch = Batch()
    batch.add(ERR, b"\r0%\r1%\r2")
    batch.add(ERR, b"%\r")
    assert batch.take() == []
    assert batch.take(progress=True) == [(ERR, "2%")]
    assert batch.take(progress=True) == [], "the same state again"
    batch.add(ERR, b"3%\r4%\n")
    assert batch.take() == [(ERR, "4%")], "a whole line"
    batch.add(ERR, b"\r5%")
    assert batch.take(progress=True) == [(ERR, "5%")]
    batch.add(ERR, b"\nend")
    assert batch.take(progress=True) == [], "a state that was shown, and a line without an end that is no progress bar"
    assert batch.take(last=True) == [(ERR, "end")]


def test_row_04_a_progress_bar_takes_no_memory() -> None:
    batch = Batch()
    tracemalloc.start()
    try:
        for number in range(5000):
            batch.add(ERR, b"\r%08d" % number * 10)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 10_000
    assert batch.take(last=True) == [(ERR, "00004999")]


@pytest.mark.parametrize("text", ["日本語" * 6000, "é" * 100_001, "a" + "€" * 50_000, "a" + "\U0001f40b" * 40_000])
@pytest.mark.parametrize("step", [1 << 14, 1 << 20])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_row_13_no_character_is_cut(text: str, step: int, end: bytes) -> None:
    data = text.encode() + end
    ((_, taken),) = take(*((OUT, data[start : start + step]) for start in range(0, len(data), step)))
    assert taken.replace("\n", "") == text
    assert max(len(line.encode()) for line in taken.split("\n")) <= LINE_BYTES
