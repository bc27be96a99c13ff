"""A node kept free for somebody, and who may use it meanwhile without being in the way.

Two ways past a hold (the second is EASY backfill: Lifka, 1995): what is taken is something
the holder has enough of already and keeps enough of; or it is given back before the holder
could begin, which is known where the tasks in its way have time limits.

Knows: what the holder of one node lacks, and when it will surely have it.
Does not know: queues, clocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kohaku_daemon.core.placement.books import Books
from kohaku_daemon.core.placement.request import Request
from protocol.ids import NodeName, TaskId

#: UTC seconds at which a running task has surely ended; infinity if nobody knows.
EndsAt = Callable[[TaskId], float]


@dataclass(frozen=True, slots=True)
class Hold:
    """One node kept free for the first task of a lane."""

    node: NodeName
    task: TaskId
    #: What waits for the node; None for a gang, past which nothing goes.
    request: Request | None

    def lets_pass(self, request: Request, books: Books, now: float, ends_at: EndsAt) -> bool:
        """Say whether a later request that fits there may use the node."""
        if self.request is None:
            return False
        if _leaves_enough(request, self.request, books):
            return True
        if not request.longest_s:
            return False
        start = find_start(self.request, books, ends_at)
        return start < math.inf and now + request.longest_s <= start


def find_start(request: Request, books: Books, ends_at: EndsAt) -> float:
    """Give when a request will surely find room (UTC seconds); infinity if nobody knows.

    Only counted in numbers: for a request that names its GPUs or its NUMA node nobody knows.
    """
    if not _is_plain(request):
        return math.inf
    cores, memory, gpus = len(books.free_cores), books.free_memory, len(books.free_gpus)
    places = books.inventory.max_tasks - books.places_taken
    for at, task in sorted((ends_at(task), task) for task in books.claims):
        claim = books.claims[task]
        cores += len(claim.cores)
        memory += claim.memory
        gpus += len(claim.gpus)
        places += 1
        enough = cores >= request.cores and memory >= request.memory and gpus >= request.gpus
        if enough and places > 0:
            return at
    return math.inf


def _is_plain(request: Request) -> bool:
    return not request.gpu_indices and request.numa is None


def _leaves_enough(request: Request, holder: Request, books: Books) -> bool:
    """Say whether what the holder has enough of stays enough, and nothing it lacks is taken."""
    if not (_is_plain(request) and _is_plain(holder)):
        return False
    return (
        _keeps(request.cores, holder.cores, len(books.free_cores))
        and _keeps(request.memory, holder.memory, books.free_memory)
        and _keeps(request.gpus, holder.gpus, len(books.free_gpus))
        and books.places_taken + 1 < books.inventory.max_tasks
    )


def _keeps(taken: int, wanted: int, free: int) -> bool:
    return taken == 0 or free - taken >= wanted
