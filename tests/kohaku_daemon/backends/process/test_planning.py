"""Which user a launch gets, and what the machine is said to enforce."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kohaku_daemon.backends.base import TaskFolders
from kohaku_daemon.backends.process import planning
from kohaku_daemon.backends.process.cgroups import GroupSite
from kohaku_daemon.backends.process.planning import Means, Planner, find_users
from kohaku_daemon.backends.process.record import LaunchPlan
from kohaku_daemon.backends.process.settings import ProcessSettings
from kohaku_daemon.core.workload import Launch
from protocol.ids import BatchId, TaskId
from protocol.models.task import Claim, TaskSpec

RANGE = ProcessSettings(uid_base=200_000, uid_span=1_000)


def plan(
    means: Means, node: str = "node1", task: int = 7, claim: Claim | None = None
) -> LaunchPlan:
    launch = Launch(
        task=TaskId(task), attempt=1, batch=BatchId(1),
        spec=TaskSpec(command=("true",)), claim=claim or Claim(),
    )  # fmt: skip
    folders = TaskFolders(Path("/s"), Path("/o"), Path("/e"))
    return Planner(node, (), RANGE, means, "boot").plan(launch, "/state/7-1-0", folders)


@pytest.mark.parametrize(
    ("uid_map", "users"),
    [
        ("         0          0 4294967295\n", range(200_000, 201_000)),
        ("0 100000 65536\n", range(65534, 65535)),
        ("0 1000 1\n", range(0)),
    ],
)
def test_users_are_those_that_exist_here(
    uid_map: str, users: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(planning, "read_text", lambda _: uid_map)
    assert find_users(RANGE) == users


def test_a_runner_that_is_not_root_gives_no_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert find_users(RANGE) == range(0)
    assert plan(Means(False, None, range(0)))["uid"] == -1


def test_a_launch_keeps_its_user_and_others_have_others() -> None:
    means = Means(False, None, range(200_000, 300_000))
    assert plan(means)["uid"] == plan(means)["uid"]
    drawn = {plan(means, task=task)["uid"] for task in range(50)}
    assert len(drawn) > 45
    assert drawn <= set(means.users)
    assert plan(means, node="node2")["uid"] != plan(means)["uid"]


def test_what_no_cgroup_limits_is_limited_otherwise() -> None:
    claim = Claim(cores=(1, 2), memory=4096)
    bare = plan(Means(False, None, range(0)), claim=claim)
    assert (bare["cores"], bare["address_space"], bare["group"]) == ([1, 2], 4096, None)
    site = GroupSite({"memory": Path("/c/memory")}, frozenset({"memory"}))
    partly = plan(Means(False, site, range(0)), claim=claim)
    assert (partly["cores"], partly["address_space"]) == ([1, 2], 0)


def test_nothing_is_claimed_to_be_enforced_that_is_not() -> None:
    assert Means(True, None, range(0)).list_enforced() == ("adopt", "pause")
    site = GroupSite({"unified": Path("/c")}, frozenset({"memory", "cpuset"}))
    enforced = Means(False, site, range(0)).list_enforced()
    assert enforced == ("adopt", "cores", "memory", "numa", "pause")
