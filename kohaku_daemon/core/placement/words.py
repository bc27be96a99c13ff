"""Cores and GPUs of one node in words: which there are, who holds them, where they lie.

Knows: books. Does not know: what anybody asks for, and who a task's owner is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from kohaku_daemon.core.placement.books import Books, gpus_in_order
from protocol.ids import TaskId
from protocol.models.node import Gpu
from protocol.models.task import Claim

#: Says which task one is, such as ``task 7 of ada``.
NameTask = Callable[[TaskId], str]
#: Holders of GPUs that are named; of the rest it is told how many GPUs they have.
_MOST_NAMED: Final = 8


def name_by_id(task: TaskId) -> str:
    """Say which task it is where nobody knows more."""
    return f"task {task}"


def say_gpus_taken(books: Books, name_task: NameTask) -> str:
    """Say of each GPU that cannot be had who holds it, or what is wrong with it."""
    by_reason: dict[str, list[int]] = {}
    for gpu in sorted(books.inventory.claimable_gpus, key=lambda gpu: gpu.index):
        if gpu.uuid in books.faults:
            reason = f"out of service: {books.faults[gpu.uuid]}"
        elif gpu.uuid not in books.free_gpus:
            reason = f"held by {say_holder(gpu.uuid, books, name_task)}"
        else:
            continue
        by_reason.setdefault(reason, []).append(gpu.index)
    told = [
        f"{_gpus(indices)} {'is' if len(indices) == 1 else 'are'} {reason}"
        for reason, indices in by_reason.items()
    ]
    more = sum(map(len, list(by_reason.values())[_MOST_NAMED:]))
    rest = [f"{more} more not free either"] if more else []
    return ", ".join([*told[:_MOST_NAMED], *rest])


def say_holder(uuid: str, books: Books, name_task: NameTask) -> str:
    """Say which task holds a GPU that is not free."""
    for task, claim in books.claims.items():
        if uuid in claim.gpus:
            return name_task(task)
    task, attempt = next(key for key, claim in books.remnants.items() if uuid in claim.gpus)
    return (
        f"attempt {attempt} of {name_task(task)}, which was given up and has not been seen to end"
    )


def say_gpus_here(books: Books) -> str:
    """Say which GPUs a node has, by their indices."""
    indices = [gpu.index for gpu in books.inventory.claimable_gpus]
    if not indices:
        return "the node has no GPU"
    only = "only " if len(indices) == 1 else ""
    return f"the node has {only}{_gpus(indices)}"


def say_instances(divided: Gpu, books: Books) -> str:
    """Say which MIG instances a GPU is divided into."""
    found = [gpu.index for gpu in books.inventory.gpus if gpu.parent == divided.uuid]
    return f"its instances are {_gpus(found)}" if found else "it has no instances yet"


def say_place(claim: Claim, books: Books) -> str:
    """Say which GPUs a claim holds and, where the node has several NUMA nodes, where all lies.

    Empty if neither is worth a word.
    """
    nodes = [numa.number for numa in books.inventory.numa]
    if not claim.gpus and len(nodes) < 2:
        return ""
    cores = {number: books.cores_of_numa(number).intersection(claim.cores) for number in nodes}
    gpus: dict[int | None, list[int]] = {}
    for gpu in gpus_in_order(books.inventory, claim.gpus):
        gpus.setdefault(gpu.numa, []).append(gpu.index)
    parts = [f"{_cores(some)}{_on(number, nodes)}" for number, some in cores.items() if some]
    if claim.numa is not None and claim.memory:
        parts.append(f"memory{_on(claim.numa, nodes)}")
    parts += [f"{_gpus(some)}{_on(number, nodes)}" for number, some in gpus.items()]
    near = {number for number, some in cores.items() if some}
    is_apart = near and any(number is not None and number not in near for number in gpus)
    return ", ".join(parts) + (", away from its cores" if is_apart else "")


def _on(numa: int | None, nodes: list[int]) -> str:
    return f" of NUMA node {numa}" if numa is not None and len(nodes) > 1 else ""


def _cores(numbers: Iterable[int]) -> str:
    written = _spans(numbers)
    return f"core {written}" if written.isdecimal() else f"cores {written}"


def _gpus(indices: Iterable[int]) -> str:
    written = _spans(indices)
    return f"GPU {written}" if written.isdecimal() else f"GPUs {written}"


def _spans(numbers: Iterable[int]) -> str:
    """Write numbers briefly, such as ``0-3,8``."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)
