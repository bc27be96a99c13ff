"""Filter and claim on one node: why a request does not fit, or exactly what it would hold.

Pure functions over the node's books. The reasons are written for the task's owner.
"""

from __future__ import annotations

from collections.abc import Mapping

from kohaku_daemon.core.placement.books import Books, gpus_in_order, has_room
from kohaku_daemon.core.placement.containers import unmet
from kohaku_daemon.core.placement.request import Request
from kohaku_daemon.core.placement.words import (
    NameTask,
    name_by_id,
    say_gpus_here,
    say_gpus_taken,
    say_holder,
    say_instances,
)
from protocol.models.node import BackendInfo, Gpu
from protocol.models.task import Claim
from protocol.units import render_size


def unsuitable(request: Request, books: Books, labels: Mapping[str, str]) -> list[str]:
    """Say why this node is not one the request may run on at all, however idle."""
    reasons = [
        f"label {key}={value} wanted, {_label_here(labels, key)}"
        for key, value in request.labels
        if labels.get(key) != value
    ]
    backend = _backend(request, books)
    if backend is None:
        name = request.backend or books.inventory.default_backend or "of any kind"
        reasons.append(f"backend {name} is not on this node")
    else:
        reasons += unmet(request.wishes, backend)
    return reasons


def ailment(request: Request, books: Books) -> str:
    """Say why the backend that the request needs cannot start tasks at present; empty if it can."""
    backend = _backend(request, books)
    if backend is None or backend.healthy:
        return ""
    return f"backend {backend.name} cannot start tasks: {backend.message}"


def suits(request: Request, books: Books, labels: Mapping[str, str]) -> bool:
    """Say whether ``unsuitable`` and ``ailment`` are empty, without composing them."""
    backend = _backend(request, books)
    if backend is None or not backend.healthy:
        return False
    if request.wishes is not None and any(unmet(request.wishes, backend)):
        return False
    return all(labels.get(key) == value for key, value in request.labels)


def shortages(
    request: Request, books: Books, *, of_all: bool = False, name_task: NameTask = name_by_id
) -> list[str]:
    """Say what of the request is not free in these books; empty if all is.

    ``of_all`` words it for books that nobody uses: the node has no more than that.
    """
    inventory = books.inventory
    reasons = []
    if request.numa is not None and request.numa not in books.free_numa_memory:
        return [f"NUMA node {request.numa} wanted, this node has {_numbers(books)}"]
    free_cores = len(_free_cores(request, books))
    if request.cores > free_cores:
        total = len(_all_cores(request, books))
        left = _left(str(free_cores), str(total), request.numa, of_all=of_all)
        reasons.append(f"{_count(request.cores, 'core')} wanted, {left}")
    if not has_room(request.memory, _free_memory(request, books)):
        left = _memory_left(request, books, of_all=of_all)
        reasons.append(f"{render_size(request.memory)} memory wanted, {left}")
    reasons += _gpu_shortages(request, books, name_task, of_all=of_all)
    if books.places_taken >= inventory.max_tasks:
        reasons.append(f"{books.places_taken} tasks are there already, the node's limit")
    return reasons


def fits(request: Request, books: Books) -> bool:
    """Say whether ``shortages`` is empty, without composing it: placement's inner loop."""
    if books.places_taken >= books.inventory.max_tasks:
        return False
    if request.numa is not None and request.numa not in books.free_numa_memory:
        return False
    if not has_room(request.memory, _free_memory(request, books)):
        return False
    if request.cores > len(_free_cores(request, books)):
        return False
    if request.gpu_indices:
        return request.gpus <= len(_usable_gpus(request, books))
    return request.gpus <= len(books.free_gpus)


def missing(request: Request, books: Books) -> float:
    """Give how far the books are from having it free: 0 is there, 1 a whole resource short."""
    short = 1.0 if books.places_taken >= books.inventory.max_tasks else 0.0
    cores = request.cores - len(_free_cores(request, books))
    if cores > 0:
        short += cores / request.cores
    if request.memory:
        memory = request.memory - _free_memory(request, books)
        if memory > 0:
            short += memory / request.memory
    if request.gpus:
        # Placement's inner loop: which ones they are matters only where they are named.
        free = len(_usable_gpus(request, books) if request.gpu_indices else books.free_gpus)
        if request.gpus > free:
            short += (request.gpus - free) / request.gpus
    return short


def choose_claim(request: Request, books: Books) -> Claim:
    """Choose cores and GPUs for a request that ``shortages`` has nothing against.

    GPUs come first, from one NUMA node if one has enough (the pinned one before others, then
    one that has the cores as well); then cores, from the NUMA node of those GPUs or from the
    one that they fill best, so that a wide task finds a whole one left.

    Memory is pinned to a NUMA node only where the target names one. It is counted for the
    whole node otherwise, and the kernel takes it near the cores while there is some: pinned,
    a task would run out of memory with half of the node's free.
    """
    gpus = _choose_gpus(request, books)
    return Claim(
        cores=_choose_cores(request, books, gpus),
        memory=request.memory,
        gpus=tuple(gpu.uuid for gpu in gpus),
        numa=request.numa,
    )


def _choose_gpus(request: Request, books: Books) -> list[Gpu]:
    if not request.gpus:
        return []
    usable = _usable_gpus(request, books)
    if len(usable) <= request.gpus:
        return usable[: request.gpus]
    by_numa: dict[int | None, list[Gpu]] = {}
    for gpu in usable:
        by_numa.setdefault(gpu.numa, []).append(gpu)

    def suitability(numa: int | None) -> tuple[bool, bool, int, int]:
        group = by_numa[numa]
        cores = 0 if numa is None else len(books.free_cores & books.cores_of_numa(numa))
        is_other = request.numa is not None and numa != request.numa
        # Of two that are alike, the one that they fill best.
        return is_other, cores < request.cores, len(group), group[0].index

    enough = [numa for numa, group in by_numa.items() if len(group) >= request.gpus]
    chosen = by_numa[min(enough, key=suitability)] if enough else usable
    return chosen[: request.gpus]


def _choose_cores(request: Request, books: Books, gpus: list[Gpu]) -> tuple[int, ...]:
    if not request.cores:
        return ()
    free = _free_cores(request, books)
    if len(free) > request.cores and len(books.inventory.numa) > 1:
        near = {gpu.numa for gpu in gpus if gpu.numa is not None}
        groups = [
            (numa.number not in near, len(free & set(numa.cores)), sorted(free & set(numa.cores)))
            for numa in books.inventory.numa
        ]
        fitting = [group for group in groups if group[1] >= request.cores]
        if fitting:
            return tuple(min(fitting)[2][: request.cores])
        by_gpus = frozenset[int]().union(*map(books.cores_of_numa, near))
        nearest = sorted(free, key=lambda core: (core not in by_gpus, core))
        return tuple(sorted(nearest[: request.cores]))
    return tuple(sorted(free)[: request.cores])


def _free_cores(request: Request, books: Books) -> set[int]:
    if request.numa is None:
        return books.free_cores
    return books.free_cores & books.cores_of_numa(request.numa)


def _free_memory(request: Request, books: Books) -> int:
    if request.numa is None:
        return books.free_memory
    return min(books.free_memory, books.free_memory_of(request.numa))


def _all_cores(request: Request, books: Books) -> frozenset[int]:
    if request.numa is None:
        return frozenset(books.inventory.cores)
    return books.cores_of_numa(request.numa) & set(books.inventory.cores)


def _memory_left(request: Request, books: Books, *, of_all: bool) -> str:
    free, total, numa = books.free_memory, books.inventory.memory, None
    if request.numa is not None and books.free_memory_of(request.numa) < free:
        free, numa = books.free_memory_of(request.numa), request.numa
        total = sum(one.memory for one in books.inventory.numa if one.number == numa)
    return _left(render_size(max(free, 0)), render_size(total), numa, of_all=of_all)


def _left(free: str, total: str, numa: int | None, *, of_all: bool) -> str:
    """Say how much there is of something on a node, or on one NUMA node of it."""
    if of_all:
        where = "the node" if numa is None else f"NUMA node {numa}"
        return f"{where} has {free}"
    where = "" if numa is None else f" on NUMA node {numa}"
    return f"{free} of {total} free{where}"


def _usable_gpus(request: Request, books: Books) -> list[Gpu]:
    free = gpus_in_order(books.inventory, books.free_gpus)
    if request.gpu_indices:
        return [gpu for gpu in free if gpu.index in request.gpu_indices]
    return free


def _backend(request: Request, books: Books) -> BackendInfo | None:
    return books.backends.get(request.backend or books.inventory.default_backend)


def _gpu_shortages(
    request: Request, books: Books, name_task: NameTask, *, of_all: bool
) -> list[str]:
    if request.gpu_indices:
        return [
            reason
            for index in request.gpu_indices
            if (reason := _gpu_trouble(index, books, name_task)) is not None
        ]
    free = len(_usable_gpus(request, books))
    if request.gpus <= free:
        return []
    gpus = books.inventory.claimable_gpus
    if not gpus:
        divided = ", only GPUs that are divided and have no instances"
        none = f"the node has none{divided if books.inventory.gpus else ''}"
        return [f"{_count(request.gpus, 'GPU')} wanted, {none}"]
    if of_all:
        return [f"{_count(request.gpus, 'GPU')} wanted, the node has {len(gpus)}"]
    taken = say_gpus_taken(books, name_task)
    return [f"{_count(request.gpus, 'GPU')} wanted, {free} of {len(gpus)} free: {taken}"]


def _gpu_trouble(index: int, books: Books, name_task: NameTask) -> str | None:
    gpu = next((gpu for gpu in books.inventory.gpus if gpu.index == index), None)
    if gpu is None:
        return f"GPU {index} wanted, {say_gpus_here(books)}"
    if gpu.divided:
        return f"GPU {index} is divided: {say_instances(gpu, books)}"
    if gpu.uuid in books.faults:
        return f"GPU {index} is out of service: {books.faults[gpu.uuid]}"
    if gpu.uuid not in books.free_gpus:
        return f"GPU {index} is held by {say_holder(gpu.uuid, books, name_task)}"
    return None


def _label_here(labels: Mapping[str, str], key: str) -> str:
    return f"this node has {key}={labels[key]}" if key in labels else "this node has none"


def _numbers(books: Books) -> str:
    numbers = ", ".join(map(str, sorted(books.free_numa_memory)))
    return f"only {numbers}" if numbers else "none"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
