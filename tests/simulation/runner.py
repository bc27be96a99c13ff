"""A runner's shell in a simulation: dials, registers, commits, carries out, dies anywhere.

The engine and its records are the real ones; the vault keeps bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from kohaku_daemon.core.node.actions import (
    AdoptLaunch,
    Forget,
    KillLaunch,
    NodeAction,
    PauseLaunch,
    Remember,
    RemoveLaunch,
    ResumeLaunch,
    SendReport,
    StartLaunch,
    WatchLaunch,
)
from kohaku_daemon.core.node.engine import NodeEngine
from kohaku_daemon.core.node.events import (
    KillOrdered,
    LaunchExited,
    LaunchFailed,
    LaunchFound,
    LaunchHeld,
    LaunchStarted,
    NodeEvent,
    PauseOrdered,
    ReportsTaken,
    ResumeOrdered,
    StartOrdered,
)
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Handle, Launch, Started
from protocol.messages.runner import (
    AttemptReport,
    Order,
    OrderKill,
    OrderPause,
    OrderResume,
    Orders,
    OrderStart,
    Register,
    Registered,
    Report,
    Reported,
)
from protocol.models.node import Inventory, Readings
from tests.simulation.link import Link, Message
from tests.simulation.machine import Machine, Program
from tests.simulation.stage import Stage


class Runner:
    """One runner and its machine."""

    def __init__(
        self,
        stage: Stage,
        machine: Machine,
        inventory: Inventory,
        dial: Callable[[Runner], Link | None],
    ) -> None:
        self.machine = machine
        self.vault: dict[str, bytes] = {}
        self.engine: NodeEngine | None = None
        self.link: Link | None = None
        self._stage = stage
        self._inventory = inventory
        self._dial = dial
        self._life = 0
        self._entries: list[NodeEvent | Callable[[], None]] = []
        self._busy = False
        #: What was told in calls on the link that are not answered yet, by their number.
        self._told: dict[int, tuple[AttemptReport, ...]] = {}
        self._calls = 0
        self._registered = False
        self.boot()

    def boot(self) -> None:
        """Start from what the vault keeps."""
        self._life += 1
        self._entries, self._busy = [], False
        self.link, self._registered, self._told = None, False, {}
        self.engine = NodeEngine()
        self._stage.tell(f"{self.machine.node} is up")
        records = [msgspec.msgpack.decode(data, type=LaunchRecord) for data in self.vault.values()]
        for action in self.engine.recover(records, self._stage.now):
            self._carry_out(action)
        self._connect(self._life)
        self._beat(self._life)

    def die(self) -> None:
        """Lose everything that was not committed. Programs go on."""
        self.engine = None
        self._life += 1
        if self.link is not None:
            self.link.cut("its runner died")
        for program in self.machine.programs.values():
            program.watcher = None
        self._stage.tell(f"{self.machine.node} is dead")
        self._stage.after(self._stage.random.choice([0.1, 1.0, 10.0, 40.0]), self.boot)

    def receive(self, link: Link, message: Message, call: int) -> None:
        """Take what the host says."""
        if link is not self.link or self.engine is None:
            return
        match message:
            case Registered() | Reported():
                told = self._told.pop(call, None)
                if told is not None:  # an answer that came twice answers nothing
                    self._post(ReportsTaken(told))
            case Orders(orders):
                for order in orders:
                    self._post(self._event(order))
            case _:
                raise AssertionError(f"the host said {message}")

    def lost(self, link: Link) -> None:
        """Note that the link is broken, and dial again."""
        if link is self.link:
            self.link, self._registered, self._told = None, False, {}
            life = self._life
            self._stage.after(self._stage.random.uniform(0.1, 3.0), lambda: self._connect(life))

    # The link -----------------------------------------------------------------------

    def _connect(self, life: int) -> None:
        if self._life != life or self.engine is None or self.link is not None:
            return
        if self.engine.is_recovered:
            self.link = self._dial(self)
        if self.link is None:
            self._stage.after(self._stage.random.uniform(0.5, 3.0), lambda: self._connect(life))
        else:
            link = self.link
            self._post(lambda: self._register(link))

    def _register(self, link: Link) -> None:
        if link is self.link and self.engine is not None:
            attempts = self.engine.attempts()
            self._registered = True
            self._call(
                link,
                Register(instance="i", inventory=self._inventory, attempts=attempts),
                attempts,
            )

    def _call(
        self, link: Link, message: Register | Report, told: tuple[AttemptReport, ...]
    ) -> None:
        self._calls += 1
        self._told[self._calls] = told
        link.send("host", message, self._calls)

    def _beat(self, life: int) -> None:
        if self._life != life or self.engine is None:
            return
        if self.link is not None and self._registered:
            self.link.send("host", Readings())
        self._stage.after(2.0, lambda: self._beat(life))

    # Events, commits, actions -------------------------------------------------------

    def _post(self, entry: NodeEvent | Callable[[], None]) -> None:
        self._entries.append(entry)
        self._work_soon()

    def _work_soon(self) -> None:
        if not self._busy and self._entries:
            self._busy = True
            life = self._life
            self._stage.soon(lambda: self._work(life))

    def _work(self, life: int) -> None:
        if self._life != life or self.engine is None:
            return
        entries, self._entries = self._entries, []
        changes: list[tuple[str, bytes | None]] = []
        owed: list[NodeAction | Callable[[], None]] = []
        for entry in entries:
            if callable(entry):
                owed.append(entry)
                continue
            for action in self.engine.handle(entry, self._stage.now):
                match action:
                    case Remember(record):
                        changes.append((record.key, msgspec.msgpack.encode(record)))
                    case Forget(key):
                        changes.append((key, None))
                    case _:
                        owed.append(action)
        self._stage.soon(lambda: self._commit(life, changes, owed))

    def _commit(
        self,
        life: int,
        changes: list[tuple[str, bytes | None]],
        owed: list[NodeAction | Callable[[], None]],
    ) -> None:
        if self._life != life or self.engine is None or self._dies():
            return
        for key, data in changes:
            if data is None:
                self.vault.pop(key)
            else:
                self.vault[key] = data
        for debt in owed:
            if self._dies():
                return
            if callable(debt):
                debt()
            else:
                self._carry_out(debt)
        self._busy = False
        self._work_soon()

    def _carry_out(self, action: NodeAction) -> None:
        machine, life = self.machine, self._life
        match action:
            case StartLaunch(launch, handle):
                # It may begin after this runner has died: a start on its way is not called back.
                self._stage.soon(lambda: self._start(life, launch, handle))
            case AdoptLaunch(launch, handle):
                self._stage.soon(lambda: self._adopt(life, launch, handle))
            case WatchLaunch(_, handle):
                machine.watch(handle, lambda program: self._ended(life, program))
            case KillLaunch(_, handle, _):
                machine.kill(handle)
            case PauseLaunch(key, handle) | ResumeLaunch(key, handle):
                paused = isinstance(action, PauseLaunch)
                machine.hold(handle, paused=paused)
                self._post(LaunchHeld(key, paused))
            case SendReport(report):
                if self.link is not None and self._registered:
                    self._call(self.link, Report((report,)), (report,))
            case RemoveLaunch():
                pass
            case _:
                raise AssertionError(f"{action} was to be committed")

    def _start(self, life: int, launch: Launch, handle: Handle) -> None:
        program = self.machine.start(launch, handle)
        if self._life == life and program is not None:
            self._post(LaunchStarted(launch.key, Started(started_at=program.started_at)))
        elif self._life == life:
            self._post(LaunchFailed(launch.key, "its handle was given up"))

    def _adopt(self, life: int, launch: Launch, handle: Handle) -> None:
        if self._life == life:
            finding = self.machine.find(handle)
            self._post(LaunchFound(launch.key, finding, self.machine.plan()))

    def _ended(self, life: int, program: Program) -> None:
        if self._life == life:
            assert program.exit is not None
            self._post(
                LaunchExited(program.launch.key, program.exit, program.started_at, program.ended_at)
            )

    def _event(self, order: Order) -> NodeEvent:
        match order:
            case OrderStart():
                launch = Launch(
                    task=order.task,
                    attempt=order.attempt,
                    batch=order.batch,
                    index=order.index,
                    size=order.size,
                    spec=order.spec,
                    claim=order.claim,
                )
                return StartOrdered(launch, self.machine.plan())
            case OrderKill(task=task, attempt=attempt, grace_s=grace_s):
                return KillOrdered(task, attempt, grace_s)
            case OrderPause(task=task, attempt=attempt):
                return PauseOrdered(task, attempt)
            case OrderResume(task=task, attempt=attempt):
                return ResumeOrdered(task, attempt)
            case _:
                raise AssertionError(f"an order nobody gave: {order}")

    def _dies(self) -> bool:
        if self._stage.chance(0.006):
            self.die()
            return True
        return False
