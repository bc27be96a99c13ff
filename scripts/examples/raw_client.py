#!/usr/bin/env python3
"""Submit a command, wait for it, print its output: with nothing but aiohttp and msgpack.

    python scripts/examples/raw_client.py [COMMAND...]

For whoever writes a client in another language: this is protocol/SPEC.md in one page, and it
imports nothing of KohakuRiver. The host is KOHAKU_HOST with KOHAKU_TOKEN, or the saved context.
It ends with the exit code of the command.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import msgpack  # type: ignore[import-untyped]

CALL, REPLY, NOTIFY = 0, 1, 2
LOG_CHUNK, LOG_END = 1, 2
LIMIT = 256 * 1024


class Refused(Exception):
    """The host answered with an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['code']}: {error['message']}")


def find_host() -> tuple[str, str]:
    """Give address and token of the host (SPEC names no files; these are KohakuRiver's own)."""
    if os.environ.get("KOHAKU_HOST"):
        url = os.environ["KOHAKU_HOST"]
        return url if "://" in url else f"http://{url}", os.environ.get("KOHAKU_TOKEN", "")
    home = os.environ.get("KOHAKU_HOME")
    system = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    folder = Path(home) / "config" if home else Path(system).expanduser() / "kohaku"
    try:
        saved = json.loads((folder / "contexts.json").read_text())
    except FileNotFoundError:
        sys.exit("no host is known: set KOHAKU_HOST and KOHAKU_TOKEN, or log in with kohaku login")
    for context in saved["contexts"]:
        if context["name"] == saved["current"]:
            return context["url"], context.get("token", "")
    sys.exit("no context is in use: choose one with kohaku context use NAME")


class Host:
    """A control connection, one call at a time. A program that does more keeps a table of ids."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse[bool]) -> None:
        self._socket = socket
        self._ids = itertools.count(1)

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call and wait for the reply; answer pings meanwhile."""
        number = next(self._ids)
        await self._socket.send_bytes(msgpack.packb([CALL, number, method, params]))
        while True:
            message = await self._socket.receive()
            if message.type is not aiohttp.WSMsgType.BINARY:
                raise ConnectionError(f"the host closed: {message.extra} ({message.data})")
            frame = msgpack.unpackb(message.data)
            if frame[0] == REPLY and frame[1] == number:
                _, _, error, result = frame[:4]
                if error is not None:
                    raise Refused(error)
                answer: dict[str, Any] = result
                return answer
            if frame[0] == NOTIFY and frame[1] == "ping":
                await self._socket.send_bytes(msgpack.packb([NOTIFY, "pong", None]))


async def print_logs(http: aiohttp.ClientSession, url: str, ticket: dict[str, Any]) -> None:
    """Read one data connection to its end."""
    outputs = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    headers = {"Authorization": f"Ticket {ticket['ticket']}"}
    async with http.ws_connect(url + ticket["path"], headers=headers, compress=0) as socket:
        async for message in socket:
            item = msgpack.unpackb(message.data)
            if item[0] == LOG_CHUNK:
                _, source, _offset, data = item[:4]
                outputs[source].write(data)
                outputs[source].flush()
            elif item[0] == LOG_END:
                return
    # A program that must not lose a byte asks again from the last offset (SPEC, section 10).
    raise ConnectionError("the output was cut off")


async def main(command: list[str]) -> int:
    url, token = find_host()
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{url}/v1/ws", compress=0, max_msg_size=LIMIT + 1) as socket,
    ):
        host = Host(socket)
        welcome = await host.call("hello", version=1, token=token, agent="raw_client.py")
        print(f"host {url}, here as {welcome['role']}", file=sys.stderr)

        # Chosen once and kept: were the answer lost, the same words would give the same task.
        request_id = uuid.uuid4().hex
        submitted = await host.call("task.submit", request_id=request_id, spec={"command": command})
        task = submitted["runs"][0][0]
        print(f"task {task}", file=sys.stderr)

        while not (await host.call("task.wait", tasks=[task]))["done"]:
            print("still waiting", file=sys.stderr)
        ended = (await host.call("task.show", task=task))["task"]
        await print_logs(http, url, await host.call("task.logs", task=task))
        print(f"task {task} {ended['state']}", file=sys.stderr)
        code: int | None = ended.get("exit", {}).get("code")
        return 1 if code is None else code


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(sys.argv[1:] or ["sh", "-c", "echo hello from $(hostname)"])))
    except (Refused, ConnectionError, aiohttp.ClientError) as reason:
        sys.exit(f"error: {reason}")
