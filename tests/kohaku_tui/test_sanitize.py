"""Whatever a task writes, only text, newlines, tabs and colours reach the terminal."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohaku_tui.sanitize import OutputCleaner, clean_block, clean_line

SGR = re.compile(r"\x1b\[[0-9;:]*m")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

#: Pieces that make sequences likely, among any other text.
LIKELY = (
    "\x1b", "\x1b[", "\x9b", "\x1b]", "\x9d", "\x1bP", "\x1b\\", "\x9c", "\x07", "\x18",
    "\r", "\n", "\t", " ", ";", "0", "31", "m", "?", "h", "52", "(", "\\", "]", "[", "é", "界",
)  # fmt: skip
pieces = st.one_of(st.sampled_from(LIKELY), st.text(max_size=4))
hostile = st.lists(pieces, max_size=30).map("".join)


def clean(*chunks: bytes) -> str:
    cleaner = OutputCleaner()
    return "".join([*map(cleaner.feed, chunks), cleaner.finish()])


@given(hostile)
def test_nothing_but_colours_can_drive_the_terminal(text: str) -> None:
    shown = clean(text.encode("utf-8", "replace"))
    assert not CONTROL.search(SGR.sub("", shown))


@given(st.binary(max_size=200))
def test_no_bytes_at_all_can_drive_the_terminal(data: bytes) -> None:
    assert not CONTROL.search(SGR.sub("", clean(data)))


@given(hostile, st.data())
def test_where_the_chunks_are_cut_changes_nothing(text: str, data: st.DataObject) -> None:
    raw = text.encode("utf-8", "replace")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    bounds = [0, *cuts, len(raw)]
    chunks = [raw[a:b] for a, b in pairwise(bounds)]
    assert clean(*chunks) == clean(raw)


@given(hostile)
def test_clean_text_stays_as_it_is(text: str) -> None:
    once = clean(text.encode("utf-8", "replace"))
    assert clean(once.encode()) == once


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"])))
def test_text_without_controls_is_not_touched(text: str) -> None:
    assert clean(text.encode()) == text


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"\x1b]0;title\x07after", "after"),
        (b"\x1b]52;c;ZXZpbA==\x1b\\after", "after"),
        (b"\x1bP1;2qsixel\x1b\\after", "after"),
        (b"\x1b]never ends\nnext line", "\nnext line"),
        (b"\x1b[2J\x1b[Hpainted", "painted"),
        (b"\x1b[21t", ""),
        (b"\x1b[?1049hx", "x"),
        (b"\x1b[>4;2mx", "x"),
        (b"\x1b[1;31mred\x1b[0m", "\x1b[1;31mred\x1b[0m"),
        ("\x9b31mred".encode(), "\x1b[31mred\x1b[0m"),
        (b"\x9b31m", "\ufffd31m"),
        (b"\x1b(0line drawing", "line drawing"),
        (b"\x1bcreset", "reset"),
        (b"a\x08b\x7fc\x00d", "abcd"),
        (b"dos\r\nline", "dos\nline"),
        (b"10%\r20%\r30%\n", "10%\n20%\n30%\n"),
        (b"tab\tstays\n", "tab\tstays\n"),
        (b"\x1b[32mleft on", "\x1b[32mleft on\x1b[0m"),
        ("né 界".encode(), "né 界"),
        (b"ends in ESC \x1b", "ends in ESC "),
    ],
)
def test_what_stays(raw: bytes, shown: str) -> None:
    assert clean(raw) == shown


@given(hostile)
def test_a_line_is_one_line_of_plain_text(text: str) -> None:
    line = clean_line(text)
    assert not CONTROL.search(line)
    assert "\n" not in line
    assert "\t" not in line


def test_a_name_cannot_hide_or_reorder_its_neighbours() -> None:
    assert clean_line("safe\u202egpj.exe\u200b\ufeff") == "safegpj.exe"
    assert clean_line("two\nlines\tand \x1b[31mcolour") == "two lines and colour"


def test_a_message_keeps_its_lines_and_loses_its_colours() -> None:
    assert clean_block("one\n\x1b[1mtwo\x1b[0m\x1b]0;x\x07") == "one\ntwo"
