"""Between host and runner only."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from protocol.ids import BatchId, NamedTask, NodeName
from protocol.messages.stream import OpenLogs
from protocol.models.environment import Credential, WantedImage
from protocol.models.node import Inventory
from protocol.models.task import Claim, Exit, TaskSpec


class Join(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Become a node of the cluster.

    The runner chooses its credential and stores it before it asks, so that an answer
    lost on the way costs nothing: the same join again is answered again.
    """

    token: str
    node: str
    #: ``khr_`` and 256 random bits.
    credential: str
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class Joined(msgspec.Struct, frozen=True):
    """Welcome to the cluster. From here on the connection is the runner's own."""

    node: NodeName
    cluster: str


class AttemptState(StrEnum):
    """Where one launch stands, as its runner knows it."""

    #: The order is in the vault.
    ACCEPTED = "accepted"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"

    __hash__ = str.__hash__  # as of TaskState, for the same reason


class AttemptReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of one launch. Repeating one changes nothing."""

    task: NamedTask
    attempt: int
    state: AttemptState
    #: UTC seconds by the runner's clock, when it came to this state.
    at: float = 0.0
    #: When the program started; 0.0 if it has not.
    started_at: float = 0.0
    exit: Exit | None = None
    #: What isolation was given, or why the last order could not be followed.
    note: str = ""


class Register(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """First call of a runner on a new link: what it has and every launch it knows."""

    #: Random, of this run of the runner: tells a reconnect from a second runner.
    instance: str
    inventory: Inventory
    attempts: tuple[AttemptReport, ...] = ()
    #: More ``attempts`` follow in another ``runner.register`` of the same link.
    more: bool = False
    #: Name in the runner's configuration; the credential's name must be the same.
    node: str = ""


class Registered(msgspec.Struct, frozen=True, omit_defaults=True):
    """The host knows the node again."""

    node: NodeName
    heartbeat_s: float = 2.0


class TakeOrders(msgspec.Struct, frozen=True):
    """Stream orders to this runner until the link ends."""


class OrderStart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="start"):
    """Launch an attempt. A runner that has seen this task and attempt does nothing."""

    task: NamedTask
    attempt: int
    batch: BatchId
    index: int = 0
    size: int = 1
    spec: TaskSpec
    claim: Claim = Claim()
    #: None for what the node itself is.
    image: WantedImage | None = None
    #: Who submitted it is an operator: privileged containers and other mounts may be had.
    trusted: bool = False
    #: Host names of the machines of its batch by index, as far as they are known: of gangs, and
    #: of batches whose targets name them. Empty if none is.
    hosts: tuple[str, ...] = ()


class OrderKill(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="kill"):
    """End an attempt: SIGTERM, grace, SIGKILL. One that never came is refused from now on."""

    task: NamedTask
    attempt: int
    grace_s: float = 10.0


class OrderPause(msgspec.Struct, frozen=True, kw_only=True, tag="pause"):
    """Hold an attempt still."""

    task: NamedTask
    attempt: int


class OrderResume(msgspec.Struct, frozen=True, kw_only=True, tag="resume"):
    """Let a held attempt go on."""

    task: NamedTask
    attempt: int


class OrderStream(msgspec.Struct, frozen=True, kw_only=True, tag="stream"):
    """Dial ``/v1/runner/stream/ID`` at the host and serve it."""

    stream: str
    attempt: int
    logs: OpenLogs


class OrderPull(msgspec.Struct, frozen=True, kw_only=True, tag="pull"):
    """Bring an environment to the node ahead of the tasks that will want it."""

    image: WantedImage


Order = OrderStart | OrderKill | OrderPause | OrderResume | OrderStream | OrderPull


class Orders(msgspec.Struct, frozen=True):
    """A group of orders, in order. One item of ``runner.orders``."""

    orders: tuple[Order, ...]


class OrdersEnded(msgspec.Struct, frozen=True):
    """The host let go of the link."""


class Report(msgspec.Struct, frozen=True):
    """Launches that changed. The answer comes when the host has committed them."""

    reports: tuple[AttemptReport, ...]


class Reported(msgspec.Struct, frozen=True):
    """The host has them for good; the runner may forget them."""


class PinImage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ask which image a batch runs that was named by its reference, and with whose name to pull.

    Asked first without a digest; who is told none finds it out and asks again with it. The
    first one counts, so that all of a batch runs the same image.
    """

    batch: BatchId
    reference: str
    #: ``sha256:...`` as the registry says now.
    digest: str = ""


class PinnedImage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a batch runs."""

    #: Empty if nobody has said yet.
    digest: str = ""
    #: None if the registry is to be asked as a stranger.
    credential: Credential | None = None


class HeartbeatTaken(msgspec.Struct, frozen=True):
    """The host has seen it."""
