"""Bugs that seeds once found, as the small worlds they were shrunk to.

What a seed plays changes with every change of ``draw``; these stay.
"""

from __future__ import annotations

import pytest

from tests.simulation.plan import (
    Act,
    Away,
    ClockJump,
    Command,
    Cut,
    DiskFull,
    EndBatch,
    HostDies,
    MachinePlan,
    Plan,
    Remove,
    RunnerDies,
    Steer,
    Submit,
)
from tests.simulation.shrink import try_plan

_N1, _N2 = MachinePlan("n1", numa=1), MachinePlan("n2", numa=1)
_AWAY = Cut(2.0, "n1", host_notices_s=0.1, runner_notices_s=0.1, loses=True, apart_s=20.0)


def _play(*acts: Act, machines: tuple[MachinePlan, ...] = (_N1,), piece: int = 500) -> None:
    for seed in range(5):
        failure = try_plan(Plan(seed, machines, acts, rough_s=30.0, piece=piece))
        if failure is not None:
            pytest.fail(str(failure), pytrace=False)


def test_an_attempt_given_up_is_ended_though_its_task_still_waits() -> None:
    never_ends = Submit(1.0, 0, "ada", Command(lasts_s=0.0), gib=8, array=2, requeue_on_lost=True)
    _play(never_ends, Remove(10.0, "n2", force=True, back_after_s=0.5), machines=(_N1, _N2))


def test_what_a_removed_node_still_runs_holds_its_cores_when_it_is_let_in_again() -> None:
    _play(
        Submit(1.0, 0, "ada", Command(lasts_s=30.0, on_term=-2), cores=4),
        Remove(8.0, "n1", force=True, back_after_s=0.5),
        Submit(9.0, 1, "bob", Command(lasts_s=3.0), cores=4),
    )


@pytest.mark.parametrize("step", range(4))
def test_the_host_may_die_between_its_stores_while_a_task_is_given_up(step: int) -> None:
    _play(
        Submit(1.0, 0, "ada", Command(lasts_s=6.0), requeue_on_lost=True),
        _AWAY,
        HostDies(11.5, step, down_s=0.1),
    )


def test_a_clock_set_back_does_not_keep_a_retry_waiting() -> None:
    _play(
        Submit(1.0, 0, "ada", Command(lasts_s=2.0, codes=(3,)), retries=2),
        ClockJump(3.3, "host", by_s=-3600.0),
    )


def test_a_retry_asked_for_after_a_kill_is_not_killed() -> None:
    _play(
        Submit(1.0, 0, "ada", Command(lasts_s=5.0, codes=(3,))),
        _AWAY,
        Steer(3.0, "kill", 0, 0),
        Steer(18.0, "retry", 0, 0),
    )


def test_an_order_that_the_disk_never_took_is_given_again() -> None:
    _play(
        DiskFull(0.9, "n1", for_s=5.0),
        Submit(1.0, 0, "ada", Command(lasts_s=2.0)),
        RunnerDies(5.0, "n1", step=0, down_s=0.1),
    )


@pytest.mark.parametrize("step", range(0, 24, 2))
def test_the_host_may_die_while_a_batch_falls_a_task_at_a_time(step: int) -> None:
    _play(
        Submit(1.0, 0, "ada", Command(lasts_s=2.0, codes=(3,)), cores=0),
        Submit(1.0, 1, "ada", Command(lasts_s=1.0), array=4, after=(0,)),
        HostDies(3.0, step, down_s=0.1),
        piece=1,
    )


@pytest.mark.parametrize("step", range(0, 12, 2))
def test_the_host_may_die_while_a_batch_is_made_or_ended_a_task_at_a_time(step: int) -> None:
    _play(
        Submit(1.0, 0, "ada", Command(lasts_s=5.0), array=4),
        HostDies(1.0, step, down_s=0.1),
        EndBatch(4.0, 0),
        HostDies(4.0, step, down_s=0.1),
        piece=1,
    )


def test_an_end_in_time_that_is_learnt_after_the_limit_is_no_end_by_the_limit() -> None:
    _play(
        Submit(1.0, 0, "ada", Command(lasts_s=17.0), cores=0, time_limit_s=20.0),
        Away(14.0, "n1", for_s=12.0),
    )


def test_what_was_killed_while_nobody_could_be_told_ends_once_somebody_can() -> None:
    _play(
        Submit(1.0, 0, "ada", Command(lasts_s=0.0)),
        Away(8.0, "n1", for_s=8.0),
        Steer(9.0, "kill", 0, 0),
        RunnerDies(10.0, "n1", step=0, down_s=0.1),
    )
