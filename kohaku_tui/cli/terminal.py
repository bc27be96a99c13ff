"""Our own terminal, lent to a command that runs elsewhere.

Knows: raw mode and that it is left on every way out, the terminal's size, that a shell gets all
that is typed and may drive the terminal, as nothing else may; stdin that is a file or a pipe.
Does not know: what runs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from kohaku_tui.cli.log_writer import STDERR, STDOUT, LogWriter, write_all
from protocol.errors import Unavailable
from protocol.messages.environment import ShellEnd, ShellOutput
from protocol.messages.stream import LogChunk, Source

if TYPE_CHECKING:
    import asyncio

    from protocol.shell import Shell

_STDIN: Final = 0
#: Bytes read at once.
_TYPED: Final = 32 * 1024
#: What ends us while the terminal is raw, where Ctrl-C is only a key.
_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


class Ended(Exception):
    """A signal asks this program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by signal {number}")
        #: What a shell shows for it.
        self.status = 128 + number


def is_whole() -> bool:
    """Say whether a person types and reads here."""
    return os.isatty(_STDIN) and os.isatty(STDOUT)


def size() -> tuple[int, int]:
    """Give the terminal's columns and rows."""
    try:
        found = os.get_terminal_size(STDOUT)
    except OSError:
        return 80, 24
    # One that is not drawn anywhere may say that it has none.
    return max(found.columns, 1), max(found.lines, 1)


async def lend(shell: Shell, *, terminal: bool) -> ShellEnd:
    """Pass on what is typed and said until the command ends; give its end.

    Raises:
        Unavailable: The connection broke.
        BrokenPipeError: Nobody reads our output any more.
        Ended: A signal asked for it.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    talk = loop.create_task(_talk(shell, terminal=terminal))
    typing = loop.create_task(_type(shell))
    asked: list[int] = []

    def end(number: int) -> None:
        asked.append(number)
        talk.cancel()

    with _raw() if terminal else nullcontext():
        try:
            for number in _ENDING if terminal else ():
                loop.add_signal_handler(number, end, number)
            if terminal:
                loop.add_signal_handler(signal.SIGWINCH, _resize, loop, shell)
            return await talk
        except asyncio.CancelledError:
            if asked:
                raise Ended(asked[0]) from None
            raise
        finally:
            for number in (*_ENDING, signal.SIGWINCH):
                loop.remove_signal_handler(number)
            talk.cancel()
            typing.cancel()
            await asyncio.gather(talk, typing, return_exceptions=True)


async def _talk(shell: Shell, *, terminal: bool) -> ShellEnd:
    writer = LogWriter({Source.STDOUT: STDOUT, Source.STDERR: STDERR})
    try:
        async for said in shell:
            match said:
                case ShellEnd():
                    return said
                case ShellOutput(data) if terminal:
                    await write_all(STDOUT, data)
                case ShellOutput(data, is_error):
                    source = Source.STDERR if is_error else Source.STDOUT
                    await writer.write(LogChunk(source, 0, data))
    finally:
        if not terminal:
            await writer.finish()
    raise Unavailable("the host left before the command ended")


async def _type(shell: Shell) -> None:
    """Pass on stdin until it ends, no faster than the command takes it."""
    try:
        while await _readable(_STDIN):
            data = os.read(_STDIN, _TYPED)
            if not data:
                break
            await shell.type(data)
        await shell.end_input()
    except (Unavailable, OSError):
        return  # it has ended, or stdin is closed; the other way says what there is to say


async def _readable(fd: int) -> bool:
    """Wait until there is something to read, or the end. A file has it at once."""
    import asyncio

    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    try:
        loop.add_reader(fd, _set_done, ready)
    except PermissionError:  # epoll does not take regular files (epoll_ctl(2), EPERM)
        await asyncio.sleep(0)
        return True
    try:
        await ready
    finally:
        loop.remove_reader(fd)
    return True


def _set_done(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _resize(loop: asyncio.AbstractEventLoop, shell: Shell) -> None:
    async def tell() -> None:
        try:
            await shell.resize(*size())
        except Unavailable:
            return  # it has ended

    job = loop.create_task(tell())
    _resizing.add(job)
    job.add_done_callback(_resizing.discard)


#: The loop itself keeps weak references only.
_resizing: Final[set[asyncio.Task[None]]] = set()


@contextmanager
def _raw() -> Iterator[None]:
    """Have every key sent as it is, and have the terminal as it was afterwards."""
    import termios
    import tty

    before = termios.tcgetattr(_STDIN)
    sys.stdout.flush()
    try:
        tty.setraw(_STDIN, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, before)
