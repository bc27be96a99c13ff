"""What has to be on the disk before what may go out: the order of the runner's commits.

Knows: which action waits for which commit, and what may share one.
Does not know: the disk, how long a commit takes, what actions do.

A commit to the disk that survives a power cut (``fdatasync``) costs more than all the rest
of a short task, so as few as possible are waited for:

- An order is on the disk before its launch is started or the host hears that it was taken.
  Without that a power cut could make the host give the order again. The same goes for an end
  the runner decided by itself, such as of a launch that could not be started: nothing but
  the vault knows of it.
- The end of a launch that ran is written soon, and told at once. Its backend tells it again
  after a crash, for it is removed there only when the vault has it as settled.
- That a launch is settled, and what is forgotten, is written soon. A crash before costs one
  more report of what the host knows.
- That an end was asked for, or a time limit reached, is written soon and carried out at once:
  the task that fills the disk must be one that can be killed. A host that asked asks again,
  and a deadline follows from the launch's start.

So whatever stands still while the disk is full, it is not what ends.

What is written soon is not written along with the next order either: of a short task the end
and the host's word come within moments, and then the vault hears of both at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kohaku_daemon.core.node.actions import Forget, NodeAction, Remember, RemoveLaunch
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Handle
from protocol.messages.runner import AttemptReport, AttemptState


@dataclass(slots=True, eq=False)
class Bundle:
    """What is committed together, and what goes out once it is."""

    #: Counted from 1; 0 of what may be put off, which joins another.
    number: int
    #: As they are when the commit begins.
    puts: dict[str, LaunchRecord] = field(default_factory=dict)
    #: Settled ones that are forgotten, the oldest first.
    drops: dict[str, None] = field(default_factory=dict)
    #: Orders that were let go of, of which nothing may stay.
    voids: dict[str, None] = field(default_factory=dict)
    owed: list[NodeAction] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write, and nothing that waits for it."""
        return not (self.puts or self.drops or self.voids or self.owed)

    def join(self, other: Bundle) -> None:
        """Take in another one, which has no launch that this one has."""
        self.puts |= other.puts
        self.drops |= other.drops
        self.voids |= other.voids
        self.owed += other.owed


class Ledger:
    """Sorts actions by what they wait for. One bundle gathers while another is written."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        """``known`` are the launches on the disk whose end the host may not know."""
        #: Gathers, and is waited for.
        self.open = Bundle(1)
        #: Gathers, and may be put off: until it is ripe no commit takes it along.
        self.later = Bundle(0)
        self._is_ripe = False
        #: Is being written.
        self.under_way: Bundle | None = None
        #: By launch, the bundle without which nothing may be said of it.
        self._held: dict[str, Bundle] = {}
        self._known = set(known)

    @property
    def is_due(self) -> bool:
        """Whether there is something that is to be written now."""
        return self._is_ripe or not self.open.is_empty

    def ripen(self) -> None:
        """Let the next commit take along what was put off."""
        self._is_ripe = not self.later.is_empty

    def is_kept(self, key: str) -> bool:
        """Say whether all that must be on the disk of a launch is there."""
        return key not in self._held

    def withdraw(self) -> list[str]:
        """Let go of launches whose order is not on the disk at all, and name them.

        For a new link, while the disk takes nothing. The host does not hear of them, so it
        gives the order again or not: what it does not know it could not end.
        """
        keys = {key for key in self._held if key not in self._known}
        for bundle in (self.under_way, self.open, self.later):
            if bundle is not None:
                for key in keys:
                    bundle.puts.pop(key, None)
                bundle.owed = [action for action in bundle.owed if action.key not in keys]
        for key in keys:
            del self._held[key]
            if self.under_way is not None:
                # It may just be written all the same.
                self.later.voids[key] = None
        return sorted(keys)

    def leaving(self) -> list[Handle]:
        """Give the handle of each launch that is removed once a commit is through."""
        bundles = (self.under_way, self.open, self.later)
        owed = (action for bundle in bundles if bundle is not None for action in bundle.owed)
        return [action.handle for action in owed if isinstance(action, RemoveLaunch)]

    def tellable(self, reports: Iterable[AttemptReport]) -> Iterator[AttemptReport]:
        """Give what a new link may be told of launches: no more than the disk has."""
        for report in reports:
            if self.is_kept(f"{report.task}-{report.attempt}"):
                yield report
            else:
                taken = AttemptState.ACCEPTED
                yield AttemptReport(
                    task=report.task, attempt=report.attempt, state=taken, at=report.at
                )

    def take(self, actions: Sequence[NodeAction]) -> list[NodeAction]:
        """Take what came of one event; give what may be carried out at once."""
        free: list[NodeAction] = []
        for action in actions:
            match action:
                case Remember(record, later):
                    self._put(record, later=later)
                case Forget(key):
                    self.later.puts.pop(key, None)
                    self.later.drops[key] = None
                case RemoveLaunch():
                    self.later.owed.append(action)
                case _:
                    held = self._held.get(action.key)
                    (free if held is None else held.owed).append(action)
        return free

    def close(self) -> Bundle:
        """Give what is to be written now; what comes from here on goes into the next bundle."""
        assert self.under_way is None, "one commit at a time"
        self.under_way = self.open
        self.open = Bundle(self.under_way.number + 1)
        if self._is_ripe:
            self.under_way.join(self.later)
            self.later, self._is_ripe = Bundle(0), False
        return self.under_way

    def finish(self) -> list[NodeAction]:
        """Take note that the bundle under way is on the disk; give what waited for it."""
        done = self.under_way
        assert done is not None, "nothing is being written"
        self.under_way = None
        self._held = {key: held for key, held in self._held.items() if held is not done}
        for key, record in done.puts.items():
            if record.settled:
                self._known.discard(key)
            else:
                self._known.add(key)
        return done.owed

    def _put(self, record: LaunchRecord, *, later: bool) -> None:
        key = record.key
        self.later.drops.pop(key, None)
        self.later.voids.pop(key, None)
        if not later:
            self.open.puts[key] = record
            self.later.puts.pop(key, None)
            self._held[key] = self.open
        elif key not in self.open.puts:
            self.later.puts[key] = record
