"""How rows are laid out when there is room, and when there is none."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kohaku_tui.cli.table import GAP, Cell, Column, lay_out, text_width

COLUMNS = (
    Column("ID"),
    Column("OWNER", yields=True, spare=2),
    Column("AGE", right=True, spare=1),
    Column("COMMAND", yields=True),
)
ROWS = [("1152921504606846976", "ada", "5m", "python train.py --epochs 100"), ("7", "-", "1h", "x")]


def draw(width: int | None) -> list[str]:
    return [GAP.join(cell.text for cell in line) for line in lay_out(COLUMNS, ROWS, width)]


def test_with_room_nothing_is_cut() -> None:
    assert draw(None) == draw(200) == [
        "ID                   OWNER  AGE  COMMAND                     ",
        "1152921504606846976  ada     5m  python train.py --epochs 100",
        "7                    -       1h  x                           ",
    ]  # fmt: skip


def test_the_widest_that_may_yield_is_cut_first() -> None:
    assert draw(50)[1] == "1152921504606846976  ada     5m  python train.py …"


def test_what_can_be_spared_goes_whole() -> None:
    assert draw(38) == [
        "ID                   AGE  COMMAND     ",
        "1152921504606846976   5m  python trai…",
        "7                     1h  x           ",
    ]
    assert draw(30)[1] == "1152921504606846976  python t…"


def test_what_has_nothing_to_say_goes_before_anything_is_cut() -> None:
    rows = [
        ("1152921504606846976", "-", "5m", "python train.py --epochs 100"),
        ("7", "-", "-", "-"),
    ]
    lines = lay_out(COLUMNS, rows, 56)
    assert [cell.text.strip() for cell in lines[0]] == ["ID", "AGE", "COMMAND"]
    assert lines[1][-1].text == "python train.py --epochs 100"
    assert len(lay_out(COLUMNS, rows, 200)[0]) == len(COLUMNS)


def test_an_id_is_never_cut() -> None:
    assert draw(5)[1].startswith("1152921504606846976  ")


def test_wide_characters_count_twice() -> None:
    lines = lay_out([Column("A", yields=True), Column("B")], [("世界世界世界世界", "x")], 13)
    assert [text_width(line[0].text) for line in lines] == [10, 10]
    assert lines[1][0].text.endswith("…")


@given(st.lists(st.text(), min_size=1, max_size=5), st.integers(20, 60))
def test_columns_stay_columns_whatever_is_in_them(texts: list[str], width: int) -> None:
    columns = [Column("A", yields=True), Column("B", right=True, yields=True)]
    lines = lay_out(columns, [(text, Cell(text, "red")) for text in texts], width)
    for i in (0, 1):
        assert len({text_width(line[i].text) for line in lines}) == 1
    assert all(text_width(GAP.join(cell.text for cell in line)) <= width for line in lines)
