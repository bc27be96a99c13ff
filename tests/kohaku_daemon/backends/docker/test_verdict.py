"""What a task's owner is told of each end, from what init and the engine say."""

from __future__ import annotations

import errno
import signal

import pytest

from kohaku_daemon.backends.docker.facts import ContainerFacts
from kohaku_daemon.backends.docker.init import Stage, Status
from kohaku_daemon.backends.docker.verdict import explain_start, judge
from protocol.models.task import Cause, Exit

BEGUN = Status(Stage.BEGUN, began_at_ns=1)


def ended(wait_status: int) -> Status:
    return Status(Stage.ENDED, 1, 2, wait_status)


def facts(code: int = 0, *, oom: bool = False, error: str = "", ran: bool = True) -> ContainerFacts:
    return ContainerFacts(
        "1", "exited", exit_code=code, oom_killed=oom, error=error, started_at=float(ran)
    )


def told(
    found: ContainerFacts | None,
    status: Status | None,
    *,
    has_restarted: bool = False,
    suspicion: str = "",
) -> Exit:
    return judge(
        found, status, command="run", where="image a:1", node="node1",
        has_restarted=has_restarted, suspicion=suspicion,
    )  # fmt: skip


def test_a_code_is_inits_word_whatever_docker_makes_of_it() -> None:
    assert told(facts(137), ended(137 << 8)) == Exit(Cause.EXITED, code=137)
    assert told(None, ended(3 << 8)) == Exit(Cause.EXITED, code=3), "also without a container"
    assert told(None, ended(0), has_restarted=True) == Exit(Cause.EXITED, code=0)


def test_memory_ends_a_task_only_if_it_was_the_program_that_was_killed() -> None:
    killed = Exit(Cause.OOM, signal=signal.SIGKILL, oom_kills=1)
    assert told(facts(137, oom=True), ended(signal.SIGKILL)) == killed
    assert told(facts(137, oom=True), BEGUN) == killed, "and init with it"
    assert told(facts(0, oom=True), ended(0)) == Exit(Cause.EXITED, code=0, oom_kills=1)
    assert told(facts(137, oom=True), ended(137 << 8)).cause is Cause.EXITED
    assert told(facts(143, oom=True), ended(signal.SIGTERM)).cause is Cause.SIGNALLED


def test_a_whole_container_that_was_killed_is_told_by_docker() -> None:
    assert told(facts(137), BEGUN) == Exit(Cause.SIGNALLED, signal=signal.SIGKILL)
    assert told(facts(137), None) == Exit(Cause.SIGNALLED, signal=signal.SIGKILL)
    assert told(facts(5), BEGUN) == Exit(Cause.EXITED, code=5), "the disk was too full for more"


def test_who_may_have_ended_it_is_said_of_what_ends_containers_alone() -> None:
    assert told(facts(143), ended(signal.SIGTERM), suspicion="Docker").message == "Docker"
    assert told(facts(139), ended(signal.SIGSEGV), suspicion="Docker").message == ""
    assert told(facts(0), ended(0), suspicion="Docker").message == ""


def test_a_machine_that_restarted_took_what_had_not_ended() -> None:
    exit_ = told(facts(255), BEGUN, has_restarted=True)
    assert exit_ == Exit(Cause.NODE_FAILED, message="node1 restarted while the task ran")


def test_a_container_that_is_gone_was_removed_by_somebody() -> None:
    assert told(None, BEGUN).cause is Cause.NODE_FAILED
    assert "removed its container" in told(None, BEGUN).message


def test_what_the_engine_could_not_start_is_explained() -> None:
    exit_ = told(facts(128, error='could not select device driver ""', ran=False), None)
    assert exit_.cause is Cause.START_FAILED
    assert "install nvidia-container-toolkit" in exit_.message


@pytest.mark.parametrize(
    ("stage", "number", "words"),
    [
        (Stage.NO_PROGRAM, errno.ENOENT, "command not found: run in image a:1"),
        (Stage.NO_PROGRAM, errno.ENOTDIR, "command not found: run in image a:1"),
        (Stage.NO_PROGRAM, errno.EACCES, "run in image a:1 is not executable"),
        (Stage.NO_PROGRAM, errno.ENOEXEC, "begin it with #!"),
        (Stage.NO_PROGRAM, errno.ENOMEM, "cannot be executed: cannot allocate memory"),
        (Stage.NO_PROCESS, errno.EAGAIN, "no process to spare"),
        (Stage.NO_STDOUT, errno.ENOSPC, "its output cannot be written"),
    ],
)
def test_why_a_program_did_not_start_is_said_with_what_to_do(
    stage: Stage, number: int, words: str
) -> None:
    status = Status(stage, ended_at_ns=2, errno=number)
    assert words in explain_start(status, "run", "image a:1")
    exit_ = told(facts(127), status)
    assert exit_.cause is Cause.START_FAILED
    assert words in exit_.message
