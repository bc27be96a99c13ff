"""Background jobs: the only place that makes them.

Knows: that the event loop keeps weak references only, and that an exception nobody awaits
is told when the garbage collector comes by, or never.
Does not know: what a job does. Where jobs live and die together, use ``asyncio.TaskGroup``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final, NoReturn, TypeVar

from protocol.errors import KohakuError

T = TypeVar("T")

_log = logging.getLogger(__name__)

#: Strong references to the jobs that run: without one the loop may drop a job half-way.
_jobs: Final[set[asyncio.Task[Any]]] = set()


def spawn(coro: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
    """Run a coroutine in the background.

    An exception that escapes it is logged with its traceback at once, whether or not
    somebody awaits the job. Cancelling a job is not an error.
    """
    job = asyncio.create_task(coro, name=name)  # noqa: TID251  the one place, see above
    _jobs.add(job)
    job.add_done_callback(_ended)
    return job


async def until_one_fails(*works: Coroutine[Any, Any, NoReturn], name: str) -> KohakuError:
    """Run all until the first fails with an error of ours, and give that; end the others.

    By hand and not by a TaskGroup: before Python 3.13 that one forgets that it was cancelled
    from outside when a job fails at the same time.
    """
    jobs = [spawn(_failure(work), name=name) for work in works]
    try:
        done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)


async def _failure(work: Coroutine[Any, Any, NoReturn]) -> KohakuError:
    try:
        await work
    except KohakuError as error:
        return error


def _ended(job: asyncio.Task[Any]) -> None:
    _jobs.discard(job)
    if job.cancelled():
        return
    error = job.exception()
    if error is not None:
        _log.error("a job failed", exc_info=error, extra={"job": job.get_name()})
