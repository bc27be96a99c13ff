"""Where a task should run, as people write it.

``node``, ``node:numa``, ``node::0,1`` or ``node:numa:0,1``: a NUMA node and GPUs by index.
"""

from __future__ import annotations

import msgspec

from protocol.errors import BadRequest
from protocol.ids import parse_node_name


class Target(msgspec.Struct, frozen=True, omit_defaults=True):
    """One node, and optionally a NUMA node and GPUs of it."""

    node: str
    #: Number of the NUMA node, or None for any.
    numa: int | None = None
    #: Indices of GPUs as the node's driver counts them, of MIG instances by ``node.mig_index``.
    gpus: tuple[int, ...] = ()


def parse_target(text: str) -> Target:
    """Read a target.

    Raises:
        BadRequest: It does not follow ``node[:numa][:gpu,gpu...]``.
    """
    node, _, rest = text.partition(":")
    numa_text, _, gpus_text = rest.partition(":")
    try:
        numa = _parse_index(numa_text) if numa_text else None
        gpus = tuple(_parse_index(part) for part in gpus_text.split(",")) if gpus_text else ()
    except ValueError:
        raise BadRequest(
            f"{text!r} is not a target",
            hint="write node, node:numa, node::gpu,gpu or node:numa:gpu,gpu",
        ) from None
    if len(set(gpus)) != len(gpus):
        raise BadRequest(f"target {text!r} names a GPU twice")
    return Target(parse_node_name(node), numa, gpus)


def render_target(target: Target) -> str:
    """Write a target as ``parse_target`` reads it."""
    numa = "" if target.numa is None else str(target.numa)
    gpus = ",".join(map(str, target.gpus))
    return f"{target.node}:{numa}:{gpus}".rstrip(":")


def _parse_index(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(text)
    return int(text)
