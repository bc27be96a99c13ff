"""What a task wants of its container that not every node lets it have.

Knows: mounts by their place on the node, privileges, and that other backends have no containers.
Does not know: whether a source exists and what it is a link to; the node looks when it starts
the container. Who may ask for what is checked at the door.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kohaku_daemon.core.task.containers import wishes
from protocol.models.node import BackendInfo
from protocol.models.task import DOCKER, TaskSpec

#: What backends allow operators, as BackendInfo says it.
_PRIVILEGED: Final = "privileged"
_ANY_MOUNT: Final = "any-mount"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is compared with a node's backend. Hashable, and equal for equal needs."""

    #: Sources of mounts, each once, in order.
    mounts: tuple[str, ...] = ()
    privileged: bool = False
    #: They are an operator's. Only told where it matters.
    trusted: bool = False
    #: Fields of the spec that need a container of any kind, where the spec does not ask for one.
    needs: tuple[str, ...] = ()


def wishes_of(spec: TaskSpec, *, trusted: bool) -> Wishes | None:
    """Give what a spec wants of its container; None if any container will do, or none."""
    needs = () if spec.wanted_backend == DOCKER else tuple(wishes(spec))
    mounts = tuple(sorted({mount.source for mount in spec.mounts}))
    if not (needs or mounts or spec.privileged):
        return None
    return Wishes(mounts, spec.privileged, trusted and bool(mounts), needs)


def unmet(wanted: Wishes | None, backend: BackendInfo) -> Iterator[str]:
    """Say, for the task's owner, what a backend will not give, however idle its node is."""
    if wanted is None:
        return
    if wanted.needs and backend.name != DOCKER:
        yield (
            f"{' and '.join(wanted.needs)} wanted, which only containers have, and the backend"
            f" here is {backend.name}"
        )
        return
    if wanted.privileged and _PRIVILEGED not in backend.allows:
        yield "a privileged container wanted, this node allows none"
    if wanted.mounts and not (wanted.trusted and _ANY_MOUNT in backend.allows):
        for source in wanted.mounts:
            if not any(_is_below(source, root) for root in backend.mount_roots):
                yield f"mount of {source} wanted, {_say_mountable(backend)}"


def _say_mountable(backend: BackendInfo) -> str:
    here = (
        f"this node allows only what is below {', '.join(backend.mount_roots)}"
        if backend.mount_roots
        else "this node allows none"
    )
    return f"{here}; more only for operators" if _ANY_MOUNT in backend.allows else here


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
