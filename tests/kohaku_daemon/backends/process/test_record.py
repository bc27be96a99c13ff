"""The record of a launch: taken once, never half believed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohaku_daemon.backends.process.record import (
    NOBODY,
    Ending,
    Keeper,
    read_ending,
    read_keeper,
    take,
    write_ending,
)

KEEPER = Keeper(12, 3456, "boot", 1.5, 13, 2000, {"memory": "/m"}, "plain \udcff")


def test_what_was_taken_is_read_and_not_taken_again(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert read_keeper(folder) is None
    assert take(folder, KEEPER)
    assert not take(folder, NOBODY)
    assert read_keeper(folder) == KEEPER
    assert read_ending(folder) is None
    ending = Ending(9, 2.5, oom_kills=1, error="x\ny")
    write_ending(folder, ending)
    assert (read_keeper(folder), read_ending(folder)) == (KEEPER, ending)
    assert os.listdir(folder) == ["keeper"]


def test_of_many_at_once_one_takes_it(tmp_path: Path) -> None:
    start, go = os.pipe()
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(start, 1)  # ends for all of them at once
            os._exit(0 if take(str(tmp_path), KEEPER._replace(pid=os.getpid())) else 1)
        children.append(pid)
    os.close(start)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(codes) == [0] + [1] * 7
    keeper = read_keeper(str(tmp_path))
    assert keeper is not None
    assert keeper.pid == children[codes.index(0)]


def test_nothing_is_taken_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        take(str(tmp_path / "gone"), KEEPER)
    with pytest.raises(FileNotFoundError):
        write_ending(str(tmp_path), Ending(0, 1.0))
    assert not (tmp_path / "keeper").exists()


@given(cut=st.integers(min_value=0, max_value=400))
def test_what_a_power_cut_left_is_whole_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("launch")
    ending = Ending(256, 2.5)
    take(str(folder), KEEPER)
    write_ending(str(folder), ending)
    file = folder / "keeper"
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    assert read_keeper(str(folder)) in (None, KEEPER)
    assert read_ending(str(folder)) == (ending if cut >= len(whole) else None)
