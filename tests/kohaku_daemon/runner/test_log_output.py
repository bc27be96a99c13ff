"""Reading an output at the very moment its middle is dropped."""

import os
from pathlib import Path

import pytest

from kohaku_daemon.runner.log_holes import Holes
from kohaku_daemon.runner.log_output import OutputReader
from protocol.messages.stream import Source

MIB = 2**20


@pytest.mark.parametrize("start", [0, 256 * 1024, MIB])
def test_a_hole_punched_between_looking_and_reading_is_noticed(
    start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "stdout"
    output.write_bytes(b"x" * (3 * MIB))
    holes = Holes(tmp_path)
    reader = OutputReader(Source.STDOUT, output, holes, cap=MIB)
    reader.begin(start, 0, stop_at_end=True)
    read = os.pread

    def trim_then_read(file: int, length: int, offset: int) -> bytes:
        holes.trim(output, MIB)
        return read(file, length, offset)

    monkeypatch.setattr(os, "pread", trim_then_read)
    chunks = reader.read()
    monkeypatch.undo()
    reader.close()

    if start == 0:  # up to the hole
        assert b"".join(chunk.data for chunk in chunks) == b"x" * (MIB // 4)
    else:
        (ours,) = chunks
        assert b"[kohaku: " in ours.data
        assert ours.offset + len(ours.data) == reader.position == 2.5 * MIB
