"""The queue as people use it: waiting for others, gangs, time limits, further attempts.

With three nodes of all this machine's cores each, so that what fits is known.
"""

from __future__ import annotations

import os

from tests.system.homes import Home, wait_for

CORES = len(os.sched_getaffinity(0))


def submit(home: Home, *words: str) -> list[str]:
    return home.kohaku("task", "submit", *words).split()


def test_after_waits_for_tasks_and_batches_and_fails_with_them(home: Home) -> None:
    # It completes when its end is asked for: a program that returns 0 by itself has completed.
    polite = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    first = submit(home, "-c", "0", "--", "sh", "-c", polite)
    then = submit(home, "-c", "0", "--after", *first, "--", "echo", "then")
    last = submit(home, "-c", "0", "--after", *then, "--", "true")
    wait_for(lambda: home.kohaku("task", "logs", *first) == "ready", "the trap")
    told = home.json("task", "explain", then[0])
    assert told["summary"] == f"waits for task {first[0]} (running) to complete"
    assert home.state(last[0]) == "queued"
    home.kohaku("task", "kill", *first)
    assert home.run("kohaku", "task", "wait", *last).code == 0
    assert home.kohaku("task", "logs", *then) == "then"

    failing = submit(home, "--array", "2", "--", "sh", "-c", "exit $KOHAKU_TASK_INDEX")
    batch = home.json("task", "show", failing[0])["batch"]
    done = home.run("kohaku", "task", "submit", "--after", batch, "--wait", "--", "true")
    if done.code == 1 and not done.out:
        assert "did not complete" in done.err  # it had failed before this was submitted
    else:
        assert done.code == 1
        shown = home.json("task", "show", done.out.split()[0])
        assert (shown["state"], shown["exit"]["cause"]) == ("failed", "dependency")
        assert failing[1] in shown["reason"]


def test_gangs_under_contention_begin_whole_and_none_waits_for_ever(home: Home) -> None:
    whole = ("-c", str(CORES))
    singles = submit(home, *whole, "--array", "4", "--", "sleep", "0.2")
    gangs = [submit(home, *whole, "--array", "3", "--gang", "--", "sleep", "0.2") for _ in range(3)]
    more = submit(home, "-c", "1", "--array", "6", "--", "true")
    everything = [*singles, *more, *(task for gang in gangs for task in gang)]
    assert home.run("kohaku", "task", "wait", *everything, "--timeout", "120").code == 0
    for gang in gangs:
        placed = [
            next(one["at"] for one in home.json("task", "show", task)["history"]
                 if one["state"] == "assigned")
            for task in gang
        ]  # fmt: skip
        assert len(set(placed)) == 1, "its tasks were placed one by one"
    refused = home.run("kohaku", "task", "submit", *whole, "--array", "4", "--gang", "--", "true")
    assert refused.code == 1
    assert "4 tasks of this gang do not fit together" in refused.err


def test_a_gang_of_which_one_cannot_begin_ends(home: Home) -> None:
    script = 'test "$KOHAKU_TASK_INDEX" = 0 || exec sleep 600'
    gang = submit(
        home, "-c", "0", "--array", "2", "--gang", "--workdir", "/nonexistent", "--", "sh", "-c",
        script,
    )  # fmt: skip
    assert home.run("kohaku", "task", "wait", *gang).code != 0
    assert {home.state(task) for task in gang} <= {"failed", "killed"}


def test_a_time_limit_ends_what_runs_too_long(home: Home) -> None:
    stubborn = "trap '' TERM; while :; do sleep 0.1; done"
    done = home.run(
        "kohaku", "task", "submit", "--time-limit", "1s", "--grace", "0.2s", "--wait", "--", "sh",
        "-c", stubborn,
    )  # fmt: skip
    assert done.code == 124
    assert "time limit" in done.err
    shown = home.json("task", "show", done.out.split()[0])
    assert (shown["state"], shown["exit"]["cause"]) == ("failed", "time_limit")
    assert shown["reason"] == "ended at its time limit of 1.0s"
    assert 1.0 <= shown["ended_at"] - shown["started_at"] < 30.0
    quick = home.run("kohaku", "task", "submit", "--time-limit", "1h", "--wait", "--", "true")
    assert quick.code == 0


def test_retries_make_new_attempts_with_their_own_output(home: Home) -> None:
    words = "echo attempt $KOHAKU_ATTEMPT; exit $((3 - $KOHAKU_ATTEMPT))"
    done = home.run(
        "kohaku", "task", "submit", "--retries", "4", "--follow", "--", "sh", "-c", words
    )
    assert done.code == 0
    assert done.out == "attempt 1\nattempt 2\nattempt 3\n"
    task = done.err.split()[0]
    shown = home.json("task", "show", task)
    assert (shown["attempt"], shown["state"]) == (3, "completed")
    for attempt in ("1", "2", "3"):
        assert home.kohaku("task", "logs", task, "--attempt", attempt) == f"attempt {attempt}"
    causes = [change["cause"] for change in shown["history"] if change["state"] == "queued"]
    assert causes[1].startswith("attempt 1 exited with 2; tries again in 1 s, 3 of 4 retries left")


def test_what_failed_is_tried_again_by_hand_under_a_new_id(home: Home) -> None:
    old = submit(home, "--array", "3", "--", "sh", "-c", "exit $KOHAKU_TASK_INDEX")
    home.run("kohaku", "task", "wait", *old)
    batch = home.json("task", "show", old[0])["batch"]
    new = home.kohaku("task", "retry", batch).split()
    assert len(new) == 2
    assert home.run("kohaku", "task", "wait", new[1]).code == 2
    shown = home.json("task", "show", new[1])
    assert (shown["index"], shown["size"], shown["retry_of"]) == (2, 3, old[2])
    assert home.state(old[2]) == "failed", "an end is never rewritten"
    refused = home.run("kohaku", "task", "retry", old[0])
    assert refused.code == 1
    assert "completed" in refused.err
    nobody = home.run("kohaku", "task", "retry", "12345")
    assert nobody.code == 1


def test_owners_of_equal_priority_do_not_overtake_their_own_tasks(home: Home) -> None:
    order = submit(home, "-t", "node1", "-c", str(CORES), "--", "sleep", "0.3")
    for _ in range(3):
        order += submit(home, "-t", "node1", "-c", str(CORES), "--", "true")
    wait_for(lambda: home.state(order[-1]) == "completed", "the last of the line")
    begun = [home.json("task", "show", task)["started_at"] for task in order]
    assert begun == sorted(begun)
