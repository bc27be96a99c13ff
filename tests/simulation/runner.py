"""A runner's shell in a simulation: groups of events, one commit for each, death anywhere.

The engine and its records are the real ones; the vault keeps bytes. What is committed before
what is carried out is as in ``kohaku_daemon.runner.loop`` and ``effects``.

Knows: the vault, and how actions become what a machine does.
Does not know: what is said to the host and when (``uplink``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import msgspec

from kohaku_daemon.backends.base import BackendAway
from kohaku_daemon.core.node.actions import (
    AdoptLaunch,
    KillLaunch,
    LetGo,
    NodeAction,
    PauseLaunch,
    RemoveLaunch,
    ResumeLaunch,
    SendReport,
    SetDeadline,
    StartLaunch,
    WatchLaunch,
)
from kohaku_daemon.core.node.engine import NodeEngine
from kohaku_daemon.core.node.events import (
    DeadlinePassed,
    KillOrdered,
    LaunchBrokeOff,
    LaunchExited,
    LaunchFailed,
    LaunchFound,
    LaunchHeld,
    LaunchLetGo,
    LaunchProgressed,
    LaunchRefused,
    LaunchStarted,
    NodeEvent,
)
from kohaku_daemon.core.node.ledger import Bundle, Ledger
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Found, Handle, Launch, Started
from protocol.ids import TaskId
from protocol.messages.runner import AttemptReport
from protocol.models.task import Cause
from tests.simulation.machine import Machine, Program
from tests.simulation.stage import Stage, promise
from tests.simulation.truth import Truth
from tests.simulation.uplink import Uplink

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(LaunchRecord).decode
#: Seconds in which a runner that was ordered to end something has ended it, whoever restarts:
#: the longest grace, and what adopting takes.
_ENDS_WITHIN_S: Final = 20.0

#: Seconds that what nobody waits for may gather before it is written.
_PUT_OFF_S: Final = 0.1
#: Seconds that preparing a launch takes at most, where it takes any.
_PREPARES_S: Final = 6.0
#: Seconds between tries while a backend is away.
_AGAIN_S: Final = 0.5


class Runner:
    """One runner on its machine."""

    def __init__(
        self,
        stage: Stage,
        machine: Machine,
        truth: Truth,
        engine: type[NodeEngine],
    ) -> None:
        self.machine = machine
        self.engine: NodeEngine | None = None
        #: Nothing can be written to the vault at present.
        self.is_full = False
        self.life = 0
        #: What the vault keeps.
        self.vault: dict[str, bytes] = {}
        self.uplink: Uplink | None = None
        self._stage = stage
        self._truth = truth
        self._random = stage.chance()
        self._engine = engine
        self._entries: list[NodeEvent] = []
        self._ledger = Ledger()
        self._put_off = False
        #: Ends that were ordered and not written yet.
        self._ends_open: list[tuple[TaskId, int]] = []
        #: The last write failed.
        self.in_trouble = False
        #: Counts the deadlines set for each launch: only the last counts.
        self._deadlines: dict[str, int] = {}
        self._ends_at_boot: set[tuple[TaskId, int]] = set()
        #: When the last order to hold a launch was carried out: they keep their order.
        self._held_at: dict[str, float] = {}
        #: Launches that are being prepared.
        self._preparing: set[str] = set()
        self._dies_in = -1
        self._down_s = 0.0
        self._reboot = False

    # Life and death -----------------------------------------------------------------

    def boot(self) -> None:
        """Start from what the vault keeps."""
        if self.engine is not None:
            return
        self.life += 1
        self._entries, self._put_off, self._held_at = [], False, {}
        self._ends_open, self.in_trouble, self._deadlines = [], False, {}
        self._preparing = set()
        self.engine = self._engine()
        self._stage.tell("the runner of {} is up", self.machine.node)
        node = self.machine.node
        self._ends_at_boot = {
            (task, attempt) for where, task, attempt in self._truth.ends_taken if where == node
        }
        records = [_decode(data) for data in self.vault.values()]
        self._ledger = Ledger(record.key for record in records if not record.settled)
        now = self.machine.clock.now()
        for action in self.take(self.engine.recover(records, now)):
            self.carry_out(action)
        assert self.uplink is not None
        self.uplink.begin()
        self._stage.after(_ENDS_WITHIN_S, partial(self._check_ends, self.life))

    def die(self, down_s: float, *, reboot: bool = False) -> None:
        """Lose everything that was not committed. Programs go on, unless the machine does not."""
        if self.engine is None:
            return
        self.engine = None
        self.life += 1
        self._dies_in = -1
        assert self.uplink is not None
        self.uplink.end("its machine lost power" if reboot else "its runner died", silent=reboot)
        self.machine.forget_runner()
        self._stage.tell("the {} of {} dies", "machine" if reboot else "runner", self.machine.node)
        if reboot:
            self.machine.go_down()
        self._stage.after(down_s, self.boot)

    def doom(self, step: int, down_s: float, *, reboot: bool) -> None:
        """Let it die at the ``step``-th boundary between two actions from now on."""
        if self.engine is not None:
            self._dies_in, self._down_s, self._reboot = step, down_s, reboot

    def spare(self) -> None:
        """Let it live after all."""
        self._dies_in = -1

    def _dies(self) -> bool:
        if self._dies_in < 0:
            return False
        self._dies_in -= 1
        if self._dies_in >= 0:
            return False
        self.die(self._down_s, reboot=self._reboot)
        return True

    def _check_ends(self, life: int) -> None:
        """Check that what an earlier run was ordered to end has ended, host or not."""
        if self.life != life or self.is_full:
            return
        since_s = self._stage.now - self.machine.back_at
        if self.machine.is_away or since_s < _ENDS_WITHIN_S:
            # It could not be told. Not by its watch: that one is off.
            self._stage.after(_ENDS_WITHIN_S, partial(self._check_ends, life))
            return
        for task, attempt in sorted(self._ends_at_boot):
            program = self._truth.of(task, attempt)
            promise(
                program is None or not program.runs or program.node != self.machine.node,
                "an ordered end is not forgotten",
                "{}-{} runs on {} {} s after its runner came back",
                task,
                attempt,
                self.machine.node,
                _ENDS_WITHIN_S,
            )

    # Events and commits -------------------------------------------------------------

    def post(self, event: NodeEvent) -> None:
        """Let an event be handled with the next group."""
        self._entries.append(event)
        if len(self._entries) == 1:
            self._later(self._work)

    def attempts(self) -> tuple[AttemptReport, ...]:
        """Give what a new link is told."""
        assert self.engine is not None
        for key in self._ledger.withdraw():
            self.engine.forget(key)
        return tuple(self._ledger.tellable(self.engine.attempts()))

    @property
    def has_kept_up(self) -> bool:
        """Whether all is on the disk, or the disk takes nothing so that it is no use to wait."""
        return self.in_trouble or not (self._ledger.is_due or self._ledger.under_way)

    def _later(self, act: Callable[[], None], delay_s: float = 0.0) -> None:
        life = self.life

        def if_alive() -> None:
            if self.life == life:
                act()

        self._stage.after(delay_s or 0.0001 + 0.02 * self._random.random(), if_alive)

    def _work(self) -> None:
        assert self.engine is not None
        entries, self._entries = self._entries, []
        free: list[NodeAction] = []
        now = self.machine.clock.now()
        for event in entries:
            if isinstance(event, KillOrdered):
                self._ends_open.append((event.task, event.attempt))
            free += self.take(self.engine.handle(event, now))
        self._commit_if_due()
        self._pay(free)

    def take(self, actions: Sequence[NodeAction]) -> list[NodeAction]:
        """Sort actions; give what need not wait for the disk."""
        return self._ledger.take(actions)

    def _commit_if_due(self) -> None:
        if self._ledger.under_way is None and self._ledger.is_due:
            bundle = self._ledger.close()
            # An end that was ordered may be put off: then it is not among what is written.
            off = [end for end in self._ends_open if _name(*end) in self._ledger.later.puts]
            ends = [end for end in self._ends_open if end not in off]
            self._ends_open = off
            self._begin_write(bundle, ends)
        if not self._put_off and not self._ledger.later.is_empty:
            self._put_off = True
            self._later(self._commit_put_off, _PUT_OFF_S)

    def _commit_put_off(self) -> None:
        self._put_off = False
        self._ledger.ripen()
        self._commit_if_due()

    def _begin_write(self, bundle: Bundle, ends: list[tuple[TaskId, int]]) -> None:
        puts = {key: _encode(record) for key, record in bundle.puts.items()}
        drops = [*bundle.drops, *bundle.voids]
        self._later(lambda: self._write(bundle, puts, drops, ends))

    def _write(
        self,
        bundle: Bundle,
        puts: dict[str, bytes],
        drops: list[str],
        ends: list[tuple[TaskId, int]],
    ) -> None:
        if self.is_full:
            self._set_trouble(True)
            self._later(lambda: self._begin_write(bundle, ends), 0.5)
            return
        if self._dies():
            return
        self.vault.update(puts)
        for key in drops:
            self.vault.pop(key, None)
        self._truth.ends_taken.update((self.machine.node, *end) for end in ends)
        for record in map(_decode, puts.values()):
            if record.exit is not None and record.exit.cause is Cause.KILLED:
                self._truth.never.add((record.launch.task, record.launch.attempt))
        self._pay(self._ledger.finish())
        if self.engine is not None:
            self._set_trouble(False)
            self._commit_if_due()

    def _set_trouble(self, now: bool) -> None:
        if self.in_trouble != now:
            self.in_trouble = now
            assert self.uplink is not None
            self.uplink.tell_trouble()

    def _pay(self, owed: list[NodeAction]) -> None:
        life = self.life
        for debt in owed:
            if self.life != life or self._dies():
                return
            self.carry_out(debt)

    # Actions ------------------------------------------------------------------------

    def carry_out(self, action: NodeAction) -> None:
        """Begin what an action says."""
        match action:
            case StartLaunch(launch, handle):
                self._check_start(launch)
                self._prepare(launch, handle)
            case LetGo(key):
                self.let_go(key)
            case AdoptLaunch(launch, handle):
                self._later(lambda: self._adopt(launch, handle))
            case WatchLaunch(key, handle):
                self.machine.watch(handle, partial(self._ended, self.life, key))
            case KillLaunch(_, handle, grace_s):
                self._later(lambda: self.kill(handle, grace_s))
            case PauseLaunch(key, handle) | ResumeLaunch(key, handle):
                self._hold(key, handle, paused=isinstance(action, PauseLaunch))
            case SendReport(report):
                assert self.uplink is not None
                self.uplink.put(report)
            case SetDeadline(key, in_s):
                self._set_deadline(key, in_s)
            case RemoveLaunch(launch):
                program = self._truth.of(launch.task, launch.attempt)
                promise(
                    program is None or not program.runs,
                    "daemons are not the work",
                    "{} is removed and runs",
                    launch.key,
                )
            case _:
                raise AssertionError(f"{action} was to be committed")

    def _set_deadline(self, key: str, in_s: float | None) -> None:
        number = self._deadlines[key] = self._deadlines.get(key, 0) + 1

        def pass_() -> None:
            if self._deadlines.get(key) == number:
                self.post(DeadlinePassed(key))

        if in_s is not None:
            self._later(pass_, in_s)

    def _check_start(self, launch: Launch) -> None:
        promise(
            (launch.task, launch.attempt) not in self._ends_at_boot,
            "an ordered end is not forgotten",
            "{} is started on {}, whose earlier run was ordered to end it",
            launch.key,
            self.machine.node,
        )
        promise(
            launch.key in self.vault,
            "a handle is stored before the start",
            "{} is started on {} and is not in the vault",
            launch.key,
            self.machine.node,
        )

    def _prepare(self, launch: Launch, handle: Handle) -> None:
        """Bring what a launch needs, which ends with this runner; then start it."""
        self._preparing.add(launch.key)
        takes_s = _PREPARES_S * self._random.random() if self._random.random() < 0.2 else 0.0
        if takes_s:
            event = LaunchProgressed(launch.key, "preparing 43 %")
            self._later(lambda: self.post(event), takes_s / 2)
        self._later(lambda: self._end_preparing(launch, handle), takes_s)

    def _end_preparing(self, launch: Launch, handle: Handle) -> None:
        if not self.may_start(launch.key):
            return
        if self.machine.is_away:
            self.post(LaunchProgressed(launch.key, "waiting for process"))
            self._later(lambda: self._end_preparing(launch, handle), _AGAIN_S)
            return
        self._preparing.discard(launch.key)
        # It may begin after this runner has died: a start on its way is not called back.
        slow = self._random.random() < 0.3
        life, delay_s = self.life, (5.0 if slow else 0.05) * self._random.random()
        self._stage.after(delay_s, lambda: self._start(life, launch, handle))

    def may_start(self, key: str) -> bool:
        """Say whether a launch that is prepared is still wanted."""
        return key in self._preparing

    def let_go(self, key: str) -> None:
        """Give a launch up that is being prepared."""
        if key in self._preparing:
            self._preparing.discard(key)
            self.post(LaunchLetGo(key))

    def kill(self, handle: Handle, grace_s: float) -> None:
        """Have a program ended, as soon as its backend can be asked."""
        try:
            self.machine.kill(handle, grace_s)
        except BackendAway:
            self._later(lambda: self.kill(handle, grace_s), _AGAIN_S)

    def _lose_sight(self, life: int, launch: Launch, handle: Handle) -> None:
        """Start something just when the backend goes away: it may begin, now or later, or not."""
        becomes = self._random.random()
        if becomes < 0.6:
            late_s = 0.0 if becomes < 0.3 else 2.0 * self._random.random()
            self._stage.after(late_s, partial(self._begin_unseen, launch, handle))
        self.tell_lost(life, launch, handle)

    def _begin_unseen(self, launch: Launch, handle: Handle) -> None:
        self.machine.start(launch, handle)

    def tell_lost(self, life: int, launch: Launch, handle: Handle) -> None:
        """Say that nobody knows whether a start was one."""
        event = LaunchBrokeOff(launch.key, "waiting for process")
        self._stage.after(_AGAIN_S, lambda: self._post_as(life, event))

    def _start(self, life: int, launch: Launch, handle: Handle) -> None:
        if self.machine.is_away:
            self._lose_sight(life, launch, handle)
            return
        trouble = self.machine.trouble
        if trouble == "before":
            self.machine.find(handle)
        if trouble in {"clean", "before"}:
            self._truth.failed_starts.add((launch.task, launch.attempt))
            self._stage.tell("{} cannot start {}", self.machine.node, launch)
            self._post_as(life, LaunchFailed(launch.key, "it could not be started"))
            return
        program = self.machine.start(launch, handle)
        if program is None:
            self._post_as(life, LaunchFailed(launch.key, "its handle was given up"))
            return
        note = "starting it broke off" if trouble else ""
        self._post_as(
            life, LaunchStarted(launch.key, Started(started_at=program.started_at, note=note))
        )

    def _adopt(self, launch: Launch, handle: Handle) -> None:
        try:
            finding = self.machine.find(handle)
        except BackendAway:
            self._later(lambda: self._adopt(launch, handle), _AGAIN_S)
            return
        fresh = self.machine.plan() if finding.found is Found.NEVER_STARTED else None
        self.post(LaunchFound(launch.key, finding, fresh))

    def _hold(self, key: str, handle: Handle, *, paused: bool) -> None:
        delay_s = 0.001 + 0.02 * self._random.random()
        at = max(self._stage.now + delay_s, self._held_at.get(key, 0.0) + 1e-6)
        self._held_at[key] = at
        self._later(lambda: self._hold_now(key, handle, paused=paused), at - self._stage.now)

    def _hold_now(self, key: str, handle: Handle, *, paused: bool) -> None:
        try:
            is_held = self.machine.hold(handle, paused=paused)
        except BackendAway:
            self.post(LaunchRefused(key, "ask again later"))
            return
        self.post(LaunchHeld(key, paused) if is_held else LaunchRefused(key, "it has ended"))

    def _ended(self, life: int, key: str, program: Program) -> None:
        assert program.exit is not None
        event = LaunchExited(key, program.exit, program.started_at, program.ended_at)
        self._post_as(life, event)

    def _post_as(self, life: int, event: NodeEvent) -> None:
        if self.life == life:
            self.post(event)


def _name(task: TaskId, attempt: int) -> str:
    return f"{task}-{attempt}"
