"""The keeper: one process that keeps many launches, from their starts to their recorded ends.

It is forked once by its guard, outlives the runner, starts each program as a child of its own
(``starting``), passes on what they write (``output``), and waits for them, so that an exit
status is the kernel's own word. It ends when the runner has gone and its last launch is over.

From the runner comes one line of JSON for each launch, ``[number, LaunchPlan]``; to it go, as
lines of JSON too, in any order:

- ``["hello", pid, start, guard, guard_start]`` once, first;
- ``[kind, number, text, started_at]``, the answer to a launch: see ``launching``;
- ``["over", name, Ending]`` when an end is recorded and nothing is left of the launch;
- ``["retiring"]`` when the guard has gone: new launches shall go to another keeper.

A stalled runner is never waited for, and a runner that has gone leaves its lines in order: all
that it sent is launched. Standard library only: it runs as ``python -I -S``.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import select
import socket
import sys
from collections.abc import Callable
from typing import Any, Final

from kohaku_daemon.backends.process import launching
from kohaku_daemon.backends.process.launching import Launched, NotLaunchedError
from kohaku_daemon.backends.process.leftovers import Leftovers
from kohaku_daemon.backends.process.output import Output
from kohaku_daemon.backends.process.record import Keeper
from kohaku_daemon.backends.process.starting import Starter

HELLO: Final = "hello"
OVER: Final = "over"
RETIRING: Final = "retiring"

#: Launches started between two looks at what goes on elsewhere: each holds up some 0.5 ms.
_STARTS_AT_ONCE: Final = 4
#: Seconds after which orphans that have ended are waited for even if nothing else happens.
_REAP_S: Final = 1.0
#: Seconds between looks at what is being killed.
_SWEEP_FIRST_S: Final = 0.0005
_SWEEP_LAST_S: Final = 0.05


class KeeperLoop:
    """All that one keeper does."""

    def __init__(self, me: Keeper, link: socket.socket | None, guard: int = -1) -> None:
        """Make a keeper; ``serve`` runs it.

        Args:
            me: The calling process and its guard.
            link: To the runner; None for a guard that keeps what a keeper has left it.
            guard: A pidfd of the guard; -1 if there is none.
        """
        self._me = me
        self._link = link
        self._poll = select.epoll()
        #: By descriptor; told what ``epoll`` said of it.
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._starter = Starter()
        self._starter.allow_many_files()
        self._leftovers = Leftovers()
        self._queue: collections.deque[bytes] = collections.deque()
        self._unread = b""
        self._unsent = bytearray()
        #: Whether the runner does not take what is unsent.
        self._is_stalled = False
        self._launches: set[Launched] = set()
        #: Launches whose programs have ended, and that have left something.
        self._ending: list[Launched] = []
        self._sweep_s = _SWEEP_FIRST_S
        if link is not None:
            os.set_blocking(link.fileno(), False)
            self._listen(link.fileno(), self._receive)
            self._say(HELLO, me.pid, me.start, me.guard, me.guard_start)
        if guard >= 0:
            self._listen(guard, functools.partial(self._retire, guard))

    def __repr__(self) -> str:
        return f"KeeperLoop({self._me.pid}, launches={len(self._launches)})"

    def serve(self) -> None:
        """Serve until the runner has gone and nothing is left to keep."""
        while self._link is not None or self._queue or self._launches:
            self._send()
            for descriptor, events in self._poll.poll(self._choose_timeout()):
                handler = self._handlers.get(descriptor)
                if handler is not None:
                    handler(events)
            for _ in range(min(len(self._queue), _STARTS_AT_ONCE)):
                self._start(self._queue.popleft())
            self._end_each()
            self._leftovers.reap()

    def keep(self, launched: Launched) -> None:
        """Keep a launch of the calling process."""
        self._launches.add(launched)
        self._leftovers.add(launched)
        for output in launched.outputs:
            self._listen(output.source, functools.partial(self._pass_on, output))
        if not launched.has_program:
            self._ending.append(launched)
            return
        self._await_end(launched.program.pid, functools.partial(self._note_end, launched))

    def _choose_timeout(self) -> float | None:
        if self._queue:
            return 0
        if self._ending:
            self._sweep_s = min(2 * self._sweep_s, _SWEEP_LAST_S)
            return self._sweep_s
        return _REAP_S if self._launches else None

    def _await_end(self, pid: int, then: Callable[[], None]) -> None:
        """Have something done once when a child has ended, which has not been waited for."""
        descriptor = os.pidfd_open(pid)
        self._listen(descriptor, functools.partial(self._take_end, descriptor, then))

    def _take_end(self, descriptor: int, then: Callable[[], None], _events: int) -> None:
        self._ignore(descriptor)
        os.close(descriptor)
        then()

    def _listen(self, descriptor: int, handler: Callable[[int], None]) -> None:
        self._handlers[descriptor] = handler
        self._poll.register(descriptor, select.EPOLLIN)

    def _ignore(self, descriptor: int) -> None:
        if self._handlers.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    # The runner ---------------------------------------------------------------------

    def _receive(self, _events: int) -> None:
        if self._link is None:
            return
        try:
            received = self._link.recv(1 << 18)
        except BlockingIOError:
            received = None
        except ConnectionError:
            received = b""
        if received == b"":
            self._ignore(self._link.fileno())
            self._link.close()
            self._link = None
        elif received:
            *lines, self._unread = (self._unread + received).split(b"\n")
            self._queue.extend(lines)
        self._send()

    def _say(self, *fields: Any) -> None:
        self._say_line(json.dumps(fields))

    def _say_line(self, line: str) -> None:
        if self._link is not None:
            self._unsent += line.encode() + b"\n"

    def _send(self) -> None:
        if self._link is None or not self._unsent:
            return
        try:
            del self._unsent[: self._link.send(self._unsent)]
        except BlockingIOError:
            pass
        except ConnectionError:
            self._unsent.clear()  # it has gone; reading will say so
        if self._is_stalled != bool(self._unsent):
            self._is_stalled = not self._is_stalled
            more = select.EPOLLOUT if self._is_stalled else 0
            self._poll.modify(self._link.fileno(), select.EPOLLIN | more)

    def _retire(self, guard: int, _events: int) -> None:
        self._ignore(guard)
        self._say(RETIRING)

    # Launches -----------------------------------------------------------------------

    def _start(self, line: bytes) -> None:
        number, plan = json.loads(line)
        try:
            launched = launching.launch(plan, self._me, self._starter)
        except NotLaunchedError as error:
            self._say(error.kind, number, error.text, 0.0)
            return
        self.keep(launched)
        # Of numbers alone, as the name below is of letters, JSON needs nothing but their text.
        self._say_line(f'["{launching.STARTED}", {number}, "", {launched.started_at}]')

    def _pass_on(self, output: Output, events: int) -> None:
        if not output.pass_on(events):
            self._ignore(output.source)

    def _note_end(self, launched: Launched) -> None:
        launched.note_end()
        if not launched.has_program:
            self._leftovers.forget_program(launched)
            if launched.has_init:  # is being killed: go on as soon as that is done
                self._await_end(launched.program.init, _do_nothing)
        self._ending.append(launched)
        self._sweep_s = _SWEEP_FIRST_S

    def _end_each(self) -> None:
        """Go on ending each launch whose program has ended, as far as that goes now."""
        if not self._ending:
            return
        left = []
        for launched in self._ending:
            if self._is_clean(launched) or launched.is_late:
                self._end(launched)
            else:
                left.append(launched)
        self._ending = left

    def _is_clean(self, launched: Launched) -> bool:
        if launched.is_bare:
            return self._leftovers.kill_left_by(launched)
        return launched.kill_rest()

    def _end(self, launched: Launched) -> None:
        for output in launched.outputs:
            self._ignore(output.source)
        ending = launched.close()
        self._leftovers.discard(launched)
        self._launches.discard(launched)
        self._say_line(f'["{OVER}", "{launched.name}", {ending}]')


def _do_nothing() -> None:
    """Wake up: what follows is done in every round."""


def run(me: Keeper, link: socket.socket, guard: int) -> None:
    """Be a keeper, and end the calling process with it; a failure is for the guard."""
    status = 1
    try:
        KeeperLoop(me, link, guard).serve()
        status = 0
    except BaseException:  # we leave by _exit, which would swallow whatever it is
        # To the log. The module ``traceback`` would be half a megabyte in each of us.
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(status)
