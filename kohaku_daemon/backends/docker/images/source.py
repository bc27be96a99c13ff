"""Where images come from, as the backend is told by its runner.

Knows: what is asked of a source. Does not know: shared storage, the host, networks.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from protocol.ids import BatchId
from protocol.messages.runner import PinnedImage
from protocol.models.environment import Version


class ImageSource(Protocol):
    """Gives packed environments, and says which image a batch runs."""

    def pieces(self, version: Version) -> AsyncGenerator[bytes]:
        """Give the file of a version, a checked piece at a time, however long that takes.

        Whoever breaks off and comes back is given at once what was fetched before.

        Raises:
            Damaged: The file is not what was packed.
            NotFound: There is no such file any more.
        """

    async def forget(self, version: Version) -> None:
        """Take note that a version is brought, or given up: what was kept of it goes."""

    async def pin(self, batch: BatchId, reference: str, digest: str = "") -> PinnedImage:
        """Ask the host which image a batch runs, telling it what was found, if anything was.

        Raises:
            BackendAway: The host cannot be asked now.
            KohakuError: The host refuses.
        """
