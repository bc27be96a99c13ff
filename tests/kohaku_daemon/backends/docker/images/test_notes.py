"""What was brought and when it was used, over restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from kohaku_daemon.backends.docker.images.notes import ImageNote, ImageNotes


async def reopened(file: Path) -> ImageNotes:
    notes = ImageNotes(file)
    await notes.read()
    return notes


async def test_notes_survive_and_are_in_the_order_of_use(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "images.json"
    notes = await reopened(file)
    for name, used_at in (("a", 5.0), ("b", 9.0), ("c", 7.0)):
        await notes.put(ImageNote(name=name, used_at=used_at, present=True))
    await notes.drop("c")
    assert [note.name for note in (await reopened(file)).by_use()] == ["b", "a"]


async def test_a_use_is_known_at_once_and_on_disk_within_the_hour(tmp_path: Path) -> None:
    file = tmp_path / "images.json"
    notes = await reopened(file)
    await notes.put(ImageNote(name="a", used_at=1000.0))
    await notes.touch("a", 2000.0)
    assert notes.by_use()[0].used_at == 2000.0
    assert (await reopened(file)).by_use()[0].used_at == 1000.0
    await notes.touch("a", 9000.0)
    assert (await reopened(file)).by_use()[0].used_at == 9000.0
    await notes.touch("unknown", 9000.0)
    assert notes.get("unknown") is None


async def test_a_file_that_makes_no_sense_costs_its_notes_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "images.json"
    file.write_text("{half")
    notes = await reopened(file)
    assert notes.by_use() == []
    assert "not known" in caplog.text
    await notes.put(ImageNote(name="a"))
    assert (await reopened(file)).get("a") is not None
