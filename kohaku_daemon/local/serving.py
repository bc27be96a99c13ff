"""One daemon as one process: its pid file, its signals, its readiness, how it ends.

Knows: what every daemon does around its work. Does not know: the work.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from kohaku_daemon.local import pidfiles
from kohaku_daemon.local.readiness import notify_systemd, url_file
from protocol.errors import KohakuError

_log = logging.getLogger(__name__)

#: Called once, with the address of the host, when the daemon is ready.
OnReady = Callable[[str], None]


class Work(Protocol):
    """What a daemon does until ``stop`` is set; it calls ``on_ready`` once."""

    def __call__(self, *, stop: asyncio.Event, on_ready: OnReady) -> Awaitable[None]:
        """Work."""


def serve(work: Work, *, data: Path, name: str, publishes_url: bool = False) -> None:
    """Run a daemon in this process until SIGTERM or SIGINT. ``NAME.pid`` is in ``data``.

    A second signal cancels the work where it stands.

    Raises:
        Conflict: This daemon runs already on that folder.
        KohakuError: The folder cannot be used, or the work failed.
    """
    # What a daemon writes is for its user alone: output, tokens, the vault.
    os.umask(0o077)
    # Seconds for which the event loop keeps a thread that comes back from the disk waiting: a
    # commit comes back three times. Python's 5 ms made it three times as long on a busy loop.
    sys.setswitchinterval(0.001)
    _own(data)
    with ExitStack() as stack:
        stack.enter_context(pidfiles.hold(data / f"{name}.pid", f"{name} of {data}"))
        url = stack.enter_context(url_file(data / f"{name}.url")) if publishes_url else None

        def on_ready(address: str) -> None:
            # What is there now stays. A full collection that went over all of it was measured at
            # 25 ms in a host, and a peer that has many small things made could repeat that.
            gc.collect()
            gc.freeze()
            # A daemon makes much that lives on (the records of a batch) and few cycles, so the
            # old are looked at seldom. The young are looked at as often as Python does about,
            # for nothing else runs meanwhile: 20,000 of them were measured at 5 to 20 ms. Not
            # never: of each connection that ends, asyncio's transport holds itself in a circle.
            gc.set_threshold(2_000, 4, 100)
            if url is not None:
                url.write(address)
            notify_systemd("READY=1")
            _log.info("ready", extra={"daemon": name, "host": address, "pid": os.getpid()})

        asyncio.run(_until_signalled(work, on_ready))
        _log.info("stopped", extra={"daemon": name})


async def _until_signalled(work: Work, on_ready: OnReady) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None

    def signalled(number: signal.Signals) -> None:
        _log.info("asked to stop", extra={"signal": number.name})
        if stop.is_set():
            main.cancel()
        notify_systemd("STOPPING=1")
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled, number)
    try:
        await work(stop=stop, on_ready=on_ready)
    except asyncio.CancelledError:
        _log.warning("stopped before all was put in order")


def _own(data: Path) -> None:
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KohakuError(
            f"cannot use the data folder {data}: {error.strerror}",
            hint="give another one with --data, or set KOHAKU_HOME",
        ) from error
