"""Where the host of a home listens, from one ``up`` to the next.

Knows: what was asked for, what was used before, what is free.
Does not know: processes.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from kohaku_daemon.host.config import load
from kohaku_daemon.local.home import Remembered
from protocol.errors import BadRequest, Conflict


@dataclass(frozen=True, slots=True)
class Asked:
    """An address from the command line; port 0 for any free one."""

    listen: str
    port: int


@dataclass(frozen=True, slots=True)
class Address:
    """Where the host is to listen."""

    listen: str
    port: int
    #: Any free port will do.
    any_port: bool
    #: The next ``up`` listens here again, whatever the settings say.
    keep: bool

    @property
    def flag(self) -> str:
        """Write it as ``--listen`` takes it."""
        name = f"[{self.listen}]" if ":" in self.listen else self.listen
        return f"{name}:{self.port}"

    def kept_in(self, before: Remembered, *, port: int) -> Remembered:
        """Add it, with the port the host got, to what is remembered."""
        if not self.keep:
            return before
        return msgspec.structs.replace(before, listen=self.listen, port=port, picked=self.any_port)


def choose_address(before: Remembered, asked: Asked | None) -> Address:
    """Choose: what is asked for, else what was used before, else what the settings say.

    Raises:
        BadRequest: A setting is wrong, or the address is not one of this machine.
        Conflict: Another program has the port.
    """
    if asked is None and before.listen:
        asked = Asked(before.listen, 0 if before.picked else before.port)
    flags = {} if asked is None else {"listen": asked.listen, "port": asked.port}
    config = load(flags)  # also refuses plain text to other machines without leave
    any_port = config.port == 0
    port = config.port
    if any_port and before.picked and before.listen == config.listen:
        # The one from before, so that what people wrote down stays true.
        port = before.port if _is_free(config.listen, before.port) else 0
    if not _is_free(config.listen, port):
        raise Conflict(
            f"another program listens on port {port} of {config.listen}",
            hint="stop it, or take any free port: kohakud up --listen 127.0.0.1:0",
        )
    return Address(config.listen, port, any_port, keep=any_port or asked is not None)


def refuse_to_move(url: str, asked: Asked | None) -> None:
    """Refuse to promise an address to a host that runs at another.

    Raises:
        Conflict: The host at ``url`` is not where ``asked`` wants it.
    """
    port = urlsplit(url).port
    if asked is not None and asked.port not in (0, port):
        raise Conflict(
            f"the host is up already, on port {port}",
            hint=f"to move it to port {asked.port}: kohakud down, then kohakud up --listen again",
        )


def _is_free(listen: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        # As the host will: connections of the last run may still be winding down.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((listen, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise BadRequest(
                    f"{listen} is not an address of this machine",
                    hint="listen on 127.0.0.1, or on 0.0.0.0 for all of its addresses",
                ) from None
            if isinstance(error, PermissionError):
                raise BadRequest(
                    f"port {port} is kept for root", hint="choose one above 1023"
                ) from None
            return False
    return True
