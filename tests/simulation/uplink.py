"""What a runner says to the host in a simulation: joins, registers, reports, beats; dials again.

As in ``kohaku_daemon.runner.uplink``, ``link`` and ``outbox``: one call of reports under way,
of each launch the newest; whatever goes wrong ends the link; on the next one all is said anew.

Knows: the order of things on a link, the credential.
Does not know: what reports mean, what is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kohaku_daemon.core.node.events import (
    KillOrdered,
    NodeEvent,
    PauseOrdered,
    ReportsTaken,
    ResumeOrdered,
    StartOrdered,
)
from kohaku_daemon.core.workload import Launch
from protocol.errors import ErrorBody
from protocol.messages.runner import (
    AttemptReport,
    HeartbeatTaken,
    Join,
    Joined,
    Order,
    OrderKill,
    OrderPause,
    OrderPull,
    OrderResume,
    Orders,
    OrderStart,
    OrderStream,
    Register,
    Registered,
    Report,
    Reported,
)
from tests.simulation.disk import HEARTBEAT_S
from tests.simulation.link import Link, Message
from tests.simulation.stage import Stage

if TYPE_CHECKING:
    from tests.simulation.runner import Runner

#: Seconds the host has to answer a heartbeat, and anything it must first commit.
_BEAT_PATIENCE_S: Final = 10.0
_COMMIT_S: Final = 60.0

#: Dials as this runner: gives the link, None if nobody is there, or that it is not known.
Dial = Callable[["Uplink"], "Link | None"]


class Uplink:
    """One runner's side of its link."""

    def __init__(self, stage: Stage, runner: Runner, credential: str, dial: Dial) -> None:
        self.runner = runner
        self.node = runner.machine.node
        self.link: Link | None = None
        #: Kept in the vault: who it is, and whether it has become a node.
        self.credential = credential
        self.has_joined = True
        #: The join token a person has put there.
        self.token = ""
        #: No heartbeats are sent at present.
        self.is_mute = False
        self._stage = stage
        self._random = stage.chance()
        self._dial = dial
        self._outbox: dict[tuple[int, int], AttemptReport] = {}
        #: Calls under way: what was told in them.
        self._told: dict[int, tuple[AttemptReport, ...]] = {}
        self._calls = 0
        self._reporting = False
        self._registered = False
        self._registering = False
        self._told_trouble = False
        self._beat_at = 0.0

    # Dialling -----------------------------------------------------------------------

    def begin(self) -> None:
        """Start with a new run of the runner."""
        self._outbox.clear()
        self._connect_later(0.01)

    def end(self, why: str, *, silent: bool) -> None:
        """The runner is gone; ``silent`` if not even its kernel can say so."""
        if self.link is None:
            return
        link, self.link = self.link, None
        if silent:
            link.cut(why, {"host": 12.0, "runner": 0.0}, loses=True)
        link.close("runner", why)

    def _connect_later(self, delay_s: float) -> None:
        life = self.runner.life

        def connect() -> None:
            if self.runner.life == life and self.link is None:
                self._connect()

        self._stage.after(delay_s, connect)

    def _connect(self) -> None:
        engine = self.runner.engine
        assert engine is not None
        if engine.is_recovered:
            self.link = self._dial(self)
        if self.link is None:
            self._connect_later(0.2 + 2.0 * self._random.random())
            return
        link = self.link
        link.on_closed["runner"] = self._closed
        self._told, self._registered, self._reporting, self._beat_at = {}, False, False, 0.0
        self._registering = False
        if self.has_joined:
            self._register(link)
        else:
            join = Join(
                token=self.token,
                node=self.node,
                credential=self.credential,
                labels={"zone": self.runner.machine.plan_.zone},
            )
            self._call(link, join, ())

    def become_stranger(self) -> None:
        """The host does not know the credential: join anew if somebody gave a token."""
        if self.token:
            self.credential += "+"
            self.has_joined = False

    def _closed(self, link: Link) -> None:
        if link is self.link:
            self.link = None
            if self.runner.engine is not None:
                self._connect_later(0.1 + 2.0 * self._random.random())

    # Saying -------------------------------------------------------------------------

    def put(self, report: AttemptReport) -> None:
        """Have a launch reported; an older report of it is said no more."""
        key = (report.task, report.attempt)
        self._outbox.pop(key, None)
        self._outbox[key] = report
        self._report()

    def _report(self) -> None:
        if not self._registered or self._reporting or not self._outbox or self.link is None:
            return
        group = tuple(self._outbox.values())
        self._outbox.clear()
        self._reporting = True
        self._call(self.link, Report(group), group)

    def _register(self, link: Link) -> None:
        if link is not self.link or self.runner.engine is None:
            return
        self._registering = True
        if not self.runner.has_kept_up:
            self._stage.after(0.01, lambda: self._register(link))
            return
        self._outbox.clear()
        attempts = self.runner.attempts()
        self._told_trouble = self.runner.in_trouble
        inventory = self.runner.machine.inventory(healthy=not self._told_trouble)
        register = Register(
            instance=f"{self.node}-{self.runner.life}",
            inventory=inventory,
            attempts=attempts,
        )
        self._call(link, register, attempts)

    def tell_trouble(self) -> None:
        """Register once more when trouble with the vault begins or ends."""
        link, is_news = self.link, self.runner.in_trouble != self._told_trouble
        if link is not None and self._registered and not self._registering and is_news:
            self._register(link)

    def _call(
        self, link: Link, message: Join | Register | Report, told: tuple[AttemptReport, ...]
    ) -> None:
        self._calls += 1
        call = self._calls
        self._told[call] = told
        link.send("host", message, call)
        self._stage.after(_COMMIT_S, lambda: self._give_up(link, call))

    def _give_up(self, link: Link, call: int) -> None:
        if link is self.link and call in self._told:
            link.close("runner", "the host does not answer")

    def _beat(self, link: Link) -> None:
        if link is not self.link or self.runner.engine is None:
            return
        if self._beat_at and self._stage.now - self._beat_at > _BEAT_PATIENCE_S:
            link.close("runner", "a heartbeat is not answered")
            return
        if not self._beat_at and not self.is_mute:
            self._beat_at = self._stage.now
            self._calls += 1
            link.send("host", self.runner.machine.readings(), self._calls)
        self._stage.after(HEARTBEAT_S, lambda: self._beat(link))

    # Hearing ------------------------------------------------------------------------

    def receive(self, link: Link, message: Message, call: int) -> None:
        """Take what the host says."""
        if link is not self.link or self.runner.engine is None:
            return
        match message:
            case HeartbeatTaken():
                self._beat_at = 0.0
            case Orders(orders):
                for order in orders:
                    self.runner.post(self._event(order))
            case ErrorBody(_, text):
                link.close("runner", text)
            case Joined() if call in self._told:
                del self._told[call]
                self.has_joined, self.token = True, ""
                self._register(link)
            case Registered() | Reported() if call in self._told:
                self.runner.post(ReportsTaken(self._told.pop(call)))
                self._go_on(link, message)
            case _:
                pass  # an answer that came twice answers nothing

    def _go_on(self, link: Link, message: Message) -> None:
        if isinstance(message, Registered):
            self._registering = False
            if not self._registered:
                self._registered = True
                self._beat(link)
            self.tell_trouble()
        else:
            self._reporting = False
        self._report()

    def _event(self, order: Order) -> NodeEvent:
        if not isinstance(order, OrderStream | OrderPull):
            words = (self.node, type(order).__name__[5:].lower(), order.task, order.attempt)
            self._stage.tell("{} gets the order to {} {}/{}", *words)
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
                return StartOrdered(launch, self.runner.machine.plan())
            case OrderKill(task=task, attempt=attempt, grace_s=grace_s):
                return KillOrdered(task, attempt, grace_s)
            case OrderPause(task=task, attempt=attempt):
                return PauseOrdered(task, attempt)
            case OrderResume(task=task, attempt=attempt):
                return ResumeOrdered(task, attempt)
            case _:
                raise AssertionError(f"an order nobody gave: {order}")
