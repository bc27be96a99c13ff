"""Whose turn it is: owners who wait share the cluster fairly.

Owners take turns by virtual time (start-time fair queueing: Goyal, Vin and Cheng, 1996). Each
placed task moves its owner's turn on by what it costs; of those who wait, the owner whose
turn is earliest goes next. Whoever begins to wait for something starts at the present turn:
nobody saves turns up, not even by waiting for what cannot be had. So a thousand tasks of one
person delay one task of another by a few tasks, and nobody is ever passed over for ever.

Knows: turns and costs. They live in memory only: a restart of the host deals them anew.
Does not know: tasks, nodes, priorities.
"""

from __future__ import annotations

from typing import Final

from kohaku_daemon.core.placement.request import Request
from protocol.ids import UserName

#: What weighs as much as one core. A choice of ours: about how lab machines are built.
_MEMORY_PER_CORE: Final = 4 * 2**30
_CORES_PER_GPU: Final = 8


def cost_of(request: Request) -> float:
    """Give what placing a request costs its owner, in cores: the dearest thing it claims."""
    return max(
        1.0,
        float(request.cores),
        request.memory / _MEMORY_PER_CORE,
        float(request.gpus * _CORES_PER_GPU),
    )


class FairOrder:
    """The turn of every owner who waits or waited lately."""

    def __init__(self) -> None:
        self._turns: dict[UserName, float] = {}
        self._present = 0.0

    def join(self, owner: UserName) -> None:
        """Note that an owner waits for something more: turns that were not used are lost."""
        self._turns[owner] = max(self._turns.get(owner, 0.0), self._present)

    def leave(self, owner: UserName) -> None:
        """Note that an owner waits for nothing more. What was overspent is remembered."""
        if self._turns.get(owner, 0.0) <= self._present:
            self._turns.pop(owner, None)

    def of(self, owner: UserName) -> float:
        """Give an owner's turn: the smallest goes first."""
        return self._turns.get(owner, self._present)

    def take(self, owner: UserName, cost: float) -> None:
        """Let an owner's turn pass: something of theirs was placed."""
        turn = self.of(owner)
        self._present = max(self._present, turn)
        self._turns[owner] = turn + cost
