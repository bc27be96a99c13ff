"""Packed environments over HTTP: who may have them, from which byte on, and what it costs."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kohaku_daemon.host import environment_files
from kohaku_daemon.packing.pieces import PIECE, list_name
from protocol.models.access import Role
from protocol.models.environment import Version
from tests.support.host import TOKENS, RunningHost, linked_runner, running_host
from tests.support.packs import pack, pack_noise, read_pack


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[RunningHost]:
    async with running_host(tmp_path / "host") as host:
        yield host


@pytest.fixture
async def credential(host: RunningHost) -> AsyncIterator[str]:
    async with linked_runner(host) as runner:
        yield runner.credential


@pytest.fixture
def folder(host: RunningHost) -> Path:
    return host.data / "environments"


async def get(host: RunningHost, name: str, token: str, **more: Any) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    headers |= more
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{host.url}/v1/runner/environment/{name}", headers=headers) as response,
    ):
        return response.status, await response.read()


@pytest.mark.parametrize("start", [0, 1, PIECE, 2 * PIECE + 999])
async def test_a_node_is_sent_a_file_from_any_byte_on(
    host: RunningHost, credential: str, folder: Path, start: int
) -> None:
    version = await pack_noise(folder, 2)
    whole = read_pack(folder, version)
    more = {"Range": f"bytes={start}-"} if start else {}
    status, data = await get(host, version.digest, credential, **more)
    assert status == (206 if start else 200)
    assert data == whole[start:]


async def test_a_list_comes_with_its_file(host: RunningHost, credential: str, folder: Path) -> None:
    version = await pack(folder, b"x")
    status, data = await get(host, f"{version.digest}.pieces", credential)
    assert (status, data) == (200, (folder / list_name(version.digest)).read_bytes())


async def test_shared_storage_is_served_where_the_host_has_some(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    version = await pack(shared / "environments", b"x")
    async with (
        running_host(tmp_path / "host", shared_dir=shared) as host,
        linked_runner(host) as runner,
    ):
        status, _ = await get(host, version.digest, runner.credential)
    assert status == 200


@pytest.mark.parametrize("token", ["", "khr_" + "0" * 64, TOKENS[Role.ADMIN]])
async def test_nobody_but_a_node_is_sent_anything(
    host: RunningHost, folder: Path, token: str
) -> None:
    version = await pack(folder, b"x")
    status, data = await get(host, version.digest, token)
    assert status == 401
    assert version.digest.encode() not in data


@pytest.mark.parametrize(
    "name", ["0" * 64, "0" * 63, "A" * 64, "x", "..%2Fcluster.json", "0" * 64 + ".tar.zst"]
)
async def test_what_is_not_there_cannot_be_had(
    host: RunningHost, credential: str, folder: Path, name: str
) -> None:
    await pack(folder, b"x")
    status, _ = await get(host, name, credential)
    assert status == 404


@pytest.mark.parametrize("asked", ["bytes=5-6", "bytes=-5", "lines=1-", "bytes=0-,4-", "x"])
async def test_other_ranges_are_sent_all(
    host: RunningHost, credential: str, folder: Path, asked: str
) -> None:
    version = await pack(folder, b"some text")
    status, data = await get(host, version.digest, credential, Range=asked)
    assert (status, data) == (200, read_pack(folder, version))


async def test_a_range_behind_the_end_is_refused(
    host: RunningHost, credential: str, folder: Path
) -> None:
    version = await pack(folder, b"some text")
    status, _ = await get(host, version.digest, credential, Range=f"bytes={version.size}-")
    assert status == 416


async def test_one_node_fetches_so_many_files_and_no_more(
    host: RunningHost, credential: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment_files, "_MOST_PER_NODE", 2)
    version = await pack_noise(folder, 8)  # more than sockets hold
    sockets = [await begin(host, version, credential) for _ in range(2)]
    assert (await get(host, version.digest, credential))[0] == 503
    for opened in sockets:
        opened.close()
    async with asyncio.timeout(10):
        status = 503
        while status == 503:
            status, _ = await get(host, f"{version.digest}.pieces", credential)
    assert status == 200


async def test_who_reads_nothing_costs_the_host_next_to_nothing(
    host: RunningHost, credential: str, folder: Path
) -> None:
    """Memory stays flat, and everybody else is answered."""
    version = await pack(folder, os.urandom(64 * 2**20))
    before = resident()
    sockets = [await begin(host, version, credential) for _ in range(8)]
    async with aiohttp.ClientSession() as http:
        for _ in range(20):
            async with http.get(f"{host.url}/healthz") as response:
                assert response.status == 200
    assert resident() - before < 48 * 2**20
    for opened in sockets:
        opened.close()


async def test_a_host_that_stops_breaks_off_what_it_sends(tmp_path: Path) -> None:
    async with running_host(tmp_path / "host") as host, linked_runner(host) as runner:
        version = await pack_noise(host.data / "environments", 8)
        opened = await begin(host, version, runner.credential)
        async with asyncio.timeout(10):
            await host.stop()
        opened.close()


async def begin(host: RunningHost, version: Version, credential: str) -> socket.socket:
    """Ask for a file, and read the first byte of the answer only."""
    loop = asyncio.get_running_loop()
    opened = socket.socket()
    opened.setblocking(False)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await loop.sock_connect(opened, host.authority)
    request = (
        f"GET /v1/runner/environment/{version.digest} HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {credential}\r\n\r\n"
    )
    await loop.sock_sendall(opened, request.encode())
    assert await loop.sock_recv(opened, 1) == b"H"
    return opened


def resident() -> int:
    """Give the bytes this process has in memory."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
