"""Marks of removed outputs: they last, whatever happens to their file, and never grow for ever."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kohaku_daemon.runner import log_marks
from kohaku_daemon.runner.log_marks import Marks

KEY = re.compile(r"[0-9]+-[0-9]+")


def marks_in(tmp_path: Path) -> Marks:
    return Marks(tmp_path / "removed", KEY.fullmatch)


def test_marks_are_there_at_once_and_in_the_next_run(tmp_path: Path) -> None:
    marks = marks_in(tmp_path)
    marks.add(["1-1", "2-1"])
    marks.add(["3-1"])
    marks.add([])
    for known in (marks, marks_in(tmp_path)):
        assert [key in known for key in ("1-1", "2-1", "3-1", "4-1")] == [True, True, True, False]


def test_a_line_that_was_cut_off_marks_nobody(tmp_path: Path) -> None:
    marks_in(tmp_path).add(["1-1", "2-13"])
    path = tmp_path / "removed"
    path.write_bytes(path.read_bytes()[: -len("3 removed\n")])
    marks = marks_in(tmp_path)
    assert ("1-1" in marks, "2-1" in marks) == (True, False)
    marks.add(["3-1"])
    marks = marks_in(tmp_path)
    assert ("1-1" in marks, "2-1" in marks, "3-1" in marks) == (True, False, True)


def test_only_the_newest_are_kept_in_memory_and_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_marks, "MOST", 10)
    monkeypatch.setattr(log_marks, "_MOST_LINES", 20)
    marks = marks_in(tmp_path)
    for number in range(100):
        marks.add([f"{number}-1"])
    for known in (marks, marks_in(tmp_path)):
        assert [number for number in range(100) if f"{number}-1" in known] == list(range(90, 100))
    assert len((tmp_path / "removed").read_text().splitlines()) <= 22
    assert [path.name for path in tmp_path.iterdir()] == ["removed"]
