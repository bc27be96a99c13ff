"""Where groups are made and what is written into them, on trees of plain files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kohaku_daemon.backends.process import sites
from kohaku_daemon.backends.process.cgroups import GroupSite, find_site
from kohaku_daemon.backends.process.group import Group
from kohaku_daemon.backends.process.settings import ProcessSettings
from protocol.models.task import Claim

CLAIM = Claim(cores=(2, 3), memory=1 << 30, numa=1)


def make_v2(root: Path, controllers: str = "cpuset cpu io memory pids") -> Path:
    """Make a tree like that of a machine with cgroup v2 alone."""
    for name in ("", "system.slice/kohaku.service"):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.controllers").write_text(controllers)
        (folder / "cgroup.subtree_control").write_text(controllers)
        (folder / "cgroup.procs").write_text("")
    return root


def make_v1(root: Path, *hierarchies: str) -> Path:
    """Make a tree like that of a machine with cgroup v1."""
    for name in hierarchies:
        (root / name).mkdir(parents=True)
        (root / name / "cgroup.procs").write_text("")
    if "cpuset" in hierarchies:
        (root / "cpuset" / "cpuset.cpus").write_text("0-7\n")
        (root / "cpuset" / "cpuset.mems").write_text("0-1\n")
    return root


def read_settings(site: GroupSite, claim: Claim) -> dict[str, str]:
    root = next(iter(site.parents.values())).parents[2]
    settings = site.plan("7-1", claim, 100)["settings"]
    return {os.path.relpath(path, root): value for path, value in settings}


def find(root: Path, own: str = "0::/\n") -> GroupSite:
    (root.parent / "own").write_text(own)
    site = find_site(root, "node1", own=root.parent / "own")
    assert site is not None
    return site


def test_v2_limits_memory_with_swap_cores_and_processes(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "cgroup")
    node = root / "kohaku" / "node1"
    node.mkdir(parents=True)
    (node / "memory.swap.max").write_text("max")
    site = find(root)
    assert site.parents == {"unified": node}
    assert site.limits == {"memory", "cpuset", "pids"}
    assert site.describe() == "cgroup v2: cpuset, memory, pids"
    settings = {os.path.relpath(p, node): v for p, v in site.plan("7-1", CLAIM, 100)["settings"]}
    assert settings == {
        "7-1/memory.max": str(1 << 30),
        "7-1/memory.swap.max": "0",
        "7-1/cpuset.cpus": "2,3",
        "7-1/cpuset.mems": "1",
        "7-1/pids.max": "100",
    }


def test_v2_without_a_claim_limits_processes_only(tmp_path: Path) -> None:
    site = find(make_v2(tmp_path / "cgroup"))
    ((path, value),) = site.plan("7-1", Claim(), 100)["settings"]
    assert path.endswith("/7-1/pids.max")
    assert value == "100"


def test_v2_claims_only_what_the_kernel_offers(tmp_path: Path) -> None:
    site = find(make_v2(tmp_path / "cgroup", "cpu memory"))
    assert site.limits == {"memory"}
    paths = [path for path, _ in site.plan("7-1", CLAIM, 100)["settings"]]
    assert [os.path.basename(path) for path in paths] == ["memory.max"]


def test_v2_enables_controllers_at_every_level(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "cgroup")
    (root / "cgroup.subtree_control").write_text("")
    find(root)
    for folder in (root, root / "kohaku", root / "kohaku" / "node1"):
        assert (folder / "cgroup.subtree_control").read_text().startswith("+")


SERVICE = "system.slice/kohaku.service"


@pytest.mark.parametrize("own", [f"0::/{SERVICE}\n", f"0::/{SERVICE}/kohaku-daemons\n"])
def test_v2_works_below_its_own_group_if_that_was_given_to_it(
    tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_v2(tmp_path / "cgroup")
    (root / SERVICE / "kohaku-daemons").mkdir()
    # As an ordinary user, to whom systemd gives the folder itself.
    monkeypatch.setattr(os, "geteuid", lambda: 4000)
    assert find(root, own).parents["unified"] == root / "kohaku" / "node1"
    monkeypatch.setattr(os, "geteuid", lambda: (root / SERVICE).stat().st_uid or 4000)
    if os.getuid() == 0:
        os.chown(root / SERVICE, 4000, -1)
    assert find(root, own).parents["unified"] == root / SERVICE / "kohaku" / "node1"


def test_hybrid_joins_the_v2_tree_instead_of_two_more_hierarchies(tmp_path: Path) -> None:
    root = make_v1(tmp_path / "cgroup", "memory", "cpuset", "pids", "freezer", "cpuacct", "unified")
    (root / "unified" / "cgroup.controllers").write_text("hugetlb")
    site = find(root)
    assert set(site.parents) == {"memory", "cpuset", "pids", "unified"}
    assert site.describe() == "cgroup v1: cpuset, memory, pids"


def test_v1_sets_both_of_a_cpuset_before_anybody_joins(tmp_path: Path) -> None:
    root = make_v1(tmp_path / "cgroup", "memory", "cpuset", "pids", "freezer", "cpuacct")
    site = find(root)
    assert set(site.parents) == {"memory", "cpuset", "pids", "freezer", "cpuacct"}
    settings = read_settings(site, Claim(cores=(5,)))
    assert settings["cpuset/kohaku/node1/7-1/cpuset.cpus"] == "5"
    assert settings["cpuset/kohaku/node1/7-1/cpuset.mems"] == "0-1"


def test_v1_limits_memory_with_swap_where_that_is_counted(tmp_path: Path) -> None:
    root = make_v1(tmp_path / "cgroup", "memory")
    folder = "memory/kohaku/node1/7-1"
    claim = Claim(memory=4096)
    assert read_settings(find(root), claim) == {
        f"{folder}/memory.limit_in_bytes": "4096",
        f"{folder}/memory.swappiness": "0",
    }
    (root / "memory/kohaku/node1/memory.memsw.limit_in_bytes").write_text("max")
    assert read_settings(find(root), claim) == {
        f"{folder}/memory.limit_in_bytes": "4096",
        f"{folder}/memory.memsw.limit_in_bytes": "4096",
    }


def test_no_cpuset_is_joined_without_cores(tmp_path: Path) -> None:
    site = find(make_v1(tmp_path / "cgroup", "memory", "cpuset", "pids"))
    assert "cpuset" not in site.plan("7-1", Claim(memory=1), 100)["folders"]
    assert "cpuset" in site.plan("7-1", Claim(cores=(1,)), 100)["folders"]


def test_where_there_is_nothing_nothing_is_found(tmp_path: Path) -> None:
    assert find_site(tmp_path / "nowhere", "node1") is None
    assert find_site(tmp_path, "node1") is None


def test_parents_go_with_the_last_of_them(tmp_path: Path) -> None:
    root = make_v1(tmp_path / "cgroup", "memory")
    first, second = find(root), find_site(root, "node2")
    assert second is not None
    first.remove()
    assert not first.is_ready()
    assert second.is_ready()
    second.remove()
    assert not (root / "memory" / "kohaku").exists()


@pytest.mark.parametrize(
    ("key", "file", "text"),
    [
        ("unified", "memory.events", "low 0\nhigh 0\nmax 12\noom 2\noom_kill 2\n"),
        ("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
    ],
)
def test_oom_kills_are_the_kernels_own_count(
    tmp_path: Path, key: str, file: str, text: str
) -> None:
    group = Group({key: str(tmp_path)})
    assert group.count_oom_kills() == 0
    (tmp_path / file).write_text(text)
    assert group.count_oom_kills() == 2


def test_usage_of_v2_leaves_out_pages_that_can_be_dropped(tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 2000000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 300\n")
    (tmp_path / "cgroup.procs").write_text("1\n2\n")
    assert Group({"unified": str(tmp_path)}).read_usage() == (2.5, 700, 2)


def test_v2_freezes_kills_and_says_so_by_its_files(tmp_path: Path) -> None:
    group = Group({"unified": str(tmp_path)})
    for name, text in {"procs": "1\n", "kill": "", "freeze": "0", "events": "frozen 0\n"}.items():
        (tmp_path / f"cgroup.{name}").write_text(text)
    group.freeze()
    assert (tmp_path / "cgroup.freeze").read_text() == "1"
    assert not group.is_frozen()
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    assert group.is_frozen()
    assert group.kill()
    assert (tmp_path / "cgroup.kill").read_text() == "1"
    (tmp_path / "cgroup.procs").write_text("")
    assert not group.kill()


def make_deserted(root: Path, site: str) -> Path:
    """Leave what a killed runner leaves."""
    folder = root / "memory" / "kohaku" / site
    (folder / "keepers").mkdir(parents=True)
    return folder


def test_what_killed_runners_left_goes_when_another_opens(tmp_path: Path) -> None:
    root = make_v1(tmp_path / "cgroup", "memory")
    whole, half, busy = (make_deserted(root, site) for site in ("whole", "half", "busy"))
    (half / "keepers").rmdir()
    (busy / "7-1").mkdir()  # a launch that still runs
    find(root)
    assert not whole.exists()
    assert not half.exists()
    assert (busy / "7-1").exists()


def test_what_a_living_runner_prepared_stays_until_it_ends(tmp_path: Path) -> None:
    root = make_v1(tmp_path / "cgroup", "memory")
    script = (
        "import sys; from pathlib import Path;"
        "from kohaku_daemon.backends.process.cgroups import find_site;"
        "find_site(Path(sys.argv[1]), 'idle'); print('ready', flush=True); sys.stdin.read()"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", script, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == b"ready\n"
        idle = root / "memory" / "kohaku" / "idle" / "keepers"
        find(root)
        assert idle.exists()
        runner.kill()
        runner.wait()
    find(root)
    assert not idle.exists()


def test_a_site_removed_while_it_is_being_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_v1(tmp_path / "cgroup", "memory")
    hold, removed = sites.hold, list[Path]()

    def hold_late(folder: Path) -> None:
        if not removed:
            removed.append(folder)
            folder.rmdir()
            folder.parent.rmdir()
        hold(folder)

    monkeypatch.setattr(sites, "hold", hold_late)
    assert find(root).is_ready()
    assert removed == [root / "memory" / "kohaku" / "node1" / "keepers"]


@pytest.mark.skipif(os.geteuid() != 0, reason="cgroups of the machine are root's")
def test_the_machines_own_cgroups_are_held_and_removed() -> None:
    root = ProcessSettings().cgroup_root
    first = find_site(root, f"test-{os.getpid()}-first")
    assert first is not None
    second = find_site(root, f"test-{os.getpid()}-second")
    assert second is not None
    assert first.is_ready()
    for parent in first.parents.values():
        sites.let_go(parent / "keepers")  # as its end would
    third = find_site(root, f"test-{os.getpid()}-second")
    assert third == second
    assert not any(parent.exists() for parent in first.parents.values())
    second.remove()
    assert not any(parent.exists() for parent in second.parents.values())
