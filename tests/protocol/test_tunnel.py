"""The 8-byte header, byte for byte, and what it may not say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.framing import MAX_CHUNK, ProtocolViolation
from protocol.tunnel import (
    HEADER_SIZE,
    TunnelFrame,
    TunnelProto,
    TunnelType,
    decode_tunnel,
    encode_tunnel,
    encode_window,
)


@pytest.mark.parametrize(
    ("frame", "wire"),
    [
        (TunnelFrame(TunnelType.CONNECT, TunnelProto.TCP, 1, 8080), "0100000000011f90"),
        (TunnelFrame(TunnelType.CONNECTED, TunnelProto.TCP, 1, 8080), "0200000000011f90"),
        (TunnelFrame(TunnelType.DATA, TunnelProto.UDP, 2**32 - 1, 53, b"hi"),
         "0301ffffffff00356869"),
        (TunnelFrame(TunnelType.CLOSE, TunnelProto.UDP, 258, 53), "0401000001020035"),
        (TunnelFrame(TunnelType.ERROR, TunnelProto.TCP, 1, 22, b"refused"),
         "050000000001001672656675736564"),
        (TunnelFrame(TunnelType.PING, TunnelProto.TCP, 0, 0, b"x"), "060000000000000078"),
        (TunnelFrame(TunnelType.PONG, TunnelProto.TCP, 0, 0, b"x"), "070000000000000078"),
        (TunnelFrame(TunnelType.WINDOW, TunnelProto.TCP, 1, 22, b"\x00\x01\x00\x00"),
         "080000000001001600010000"),
        (TunnelFrame(TunnelType.EOF, TunnelProto.TCP, 1, 22), "0900000000010016"),
    ],
    ids=lambda value: value.type.name if isinstance(value, TunnelFrame) else "",
)  # fmt: skip
def test_each_type_byte_for_byte(frame: TunnelFrame, wire: str) -> None:
    assert encode_tunnel(frame).hex() == wire
    assert decode_tunnel(bytes.fromhex(wire)) == frame


def test_a_window_is_a_number_of_bytes() -> None:
    frame = decode_tunnel(encode_window(1, 22, 65536))
    assert frame.window == 65536


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        ("", "0 bytes"),
        ("01000000000116", "7 bytes"),
        ("0000000000010016", "type 0"),
        ("0a00000000010016", "type 10"),
        ("0102000000010016", "proto 2"),
        ("0100000000010000", "without a port"),
        ("0100000000010016ff", "CONNECT with 1"),
        ("0900000000010016ff", "EOF with 1"),
        ("0901000000010016", "EOF for datagrams"),
        ("080100000001001600010000", "WINDOW for datagrams"),
        ("0800000000010016", "WINDOW"),
        ("080000000001001600000000", "WINDOW"),
        ("06" + "00" * 7 + "00" * 126, "PING with 126"),
        ("0300000000010016" + "00" * (MAX_CHUNK + 1), "DATA with"),
    ],
)
def test_what_may_not_be_said_is_a_violation(wire: str, why: str) -> None:
    with pytest.raises(ProtocolViolation, match=why):
        decode_tunnel(bytes.fromhex(wire))


def test_what_no_peer_takes_is_not_made() -> None:
    with pytest.raises(ValueError, match="too many bits"):
        encode_tunnel(TunnelFrame(TunnelType.DATA, TunnelProto.TCP, 2**32, 22))
    with pytest.raises(ValueError, match="WINDOW"):
        encode_window(1, 22, 0)


@given(st.binary(min_size=0, max_size=40))
def test_what_is_read_is_written_the_same(data: bytes) -> None:
    try:
        frame = decode_tunnel(data)
    except ProtocolViolation:
        return
    assert encode_tunnel(frame) == data


@given(
    st.sampled_from([TunnelType.DATA, TunnelType.ERROR]),
    st.sampled_from(TunnelProto),
    st.integers(0, 2**32 - 1),
    st.integers(1, 2**16 - 1),
    st.binary(max_size=300),
)
def test_what_is_written_is_read_the_same(
    kind: TunnelType, proto: TunnelProto, client_id: int, port: int, payload: bytes
) -> None:
    frame = TunnelFrame(kind, proto, client_id, port, payload)
    data = encode_tunnel(frame)
    assert len(data) == HEADER_SIZE + len(payload)
    assert decode_tunnel(data) == frame
