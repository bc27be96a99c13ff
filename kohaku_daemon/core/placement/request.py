"""What a task asks of a node, reduced to what placement compares.

Equal requests are answered alike, so waiting tasks are kept in lanes of equal requests
and a lane is asked about once however long it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from kohaku_daemon.core.placement.containers import Wishes, wishes_of
from protocol.models.target import Target
from protocol.models.task import TaskSpec


@dataclass(frozen=True, slots=True)
class Request:
    """The shape of a task. Hashable."""

    cores: int = 0
    #: Bytes.
    memory: int = 0
    gpus: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    backend: str = ""
    #: Of its container; None for nothing that a node could lack.
    wishes: Wishes | None = None
    #: Empty for any node.
    node: str = ""
    numa: int | None = None
    #: Named GPUs by index; then ``gpus`` is their number.
    gpu_indices: tuple[int, ...] = ()
    #: Seconds after which it has surely ended, its grace included; 0 if nobody knows.
    longest_s: float = 0.0


def request_of(spec: TaskSpec, target: Target | None, *, trusted: bool = False) -> Request:
    """Give the shape of a task with this spec and target. ``trusted``: an operator's."""
    named = target.gpus if target is not None else ()
    return Request(
        cores=spec.cores,
        memory=spec.memory,
        gpus=len(named) or spec.gpus,
        labels=tuple(sorted(spec.labels.items())),
        backend=spec.wanted_backend,
        wishes=wishes_of(spec, trusted=trusted),
        node=target.node if target is not None else "",
        numa=target.numa if target is not None else None,
        gpu_indices=named,
        longest_s=spec.time_limit_s + spec.grace_s if spec.time_limit_s else 0.0,
    )
