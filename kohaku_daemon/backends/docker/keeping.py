"""All containers that the backend remembers, by what they are looked for by.

Knows: the names of a container. Does not know: what becomes of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.docker.kept import KeptContainer
from kohaku_daemon.backends.docker.record import ContainerRecord, name_launch
from kohaku_daemon.core.workload import Handle
from protocol.ids import TaskId

#: Id of a container in paths of control groups.
_CONTAINER_ID: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


class Keeping:
    """The containers of one runner."""

    def __init__(self, records: Path) -> None:
        """``records`` is the folder that the launches' records are in."""
        self.records = records
        self._by_plan: dict[str, KeptContainer] = {}
        self._by_id: dict[str, KeptContainer] = {}

    def __len__(self) -> int:
        return len(self._by_plan)

    def __iter__(self) -> Iterator[KeptContainer]:
        return iter(list(self._by_plan.values()))

    def keep(self, handle: Handle) -> KeptContainer:
        """Give what is remembered of a launch, which may be nothing yet.

        Raises:
            BackendFailed: It is not one of this backend's handles.
        """
        plan = name_launch(handle)
        kept = self._by_plan.get(plan)
        if kept is None:
            kept = KeptContainer(
                plan=plan,
                task=TaskId(int(handle.data["task"])),
                record=ContainerRecord(self.records, plan),
                boot=str(handle.data.get("boot", "")),
            )
            self._by_plan[plan] = kept
        return kept

    def register(self, kept: KeptContainer, container: str) -> None:
        """Take note of a launch's container, before anything can be heard of it."""
        kept.id = container
        self._by_id[container] = kept

    def forget(self, kept: KeptContainer) -> None:
        """Remember no more of it."""
        self._by_plan.pop(kept.plan, None)
        self._by_id.pop(kept.id, None)

    def find(self, plan: str) -> KeptContainer | None:
        """Give what is remembered of a plan."""
        return self._by_plan.get(plan)

    def find_alive(self, plan: str) -> KeptContainer | None:
        """Give what is remembered of a plan that has a container, and has not ended."""
        kept = self._by_plan.get(plan)
        return kept if kept is not None and kept.id and kept.exit is None else None

    def find_container(self, container: str) -> KeptContainer | None:
        """Give whose container it is by its id."""
        return self._by_id.get(container)

    def find_owner(self, cgroup: str) -> TaskId | None:
        """Name the task that has an id in the text of ``/proc/PID/cgroup``."""
        for container in _CONTAINER_ID.findall(cgroup):
            if (kept := self._by_id.get(container)) is not None:
                return kept.task
        return None
