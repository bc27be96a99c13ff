"""What a program writes gets into its file, or the file says what is missing."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from kohaku_daemon.backends.process.output import Output, open_pipe


class Piped:
    """An output, and the program's end of its pipe."""

    def __init__(self, path: Path) -> None:
        source, self.sink = open_pipe(-1)
        self.output = Output(str(path), source)

    def leave(self) -> None:
        os.close(self.sink)


def test_it_is_passed_on_until_nobody_can_write_any_more(tmp_path: Path) -> None:
    path = tmp_path / "stdout"
    path.write_text("before\n")
    piped = Piped(path)
    output = piped.output
    assert output.pass_on(), "nothing has come yet, but may"
    os.write(piped.sink, b"one\n")
    os.truncate(path, 3)  # it is appended to all the same
    assert output.pass_on()
    piped.leave()
    assert not output.pass_on()
    output.finish()
    piped.output.close()
    assert path.read_bytes() == b"befone\n"


def test_all_that_a_pipe_can_hold_is_passed_on_at_the_end_though_it_is_still_open(
    tmp_path: Path,
) -> None:
    path = tmp_path / "stdout"
    piped = Piped(path)
    output = piped.output
    held = fcntl.fcntl(piped.sink, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.write(piped.sink, b"x" * held)
    output.finish()
    piped.output.close()
    piped.leave()
    assert path.read_bytes() == b"x" * held


def test_a_silent_output_makes_no_file(tmp_path: Path) -> None:
    piped = Piped(tmp_path / "folder" / "stdout")
    piped.leave()
    piped.output.finish()
    piped.output.close()
    assert list(tmp_path.iterdir()) == []


def test_its_folder_is_made_when_there_is_something_to_keep(tmp_path: Path) -> None:
    piped = Piped(tmp_path / "folder" / "stdout")
    os.write(piped.sink, b"something")
    piped.leave()
    piped.output.finish()
    piped.output.close()
    assert (tmp_path / "folder" / "stdout").read_bytes() == b"something"
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700


def test_a_link_in_the_place_of_its_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "stdout").symlink_to(tmp_path / "elsewhere")
    piped = Piped(tmp_path / "stdout")
    os.write(piped.sink, b"something")
    assert piped.output.pass_on()
    piped.leave()
    piped.output.finish()
    piped.output.close()
    assert not (tmp_path / "elsewhere").exists()


def test_what_a_full_disk_did_not_take_is_told_in_its_place(small_disk: Path) -> None:
    filler = small_disk / "filler"
    path = small_disk / "stdout"
    piped = Piped(path)
    output = piped.output
    os.write(piped.sink, b"first")
    output.pass_on()
    filler.write_bytes(b"x" * ((1 << 20) - 4096))
    for _ in range(3):
        os.write(piped.sink, b"y" * 4096)
        output.pass_on()
    filler.unlink()
    os.write(piped.sink, b"last")
    piped.leave()
    output.finish()
    piped.output.close()
    told = b"\n[kohaku: 8197 bytes are missing here: No space left on device]\n"
    assert path.read_bytes() == b"first" + b"y" * 4091 + told + b"last"
