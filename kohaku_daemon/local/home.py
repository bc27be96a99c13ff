"""What ``kohakud up`` keeps of a home, and where its daemons have their files.

Knows: the folders, and what must be the same at the next ``up``.
Does not know: processes.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from kohaku_daemon.local import pidfiles
from protocol.errors import BadRequest, Conflict
from protocol.home import data_dir

#: Seconds another ``up`` or ``down`` is waited for: longer than either takes.
_TURN_S: Final = 60.0


class Remembered(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the last ``up`` was asked for."""

    #: Where the host listens, if ``--listen`` said so or a free port was picked.
    listen: str = ""
    port: int = 0
    #: The port was picked, so another is as good.
    picked: bool = False
    runners: int = 1
    backend: str = ""
    #: Tasks may be left that a ``down --tasks`` has to end.
    tasks_left: bool = False


class Home:
    """Folders of one home; names them, makes none."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or data_dir()

    @property
    def host(self) -> Path:
        """Folder of the host."""
        return self.root / "host"

    @property
    def logs(self) -> Path:
        """Folder of what the daemons write to stderr."""
        return self.root / "logs"

    @property
    def kept(self) -> Path:
        """File of what the last ``up`` was asked for."""
        return self.root / "up.json"

    def runner(self, name: str) -> Path:
        """Folder of one runner."""
        return self.root / "runners" / name

    def runners(self) -> list[str]:
        """Names of the runners that have ever run here."""
        return sorted(path.name for path in (self.root / "runners").glob("*") if path.is_dir())

    def find_shut(self) -> Path | None:
        """Find the first folder above this home that not everybody may pass; None if all may.

        A runner that is root opens the home itself for its tasks' users, and nothing above it.
        """
        above = reversed(self.root.resolve().parents)
        return next((path for path in above if not path.stat().st_mode & stat.S_IXOTH), None)

    def recall(self) -> Remembered:
        """Read what the last ``up`` kept.

        Raises:
            BadRequest: The file is damaged.
        """
        try:
            return msgspec.json.decode(self.kept.read_bytes(), type=Remembered)
        except FileNotFoundError:
            return Remembered()
        except msgspec.MsgspecError as error:
            raise BadRequest(f"{self.kept} is damaged: {error}", hint="remove it") from None

    def remember(self, what: Remembered) -> None:
        """Keep it for the next ``up``, in one step."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = self.kept.with_suffix(".new")
        aside.write_bytes(msgspec.json.encode(what))
        aside.replace(self.kept)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Be the only ``up`` or ``down`` at work here; wait for one that is.

        Raises:
            Conflict: It takes too long.
        """
        deadline = time.monotonic() + _TURN_S
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(
                        pidfiles.hold(self.root / "up.lock", "kohakud up or kohakud down")
                    )
                    break
                except Conflict:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
            yield
