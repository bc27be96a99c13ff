"""Two may stop the reading of a connection, and neither starts it against the other."""

from __future__ import annotations

import asyncio
from itertools import product
from typing import Any

import pytest

from kohaku_daemon.host.valve import Valve


class Below(asyncio.Transport):
    """A transport that knows whether it reads, and what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = True
        self.asked: list[tuple[Any, ...]] = []

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def is_reading(self) -> bool:
        return self.reads

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.asked.append(("write", data))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return f"the {name}"

    def get_write_buffer_size(self) -> int:
        return 7

    def abort(self) -> None:
        self.asked.append(("abort",))


@pytest.mark.parametrize("order", list(product(("pause", "resume", "hold", "release"), repeat=4)))
def test_it_is_read_only_while_nobody_minds(order: tuple[str, ...]) -> None:
    below = Below()
    valve = Valve(below)
    do = {
        "pause": valve.pause_reading,
        "resume": valve.resume_reading,
        "hold": valve.hold,
        "release": valve.release,
    }
    paused = held = False
    for word in order:
        do[word]()
        paused = {"pause": True, "resume": False}.get(word, paused)
        held = {"hold": True, "release": False}.get(word, held)
        assert below.reads is valve.is_reading() is not (paused or held)


def test_everything_else_goes_through() -> None:
    below = Below()
    valve = Valve(below)
    valve.write(b"x")
    valve.abort()
    assert below.asked == [("write", b"x"), ("abort",)]
    assert valve.get_extra_info("peername") == "the peername"
    assert valve.get_write_buffer_size() == 7


def test_it_hides_nothing_a_transport_has() -> None:
    """A method that is not passed on would raise NotImplementedError on a live connection."""
    passed = set(vars(Valve))
    wanted = {
        name
        for kind in asyncio.Transport.__mro__[:-1]
        for name, value in vars(kind).items()
        if callable(value) and not name.startswith("_")
    }
    assert wanted <= passed
