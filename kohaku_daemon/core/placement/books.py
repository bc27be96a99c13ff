"""The books of one node: what it has, who holds what of it, what is left.

Knows: cores by number, bytes, GPUs by UUID (MIG instances in place of the GPU they divide),
places for tasks. A claim is entered when its
task is assigned and struck out when it ends; paused and lost tasks keep theirs.
Does not know: queues, why somebody wants something.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from protocol.ids import TaskId
from protocol.models.node import BackendInfo, Claimed, Gpu, Inventory
from protocol.models.task import Claim


@dataclass(slots=True)
class Books:
    """Capacity, claims and what is free. Changed by ``enter``, ``strike`` and ``refit`` only."""

    inventory: Inventory = field(default_factory=Inventory)
    #: Every claim that is held, by its task.
    claims: dict[TaskId, Claim] = field(default_factory=dict)
    #: What attempts that were given up may still hold, by task and attempt: nobody has said yet
    #: that they are dead.
    remnants: dict[tuple[TaskId, int], Claim] = field(default_factory=dict)
    #: UUIDs of GPUs out of service, with the reason.
    faults: Mapping[str, str] = field(default_factory=dict)
    free_cores: set[int] = field(default_factory=set)
    free_memory: int = 0
    free_gpus: set[str] = field(default_factory=set)
    #: Bytes free for pinned claims, by NUMA node.
    free_numa_memory: dict[int, int] = field(default_factory=dict)
    #: What the inventory has, for placement's inner loops: backends by name, all cores, GPUs in
    #: service.
    backends: dict[str, BackendInfo] = field(default_factory=dict)
    _cores: frozenset[int] = frozenset()
    _gpus: frozenset[str] = frozenset()
    #: Sums of what is held.
    _cores_held: int = 0
    _memory_held: int = 0
    _gpus_held: int = 0
    #: Answers of ``has_together`` since something was held or let go of last.
    _together: dict[tuple[int, int], bool] = field(default_factory=dict)
    _whole: Books | None = None
    _idle: Books | None = None

    def refit(self, inventory: Inventory, faults: Mapping[str, str] | None = None) -> None:
        """Take a new inventory (or new faults) and work out anew what is free."""
        self.inventory = inventory
        self._whole = self._idle = None
        self._together.clear()
        if faults is not None:
            self.faults = dict(faults)
        self.backends = {info.name: info for info in inventory.backends}
        self._cores = frozenset(inventory.cores)
        self._gpus = frozenset(gpu.uuid for gpu in inventory.claimable_gpus) - self.faults.keys()
        self._cores_held = self._memory_held = self._gpus_held = 0
        self.free_cores = set(self._cores)
        self.free_memory = inventory.memory
        self.free_gpus = set(self._gpus)
        self.free_numa_memory = {numa.number: numa.memory for numa in inventory.numa}
        for claim in self._held():
            self._take(claim)

    def enter(self, task: TaskId, claim: Claim) -> None:
        """Hold a claim for a task.

        Raises:
            ValueError: Something of it is not free: a bug of whoever chose it.
        """
        if task in self.claims:
            raise ValueError(f"task {task} holds a claim already")
        if not self.has_free(claim):
            raise ValueError(f"claim {claim} of task {task} is not free")
        self.restore(task, claim)

    def restore(self, task: TaskId, claim: Claim) -> None:
        """Hold a claim that was held before a restart, whether or not the machine still has it."""
        self.claims[task] = claim
        self._take(claim)

    def strike(self, task: TaskId) -> None:
        """Let go of a task's claim."""
        self._let_go(self.claims.pop(task))

    def give_up(self, task: TaskId, attempt: int) -> Claim:
        """Keep a task's claim as a remnant of its attempt: the task itself lets go of it."""
        claim = self.claims.pop(task)
        self.remnants[(task, attempt)] = claim
        return claim

    def restore_remnant(self, task: TaskId, attempt: int, claim: Claim) -> None:
        """Hold a remnant that was held before a restart."""
        self.remnants[(task, attempt)] = claim
        self._take(claim)

    def clear_remnant(self, task: TaskId, attempt: int) -> None:
        """Let go of a remnant: its attempt is known to be dead."""
        self._let_go(self.remnants.pop((task, attempt)))

    @property
    def places_taken(self) -> int:
        """How many of the node's places for tasks are taken."""
        return len(self.claims) + len(self.remnants)

    def _held(self) -> Iterator[Claim]:
        yield from self.claims.values()
        yield from self.remnants.values()

    def _let_go(self, claim: Claim) -> None:
        self._together.clear()
        self._cores_held -= len(claim.cores)
        self._memory_held -= claim.memory
        self._gpus_held -= len(claim.gpus)
        self.free_cores.update(self._cores.intersection(claim.cores))
        self.free_memory += claim.memory
        self.free_gpus.update(self._gpus.intersection(claim.gpus))
        if claim.numa in self.free_numa_memory:
            self.free_numa_memory[claim.numa] += claim.memory

    def has_free(self, claim: Claim) -> bool:
        """Say whether all of a claim is free."""
        return (
            self.free_cores.issuperset(claim.cores)
            and self.free_gpus.issuperset(claim.gpus)
            and has_room(claim.memory, self.free_memory)
            and (claim.numa is None or has_room(claim.memory, self.free_memory_of(claim.numa)))
        )

    def free_memory_of(self, numa: int) -> int:
        """Give the bytes that are free for claims pinned to a NUMA node; 0 if there is none."""
        return self.free_numa_memory.get(numa, 0)

    def has_together(self, gpus: int, cores: int) -> bool:
        """Say whether so many free GPUs and so many free cores lie on one NUMA node.

        A machine of one NUMA node has all of it there. Remembered: placement's inner loop asks
        all nodes for the same, and between two questions few have changed.
        """
        if len(self.inventory.numa) < 2:
            return True
        answer = self._together.get((gpus, cores))
        if answer is None:
            answer = self._together[gpus, cores] = any(
                len(self.free_cores.intersection(numa.cores)) >= cores
                and sum(
                    gpu.numa == numa.number and gpu.uuid in self.free_gpus
                    for gpu in self.inventory.gpus
                )
                >= gpus
                for numa in self.inventory.numa
            )
        return answer

    def emptied(self) -> Books:
        """Give the books this node would have if it were idle and whole. Not to be changed."""
        if self._whole is None:
            self._whole = Books()
            self._whole.refit(self.inventory, {})
        return self._whole

    def idle(self) -> Books:
        """Give the books it would have if it were idle, with its faults. Not to be changed."""
        if self._idle is None:
            self._idle = Books()
            self._idle.refit(self.inventory, self.faults)
        return self._idle

    def claimed(self) -> Claimed:
        """Sum up what is held."""
        return Claimed(
            tasks=self.places_taken,
            cores=self._cores_held,
            memory=self._memory_held,
            gpus=self._gpus_held,
        )

    def cores_of_numa(self, number: int) -> frozenset[int]:
        """Give the cores of a NUMA node."""
        return frozenset(
            core for numa in self.inventory.numa if numa.number == number for core in numa.cores
        )

    def check(self) -> None:
        """Assert that nothing is held twice and that the sums are right."""
        held_cores = [core for claim in self._held() for core in claim.cores]
        held_gpus = [gpu for claim in self._held() for gpu in claim.gpus]
        assert len(held_cores) == len(set(held_cores)), f"a core is held twice: {held_cores}"
        assert len(held_gpus) == len(set(held_gpus)), f"a GPU is held twice: {held_gpus}"
        assert not self.free_cores & set(held_cores), "a held core counts as free"
        assert not self.free_gpus & set(held_gpus), "a held GPU counts as free"
        held_memory = sum(claim.memory for claim in self._held())
        assert self.free_memory == self.inventory.memory - held_memory, "memory does not add up"
        sums = (len(held_cores), held_memory, len(held_gpus))
        assert (self._cores_held, self._memory_held, self._gpus_held) == sums, "a sum is wrong"

    def _take(self, claim: Claim) -> None:
        self._together.clear()
        self._cores_held += len(claim.cores)
        self._memory_held += claim.memory
        self._gpus_held += len(claim.gpus)
        self.free_cores.difference_update(claim.cores)
        self.free_memory -= claim.memory
        self.free_gpus.difference_update(claim.gpus)
        if claim.numa in self.free_numa_memory:
            self.free_numa_memory[claim.numa] -= claim.memory


def has_room(memory: int, free: int) -> bool:
    """Say whether a claim of so many bytes finds them free.

    No claim always does: less than nothing is free where a machine came back with less
    memory than its tasks hold.
    """
    return memory == 0 or memory <= free


def gpus_in_order(inventory: Inventory, uuids: Iterable[str]) -> list[Gpu]:
    """Give the GPUs of these UUIDs, by index."""
    wanted = set(uuids)
    return sorted((gpu for gpu in inventory.gpus if gpu.uuid in wanted), key=lambda gpu: gpu.index)
