"""Which mounts are given, and how none leads where it must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from kohaku_daemon.backends.base import BackendFailed
from kohaku_daemon.backends.docker.mounts import MountRules, cover, resolve_fixed
from protocol.models.task import Mount


@pytest.fixture
def rules(tmp_path: Path) -> MountRules:
    for name in ("data/set", "own/secret", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    return MountRules(
        roots=(tmp_path / "data",), allows_any=True, hidden=(tmp_path / "own" / "secret",)
    )


def resolve(rules: MountRules, source: Path, target: str = "/x", *, trusted: bool = False) -> str:
    (written,) = rules.resolve([Mount(str(source), target)], trusted=trusted)
    assert (written["Type"], written["Target"]) == ("bind", target)
    return str(written["Source"])


def test_a_root_and_what_is_below_it_is_given(rules: MountRules, tmp_path: Path) -> None:
    assert resolve(rules, tmp_path / "data") == str(tmp_path / "data")
    assert resolve(rules, tmp_path / "data" / "set") == str(tmp_path / "data" / "set")


def test_a_neighbour_whose_name_begins_like_a_root_is_not_below_it(
    rules: MountRules, tmp_path: Path
) -> None:
    (tmp_path / "data2").mkdir()
    with pytest.raises(BackendFailed, match="is not below a folder that tasks may mount"):
        resolve(rules, tmp_path / "data2")


@pytest.mark.parametrize("path", ["data/../elsewhere", "data/out", "data/out/deeper"])
def test_neither_dots_nor_links_lead_out(rules: MountRules, tmp_path: Path, path: str) -> None:
    (tmp_path / "data" / "out").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "deeper").mkdir()
    with pytest.raises(BackendFailed, match="is not below"):
        resolve(rules, tmp_path / path)


def test_a_link_that_stays_inside_is_followed(rules: MountRules, tmp_path: Path) -> None:
    (tmp_path / "data" / "latest").symlink_to("set")
    assert resolve(rules, tmp_path / "data" / "latest") == str(tmp_path / "data" / "set")


def test_operators_mount_anything_but_the_daemons_own(rules: MountRules, tmp_path: Path) -> None:
    assert resolve(rules, tmp_path / "elsewhere", trusted=True) == str(tmp_path / "elsewhere")
    for path in ("own", "own/secret"):
        with pytest.raises(BackendFailed, match="data of the cluster's daemons"):
            resolve(rules, tmp_path / path, trusted=True)


def test_operators_have_no_more_where_the_node_says_so(tmp_path: Path) -> None:
    with pytest.raises(BackendFailed, match="not operators either"):
        resolve(MountRules(), tmp_path, trusted=True)


def test_what_is_outside_is_refused_whether_or_not_it_is_there(
    rules: MountRules, tmp_path: Path
) -> None:
    words = []
    for name in ("elsewhere", "nothing"):
        with pytest.raises(BackendFailed) as caught:
            resolve(rules, tmp_path / name)
        words.append(caught.value.message.replace(name, "NAME"))
    assert words[0] == words[1], "nobody learns what there is"


def test_what_is_inside_must_be_there_and_be_a_file_or_folder(
    rules: MountRules, tmp_path: Path
) -> None:
    with pytest.raises(BackendFailed, match="no such file or directory"):
        resolve(rules, tmp_path / "data" / "nothing")
    with pytest.raises(BackendFailed, match="neither a file nor a folder"):
        MountRules(roots=(Path("/dev"),)).resolve([Mount("/dev/null", "/x")], trusted=False)


@pytest.mark.parametrize(
    "target", ["/", "/.kohaku", "/.kohaku/init", "/proc/x", "/shared/x", "/local_temp", "x"]
)
def test_no_mount_hides_what_every_container_needs(
    rules: MountRules, tmp_path: Path, target: str
) -> None:
    with pytest.raises(BackendFailed, match="nothing can be mounted at"):
        resolve(rules, tmp_path / "data", target)


def test_the_administrators_mounts_are_written_and_what_is_hidden_is_covered(
    tmp_path: Path,
) -> None:
    (tmp_path / "a" / "own").mkdir(parents=True)
    hidden = [tmp_path / "a" / "own", tmp_path / "elsewhere"]
    bound, covered = resolve_fixed([f"{tmp_path}/a:/a:ro"], hidden)
    assert (bound["Target"], bound["ReadOnly"]) == ("/a", True)
    assert (covered["Type"], covered["Target"]) == ("tmpfs", "/a/own")


@pytest.mark.parametrize("text", ["/a", "a:/b", "/tmp:b", "/tmp:/b:rx", "/tmp:/.kohaku", ""])
def test_a_mount_of_the_configuration_that_makes_no_sense_says_how(text: str) -> None:
    with pytest.raises(BackendFailed, match="SOURCE:DESTINATION"):
        list(resolve_fixed([text], []))


def test_only_what_is_below_is_covered(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert list(cover(str(tmp_path / "a"), "/x", [tmp_path / "a", tmp_path])) == []
