"""Filter and claim on one node: why a request does not fit, or exactly what it would hold.

Pure functions over the node's books. The reasons are written for the task's owner.
"""

from __future__ import annotations

from collections.abc import Mapping

from kohaku_daemon.core.placement.books import Books, gpus_in_order, has_room
from kohaku_daemon.core.placement.request import Request
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
    if _backend(request, books) is None:
        name = request.backend or books.inventory.default_backend or "of any kind"
        reasons.append(f"backend {name} is not on this node")
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
    return all(labels.get(key) == value for key, value in request.labels)


def shortages(request: Request, books: Books, *, of_all: bool = False) -> list[str]:
    """Say what of the request is not free in these books; empty if all is.

    ``of_all`` words it for books that nobody uses: the node has no more than that.
    """
    inventory = books.inventory
    reasons = []
    if request.numa is not None and request.numa not in books.free_numa_memory:
        return [f"NUMA node {request.numa} wanted, this node has {_numbers(books)}"]
    if request.cores > len(_free_cores(request, books)):
        where = f" of NUMA node {request.numa}" if request.numa is not None else ""
        total = len(_all_cores(request, books))
        free = len(_free_cores(request, books))
        left = f"the node has {total}" if of_all else f"{free} of {total} free"
        reasons.append(f"{_count(request.cores, 'core')} wanted, {left}{where}")
    free_memory = _free_memory(request, books)
    if not has_room(request.memory, free_memory):
        free_size, total_size = map(render_size, (max(free_memory, 0), inventory.memory))
        left = f"the node has {free_size}" if of_all else f"{free_size} of {total_size} free"
        reasons.append(f"{render_size(request.memory)} memory wanted, {left}")
    reasons += _gpu_shortages(request, books, of_all=of_all)
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

    GPUs come first, from one NUMA node if one has enough (the pinned one before others); then
    cores, from the NUMA node of those GPUs or from the one that they fill best, so that a
    wide task finds a whole one left.
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
    enough = [
        (request.numa is not None and numa != request.numa, len(group), group[0].index, group)
        for numa, group in by_numa.items()
        if len(group) >= request.gpus
    ]
    return (min(enough)[3] if enough else usable)[: request.gpus]


def _choose_cores(request: Request, books: Books, gpus: list[Gpu]) -> tuple[int, ...]:
    if not request.cores:
        return ()
    free = _free_cores(request, books)
    if len(free) > request.cores and len(books.inventory.numa) > 1:
        near = {gpu.numa for gpu in gpus}
        groups = [
            (numa.number not in near, len(free & set(numa.cores)), sorted(free & set(numa.cores)))
            for numa in books.inventory.numa
        ]
        fitting = [group for group in groups if group[1] >= request.cores]
        if fitting:
            return tuple(min(fitting)[2][: request.cores])
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


def _usable_gpus(request: Request, books: Books) -> list[Gpu]:
    free = gpus_in_order(books.inventory, books.free_gpus)
    if request.gpu_indices:
        return [gpu for gpu in free if gpu.index in request.gpu_indices]
    return free


def _backend(request: Request, books: Books) -> BackendInfo | None:
    return books.backends.get(request.backend or books.inventory.default_backend)


def _gpu_shortages(request: Request, books: Books, *, of_all: bool) -> list[str]:
    gpus = books.inventory.gpus
    if request.gpu_indices:
        return [
            reason
            for index in request.gpu_indices
            if (reason := _gpu_trouble(index, books)) is not None
        ]
    free = len(_usable_gpus(request, books))
    if request.gpus <= free:
        return []
    if not gpus:
        return [f"{_count(request.gpus, 'GPU')} wanted, the node has none"]
    out = f", {len(books.faults)} out of service" if books.faults else ""
    left = f"the node has {len(gpus)}" if of_all else f"{free} of {len(gpus)} free{out}"
    return [f"{_count(request.gpus, 'GPU')} wanted, {left}"]


def _gpu_trouble(index: int, books: Books) -> str | None:
    gpu = next((gpu for gpu in books.inventory.gpus if gpu.index == index), None)
    if gpu is None:
        return f"GPU {index} wanted, {_gpus_here(books)}"
    if gpu.uuid in books.faults:
        return f"GPU {index} is out of service: {books.faults[gpu.uuid]}"
    if gpu.uuid not in books.free_gpus:
        return f"GPU {index} is held by {_holder(gpu.uuid, books)}"
    return None


def _gpus_here(books: Books) -> str:
    """Say which GPUs a node has, by their indices."""
    indices = sorted(gpu.index for gpu in books.inventory.gpus)
    if not indices:
        return "the node has no GPU"
    if len(indices) == 1:
        return f"the node has only GPU {indices[0]}"
    if indices == list(range(indices[0], indices[-1] + 1)):
        return f"the node has GPUs {indices[0]} to {indices[-1]}"
    return f"the node has GPUs {', '.join(map(str, indices))}"


def _holder(uuid: str, books: Books) -> str:
    for task, claim in books.claims.items():
        if uuid in claim.gpus:
            return f"task {task}"
    task, attempt = next(key for key, claim in books.remnants.items() if uuid in claim.gpus)
    return f"attempt {attempt} of task {task}, which was given up and has not been seen to end"


def _label_here(labels: Mapping[str, str], key: str) -> str:
    return f"this node has {key}={labels[key]}" if key in labels else "this node has none"


def _numbers(books: Books) -> str:
    numbers = ", ".join(map(str, sorted(books.free_numa_memory)))
    return f"only {numbers}" if numbers else "none"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
