"""Programs behind walls, with either first process of their namespace."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kohaku_daemon.backends.process.test_init import needs_seed, run_apart

SCRIPT = """
from kohaku_daemon.backends.process import starting
if {is_forked}:
    starting._find_seed = lambda: None
starter = starting.Starter()
namespaces = [os.readlink("/proc/self/ns/" + name) for name, _ in starting._NAMESPACES]
command = "cat /proc/1/comm; echo $$; touch /kohaku-x || hostname; pwd; exec >&- 2>&-; sleep 600"
plan = dict(
    argv=["sh", "-c", command], env=dict(os.environ), workdir={scratch!r}, scratch={scratch!r},
    uid=-1, cores=[], address_space=0, memory=0, group=None,
    sandbox=dict(user=False, hostname="walled", hidden=[], writable=[], tmp_size=0),
)
for _ in range(2):
    source, sink = os.pipe()
    program, init = starter.start(plan, [sink, sink])
    os.close(sink)
    with os.fdopen(source) as said:
        print(*said.read().split("\\n"), sep="|")
    os.kill(init, signal.SIGKILL)
    print(*[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (program, init)])
print([os.readlink("/proc/self/ns/" + name) for name, _ in starting._NAMESPACES] == namespaces)
plan["workdir"] = "/no/such/folder"
try:
    starter.start(plan, [1, 2])
except starting.StepFailed as error:
    print(error)
print(os.getcwd(), os.path.exists("/proc/self/fd"))
"""


@needs_seed
@pytest.mark.parametrize("is_forked", [False, True])
def test_what_is_started_behind_walls_leaves_its_starter_where_it_was(
    tmp_path: Path, is_forked: bool
) -> None:
    (tmp_path / "scratch").mkdir()
    scratch = str(tmp_path / "scratch")
    lines = run_apart(SCRIPT.format(is_forked=is_forked, scratch=scratch))
    first, over, *rest = lines
    name, pid, refused, *_ = first.split("|")
    assert name == "kohaku-init"
    assert int(pid) <= 3
    assert "Read-only file system" in refused
    assert f"|walled|{scratch}|" in first
    assert over == "-9 -9"
    again, _, is_back, failure, place = rest
    assert again == first
    assert is_back == "True"
    assert failure == (
        "cannot enter its working directory /no/such/folder: No such file or directory"
    )
    assert place == "/ True"
