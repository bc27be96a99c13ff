"""What waits for which commit, and what waits for none."""

from __future__ import annotations

import pytest

from kohaku_daemon.core.node.actions import (
    Forget,
    KillLaunch,
    NodeAction,
    Remember,
    RemoveLaunch,
    SendReport,
    StartLaunch,
    WatchLaunch,
)
from kohaku_daemon.core.node.ledger import Ledger
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Handle, Launch
from protocol.ids import BatchId, TaskId
from protocol.messages.runner import AttemptState
from protocol.models.task import Cause, Exit, TaskSpec

HANDLE = Handle(backend="mock")


def a_record(task: int = 1) -> LaunchRecord:
    spec = TaskSpec(command=("true",))
    launch = Launch(task=TaskId(task), attempt=1, batch=BatchId(1), spec=spec)
    return LaunchRecord(launch=launch, handle=HANDLE)


def an_order(record: LaunchRecord) -> list[NodeAction]:
    return [Remember(record), SendReport(record.report()), StartLaunch(record.launch, HANDLE)]


def an_end(record: LaunchRecord) -> list[NodeAction]:
    return [Remember(record, later=True), SendReport(record.report())]


def a_settling(record: LaunchRecord) -> list[NodeAction]:
    return [RemoveLaunch(record.launch, HANDLE), Remember(record, later=True)]


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_a_start_and_its_report_wait_for_their_order_to_be_on_the_disk(ledger: Ledger) -> None:
    record = a_record()
    order = an_order(record)
    assert ledger.take(order) == []
    assert ledger.is_due
    assert not ledger.is_kept("1-1")
    bundle = ledger.close()
    assert list(bundle.puts) == ["1-1"]
    assert not ledger.is_kept("1-1")
    assert ledger.finish() == order[1:]
    assert ledger.is_kept("1-1")


def test_an_end_is_told_at_once_and_written_with_what_comes_when_it_is_ripe(
    ledger: Ledger,
) -> None:
    ended = a_record()
    assert ledger.take(an_end(ended)) == [SendReport(ended.report())]
    assert not ledger.is_due
    ledger.take(an_order(a_record(2)))
    assert sorted(ledger.close().puts) == ["2-1"]
    ledger.finish()
    ledger.ripen()
    ledger.take(an_order(a_record(3)))
    assert sorted(ledger.close().puts) == ["1-1", "3-1"]
    ledger.finish()
    assert not ledger.is_due
    ledger.ripen()
    assert not ledger.is_due, "there is nothing more"


def test_what_is_written_again_at_once_is_not_written_again_later(ledger: Ledger) -> None:
    first, second = a_record(), a_record()
    ledger.take([Remember(first, later=True), Remember(second)])
    ledger.take([Remember(second, later=True)])  # it will be written as it is then
    ledger.ripen()
    assert ledger.close().puts["1-1"] is second
    assert ledger.later.is_empty


def test_nothing_is_removed_before_the_disk_has_it_as_settled(ledger: Ledger) -> None:
    record = a_record()
    settling = a_settling(record)
    assert ledger.take(settling) == []
    ledger.take(an_order(a_record(2)))
    ledger.close()
    assert settling[0] not in ledger.finish()
    ledger.ripen()
    assert list(ledger.close().puts) == ["1-1"]
    assert ledger.finish() == settling[:1]


def test_what_ends_is_not_held_up_by_orders_the_disk_does_not_take(ledger: Ledger) -> None:
    running = a_record(1)
    ledger.take(an_order(a_record(2)))
    ledger.close()  # and it never finishes
    kill = KillLaunch("1-1", HANDLE, 3.0)
    assert ledger.take([Remember(running, later=True), kill]) == [kill]
    assert ledger.take(an_end(running)) == [SendReport(running.report())]


def test_nothing_is_said_of_a_launch_whose_order_is_on_its_way_to_the_disk(
    ledger: Ledger,
) -> None:
    record = a_record()
    ledger.take(an_order(record))
    ledger.close()
    again = SendReport(record.report())
    assert ledger.take([again]) == []  # the order came twice
    assert ledger.finish()[-1] == again


def test_what_comes_during_a_commit_waits_for_the_next_one(ledger: Ledger) -> None:
    first, second = a_record(1), a_record(2)
    ledger.take(an_order(first))
    ledger.close()
    ledger.take(an_order(second))
    assert ledger.finish() == an_order(first)[1:]
    assert not ledger.is_kept("2-1")
    assert list(ledger.close().puts) == ["2-1"]
    watch = WatchLaunch("2-1", HANDLE)
    assert ledger.take([watch]) == []
    assert ledger.finish() == [*an_order(second)[1:], watch]


def test_a_launch_written_again_during_its_commit_is_held_until_both_are_done(
    ledger: Ledger,
) -> None:
    record = a_record()
    ledger.take(an_order(record))
    ledger.close()
    ledger.take([Remember(record)])
    ledger.finish()
    assert not ledger.is_kept("1-1")
    ledger.close()
    ledger.finish()
    assert ledger.is_kept("1-1")


@pytest.mark.parametrize("under_way", [False, True])
def test_an_order_the_disk_does_not_take_is_let_go_of_for_a_new_link(
    ledger: Ledger, under_way: bool
) -> None:
    kept, waiting = a_record(1), a_record(2)
    ledger.take(an_order(kept))
    ledger.close()
    ledger.finish()
    ledger.take([*an_order(waiting), *an_end(kept)])
    if under_way:
        ledger.close()
    assert ledger.withdraw() == ["2-1"]
    if under_way:
        assert ledger.finish() == []
        assert list(ledger.later.voids) == ["2-1"]  # it may have been written
    ledger.ripen()
    bundle = ledger.close()
    assert (list(bundle.puts), list(bundle.voids)) == (["1-1"], ["2-1"] if under_way else [])
    assert ledger.finish() == []
    # Given again it is an order as any other.
    ledger.take(an_order(waiting))
    bundle = ledger.close()
    assert (list(bundle.puts)[-1], list(bundle.voids)) == ("2-1", [])
    assert ledger.finish() == an_order(waiting)[1:]


def test_a_new_link_is_told_no_more_than_the_disk_has(ledger: Ledger) -> None:
    record = a_record()
    ledger.take(an_order(record))
    ledger.close()
    ledger.finish()
    assert list(ledger.tellable([record.report()])) == [record.report()]

    accepted = record.report()
    record.state, record.exit = AttemptState.ENDED, Exit(Cause.START_FAILED)
    ledger.take([Remember(record)])
    assert ledger.withdraw() == []
    assert list(ledger.tellable([record.report()])) == [accepted]
    ledger.close()
    ledger.finish()
    assert list(ledger.tellable([record.report()])) == [record.report()]


def test_what_is_forgotten_is_not_written(ledger: Ledger) -> None:
    ledger.take([Remember(a_record(), later=True), Forget("1-1")])
    ledger.ripen()
    bundle = ledger.close()
    assert (bundle.puts, list(bundle.drops)) == ({}, ["1-1"])
    assert not bundle.is_empty


def test_what_is_about_to_be_removed_is_known_until_it_may_be(ledger: Ledger) -> None:
    ledger.take(a_settling(a_record()))
    assert ledger.leaving() == [HANDLE]
    ledger.ripen()
    ledger.close()
    assert ledger.leaving() == [HANDLE]
    ledger.finish()
    assert ledger.leaving() == []
