"""What the vault holds of launches: a row each until settled, then a row for each group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Handle, Launch
from kohaku_daemon.runner.memory import Memory
from kohaku_daemon.store.vault import Vault
from protocol.errors import Unavailable
from protocol.ids import BatchId, TaskId
from protocol.models.task import TaskSpec
from tests.kohaku_daemon.runner.waiting import keep


def a_record(task: int, *, settled: bool = False) -> LaunchRecord:
    spec = TaskSpec(command=("true",))
    launch = Launch(task=TaskId(task), attempt=1, batch=BatchId(1), spec=spec)
    return LaunchRecord(launch=launch, handle=Handle(backend="mock"), settled=settled)


def by_key(*records: LaunchRecord) -> dict[str, LaunchRecord]:
    return {record.key: record for record in records}


class Kept:
    """A memory over a file, and what is in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vault = Vault.open(path)
        self.memory = Memory(self.vault)

    def rows(self) -> list[str]:
        return [key for key, _ in self.vault.items()]

    def launches(self) -> list[tuple[int, bool]]:
        return sorted((record.launch.task, record.settled) for record in self.memory.launches())

    def reopen(self) -> None:
        self.memory.close()
        self.vault = Vault.open(self.path)
        self.memory = Memory(self.vault)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(tmp_path / "vault.sqlite")
    yield kept
    kept.memory.close()


async def test_what_is_settled_together_shares_a_row_and_leaves_its_own(kept: Kept) -> None:
    await keep(kept.memory, by_key(*map(a_record, range(1, 4))))
    assert kept.rows() == ["launch/1-1", "launch/2-1", "launch/3-1"]
    await keep(kept.memory, by_key(a_record(1, settled=True), a_record(2, settled=True)))
    assert kept.rows() == ["fences/0000000000000000", "launch/3-1"]
    kept.reopen()
    assert kept.launches() == [(1, True), (2, True), (3, False)]


async def test_a_row_goes_when_all_that_was_in_it_is_forgotten(kept: Kept) -> None:
    for first in (1, 4):
        group = [a_record(task, settled=True) for task in range(first, first + 3)]
        await keep(kept.memory, by_key(*group))
    await keep(kept.memory, {}, ["1-1", "2-1"])
    assert len(kept.rows()) == 2
    await keep(kept.memory, by_key(a_record(7, settled=True)), ["3-1"])
    assert kept.rows() == ["fences/0000000000000001", "fences/0000000000000002"]
    kept.reopen()
    await keep(kept.memory, by_key(a_record(8, settled=True)), ["4-1", "5-1", "6-1"])
    assert kept.rows() == ["fences/0000000000000002", "fences/0000000000000003"]
    assert kept.launches() == [(7, True), (8, True)]


async def test_what_could_not_be_written_is_written_once_when_it_is_tried_again(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    await keep(kept.memory, by_key(a_record(1, settled=True)))

    def full(*_: object) -> None:
        raise Unavailable("the disk is full")

    called = []
    with monkeypatch.context() as broken:
        broken.setattr(kept.vault, "write", full)
        with pytest.raises(Unavailable):
            await keep(
                kept.memory,
                by_key(a_record(2, settled=True)),
                ["1-1"],
                lambda: called.append("too early"),
            )
    await keep(
        kept.memory, by_key(a_record(2, settled=True)), ["1-1"], lambda: called.append("in time")
    )
    assert called == ["in time"]
    assert kept.rows() == ["fences/0000000000000001"]


async def test_of_what_is_void_nothing_stays(kept: Kept) -> None:
    await keep(kept.memory, by_key(a_record(1), a_record(2)))
    await keep(kept.memory, by_key(a_record(2)), void=["1-1", "2-1", "3-1"])
    assert kept.rows() == ["launch/2-1"]


async def test_fences_of_an_earlier_version_are_kept_and_forgotten_in_turn(kept: Kept) -> None:
    """It kept each in the row it had as a launch."""
    kept.vault.write(
        {
            f"launch/{task}-1": msgspec.msgpack.encode(a_record(task, settled=True))
            for task in (1, 2)
        }
    )
    assert kept.launches() == [(1, True), (2, True)]
    await keep(kept.memory, by_key(a_record(3, settled=True)), ["1-1"])
    assert kept.rows() == ["fences/0000000000000000", "launch/2-1"]
