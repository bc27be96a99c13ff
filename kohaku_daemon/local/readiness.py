"""Telling whoever started a daemon that it is ready: systemd, and who reads the url file.

Knows: sd_notify(3) and the file. Does not know: what being ready means to a daemon.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def notify_systemd(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send ``READY=1`` or ``STOPPING=1`` to systemd, if it started this process and listens."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address[0] == "@":  # a name in the abstract namespace, unix(7)
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, suppress(OSError):
        # A daemon works just as well if nobody is told.
        channel.sendto(state.encode(), address)


@contextmanager
def url_file(path: Path) -> Iterator[UrlFile]:
    """Say in a file where this daemon is reached, from when it is ready until it stops."""
    path.unlink(missing_ok=True)  # left by one that was killed
    try:
        yield UrlFile(path)
    finally:
        path.unlink(missing_ok=True)


class UrlFile:
    """A file that holds one URL, or does not exist."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, url: str) -> None:
        """Write it in one step: a reader sees all of it or nothing."""
        aside = self._path.with_suffix(".new")
        aside.write_text(url + "\n", encoding="ascii")
        aside.rename(self._path)
