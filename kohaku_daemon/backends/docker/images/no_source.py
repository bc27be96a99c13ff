"""Where images come from for a backend that nobody gave a source: nowhere."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from protocol.errors import NotFound
from protocol.ids import BatchId
from protocol.messages.runner import PinnedImage
from protocol.models.environment import Version


class NoImages:
    """Has no image but those that the engine has already. See ``ImageSource``."""

    async def pieces(self, version: Version) -> AsyncGenerator[bytes]:
        """Refuse.

        Raises:
            NotFound: Always.
        """
        raise NotFound(f"there is nowhere to get {version.digest} from")
        yield b""  # what makes it a generator

    async def forget(self, version: Version) -> None:
        """Do nothing: nothing is kept."""

    async def pin(self, batch: BatchId, reference: str, digest: str = "") -> PinnedImage:
        """Say that the image is what was found."""
        return PinnedImage(digest=digest)
