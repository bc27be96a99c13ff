"""Tasks as both ends see them: what is asked, where it stands, how it ended."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.models.target import Target


class TaskState(StrEnum):
    """Where a task stands. SPEC.md, section 9, has the legal moves."""

    QUEUED = "queued"
    #: A node holds its claim and the order to launch is committed.
    ASSIGNED = "assigned"
    #: The runner has taken the order and makes ready.
    PREPARING = "preparing"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    KILLED = "killed"
    OOM_KILLED = "oom_killed"
    #: Its node has been silent longer than its grace. Comes back if the node does.
    LOST = "lost"

    # An enum's own is written in Python, and every look into a table by state asks for it.
    __hash__ = str.__hash__

    @property
    def is_final(self) -> bool:
        """Say whether this state is never left. ``lost`` is not final."""
        return self in FINAL_STATES

    @property
    def is_over(self) -> bool:
        """Say whether whoever waits should stop waiting: final, or lost."""
        return self in FINAL_STATES or self is TaskState.LOST


FINAL_STATES: Final = frozenset(
    {TaskState.COMPLETED, TaskState.FAILED, TaskState.KILLED, TaskState.OOM_KILLED}
)


class Cause(StrEnum):
    """Why a task ended, from facts of the kernel or of the backend, never guessed from 137."""

    #: The program returned; ``code`` says what.
    EXITED = "exited"
    #: A signal ended the program, and nobody here had asked for it.
    SIGNALLED = "signalled"
    #: The kernel killed it for its memory limit.
    OOM = "oom"
    #: Somebody asked for its end.
    KILLED = "killed"
    #: The backend could not start it.
    START_FAILED = "start_failed"
    #: Its node restarted, or something killed the keeper of its exit code.
    NODE_FAILED = "node_failed"
    #: Its node was removed from the cluster.
    NODE_REMOVED = "node_removed"
    #: It ran as long as it was allowed to, and was ended.
    TIME_LIMIT = "time_limit"
    #: A task it had to wait for did not complete, so it never began.
    DEPENDENCY = "dependency"
    #: A task of its gang could not begin, so it was not to go on without.
    GANG = "gang"


_TIMED_OUT: Final = 124
#: Name of the backend that runs tasks in containers.
DOCKER: Final = "docker"


class Exit(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one attempt ended."""

    cause: Cause
    #: What the program returned, 0 to 255; None if it did not return.
    code: int | None = None
    #: The signal that ended it.
    signal: int | None = None
    #: One sentence for people, when there is more to say.
    message: str = ""
    #: Processes of the task that the kernel killed for memory; may be above 0 with code 0.
    oom_kills: int = 0

    @property
    def status(self) -> int:
        """Give the status a shell would show: the code, 128 + signal, or 1 where there is none.

        At the time limit it is 124, as of ``timeout`` (GNU coreutils), whatever the program
        made of the signal.
        """
        if self.cause is Cause.TIME_LIMIT:
            return _TIMED_OUT
        if self.code is not None:
            return self.code
        return 1 if self.signal is None else 128 + self.signal


class Network(StrEnum):
    """What network a container has."""

    #: The engine's own: out through the node, in from nowhere.
    DEFAULT = "default"
    #: Nothing but its own loopback.
    NONE = "none"


class Mount(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file or folder of the node that a container sees."""

    #: Absolute path on the node, within its ``mount_roots``.
    source: str
    #: Absolute path in the container.
    destination: str
    read_only: bool = False


class TaskSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What to run and what it needs."""

    command: tuple[str, ...]
    name: str = ""
    #: Variables added to the task's environment.
    env: dict[str, str] = msgspec.field(default_factory=dict)
    #: Directory to start in; empty for the task's own scratch folder.
    workdir: str = ""
    #: Whole cores claimed and pinned; 0 is no claim and no limit.
    cores: int = 1
    #: Bytes claimed and enforced; 0 is no claim and no limit.
    memory: int = 0
    #: How many GPUs, wherever they are. A target may name them instead.
    gpus: int = 0
    #: Labels the node must have.
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    #: Higher goes first.
    priority: int = 0
    #: Name of a backend; empty for the node's default.
    backend: str = ""
    #: Seconds between SIGTERM and SIGKILL when it is killed.
    grace_s: float = 10.0
    #: Seconds an attempt may run, pauses included; 0 is no limit. Its runner keeps to it.
    time_limit_s: float = 0.0
    #: How many more attempts are made after one that failed or ran out of memory.
    retries: int = 0
    #: Make a new attempt when its node is lost, though the old one may still run there.
    requeue_on_lost: bool = False
    #: Name of the environment it runs in; what was packed last when it was submitted.
    container: str = ""
    #: Or a reference to an image in a registry, such as ``python:3.12-slim``.
    image: str = ""
    #: The rest is about containers only.
    mounts: tuple[Mount, ...] = ()
    #: ``USER`` or ``USER:GROUP``, names of the image or numbers; empty for the image's own.
    user: str = ""
    network: Network = Network.DEFAULT
    #: Bytes of /dev/shm; 0 for the engine's own choice (Docker: 64 MiB).
    shm_size: int = 0
    #: Soft and hard limit by name, as of ``man 2 getrlimit`` without RLIMIT_; -1 for no limit.
    ulimits: dict[str, tuple[int, int]] = msgspec.field(default_factory=dict)
    #: All of the machine's devices and powers. Of operators, on nodes that allow it.
    privileged: bool = False

    @property
    def wanted_backend(self) -> str:
        """Name of the backend it needs; empty for any node's default.

        What names an environment or an image means a container.
        """
        return self.backend or (DOCKER if self.container or self.image else "")


class Claim(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a task holds of its node, from assigned to its end."""

    #: Numbers of cores as the kernel counts them.
    cores: tuple[int, ...] = ()
    memory: int = 0
    #: UUIDs, because indices change when a GPU is taken out.
    gpus: tuple[str, ...] = ()
    #: The NUMA node that cores and memory are pinned to, if the target named one.
    numa: int | None = None


class Change(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step of a task's history."""

    #: UTC seconds since 1970.
    at: float
    state: TaskState
    #: What brought it about, in words.
    cause: str = ""
    #: Who asked for it, if somebody did.
    actor: str = ""
    attempt: int = 0
    node: str = ""


class Task(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One task as people see it. Times are UTC seconds since 1970, 0.0 for not yet."""

    id: TaskId
    batch: BatchId
    #: Place in its batch, from 0.
    index: int = 0
    #: How many tasks its batch has.
    size: int = 1
    owner: UserName
    state: TaskState
    #: Blanked where the reader may not see commands and variables.
    spec: TaskSpec
    target: Target | None = None
    #: Empty while it waits.
    node: NodeName = NodeName("")
    claim: Claim | None = None
    #: Number of the launch, from 1; 0 before the first.
    attempt: int = 0
    #: What keeps it here, or what ended it, in one line.
    reason: str = ""
    exit: Exit | None = None
    created_at: float = 0.0
    started_at: float = 0.0
    ended_at: float = 0.0
    #: Somebody has asked for its end and the runner has not confirmed it.
    kill_asked: bool = False
    #: Tasks, and batches by their own ids, that must complete before it begins.
    after: tuple[TaskId, ...] = ()
    #: All tasks of its batch begin together, or none.
    gang: bool = False
    #: The task it was made from by ``task.retry``; None if it was submitted.
    retry_of: TaskId | None = None
    #: Filled by ``task.show`` only.
    history: tuple[Change, ...] = ()


class Batch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Tasks submitted together."""

    id: BatchId
    owner: UserName
    name: str = ""
    size: int = 1
    created_at: float = 0.0
    #: How many of its tasks are in each state; states without tasks are left out.
    states: dict[str, int] = msgspec.field(default_factory=dict)


class NodeVerdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why one node does not take a task, or that it does."""

    node: NodeName
    #: It could start there this instant.
    fits_now: bool
    #: It could start there if the node were idle and in service.
    could_ever: bool
    reasons: tuple[str, ...] = ()


class Explanation(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a task is where it is, as a whole and node by node."""

    task: TaskId
    state: TaskState
    summary: str
    #: How many waiting tasks are considered before it.
    ahead: int = 0
    nodes: tuple[NodeVerdict, ...] = ()
