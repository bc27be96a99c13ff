"""The rule for unencrypted connections: on loopback, or where somebody accepted the risk.

Knows: which addresses stay inside the machine. Does not know: connections, settings.
"""

from __future__ import annotations

import ipaddress

from protocol.errors import BadRequest


def is_loopback(address: str) -> bool:
    """Say whether only programs of this machine can reach an address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def check_plaintext(address: str, doing: str, *, accepted: bool) -> None:
    """Refuse to send secrets in the clear to other machines. ``doing`` begins the message.

    Raises:
        BadRequest: ``address`` is not loopback and nobody accepted the risk.
    """
    if is_loopback(address) or accepted:
        return
    raise BadRequest(
        f"{doing} {address} would send tokens and output of tasks unencrypted",
        hint="use 127.0.0.1, or on a network you trust set insecure_plaintext = true; "
        "TLS comes with accounts in a later release",
    )
