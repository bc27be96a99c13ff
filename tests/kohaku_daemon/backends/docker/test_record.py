"""What is kept of a launch on the disk, and what it decides."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kohaku_daemon.backends.base import BackendFailed
from kohaku_daemon.backends.docker.record import (
    ContainerRecord,
    list_names,
    make_writable,
    name_launch,
)
from kohaku_daemon.core.workload import Handle

NAME = "7-1-0123456789abcdef"


@pytest.fixture
def record(tmp_path: Path) -> ContainerRecord:
    return ContainerRecord(tmp_path, NAME)


def test_a_name_is_made_of_its_handle_and_of_no_other() -> None:
    data: dict[str, str | int] = {"task": 7, "attempt": 1, "plan": "0123456789abcdef"}
    assert name_launch(Handle(backend="docker", data=data)) == NAME
    for wrong in ({}, {**data, "plan": "../../etc"}, {**data, "task": "7/.."}):
        with pytest.raises(BackendFailed, match="no handle of the docker backend"):
            name_launch(Handle(backend="docker", data=wrong))


def test_without_a_record_nothing_has_begun_and_nothing_failed(record: ContainerRecord) -> None:
    assert (record.has_begun, record.failure, record.read_status()) == (False, None, None)
    record.remove()


def test_a_mark_stays_until_it_is_removed(record: ContainerRecord) -> None:
    record.make()
    record.mark_begun()
    record.make()
    assert record.has_begun
    record.remove()
    assert not record.has_begun


def test_a_launch_is_given_up_also_before_it_has_a_record(record: ContainerRecord) -> None:
    record.fail()
    assert record.failure == ""
    record.fail("why")
    assert record.failure == "why"


def test_whoever_gets_at_a_file_may_write_it_whatever_the_umask(record: ContainerRecord) -> None:
    before = os.umask(0o077)
    try:
        record.make()
    finally:
        os.umask(before)
    assert os.stat(record.exit_file).st_mode & 0o777 == 0o666


def test_what_is_there_is_kept_and_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    make_writable(str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "old"
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(OSError, match="symbolic links"):
        make_writable(str(tmp_path / "link"))


def test_records_are_listed_and_nothing_else(record: ContainerRecord, tmp_path: Path) -> None:
    record.make()
    (tmp_path / "images.json").touch()
    assert list_names(tmp_path) == [NAME]
