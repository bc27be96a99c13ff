"""Frames of a tunnel: an 8-byte header and a payload, one frame in each binary message.

Big-endian ``type u8, proto u8, client_id u32, port u16``. ``client_id`` tells the connections
inside one tunnel apart; ``port`` is the service's, and is repeated in every frame.

Knows: the layout, and which payload each type may have.
Does not know: sockets, who is connected to what.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from protocol.framing import MAX_CHUNK, ProtocolViolation

_HEADER: Final = struct.Struct(">BBIH")
_WINDOW: Final = struct.Struct(">I")
HEADER_SIZE: Final = _HEADER.size
#: Bytes a ping may carry, as in WebSocket (RFC 6455 section 5.5).
_MOST_PING: Final = 125


class TunnelType(IntEnum):
    """What a frame says. Types 1 to 7 are the base; 8 and 9 are extensions of ours."""

    #: Open a connection to ``port``.
    CONNECT = 1
    #: It is open.
    CONNECTED = 2
    #: Bytes of a TCP connection, or one datagram.
    DATA = 3
    #: The connection is gone, both ways, and its client_id is free.
    CLOSE = 4
    #: It could not be opened, or broke; the payload says why in UTF-8. Frees the client_id.
    ERROR = 5
    #: Answer with a pong of the same payload.
    PING = 6
    PONG = 7
    #: The receiver takes this many more bytes for this client_id: a u32.
    WINDOW = 8
    #: No more bytes will come this way; the other way goes on.
    EOF = 9


class TunnelProto(IntEnum):
    """What is carried."""

    TCP = 0
    UDP = 1


_EMPTY: Final = frozenset(
    {TunnelType.CONNECT, TunnelType.CONNECTED, TunnelType.CLOSE, TunnelType.EOF}
)
_STREAM_ONLY: Final = frozenset({TunnelType.WINDOW, TunnelType.EOF})
_WHOLE_TUNNEL: Final = frozenset({TunnelType.PING, TunnelType.PONG})


@dataclass(frozen=True, slots=True)
class TunnelFrame:
    """One frame."""

    type: TunnelType
    proto: TunnelProto
    client_id: int
    port: int
    payload: bytes = b""

    @property
    def window(self) -> int:
        """Bytes that a WINDOW frame grants."""
        (granted,) = _WINDOW.unpack(self.payload)
        return int(granted)


def encode_tunnel(frame: TunnelFrame) -> bytes:
    """Write a frame.

    Raises:
        ValueError: No peer would take it.
    """
    fault = _find_fault(frame)
    if fault:
        raise ValueError(fault)
    header = _HEADER.pack(frame.type, frame.proto, frame.client_id, frame.port)
    return header + frame.payload


def encode_window(client_id: int, port: int, granted: int) -> bytes:
    """Write a WINDOW frame that grants ``granted`` more bytes of a TCP connection."""
    payload = _WINDOW.pack(granted)
    return encode_tunnel(TunnelFrame(TunnelType.WINDOW, TunnelProto.TCP, client_id, port, payload))


def decode_tunnel(data: bytes) -> TunnelFrame:
    """Read a frame.

    Raises:
        ProtocolViolation: It is none, or says what it may not.
    """
    if len(data) < HEADER_SIZE:
        raise ProtocolViolation(f"a tunnel frame of {len(data)} bytes; the header has 8")
    kind, proto, client_id, port = _HEADER.unpack_from(data)
    try:
        frame = TunnelFrame(
            TunnelType(kind), TunnelProto(proto), client_id, port, data[HEADER_SIZE:]
        )
    except ValueError:
        raise ProtocolViolation(f"tunnel type {kind}, proto {proto} is unknown") from None
    fault = _find_fault(frame)
    if fault:
        raise ProtocolViolation(fault)
    return frame


def _find_fault(frame: TunnelFrame) -> str:
    """Say what is wrong with a frame; empty if nothing is."""
    size = len(frame.payload)
    if not (0 <= frame.client_id < 2**32 and 0 <= frame.port < 2**16):
        return f"client_id {frame.client_id} or port {frame.port} has too many bits"
    if frame.port == 0 and frame.type not in _WHOLE_TUNNEL:
        return f"{frame.type.name} without a port"
    if frame.proto is TunnelProto.UDP and frame.type in _STREAM_ONLY:
        return f"{frame.type.name} for datagrams"
    if frame.type in _EMPTY and size:
        return f"{frame.type.name} with {size} bytes of payload"
    if frame.type is TunnelType.WINDOW and (size != _WINDOW.size or not frame.window):
        return "a WINDOW that is not one u32 above 0"
    most = _MOST_PING if frame.type in _WHOLE_TUNNEL else MAX_CHUNK
    return f"{frame.type.name} with {size} bytes; at most {most}" if size > most else ""
