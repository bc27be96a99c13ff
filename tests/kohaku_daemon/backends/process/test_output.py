"""What a program writes gets into its file, or the file says what is missing."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from kohaku_daemon.backends.process.output import Output


def test_it_is_passed_on_until_nobody_can_write_any_more(tmp_path: Path) -> None:
    path = tmp_path / "stdout"
    path.write_text("before\n")
    output = Output(str(path), -1)
    assert output.pass_on(), "nothing has come yet, but may"
    os.write(output.sink, b"one\n")
    os.truncate(path, 3)  # it is appended to all the same
    assert output.pass_on()
    output.leave()
    assert not output.pass_on()
    output.finish()
    assert path.read_bytes() == b"befone\n"


def test_all_that_a_pipe_can_hold_is_passed_on_at_the_end_though_it_is_still_open(
    tmp_path: Path,
) -> None:
    path = tmp_path / "stdout"
    output = Output(str(path), -1)
    held = fcntl.fcntl(output.sink, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.write(output.sink, b"x" * held)
    output.finish()
    output.leave()
    assert path.read_bytes() == b"x" * held


def test_a_link_in_the_place_of_its_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "stdout").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        Output(str(tmp_path / "stdout"), -1)
    assert not (tmp_path / "elsewhere").exists()


def test_what_a_full_disk_did_not_take_is_told_in_its_place(small_disk: Path) -> None:
    filler = small_disk / "filler"
    path = small_disk / "stdout"
    output = Output(str(path), -1)
    os.write(output.sink, b"first")
    output.pass_on()
    filler.write_bytes(b"x" * ((1 << 20) - 4096))
    for _ in range(3):
        os.write(output.sink, b"y" * 4096)
        output.pass_on()
    filler.unlink()
    os.write(output.sink, b"last")
    output.leave()
    output.finish()
    told = b"\n[kohaku: 8197 bytes are missing here: No space left on device]\n"
    assert path.read_bytes() == b"first" + b"y" * 4091 + told + b"last"
