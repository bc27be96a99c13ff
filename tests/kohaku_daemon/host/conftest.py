"""A host for each test that asks for one."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from kohaku_daemon.store.tasks import Group, TaskStore
from tests.support.host import RunningHost, running_host


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[RunningHost]:
    """A host with its defaults."""
    async with running_host(tmp_path / "data") as host:
        yield host


@pytest.fixture
def hold_writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], threading.Event]:
    """Hold back the store's next writes until the event that is given is set."""
    write = TaskStore.write

    def hold() -> threading.Event:
        release = threading.Event()

        def held(store: TaskStore, group: Group) -> None:
            assert release.wait(10)
            write(store, group)

        monkeypatch.setattr(TaskStore, "write", held)
        return release

    return hold
