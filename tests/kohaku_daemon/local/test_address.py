"""Where the host of a home listens, this time and the next."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kohaku_daemon.local.address import Asked, choose_address, refuse_to_move
from kohaku_daemon.local.home import Remembered
from protocol.errors import BadRequest, Conflict

LOOP = "127.0.0.1"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path))


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server((LOOP, 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free() -> int:
    with socket.create_server((LOOP, 0)) as server:
        port: int = server.getsockname()[1]
    return port


def test_the_settings_decide_where_nothing_was_asked(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHAKU_HOSTD_PORT", str(free))
    address = choose_address(Remembered(), None)
    assert address.flag == f"127.0.0.1:{free}"
    assert address.kept_in(Remembered(), port=free) == Remembered()


def test_what_was_asked_for_once_is_used_again(free: int) -> None:
    asked = choose_address(Remembered(), Asked(LOOP, free))
    before = asked.kept_in(Remembered(runners=3), port=free)
    assert before.runners == 3
    assert choose_address(before, None).flag == f"127.0.0.1:{free}"


def test_a_picked_port_is_used_again_while_it_is_free(free: int) -> None:
    first = choose_address(Remembered(), Asked(LOOP, 0))
    assert first.port == 0
    before = first.kept_in(Remembered(), port=free)
    for asked in (None, Asked(LOOP, 0)):
        assert choose_address(before, asked).port == free


def test_a_picked_port_that_was_taken_since_is_picked_anew(taken: int) -> None:
    before = Remembered(listen=LOOP, port=taken, picked=True)
    assert choose_address(before, None).port == 0


def test_a_taken_port_that_was_asked_for_is_an_error_with_a_way_out(taken: int) -> None:
    with pytest.raises(Conflict, match=f"another program listens on port {taken} of") as caught:
        choose_address(Remembered(), Asked(LOOP, taken))
    assert "--listen 127.0.0.1:0" in caught.value.hint


def test_an_address_of_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHAKU_HOSTD_INSECURE_PLAINTEXT", "yes")
    with pytest.raises(BadRequest, match=r"192\.0\.2\.7 is not an address of this machine"):
        choose_address(Remembered(), Asked("192.0.2.7", 0))


def test_plain_text_to_other_machines_is_refused_before_anything_starts() -> None:
    with pytest.raises(BadRequest, match="unencrypted"):
        choose_address(Remembered(), Asked("0.0.0.0", 0))


def test_an_ipv6_address_is_written_so_that_it_can_be_read() -> None:
    assert choose_address(Remembered(), Asked("::1", 0)).flag == "[::1]:0"


def test_a_host_that_runs_does_not_move() -> None:
    refuse_to_move("http://127.0.0.1:8000", Asked(LOOP, 0))
    refuse_to_move("http://127.0.0.1:8000", Asked(LOOP, 8000))
    with pytest.raises(Conflict, match="up already, on port 8000"):
        refuse_to_move("http://127.0.0.1:8000", Asked(LOOP, 8001))
