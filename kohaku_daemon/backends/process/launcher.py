"""The launcher: a small process that the runner starts once and that forks every shim.

Forking the runner itself would copy a large process with threads, and starting an
interpreter for each task takes some 20 ms. The launcher is neither large nor threaded, so a
shim costs a bare fork. It ends when the runner closes its end of the socket or dies; shims
and tasks go on. It keeps no state: losing it loses nothing.

One line of JSON comes in for each launch, ``[number, LaunchPlan]``, and one goes out,
``[number, kind, text]``, as soon as its program runs or is known not to. Answers come in any
order. Standard library only: it runs as ``python -I -S``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
from typing import Final

from kohaku_daemon.backends.process import linux, shim
from kohaku_daemon.backends.process.files import read_text, write_text

#: Its shim ended without an answer: whether the program ran is in the state folder, or lost.
VANISHED: Final = "vanished"


#: Milliseconds after which shims that have ended are reaped even if nothing else happens.
_REAP_MS: Final = 1000


class Launcher:
    """The conversation with one runner."""

    def __init__(self, runner: socket.socket) -> None:
        self._runner = runner
        self._poll = select.poll()
        self._poll.register(runner, select.POLLIN)
        #: Number of a launch by the pipe on which its shim will answer.
        self._waiting: dict[int, int] = {}
        self._unread = b""

    def serve(self) -> None:
        """Serve until the runner goes."""
        while True:
            for descriptor, _ in self._poll.poll(_REAP_MS):
                if descriptor != self._runner.fileno():
                    self._pass_answer(descriptor)
                elif not self._take_requests():
                    return
            _reap()

    def _take_requests(self) -> bool:
        received = self._runner.recv(1 << 18)
        if not received:
            return False
        *lines, self._unread = (self._unread + received).split(b"\n")
        for line in lines:
            self._launch(line)
        return True

    def _launch(self, line: bytes) -> None:
        number, plan = json.loads(line)
        try:
            read, write = os.pipe()
            pid = os.fork()
        except OSError as error:  # no more processes or descriptors are to be had
            self._answer(number, shim.FAILED, f"cannot start a shim: {error.strerror}")
            return
        if pid == 0:
            try:
                shim.keep(plan, write)
            except BaseException:
                sys.excepthook(*sys.exc_info())  # to the log: the fork must not go on
            finally:
                os._exit(0)
        os.close(write)
        self._waiting[read] = number
        self._poll.register(read, select.POLLIN)

    def _pass_answer(self, descriptor: int) -> None:
        # Shorter than a pipe's atomic write, so it comes whole.
        answer = os.read(descriptor, 4096)
        kind, text = json.loads(answer) if answer else (VANISHED, "")
        self._poll.unregister(descriptor)
        os.close(descriptor)
        self._answer(self._waiting.pop(descriptor), kind, text)

    def _answer(self, number: int, kind: str, text: str) -> None:
        self._runner.sendall((json.dumps([number, kind, text]) + "\n").encode())


def _reap() -> None:
    # Kept off SIGCHLD: each shim would have to put that back for itself.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main(descriptor: int) -> None:
    """Run as a process of its own.

    Args:
        descriptor: Of a connected stream socket to the runner.
    """
    write_text("/proc/self/comm", "kohaku-launcher")
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        # What our parent ignored, such as SIGHUP under nohup, the tasks need not.
        signal.signal(number, signal.SIG_DFL)
    # Caught, not ignored: a write to whoever has gone then fails with an error, and exec gives
    # the programs the default back without a call in each of them.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if read_text("/proc/self/oom_score_adj").startswith("-"):
        # A daemon may be spared when memory runs out; its tasks must not be.
        write_text("/proc/self/oom_score_adj", "0")
    os.umask(0o022)
    os.chdir("/")
    # For all that comes after, so that it is done once: none of us runs a set-uid program.
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.bound_capabilities()
    if os.geteuid() != 0:
        linux.clear_capabilities()
    # Collected objects are written to, which would copy the pages shims share.
    gc.disable()
    gc.freeze()
    # ConnectionError: the runner has gone between a launch and its answer.
    with socket.socket(fileno=descriptor) as runner, contextlib.suppress(ConnectionError):
        Launcher(runner).serve()
