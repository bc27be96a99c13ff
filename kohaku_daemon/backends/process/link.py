"""The runner's end of the conversation with the launcher.

Knows: how a launcher is started, asked, noticed to be gone, and replaced.
Does not know: what its answers mean for a task (``backend``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.process.launcher import VANISHED
from kohaku_daemon.backends.process.record import LaunchPlan
from kohaku_daemon.supervise import spawn

_log = logging.getLogger(__name__)

_ROOT: Final = Path(__file__).resolve().parents[3]
_BOOT: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from kohaku_daemon.backends.process.launcher import main; main(int(sys.argv[2]))"
)
#: Launchers that may end under one launch before it is given up.
_TRIES: Final = 3
#: Seconds after which a launcher without an answer is replaced: far longer than a start takes
#: on a busy machine with its programs on a slow share.
ANSWER_S: Final = 120.0
#: Seconds a launcher may take to end when told to.
_END_S: Final = 5.0


class LauncherLink:
    """One launcher at a time, started when there is something to launch."""

    def __init__(self, log: Path) -> None:
        """Make a link without a launcher.

        Args:
            log: File for what a launcher or shim has to say that nobody expected.
        """
        self._log_path = log
        self._running: _Running | None = None
        self._changing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"LauncherLink({self._running})"

    @property
    def pid(self) -> int | None:
        """Pid of the launcher, if one runs."""
        return self._running.pid if self._running is not None else None

    async def launch(self, plan: LaunchPlan) -> tuple[str, str]:
        """Launch, and give the shim's answer: its kind and text.

        A launcher that ends before it answers is replaced and asked again: whoever takes the
        state folder first runs it, the other one answers ``taken``.

        Raises:
            OSError: No launcher can be started.
        """
        for _ in range(_TRIES):
            running = await self._ensure()
            answer = await running.ask(plan)
            if answer is not None:
                return answer
        return VANISHED, ""

    async def close(self) -> None:
        """End the launcher. Shims and tasks go on."""
        async with self._changing:
            running, self._running = self._running, None
            if running is not None:
                await running.close()

    async def _ensure(self) -> _Running:
        async with self._changing:
            if self._running is not None and not self._running.is_over:
                return self._running
            if self._running is not None:
                _log.warning("the launcher ended; starting another")
                await self._running.close()
            self._running = await _start_launcher(self._log_path)
            return self._running


class _Running:
    """One launcher process and the launches that wait for its answer."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._writer = writer
        self._count = 0
        self._waiting: dict[int, asyncio.Future[tuple[str, str] | None]] = {}
        self._is_over = False
        self._job = spawn(self._listen(reader), name=f"launcher {process.pid}")

    def __repr__(self) -> str:
        return f"_Running(pid={self.pid}, waiting={len(self._waiting)})"

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, plan: LaunchPlan) -> tuple[str, str] | None:
        """Give the answer, or None if the launcher ended without one."""
        self._count += 1
        number = self._count
        answer: asyncio.Future[tuple[str, str] | None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._writer.write((json.dumps([number, plan]) + "\n").encode())
            await self._writer.drain()
        except ConnectionError:
            self._give_up()
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            # Whatever holds it, another launcher will find the launch taken, or take it.
            _log.warning("the launcher does not answer; replacing it")
            self._process.kill()
            return None
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        self._writer.close()
        self._job.cancel()
        self._give_up()
        try:
            await asyncio.to_thread(self._process.wait, _END_S)
        except subprocess.TimeoutExpired:
            _log.warning("the launcher did not end; killing it")
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                number, kind, text = json.loads(line)
                answer = self._waiting.get(number)
                if answer is not None and not answer.done():
                    answer.set_result((kind, text))
        except ConnectionError:
            pass  # the same as its end
        finally:
            self._give_up()

    def _give_up(self) -> None:
        self._is_over = True
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_result(None)


async def _start_launcher(log: Path) -> _Running:
    ours, theirs = socket.socketpair()
    with theirs, log.open("ab") as errors:
        process = subprocess.Popen(  # noqa: ASYNC220  a vfork, 1 to 2 ms, once in a runner's life
            [
                sys.executable,
                "-I",
                "-S",
                "-X",
                "utf8",
                "-c",
                _BOOT,
                str(_ROOT),
                str(theirs.fileno()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={"LANG": "C.UTF-8"},
        )
    reader, writer = await asyncio.open_connection(sock=ours)
    return _Running(process, reader, writer)
