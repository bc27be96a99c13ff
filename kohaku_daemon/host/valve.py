"""A transport whose reading two may stop: the protocol on top of it, and whoever guards it.

asyncio knows one stop only: whoever starts reading again would lift the other's. Everything
else goes through as it is.

Knows: who has stopped the reading.
Does not know: why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


class Valve(asyncio.Transport):
    """The transport as the protocol on top sees it."""

    def __init__(self, inner: asyncio.Transport) -> None:
        super().__init__()
        self._inner = inner
        self._is_paused = False
        self._is_held = False

    def hold(self) -> None:
        """Read nothing until ``release``, whatever the protocol wants."""
        self._is_held = True
        self._set()

    def release(self) -> None:
        """Read again, if the protocol does not mind."""
        self._is_held = False
        self._set()

    def pause_reading(self) -> None:
        """Stop on behalf of the protocol."""
        self._is_paused = True
        self._set()

    def resume_reading(self) -> None:
        """Go on as far as the protocol is concerned."""
        self._is_paused = False
        self._set()

    def _set(self) -> None:
        # Both do nothing where nothing changes, or when the transport is closing.
        if self._is_paused or self._is_held:
            self._inner.pause_reading()
        else:
            self._inner.resume_reading()

    # -- What goes through ------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Pass it on."""
        return self._inner.get_extra_info(name, default)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Pass it on: the protocol below is the guard's."""
        return self._inner.get_protocol()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Pass it on."""
        self._inner.set_protocol(protocol)

    def is_reading(self) -> bool:
        """Pass it on."""
        return self._inner.is_reading()

    def is_closing(self) -> bool:
        """Pass it on."""
        return self._inner.is_closing()

    def close(self) -> None:
        """Pass it on."""
        self._inner.close()

    def abort(self) -> None:
        """Pass it on."""
        self._inner.abort()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Pass it on."""
        self._inner.write(data)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Pass it on."""
        self._inner.writelines(list_of_data)

    def can_write_eof(self) -> bool:
        """Pass it on."""
        return self._inner.can_write_eof()

    def write_eof(self) -> None:
        """Pass it on."""
        self._inner.write_eof()

    def get_write_buffer_size(self) -> int:
        """Pass it on."""
        return self._inner.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Pass it on."""
        return self._inner.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Pass it on."""
        self._inner.set_write_buffer_limits(high, low)
