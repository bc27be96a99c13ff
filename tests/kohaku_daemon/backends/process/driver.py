"""A runner's backend in a process of its own, for tests that kill it.

``python -m tests.kohaku_daemon.backends.process.driver ROOT ISOLATION CGROUPS SCRIPT`` starts
one task, writes its handle as one line of JSON, and waits to be killed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from kohaku_daemon.backends.process.settings import Isolation
from tests.kohaku_daemon.backends.conformance import build_rig
from tests.kohaku_daemon.backends.process.programs import ShellPrograms, make_maker, sh


async def serve(root: Path, isolation: str, cgroups: str, script: str) -> None:
    node = f"test-{os.getppid()}"
    make = make_maker(root, Isolation(isolation), cgroups=cgroups == "True", node=node)
    async with build_rig(make, ShellPrograms(), root) as rig:
        handle, _ = await rig.start(sh(script))
        sys.stdout.write(msgspec.json.encode(handle).decode() + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), *sys.argv[2:]))
