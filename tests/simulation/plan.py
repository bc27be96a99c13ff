"""What one seed holds: machines, what people will ask, what will go wrong. Plain data.

Knows: how a world is drawn from a seed, and how parts of it are left out (``shrink``).
Does not know: how any of it is played (``world``).

Each part heals by itself and stands alone, so that any of them can be left out and what is
left is still a fair world: nobody may ask for what no machine has, and nothing stays broken.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

#: Seconds in which things go wrong; then everything is whole again.
ROUGH_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class MachinePlan:
    """One machine and the node on it."""

    name: str
    cores: int = 4
    gib: int = 8
    numa: int = 2
    gpus: int = 0
    zone: str = "a"
    #: Seconds its clock is off.
    clock_off_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Command:
    """What a command does once it runs. It travels in ``TaskSpec.command``."""

    #: Seconds; 0 for never ending by itself.
    lasts_s: float
    #: What its attempts return, the last for all that follow; -9 is out of memory.
    codes: tuple[int, ...] = (0,)
    #: What it returns when it is asked to end, or -1 to be ended by the signal; -2 ignores it.
    on_term: int = -1


@dataclass(frozen=True, slots=True)
class Submit:
    """Somebody submits, and asks again until it is answered."""

    at: float
    number: int
    owner: str
    command: Command
    cores: int = 1
    gib: int = 0
    gpus: int = 0
    zone: str = ""
    priority: int = 0
    targets: tuple[str, ...] = ()
    array: int = 0
    #: Seconds after the first answer when its end is asked for; negative for never.
    killed_after_s: float = -1.0
    #: Numbers of earlier submissions that it waits for, as a whole or for their first tasks.
    after: tuple[int, ...] = ()
    after_first: bool = False
    gang: bool = False
    time_limit_s: float = 0.0
    retries: int = 0
    requeue_on_lost: bool = False

    @property
    def size(self) -> int:
        """How many tasks it becomes."""
        return len(self.targets) or self.array or 1


@dataclass(frozen=True, slots=True)
class Flood:
    """Somebody submits a wide task, and then everybody submits small ones until it begins."""

    at: float
    #: Of the wide one; the small ones have numbers far above.
    number: int
    owner: str
    cores: int
    every_s: float


@dataclass(frozen=True, slots=True)
class Crowd:
    """One owner submits a great many small tasks, and a moment later another a single one."""

    at: float
    #: Of the single one; that of the many is above all others.
    number: int
    size: int


@dataclass(frozen=True, slots=True)
class AskAgain:
    """The same request comes several times at once, or with other words."""

    at: float
    number: int
    times: int
    other_words: bool = False


@dataclass(frozen=True, slots=True)
class Steer:
    """Somebody asks something of a task: ``kill``, ``pause``, ``resume`` or ``retry``."""

    at: float
    verb: str
    number: int
    index: int


@dataclass(frozen=True, slots=True)
class EndBatch:
    """Somebody asks for the end of all of a submission, until that is answered."""

    at: float
    number: int


@dataclass(frozen=True, slots=True)
class Drain:
    """An operator drains a node and undrains it later."""

    at: float
    node: str
    for_s: float


@dataclass(frozen=True, slots=True)
class Relabel:
    """An operator gives a node another zone, and its own back later."""

    at: float
    node: str
    for_s: float


@dataclass(frozen=True, slots=True)
class Remove:
    """An admin takes a node out; later it is let in again."""

    at: float
    node: str
    force: bool
    back_after_s: float


@dataclass(frozen=True, slots=True)
class HostDies:
    """The host is killed at the ``step``-th boundary between two actions from then on."""

    at: float
    step: int
    down_s: float


@dataclass(frozen=True, slots=True)
class RunnerDies:
    """A runner is killed likewise. With ``reboot`` its machine goes down with all it runs."""

    at: float
    node: str
    step: int
    down_s: float
    reboot: bool = False


@dataclass(frozen=True, slots=True)
class HolderDies:
    """The runner that has a task is killed and cut off: it has to go by what it remembers."""

    at: float
    number: int
    index: int
    step: int
    apart_s: float


@dataclass(frozen=True, slots=True)
class Cut:
    """A link breaks. Its ends notice after some time, and cannot meet again for another."""

    at: float
    node: str
    host_notices_s: float
    runner_notices_s: float
    #: What was on its way is lost, or comes in the end.
    loses: bool
    apart_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Slow:
    """Messages of one direction take up to so many seconds for a while."""

    at: float
    node: str
    to: str
    delay_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Repeat:
    """Orders and reports of a link come twice for a while."""

    at: float
    node: str
    for_s: float


@dataclass(frozen=True, slots=True)
class Mute:
    """A runner sends no heartbeats for a while; its link stays."""

    at: float
    node: str
    for_s: float


@dataclass(frozen=True, slots=True)
class ClockJump:
    """A machine's clock jumps; ``host`` is one of them."""

    at: float
    machine: str
    by_s: float


@dataclass(frozen=True, slots=True)
class GpuFault:
    """A GPU says it is out of order, for a while; with ``gone`` the machine reboots without it."""

    at: float
    node: str
    index: int
    for_s: float
    gone: bool = False


@dataclass(frozen=True, slots=True)
class DiskFull:
    """The host, or a runner, can store nothing for a while."""

    at: float
    machine: str
    for_s: float


@dataclass(frozen=True, slots=True)
class StartTrouble:
    """A machine's backend fails to start things for a while.

    ``clean`` says so itself; ``before`` and ``after`` break off where nobody knows.
    """

    at: float
    node: str
    how: str
    for_s: float


@dataclass(frozen=True, slots=True)
class Away:
    """What a machine's backend works with cannot be asked for a while; programs go on."""

    at: float
    node: str
    for_s: float


@dataclass(frozen=True, slots=True)
class Explain:
    """Somebody asks why the tasks are where they are."""

    at: float


Fault = (
    HostDies | RunnerDies | HolderDies | Cut | Slow | Repeat | Mute | ClockJump | GpuFault
    | DiskFull | StartTrouble | Away
)  # fmt: skip
Act = (
    Submit
    | Flood
    | Crowd
    | AskAgain
    | Steer
    | EndBatch
    | Drain
    | Relabel
    | Remove
    | Explain
    | Fault
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One world."""

    seed: int
    machines: tuple[MachinePlan, ...]
    acts: tuple[Act, ...]
    rough_s: float = ROUGH_S
    host_clock_off_s: float = 0.0
    #: Which owners there are: the seed's choice of how many share the cluster.
    owners: tuple[str, ...] = field(default=("ada", "bob"))
    #: Tasks that the host works on in one go: so few that what the worlds hold takes several.
    piece: int = 500

    def with_acts(self, acts: tuple[Act, ...]) -> Plan:
        """Give the same world with only these happenings."""
        return replace(self, acts=acts)
