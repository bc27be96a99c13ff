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
    Program,
    Record,
    free,
    give_up,
    make_record,
    read_record,
    take,
    write_ending,
    write_program,
)

OUTPUTS = [("/o", 5), ("/e", 7)]
KEEPER = Keeper(12, 3456, 11, 3450, "boot", 1.5, 2000, {"memory": "/m"}, "plain \udcff", OUTPUTS)


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "7-1-0")
    make_record(path)
    return path


def take_and_close(path: str, keeper: Keeper) -> bool:
    descriptor = take(path, keeper)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def test_what_was_taken_is_read_and_not_taken_again(path: str) -> None:
    assert read_record(path) == Record()
    descriptor = take(path, KEEPER)
    assert descriptor is not None
    assert not give_up(path)
    make_record(path)
    assert read_record(path) == Record(KEEPER)
    write_program(descriptor, Program(13, 14))
    ending = Ending(9, 2.5, oom_kills=1, error="x\ny")
    write_ending(path, ending)
    assert read_record(path) == Record(KEEPER, Program(13, 14), ending=ending)


def test_what_was_given_up_is_never_taken(path: str) -> None:
    assert give_up(path)
    assert give_up(path), "again"
    assert not take_and_close(path, KEEPER)
    assert read_record(path) == Record(NOBODY)
    assert read_record(path).is_given_up


def test_what_was_freed_is_taken_by_the_next_and_only_once(path: str) -> None:
    second = KEEPER._replace(pid=99)
    assert take_and_close(path, KEEPER)
    assert not take_and_close(path, second)
    free(path)
    assert read_record(path) == Record()
    assert take_and_close(path, second)
    assert not take_and_close(path, KEEPER._replace(pid=100))
    assert read_record(path) == Record(second)


def test_what_runs_is_not_freed(path: str) -> None:
    descriptor = take(path, KEEPER)
    assert descriptor is not None
    write_program(descriptor, Program(13, 0))
    free(path)
    assert read_record(path) == Record(KEEPER, Program(13, 0))


def test_of_many_at_once_one_takes_it(path: str) -> None:
    start, go = os.pipe()
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(start, 1)  # ends for all of them at once
            os._exit(0 if take_and_close(path, KEEPER._replace(pid=os.getpid())) else 1)
        children.append(pid)
    os.close(start)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(codes) == [0] + [1] * 7
    keeper = read_record(path).keeper
    assert keeper is not None
    assert keeper.pid == children[codes.index(0)]


def test_nothing_is_taken_whose_record_is_gone(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        take(gone, KEEPER)
    with pytest.raises(FileNotFoundError):
        write_ending(gone, Ending(0, 1.0))
    assert not list(tmp_path.iterdir())


@given(cut=st.integers(min_value=0, max_value=400), fill=st.sampled_from([b"", b"\0" * 50]))
def test_what_a_power_cut_left_is_whole_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, cut: int, fill: bytes
) -> None:
    path = tmp_path_factory.mktemp("launch") / "7-1-0"
    make_record(str(path))
    ending = Ending(256, 2.5)
    take_and_close(str(path), KEEPER)
    write_ending(str(path), ending)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + fill)
    found = read_record(str(path))
    assert found.keeper in (None, KEEPER)
    assert found.ending == (ending if cut >= len(whole) else None)
