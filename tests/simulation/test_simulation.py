"""The promises of the design under faults, in a few thousand worlds of a minute and more.

scripts/test tests/simulation --simulation-seeds 100000
scripts/test tests/simulation --simulation-seed 17      one world, with its story
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Final, NoReturn

import pytest

from tests.simulation.draw import draw
from tests.simulation.shrink import Failure, brief, shrink, try_seed
from tests.simulation.world import World

_SEEDS: Final = 3000
#: Seeds that one process plays before it says what it found.
_PORTION: Final = 100
#: Seconds of real time that no world takes, however busy the machine is.
_LONGEST_S: Final = 60
#: Seeds whose stories are compared between processes.
_COMPARED: Final = range(40, 60)


def _play(seeds: range) -> Failure | None:
    """Play seeds until one breaks a promise, and make that one small. In a process of its own."""
    signal.signal(signal.SIGALRM, _hangs)
    for seed in seeds:
        signal.alarm(_LONGEST_S)
        failure = try_seed(seed)
        signal.alarm(0)
        if failure is not None:
            return failure if "_hangs" in failure.rule else shrink(failure)
    return None


def _hangs(*_: object) -> NoReturn:
    raise TimeoutError(f"this world does not end within {_LONGEST_S} s")


def _play_all(seeds: range, processes: int) -> Iterator[Failure | None]:
    portions = [seeds[at : at + _PORTION] for at in range(0, len(seeds), _PORTION)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        try:
            yield from pool.map(_play, portions)
        finally:
            pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(0)  # as long as there are seeds; each has a limit of its own
def test_every_promise_is_kept(request: pytest.FixtureRequest) -> None:
    one = request.config.getoption("--simulation-seed")
    if one is not None:
        _tell_one(request, one)
        return
    first = request.config.getoption("--simulation-from")
    count = request.config.getoption("--simulation-seeds") or _SEEDS
    processes = min(len(os.sched_getaffinity(0)), 16)
    began = time.monotonic()
    for failure in _play_all(range(first, first + count), processes):
        if failure is not None:
            pytest.fail(str(failure), pytrace=False)
    took_s = time.monotonic() - began
    _say(request, f"{count} seeds, {count / took_s:.0f} a second on {processes} cores")


def _say(request: pytest.FixtureRequest, text: str) -> None:
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.ensure_newline()
        reporter.write_line(text)


def _tell_one(request: pytest.FixtureRequest, seed: int) -> None:
    """Play one world and print what happened in it, whole; if it fails, also as small as can be."""
    failure = try_seed(seed)
    world = World(draw(seed))
    with suppress(Exception):  # what it is, ``failure`` says
        world.play()
    parts = map(brief, (*world.plan.machines, *world.plan.acts))
    _say(request, "\n".join([*parts, *world.story()]))
    if failure is not None:
        pytest.fail(str(shrink(failure)), pytrace=False)


def test_the_same_seed_tells_the_same_story_in_every_process() -> None:
    """Chance may come from the seed only: not from addresses, and not from hashes of text."""
    program = (
        "from tests.simulation.draw import draw\n"
        "from tests.simulation.world import World\n"
        f"for seed in {_COMPARED!r}:\n"
        "    world = World(draw(seed))\n"
        "    world.play()\n"
        "    print(seed, *world.story(), sep='\\n')\n"
    )
    stories = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2", "77")
    }
    assert len(stories) == 1
    assert len(stories.pop().splitlines()) > 100 * 5
