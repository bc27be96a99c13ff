"""Programs of the bench that load a host from a process of their own: null runners, watchers.

Knows: how they are started and that they say one line of JSON when ready and one at their end.
Does not know: what they are used for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from stage import Stage, cpu_s

_HERE: Final = Path(__file__).parent


class Load:
    """A program that loads the host of a stage; it ends with the stage if not before."""

    def __init__(self, place: Stage, name: str, script: str, secret: str, *flags: str) -> None:
        """``secret`` is the first line it reads.

        Raises:
            RuntimeError: It ended before it was ready.
        """
        self._log = place.folder / f"{name}.log"
        self._process = place.start_script(name, _HERE / script, f"--host={place.url}", *flags)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{secret}\n".encode())
        self._process.stdin.flush()
        self._read()

    @property
    def cpu_s(self) -> float:
        """CPU seconds the process has used."""
        return cpu_s(self._process.pid)

    def stop(self) -> dict[str, int]:
        """End it; give what it counted."""
        self._process.terminate()
        counts = self._read()
        self._process.wait()
        return counts

    def _read(self) -> dict[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self._log.stem} ended; it wrote:\n{said}")
        counts: dict[str, int] = json.loads(line)
        return counts


class Nulls(Load):
    """Null runners of one process, all registered."""

    def __init__(self, place: Stage, nodes: int = 1, **options: int | str) -> None:
        """``options`` are those of ``null_runner.py``, such as ``max_tasks=1024``."""
        flags = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in options.items()
        ]
        name = f"nulls-{options.get('prefix', 'null')}"
        secret = place.join_token(nodes)
        super().__init__(place, name, "null_runner.py", secret, f"--nodes={nodes}", *flags)


class Watchers(Load):
    """Clients that watch one topic, all with their snapshot."""

    def __init__(self, place: Stage, watchers: int, topic: str) -> None:
        flags = (f"--watchers={watchers}", f"--topic={topic}")
        super().__init__(place, f"watchers-{topic}", "watch_load.py", place.token, *flags)
