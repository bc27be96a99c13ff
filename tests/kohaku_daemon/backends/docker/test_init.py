"""The first process of a container, run as that of a pid namespace: the assembled code itself.

Where the machine has ``qemu-aarch64-static`` that of ARM runs here as well.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohaku_daemon.backends.docker.init import (
    REFUSED,
    STATUS_SIZE,
    Stage,
    Status,
    find_candidates,
    make_arguments,
    make_init,
    parse_status,
)
from tests.kohaku_daemon.backends.conformance import DEADLINE_S, open_folder
from tests.kohaku_daemon.backends.docker.assemble import (
    MACHINES,
    assemble,
    can_assemble,
    source_of,
)

#: Of the ARM source that was assembled and tried, for machines that can do neither.
ARM_SOURCE = "f995307029989093659da10d1fce847841fda371e4c4849fcce5cc51cf218766"

EMULATORS = {platform.machine(): [], "aarch64": ["qemu-aarch64-static"]}
RUNNABLE = [
    machine
    for machine in MACHINES
    if machine == platform.machine() or shutil.which("".join(EMULATORS.get(machine, [""])))
]
#: Of this run of the tests alone: the kernel counts a user's processes wherever they are.
USER = 1_000_000_000 + os.getpid()

pytestmark = pytest.mark.skipif(
    platform.machine() not in MACHINES or os.geteuid() != 0,
    reason="it is written for x86-64 and aarch64, and only root makes pid namespaces",
)


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; fail after the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state_of(pid: int) -> str:
    """Give the letter of a process's state; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


@dataclass
class Running:
    """One run of init."""

    process: subprocess.Popen[str]
    folder: Path

    @property
    def pid(self) -> int:
        """Of init, as seen from outside."""
        return children_of(self.process.pid)[0]

    @property
    def program(self) -> int:
        """Pid of the program, as seen from outside. It has begun and no orphan is left to init."""
        (program,) = children_of(self.pid)
        return program

    def wait(self) -> int:
        """Wait for its end; give its exit code."""
        return self.process.wait(DEADLINE_S)

    def status(self) -> Status | None:
        path = self.folder / "status"
        return parse_status(path.read_bytes()) if path.exists() else None

    def has_begun(self) -> bool:
        status = self.status()
        return status is not None and status.stage is Stage.BEGUN

    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def complaint(self) -> str:
        """Give what init itself has said, once it has ended."""
        return self.process.communicate(timeout=DEADLINE_S)[1]


class Rig:
    """Runs init in pid namespaces, in a folder that every user may pass through."""

    def __init__(self, machine: str, folder: Path) -> None:
        self.folder = folder
        self.files = [str(folder / name) for name in ("stdout", "stderr", "status")]
        self.init = folder / "init"
        made = make_init(machine)
        assert made is not None
        self.init.write_bytes(made)
        self.init.chmod(0o755)
        self._emulator = EMULATORS[machine]
        self._all: list[Running] = []

    def arguments(self, candidates: Sequence[str], argv: Sequence[str]) -> list[str]:
        stdout, stderr, status = self.files
        return make_arguments(stdout, stderr, status, candidates, argv)

    def command(self, *arguments: str, through: Sequence[str] = ()) -> list[str]:
        """Make a command line: unshare, other programs between, init."""
        return [
            "unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *through,
            *self._emulator, str(self.init), *arguments,
        ]  # fmt: skip

    def start_command(self, command: Sequence[str], **others: str) -> Running:
        process = subprocess.Popen(
            command, cwd=self.folder, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=dict(os.environ) | others, text=True,
        )  # fmt: skip
        running = Running(process, self.folder)
        self._all.append(running)
        return running

    def start(
        self, candidates: Sequence[str], argv: Sequence[str], through: Sequence[str] = ()
    ) -> Running:
        return self.start_command(self.command(*self.arguments(candidates, argv), through=through))

    def run(self, candidates: Sequence[str], *argv: str) -> tuple[int, Status | None]:
        running = self.start(candidates, argv or ["name"])
        return running.wait(), running.status()

    def shell(self, script: str, *through: str) -> Running:
        return self.start(["/bin/sh"], ["sh", "-c", script], through)

    def write(self, name: str, text: str, mode: int) -> str:
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    def close(self) -> None:
        for running in self._all:
            if running.process.poll() is None:
                # A change of user has undone --kill-child (man 2 prctl).
                for pid in children_of(running.process.pid):
                    os.kill(pid, signal.SIGKILL)
                running.process.kill()
            running.process.communicate(timeout=DEADLINE_S)


@contextlib.contextmanager
def open_rig(machine: str) -> Iterator[Rig]:
    with open_folder() as folder:
        rig = Rig(machine, folder)
        try:
            yield rig
        finally:
            rig.close()


@pytest.fixture(params=RUNNABLE)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with open_rig(request.param) as rig:
        yield rig


@pytest.fixture
def native() -> Iterator[Rig]:
    """Make one for what an emulator cannot do: it has threads, and signals of its own."""
    with open_rig(platform.machine()) as rig:
        yield rig


def as_user(*more: str) -> list[str]:
    """Make the front of a command line: as an ordinary user, as Docker does it."""
    return [
        "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs",
        "--bounding-set=-all", *more,
    ]  # fmt: skip


# What it is made of


@pytest.mark.parametrize("machine", [machine for machine in MACHINES if can_assemble(machine)])
def test_the_code_is_what_its_source_says(machine: str) -> None:
    made = make_init(machine)
    assert made is not None
    assert made[-len(assemble(machine)) :] == assemble(machine)
    assert len(made) == 64 + 2 * 56 + len(assemble(machine))


def test_the_arm_source_is_the_one_that_was_tried() -> None:
    assert hashlib.sha256(source_of("aarch64").read_bytes()).hexdigest() == ARM_SOURCE


@pytest.mark.parametrize("machine", MACHINES)
def test_it_is_small_and_needs_nobody(machine: str) -> None:
    made = make_init(machine)
    assert made is not None
    assert len(made) < 2048
    # No interpreter (PT_INTERP 3) and nothing dynamic (2): what to load, and the stack's kind.
    kinds = [struct.unpack_from("<I", made, 64 + 56 * number)[0] for number in range(2)]
    assert kinds == [1, 0x6474E551]


def test_there_is_none_for_other_machines() -> None:
    assert make_init("riscv64") is None


def test_both_sources_agree_on_every_number_of_ours() -> None:
    names = "[A-Z_]+"
    settings = [
        dict(re.findall(rf"\.set ({names}), (\S+)", source_of(machine).read_text()))
        for machine in MACHINES
    ]
    for stage in Stage:
        assert {found[stage.name] for found in settings} == {str(stage.value)}
    ours = [
        {name: value for name, value in found.items() if not name.startswith(("SYS_", "RECORD"))}
        for found in settings
    ]
    for found in ours:
        del found["PIPE"], found["SCRATCH"], found["FRAME"]
    assert ours[0] == ours[1]


# How the program ends


@pytest.mark.parametrize("code", [0, 3, 125, 126, 127, 137, 255])
def test_a_code_is_told_as_it_was_returned(rig: Rig, code: int) -> None:
    before = time.time_ns()
    exit_code, status = rig.run(["/bin/sh"], "sh", "-c", f"exit {code}")
    assert exit_code == code
    assert status is not None
    assert (status.stage, status.code, status.signal) == (Stage.ENDED, code, None)
    assert status.began_at_ns is not None
    assert status.ended_at_ns is not None
    assert before <= status.began_at_ns <= status.ended_at_ns <= time.time_ns()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_signal_is_not_taken_for_a_code(rig: Rig, number: int) -> None:
    exit_code, status = rig.run(["/bin/sh"], "sh", "-c", f"kill -{number} $$")
    assert exit_code == 128 + number
    assert status is not None
    assert (status.stage, status.code, status.signal) == (Stage.ENDED, None, number)


def test_the_last_signal_of_all_is_one(native: Rig) -> None:
    exit_code, status = native.run(["/bin/sh"], "sh", "-c", "kill -64 $$")
    assert exit_code == 128 + 64
    assert status is not None
    assert status.signal == 64


def test_what_runs_has_begun_and_not_ended(rig: Rig) -> None:
    running = rig.shell("until [ -e go ]; do sleep 0.01; done")
    until(running.has_begun)
    status = running.status()
    assert status is not None
    assert (status.ended_at_ns, status.wait_status, status.code) == (None, None, None)
    rig.write("go", "", 0o644)
    assert running.wait() == 0


# Finding it


@pytest.mark.parametrize(
    ("name", "text", "mode", "number", "code"),
    [
        ("not-executable", "#!/bin/sh\n", 0o644, errno.EACCES, 126),
        ("script-without-line", "echo hello\n", 0o755, errno.ENOEXEC, 126),
        ("empty", "", 0o755, errno.ENOEXEC, 126),
        ("interpreter-missing", "#!/nowhere/sh\n", 0o755, errno.ENOENT, 127),
        ("interpreter-not-executable", "#!/etc/passwd\n", 0o755, errno.EACCES, 126),
    ],
)
def test_a_file_that_cannot_be_run(
    rig: Rig, name: str, text: str, mode: int, number: int, code: int
) -> None:
    exit_code, status = rig.run([rig.write(name, text, mode)])
    assert exit_code == code
    assert status is not None
    assert (status.stage, status.errno) == (Stage.NO_PROGRAM, number)
    assert (status.began_at_ns, status.wait_status) == (None, None)
    assert status.ended_at_ns is not None


@pytest.mark.parametrize(
    ("candidates", "number", "code"),
    [
        ([], errno.ENOENT, 127),
        (["/nowhere/program"], errno.ENOENT, 127),
        (["/etc/passwd/program"], errno.ENOENT, 127),
        (["/etc"], errno.EACCES, 126),
        (["/nowhere/a", "/etc/passwd", "/nowhere/b"], errno.EACCES, 126),
        (["/" + "x" * 300], errno.ENAMETOOLONG, 126),
    ],
)
def test_a_path_that_leads_to_no_program(
    rig: Rig, candidates: list[str], number: int, code: int
) -> None:
    exit_code, status = rig.run(candidates)
    assert exit_code == code
    assert status is not None
    assert (status.stage, status.errno) == (Stage.NO_PROGRAM, number)


def test_the_first_candidate_that_can_be_run_is(rig: Rig) -> None:
    passed_over = [
        "/nowhere/program", "/etc/passwd/program", "/etc",
        rig.write("not-executable", "", 0o644),
        rig.write("no-interpreter", "#!/nowhere/sh\n", 0o755),
    ]  # fmt: skip
    first = rig.write("first", "#!/bin/sh\nexit 1\n", 0o755)
    second = rig.write("second", "#!/bin/sh\nexit 2\n", 0o755)
    assert rig.run([*passed_over, first, second])[0] == 1
    assert rig.run([*passed_over, second, first])[0] == 2


def test_a_program_of_unknown_format_ends_the_search(rig: Rig) -> None:
    unknown = rig.write("unknown", "\0\1\2", 0o755)
    _, status = rig.run([unknown, "/bin/true"])
    assert status is not None
    assert status.errno == errno.ENOEXEC


def test_candidates_are_those_of_a_shell() -> None:
    assert find_candidates("sh", "/usr/bin:/bin") == ["/usr/bin/sh", "/bin/sh"]
    assert find_candidates("sh", ":/bin:") == ["sh", "/bin/sh", "sh"]
    assert find_candidates("bin/sh", "/usr/bin") == ["bin/sh"]
    assert find_candidates("", "/usr/bin") == []


def test_arguments_that_init_would_misread_are_refused() -> None:
    assert make_arguments("o", "e", "s", ["/a", "b"], ["a", ""]) == [
        "o", "e", "s", "/a", "b", "", "a", "",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="name"):
        make_arguments("o", "e", "s", ["/a"], [])
    with pytest.raises(ValueError, match="empty"):
        make_arguments("o", "e", "s", ["/a", ""], ["a"])


# What the program gets


def test_arguments_and_environment_come_whole(rig: Rig) -> None:
    argv = ["sh", "-c", "cat /proc/$$/cmdline", "a b", "", "\N{SNOWMAN}\n", *["x" * 1000] * 1000]
    running = rig.start_command(rig.command(*rig.arguments(["/bin/sh"], argv)), LONG="y" * 100_000)
    assert running.wait() == 0
    assert running.stdout() == "".join(f"{one}\0" for one in argv)

    running = rig.start_command(
        rig.command(*rig.arguments(["/usr/bin/printenv"], ["printenv", "LONG"])),
        LONG="y" * 100_000,
    )
    assert running.wait() == 0
    assert running.stdout().endswith("\0" + "y" * 100_000 + "\n")


def test_no_signal_is_blocked_or_ignored_whoever_started_us(rig: Rig) -> None:
    ignore = ["sh", "-c", "trap '' CHLD PIPE USR1 WINCH; exec \"$@\"", "sh"]
    running = rig.shell("grep -E '^Sig(Blk|Ign)' /proc/self/status; exit 5", *ignore)
    assert running.wait() == 5
    assert running.stdout() == f"SigBlk:\t{0:016x}\nSigIgn:\t{0:016x}\n"


def test_it_leads_a_session_and_has_three_files(rig: Rig) -> None:
    running = rig.shell("cut -d' ' -f5,6 /proc/self/stat; echo $$ $$; ls /proc/$$/fd")
    assert running.wait() == 0
    leads, shell, *files = running.stdout().splitlines()
    assert leads == shell, "its group and its session are its own"
    assert files == ["0", "1", "2"]


def test_output_is_appended(rig: Rig) -> None:
    for name in ("stdout", "stderr"):
        rig.write(name, f"old {name}\n", 0o644)
    assert rig.shell("echo out; echo err >&2").wait() == 0
    assert (rig.folder / "stdout").read_text() == "old stdout\nout\n"
    assert (rig.folder / "stderr").read_text() == "old stderr\nerr\n"


def test_both_outputs_may_be_one_file(rig: Rig) -> None:
    rig.files[1] = rig.files[0]
    running = rig.shell("echo one; echo two >&2; echo three")
    assert running.wait() == 0
    assert running.stdout() == "one\ntwo\nthree\n"


def test_init_holds_neither_output_nor_lets_the_program_hold_its_files(rig: Rig) -> None:
    running = rig.shell("exec >&- 2>&-; until [ -e go ]; do sleep 0.01; done; exit 4")
    until(running.has_begun)
    until(lambda: "sh" in Path(f"/proc/{running.program}/comm").read_text())
    held = {os.readlink(path) for path in Path(f"/proc/{running.pid}/fd").iterdir()}
    assert rig.files[2] in held
    assert not held & set(rig.files[:2])
    rig.write("go", "", 0o644)
    assert running.wait() == 4


def test_an_old_status_is_gone_before_anything_runs(rig: Rig) -> None:
    assert rig.shell("exit 7").wait() == 7
    assert rig.shell(f"wc -c < {rig.files[2]}; exit 8").wait() == 8
    assert int((rig.folder / "stdout").read_text()) <= STATUS_SIZE // 2
    status = parse_status(Path(rig.files[2]).read_bytes())
    assert status is not None
    assert status.code == 8


# Others inside


def test_orphans_are_waited_for(rig: Rig) -> None:
    orphan = "until [ -e go ]; do sleep 0.01; done"
    running = rig.shell(
        f"for i in 1 2 3 4 5 6 7 8 9; do (({orphan}) &); done\n"
        "until [ -e end ]; do sleep 0.01; done"
    )
    until(lambda: running.has_begun() and len(children_of(running.pid)) == 10)
    # Stopped, it gets one signal for all of them.
    init = running.pid
    os.kill(init, signal.SIGSTOP)
    rig.write("go", "", 0o644)
    until(lambda: [state_of(pid) for pid in children_of(init)].count("Z") == 9)
    os.kill(init, signal.SIGCONT)
    until(lambda: len(children_of(init)) == 1)
    rig.write("end", "", 0o644)
    assert running.wait() == 0


def test_what_outlives_the_program_ends_with_it(rig: Rig) -> None:
    running = rig.shell(
        "(setsid sh -c \"trap '' TERM HUP; touch there; sleep 1000\" &)\n"
        "until [ -e there ]; do sleep 0.01; done; until [ -e end ]; do sleep 0.01; done; exit 6"
    )
    until((rig.folder / "there").exists)
    until(lambda: len(children_of(running.pid)) == 2)
    inside = children_of(running.pid)
    rig.write("end", "", 0o644)
    assert running.wait() == 6
    assert [state_of(pid) for pid in inside] == ["", ""]
    status = running.status()
    assert status is not None
    assert status.code == 6


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGWINCH],
)
def test_a_signal_reaches_the_whole_tree(rig: Rig, number: int) -> None:
    member = (
        f'trap "echo got > seen-$1" {number}; touch there-$1\n'
        "until [ -s seen-$1 ]; do sleep 0.01; done\n"
    )
    rig.write("member", member, 0o644)
    # A shell has what runs in its background ignore some of them.
    start = "env --default-signal sh member"
    running = rig.shell(
        f"{start} child & setsid {start} session & ({start} orphan &)\n"
        "set program; . ./member; until [ -e end ]; do sleep 0.01; done"
    )
    names = ["child", "session", "orphan", "program"]
    until(lambda: all((rig.folder / f"there-{name}").exists() for name in names))
    os.kill(running.pid, number)
    until(lambda: all((rig.folder / f"seen-{name}").exists() for name in names))
    rig.write("end", "", 0o644)
    assert running.wait() == 0


def test_a_signal_from_inside_is_for_all_as_well(rig: Rig) -> None:
    running = rig.shell("trap 'exit 9' USR2; kill -USR2 1; while :; do sleep 0.01; done")
    assert running.wait() == 9


def test_a_program_that_ignores_sigterm_goes_on_until_init_is_killed(rig: Rig) -> None:
    running = rig.shell("trap '' TERM; trap 'touch asked' USR1; touch ready; "
                        "while :; do sleep 0.01; done")  # fmt: skip
    until((rig.folder / "ready").exists)
    init, program = running.pid, running.program
    os.kill(init, signal.SIGTERM)
    os.kill(init, signal.SIGUSR1)  # handed on after SIGTERM or before, it is still there for it
    until((rig.folder / "asked").exists)
    assert running.has_begun()
    os.kill(init, signal.SIGKILL)
    running.wait()
    assert state_of(program) == ""
    assert running.has_begun(), "nobody was left to say how it ended"


def test_the_end_by_a_signal_that_was_handed_on_is_told(rig: Rig) -> None:
    running = rig.start(["/bin/sleep"], ["sleep", "1000"])
    until(running.has_begun)
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait() == 128 + signal.SIGTERM
    status = running.status()
    assert status is not None
    assert status.signal == signal.SIGTERM


def test_a_program_that_stops_has_not_ended(rig: Rig) -> None:
    running = rig.shell("touch ready; until [ -e go ]; do sleep 0.01; done; exit 3")
    until((rig.folder / "ready").exists)
    program = running.program
    os.kill(program, signal.SIGSTOP)
    until(lambda: state_of(program) == "T")
    until(lambda: state_of(running.pid) == "S")
    assert running.has_begun()
    rig.write("go", "", 0o644)
    os.kill(program, signal.SIGCONT)
    assert running.wait() == 3


def test_init_may_be_stopped_and_go_on(rig: Rig) -> None:
    running = rig.shell("trap 'exit 3' USR1; touch ready; while :; do sleep 0.01; done")
    until((rig.folder / "ready").exists)
    init = running.pid
    os.kill(init, signal.SIGSTOP)
    until(lambda: state_of(init) == "T")
    os.kill(init, signal.SIGCONT)
    os.kill(init, signal.SIGUSR1)
    assert running.wait() == 3


# Where it is hard


def test_as_an_ordinary_user_without_any_right(rig: Rig) -> None:
    for path in rig.files:
        os.close(os.open(path, os.O_CREAT))
        os.chown(path, USER, USER)
        os.chmod(path, 0o600)
    running = rig.shell("trap 'exit 5' TERM; id -u; grep NoNewPrivs /proc/self/status; "
                        "while :; do sleep 0.01; done", *as_user())  # fmt: skip
    until(lambda: "NoNewPrivs" in running.stdout())
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait() == 5
    assert running.stdout() == f"{USER}\nNoNewPrivs:\t1\n"


def test_no_process_left_to_have(native: Rig) -> None:
    for path in native.files:
        os.close(os.open(path, os.O_CREAT))
        os.chown(path, USER, USER)
    running = native.shell("true", "prlimit", "--nproc=1", *as_user())
    assert running.wait() == REFUSED
    status = running.status()
    assert status is not None
    assert (status.stage, status.errno) == (Stage.NO_PROCESS, errno.EAGAIN)


@pytest.mark.parametrize(("number", "stage"), [(0, Stage.NO_STDOUT), (1, Stage.NO_STDERR)])
def test_an_output_that_cannot_be_opened_is_on_record(rig: Rig, number: int, stage: Stage) -> None:
    rig.files[number] = str(rig.folder)
    exit_code, status = rig.run(["/bin/true"])
    assert exit_code == REFUSED
    assert status is not None
    assert (status.stage, status.errno, status.began_at_ns) == (stage, errno.EISDIR, None)


def test_a_status_that_cannot_be_opened_is_complained_of(rig: Rig) -> None:
    rig.files[2] = "/nowhere/status"
    running = rig.shell("touch ran")
    assert running.complaint() == "kohaku-init: errno 002: /nowhere/status\n"
    assert running.wait() == REFUSED
    assert not (rig.folder / "ran").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["o", "e", "s"], ["o", "e", "s", "/bin/true", "true"], ["o", "e", "s", "/bin/true", ""]],
)
def test_wrong_arguments_are_complained_of(rig: Rig, arguments: list[str]) -> None:
    running = rig.start_command(rig.command(*arguments))
    assert running.complaint().startswith("kohaku-init: errno 022: wanted: STDOUT STDERR STATUS")
    assert running.wait() == REFUSED
    assert not (rig.folder / "s").exists()


def test_it_refuses_to_be_anything_but_the_first(rig: Rig) -> None:
    arguments = rig.arguments(["/bin/true"], ["true"])
    command = rig.command(*arguments)
    running = rig.start_command(command[command.index("--kill-child") + 1 :])
    assert "not the first process of a pid namespace" in running.complaint()
    assert running.wait() == REFUSED
    assert not Path(rig.files[2]).exists()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_it_does_not_mix_up_outputs_when_started_without_files(rig: Rig, closed: str) -> None:
    running = rig.shell("touch ran", "sh", "-c", f'exec "$@" {closed}', "sh")
    assert running.complaint() == f"kohaku-init: errno 009: {rig.files[2]}\n"
    assert running.wait() == REFUSED
    assert not (rig.folder / "ran").exists()


def test_a_disk_that_the_task_has_filled_loses_no_exit(rig: Rig) -> None:
    disk = rig.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        rig.files = [str(disk / Path(path).name) for path in rig.files]
        running = rig.shell("cat /dev/zero > disk/full; echo more; exit 11")
        assert running.wait() == 11
        assert (disk / "stdout").read_text() == "", "the disk was not full"
        status = parse_status((disk / "status").read_bytes())
    finally:
        subprocess.run(["umount", disk], check=True)
    assert status is not None
    assert status.code == 11


# Reading it


def record(stage: int, value: int, at_ns: int = 1, magic: bytes = b"kohaku01") -> bytes:
    return struct.pack("<8sIiq", magic, stage, value, at_ns)


BEGUN, ENDED = record(1, 0, 5), record(2, 3 << 8, 7)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (BEGUN, Status(Stage.BEGUN, began_at_ns=5)),
        (BEGUN + ENDED, Status(Stage.ENDED, 5, 7, wait_status=3 << 8)),
        # The disk was full when it began, and no more when it ended.
        (ENDED, Status(Stage.ENDED, ended_at_ns=7, wait_status=3 << 8)),
        (BEGUN + record(2, 9 | 0x80), Status(Stage.ENDED, 5, 1, wait_status=9 | 0x80)),
        (record(3, errno.ENOENT), Status(Stage.NO_STDOUT, ended_at_ns=1, errno=errno.ENOENT)),
        (record(6, errno.EACCES), Status(Stage.NO_PROGRAM, ended_at_ns=1, errno=errno.EACCES)),
    ],
)
def test_what_init_writes_is_read(data: bytes, wanted: Status) -> None:
    assert parse_status(data) == wanted


@pytest.mark.parametrize(
    "data",
    [
        b"", BEGUN[:-1], BEGUN + b"\n", BEGUN + ENDED[:-1], BEGUN + ENDED + BEGUN,
        ENDED + BEGUN, BEGUN + BEGUN, ENDED + ENDED, record(6, 2) + ENDED, BEGUN + record(6, 2),
        bytes(len(BEGUN)), BEGUN + bytes(len(ENDED)),
        record(1, 0, magic=b"kohaku02"), record(1, 1), record(1, 0, -1), record(0, 0), record(7, 1),
        record(6, 0), record(6, -2), record(6, 4096),
        # Stopped, going on, no signal, beyond a byte.
        record(2, 0x137F), record(2, 0xFFFF), record(2, 0x80), record(2, 0x10000), record(2, -1),
        record(2, 65), record(2, 9 | 0x100),
    ],
)  # fmt: skip
def test_what_init_does_not_write_says_nothing(data: bytes) -> None:
    assert parse_status(data) is None


PART = st.one_of(
    st.binary(max_size=60),
    st.builds(
        record, st.integers(0, 8), st.integers(-5, 1 << 17), st.integers(-2, 1 << 62),
        st.sampled_from([b"kohaku01", b"kohaku00"]),
    ),
)  # fmt: skip


@given(st.lists(PART, max_size=3).map(b"".join))
def test_any_bytes_are_read_or_say_nothing(data: bytes) -> None:
    status = parse_status(data)
    if status is None:
        return
    ended = status.stage is Stage.ENDED
    assert ended == (status.wait_status is not None)
    assert ended == ((status.code is None) != (status.signal is None))
    assert (status.errno is not None) == (status.stage not in (Stage.BEGUN, Stage.ENDED))
