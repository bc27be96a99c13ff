"""What a task can reach, tried by tasks; and whether what is said of it is true."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

import msgspec
import pytest

from kohaku_daemon.backends.base import BackendFailed, TaskFolders
from kohaku_daemon.core.workload import Handle, Launch
from protocol.models.task import Cause, Claim, Exit, TaskSpec
from tests.kohaku_daemon.backends.conformance import Rig
from tests.kohaku_daemon.backends.process.forms import Form, grouped, ungrouped, walled
from tests.kohaku_daemon.backends.process.programs import PYTHON, sh

IS_ROOT = os.geteuid() == 0


async def ask(rig: Rig, script: str, claim: Claim | None = None) -> str:
    """Run a script and give all it said."""
    _, folders = await rig.run(sh(script), claim)
    outputs = (folders.stdout, folders.stderr)
    return "".join(path.read_text() for path in outputs if path.exists())


@pytest.fixture
def vault(rig: Rig) -> Path:
    """Make a file of the daemon's below the hidden folder."""
    path = rig.root / "vault.sqlite"
    path.write_text("secret")
    path.chmod(0o644)
    return path


@walled
async def test_the_daemons_data_cannot_be_read(rig: Rig, vault: Path) -> None:
    said = await ask(rig, f"cat {vault}; ls {rig.root} {rig.root}/state; ls /proc/1/root/")
    assert "secret" not in said
    assert "vault" not in said.replace(str(vault), "")
    assert "/proc/1/root/': Permission denied" in said


async def test_its_own_scratch_folder_is_there_and_another_ones_is_not(
    rig: Rig, form: Form
) -> None:
    _, other = await rig.run(sh("echo mine > file"))
    said = await ask(rig, f"echo yours > file && cat file; pwd; cat {other.scratch}/file")
    assert said.startswith("yours\n")
    if form.is_walled or IS_ROOT:
        assert "mine" not in said
    assert (other.scratch / "file").read_text() == "mine\n"


@walled
async def test_other_processes_cannot_be_seen(rig: Rig) -> None:
    said = await ask(rig, "ls /proc | grep -c '^[0-9]'; kill -0 " + str(os.getpid()))
    # init, the shell, ls and grep.
    assert int(said.split()[0]) <= 4
    assert "No such process" in said


@walled
async def test_the_machine_cannot_be_written_to(rig: Rig) -> None:
    said = await ask(
        rig,
        "for d in / /etc /usr /var /var/lib /run /sys /dev;"
        "do touch $d/kohaku-x && echo WROTE; done;"
        "mount -t tmpfs none /mnt && echo WROTE; umount /tmp && echo WROTE;"
        "mount -o remount,rw / && echo WROTE; hostname other && echo WROTE; exit 0",
    )
    assert "WROTE" not in said
    assert "Read-only file system" in said


@walled
async def test_temporary_folders_are_its_own(rig: Rig) -> None:
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        said = await ask(rig, f"touch {folder}/kohaku-mine && ls -A {folder}")
        assert set(said.split()) <= {"kohaku-mine", rig.root.name}
        assert "kohaku-mine" not in os.listdir(folder)


@walled
async def test_its_host_name_is_its_own_and_resolves(rig: Rig) -> None:
    script = "import socket; n = socket.gethostname(); print(n, socket.gethostbyname(n))"
    handle, folders = await rig.start(sh(f"{PYTHON} -c '{script}'"))
    await rig.watch(handle).wait()
    assert folders.stdout.read_text() == f"task-{handle.data['task']} 127.0.1.1\n"
    assert not socket.gethostname().startswith("task-")


async def test_it_has_no_rights_to_gain(rig: Rig) -> None:
    said = await ask(rig, "cat /proc/self/status")
    status = dict(line.split(":", 1) for line in said.splitlines())
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[name], 16) == 0
    if IS_ROOT:
        assert int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    # posix_spawn of glibc ignores its own two, 32 and 33, in every program it starts.
    assert int(status["SigIgn"], 16) & ~(0b11 << 31) == 0
    assert int(status["SigBlk"], 16) == 0


@pytest.mark.skipif(not IS_ROOT, reason="only a runner that is root has users to give")
async def test_a_root_runner_gives_each_task_a_user_of_its_own(rig: Rig) -> None:
    first, second = [await ask(rig, "id -u; id -g; id -G") for _ in range(2)]
    assert len(set(first.split())) == 1
    assert first != second
    assert int(first.split()[0]) >= 0x70000000


async def test_nothing_of_the_runner_is_passed_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHAKU_TOKEN", "a credential")
    await rig.restart()  # a keeper that is started now
    said = await ask(rig, "env; ls -l /proc/self/fd; readlink /proc/$$/fd/0; umask")
    assert "credential" not in said
    descriptors = {line.split()[-3] for line in said.splitlines() if " -> " in line}
    assert descriptors <= {"0", "1", "2", "3"}, "3 is the folder that ls lists"
    assert "/dev/null\n0022" in said


async def test_its_variables_say_which_task_it_is(rig: Rig) -> None:
    launch, handle, folders = rig.launch(sh("env; pwd"))
    await rig.backend.start(launch, handle, folders)
    await rig.watch(handle).wait()
    *lines, folder = folders.stdout.read_text().splitlines()
    env = dict(line.split("=", 1) for line in lines)
    assert env["KOHAKU_TASK_ID"] == str(launch.task)
    assert env["KOHAKU_ATTEMPT"] == "1"
    assert env["KOHAKU_BATCH_ID"] == "5"
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["HOME"] == folder == str(folders.scratch)


@pytest.mark.parametrize(
    "script",
    [
        "echo one; echo two > /dev/stdout; echo three",
        "echo one >&2; echo two > /dev/stderr; echo three >&2",
        "echo one >&2; echo two | tee /dev/stderr > file; echo three >&2",
        "exec 1>&2; echo one; echo two > /dev/fd/1; echo three",
    ],
)
async def test_opening_its_own_output_again_loses_nothing(rig: Rig, script: str) -> None:
    assert await ask(rig, script) == "one\ntwo\nthree\n"


async def test_output_written_at_once_from_many_sides_is_whole(rig: Rig) -> None:
    line = "x" * 999
    many = "i=0; while [ $i -lt 500 ]; do echo $1; i=$((i+1)); done"
    script = f"for _ in 1 2 3 4; do ({many}) & done; wait"
    exit_, folders = await rig.run(sh(script, line))
    assert exit_.code == 0
    assert folders.stdout.read_text() == f"{line}\n" * 2000


async def test_what_closes_its_output_still_runs_to_its_end(rig: Rig) -> None:
    exit_, folders = await rig.run(sh("echo out; exec >&- 2>&-; sleep 0.3; exit 6"))
    assert exit_ == Exit(Cause.EXITED, code=6)
    assert folders.stdout.read_text() == "out\n"


async def test_a_full_disk_holds_nothing_up(rig: Rig, small_disk: Path) -> None:
    launch, handle, folders = rig.launch(sh("head -c 3000000 /dev/zero; echo end >&2; exit 6"))
    folders = dataclasses.replace(folders, stdout=small_disk / "stdout")
    await rig.backend.start(launch, handle, folders)
    exit_ = await rig.watch(handle).wait()
    lost = f"{3000000 - (1 << 20)} bytes of its output are lost: No space left on device"
    assert exit_ == Exit(Cause.EXITED, code=6, message=lost)
    assert folders.stdout.stat().st_size == 1 << 20
    assert folders.stderr.read_text() == "end\n"


async def test_what_is_said_of_it_is_what_it_has(rig: Rig, form: Form) -> None:
    launch, handle, folders = rig.launch(
        sh("id -u; cat /proc/self/cgroup; ls /proc | grep -c '^[0-9]'")
    )
    started = await rig.backend.start(launch, handle, folders)
    await rig.watch(handle).wait()
    uid, *lines, seen = folders.stdout.read_text().splitlines()
    for words in (started.note, rig.info.isolation):
        assert ("namespaces (" in words) == form.is_walled
        assert ("cgroup v" in words) == form.cgroups
        assert ("memory is per process" in words) == (not form.cgroups)
    assert f"uid {uid}" in started.note
    assert (int(seen) <= 4) == form.is_walled
    inside = [line for line in lines if line.endswith(f"/{launch.key}")]
    assert bool(inside) == form.cgroups
    assert ("memory" in rig.info.enforces) == form.cgroups


async def test_it_keeps_to_its_cores(rig: Rig) -> None:
    core = max(os.sched_getaffinity(0))
    script = "import os; print(os.sched_getaffinity(0))"
    said = await ask(rig, f"{PYTHON} -c '{script}'", Claim(cores=(core,)))
    assert said == f"{{{core}}}\n"
    if "cores" in rig.info.enforces:
        widen = f"import os; os.sched_setaffinity(0, range(os.cpu_count())); {script[11:]}"
        assert await ask(rig, f"{PYTHON} -c '{widen}'", Claim(cores=(core,))) == said


@grouped
async def test_a_program_that_outlives_a_killed_child_is_no_oom(rig: Rig) -> None:
    eat = f"{PYTHON} -c \"x = b'x' * {256 << 20}\""
    exit_, _ = await rig.run(sh(f"{eat}; exit 3"), Claim(memory=64 << 20))
    assert (exit_.code, exit_.signal) == (3, None)
    assert exit_.oom_kills >= 1


@ungrouped
async def test_memory_is_limited_even_without_a_cgroup(rig: Rig) -> None:
    limit = 256 << 20
    exit_, folders = await rig.run(rig.programs.exceeds_memory(limit), Claim(memory=limit))
    assert exit_ == Exit(Cause.EXITED, code=1)
    assert "MemoryError" in folders.stderr.read_text()


async def test_two_processes_share_a_limit_exactly_where_it_is_not_per_process(
    rig: Rig, form: Form
) -> None:
    hold = f"import subprocess, sys; x = b'x' * {160 << 20}"
    both = f"{hold}; sys.exit(subprocess.call([sys.executable, '-c', {hold!r}]))"
    exit_, _ = await rig.run(TaskSpec(command=(PYTHON, "-c", both)), Claim(memory=256 << 20))
    if form.cgroups:
        assert exit_.oom_kills >= 1
    else:
        assert exit_ == Exit(Cause.EXITED, code=0)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("#!/no/such/interpreter\n", "interpreter"),
        ("no mode bits", "not allowed to run"),
    ],
)
async def test_a_program_that_cannot_run_says_why(rig: Rig, script: str, words: str) -> None:
    launch, handle, folders = rig.launch(sh("exit 0"))
    program = folders.scratch / "program"
    program.write_text(script)
    program.chmod(0o755 if script.startswith("#!") else 0o644)
    await _fails_to_start(rig, launch, handle, folders, str(program), words)


@pytest.mark.parametrize(
    ("command", "words"), [((), "command is empty"), (("echo", "a\0b"), "embedded null")]
)
async def test_a_command_that_is_none_is_told(
    rig: Rig, command: tuple[str, ...], words: str
) -> None:
    launch, handle, folders = rig.launch(TaskSpec(command=command))
    with pytest.raises(BackendFailed, match=words):
        await rig.backend.start(launch, handle, folders)


async def test_a_working_directory_that_is_not_there_is_named(rig: Rig) -> None:
    launch, handle, folders = rig.launch(sh("exit 0"))
    spec = msgspec.structs.replace(launch.spec, workdir="/no/such/folder")
    launch = msgspec.structs.replace(launch, spec=spec)
    with pytest.raises(BackendFailed, match="working directory /no/such/folder: No such file"):
        await rig.backend.start(launch, handle, folders)


async def _fails_to_start(
    rig: Rig, launch: Launch, handle: Handle, folders: TaskFolders, program: str, words: str
) -> None:
    spec = msgspec.structs.replace(launch.spec, command=(program,))
    launch = msgspec.structs.replace(launch, spec=spec)
    with pytest.raises(BackendFailed, match=words):
        await rig.backend.start(launch, handle, folders)
