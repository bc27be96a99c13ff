"""Brings images to this machine's engine, once for all who want one, and lets go of old ones.

Knows: what must be true of an image before a task may run in it, which ones were brought here,
which may go when the disk is short.
Does not know: where the pieces of an environment come from (``source``), containers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.base import BackendAway, BackendFailed, OnProgress
from kohaku_daemon.backends.docker.efforts import Efforts
from kohaku_daemon.backends.docker.images.notes import ImageNote, ImageNotes
from kohaku_daemon.backends.docker.images.source import ImageSource
from kohaku_daemon.backends.docker.images.troubles import explain_pull, is_full
from kohaku_daemon.clock import Clock, SystemClock
from kohaku_daemon.core.workload import Launch
from kohaku_daemon.dockerd.connection import Dockerd
from kohaku_daemon.dockerd.errors import EngineAway, EngineRefused
from kohaku_daemon.dockerd.images import EngineImages
from kohaku_daemon.packing.pieces import Damaged
from kohaku_daemon.packing.unpacking import unpack
from protocol.errors import KohakuError, NotFound, Unavailable
from protocol.ids import BatchId
from protocol.models.environment import ImageReading, Version, WantedImage

_log = logging.getLogger(__name__)

#: Bytes that are kept free where the engine has its images, unless that is much of a small disk.
IMAGES_FREE: Final = 10 * 2**30
_SHARE_FREE: Final = 0.1
#: What heartbeats tell at most.
_MOST_READINGS: Final = 64
#: Batches whose image is remembered; one that is not is asked for again.
_MOST_PINS: Final = 1024
#: Seconds after its use that an image stays: one that was brought is about to be used.
_JUST_USED_S: Final = 600.0
#: Repository of the tags that environments have here, for people who look at the engine.
_REPOSITORY: Final = "kohaku"
#: Characters of a digest that tell it apart.
_SHORT: Final = 12
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


class Images:
    """The images of one engine that tasks of this node run in. ``open`` it first."""

    def __init__(
        self,
        dockerd: Dockerd,
        source: ImageSource,
        *,
        notes: Path,
        free: int = IMAGES_FREE,
        clock: Clock | None = None,
    ) -> None:
        """``notes`` is a file of this object's own; ``free`` is in bytes."""
        self._dockerd = dockerd
        self._engine = EngineImages(dockerd)
        self._source = source
        self._notes = ImageNotes(notes)
        self._free = free
        self._clock = clock or SystemClock()
        self._efforts = Efforts()
        #: Environments on their way here, by the name of their image.
        self._coming: dict[str, ImageReading] = {}
        #: Why environments did not come the last time, by digest.
        self._troubles: OrderedDict[str, str] = OrderedDict()
        #: Digest by batch.
        self._pins: OrderedDict[BatchId, str] = OrderedDict()

    async def open(self) -> None:
        """Read what was noted in an earlier run."""
        await self._notes.read()

    async def close(self) -> None:
        """Give up what is being brought."""
        await self._efforts.close()

    # What tasks want ------------------------------------------------------------------

    async def bring(self, launch: Launch, on_progress: OnProgress) -> None:
        """Have the image of a launch here. Any number of times, for any number of launches.

        Raises:
            BackendFailed: It cannot be had.
            BackendAway: The engine or the host does not answer now.
        """
        if launch.image is None:
            return
        try:
            if launch.image.version is not None:
                await self.fetch(launch.image, on_progress)
            else:
                await self._bring_reference(launch, launch.image.reference, on_progress)
        except Unavailable as error:
            raise BackendAway(error.message) from error
        except EngineRefused as error:
            raise BackendFailed(f"Docker on this node: {error.message}") from error

    async def find(self, launch: Launch) -> str:
        """Give the id of the image of a launch that was brought.

        Raises:
            BackendFailed: It is not here any more.
            BackendAway: The engine does not answer now.
        """
        name = self._name_of(launch)
        try:
            image = await self._engine.find(name) if name else ""
        except EngineAway as error:
            raise BackendAway(error.message) from error
        if not image:
            raise BackendFailed(f"the image of task {launch.task} was removed from this node")
        await self._notes.touch(name, self._clock.now())
        return image

    async def fetch(self, image: WantedImage, on_progress: OnProgress) -> None:
        """Have a version of an environment here, whether or not a task wants it yet.

        Raises:
            BackendFailed: It cannot be had.
            EngineAway: The engine does not answer now.
        """
        version = image.version
        assert version is not None, "only environments are fetched"
        if await self._engine.find(version.image):
            await self._note_here(image.environment, version)
            return

        async def work(say: OnProgress) -> None:
            await self._load(image.environment, version, say)

        await self._efforts.share(version.image, work, on_progress)

    def readings(self) -> tuple[ImageReading, ...]:
        """Say which environments are here or on their way, those used last first."""
        coming = list(self._coming.values())
        known = {reading.digest for reading in coming}
        failed = [
            ImageReading(digest, trouble=trouble)
            for digest, trouble in reversed(self._troubles.items())
            if digest not in known
        ]
        known |= self._troubles.keys()
        here = [
            ImageReading(note.digest, present=True)
            for note in self._notes.by_use()
            if note.present and note.digest and note.digest not in known
        ]
        return tuple([*coming, *failed, *here][:_MOST_READINGS])

    def _name_of(self, launch: Launch) -> str:
        """Give what the engine finds a launch's image by; empty if that is not known."""
        if launch.image is None:
            return ""
        if launch.image.version is not None:
            return launch.image.version.image
        digest = self._pins.get(launch.batch, "")
        return f"{_repository_of(launch.image.reference)}@{digest}" if digest else ""

    # Environments ---------------------------------------------------------------------

    async def _load(self, environment: str, version: Version, say: OnProgress) -> None:
        """Load a version, and give it its tag. Raises as ``fetch``."""
        say("preparing 0 %")
        self._coming[version.image] = ImageReading(version.digest)
        self._troubles.pop(version.digest, None)
        # Before anything is there: what is given up half-way may be there all the same later.
        await self._notes.put(_note_of(environment, version, self._clock.now()))
        try:
            try:
                await self._load_pieces(version, say)
            except EngineRefused as error:
                if not is_full(error) or not await self._collect(version.image, all_unused=True):
                    raise
                _log.warning("removed unused images to make room for %s", environment)
                await self._load_pieces(version, say)
            await self._note_here(environment, version)
            await self._source.forget(version)
        except (Damaged, NotFound, EngineRefused) as error:
            failure = await self._explain_load(environment, version, error)
            self._troubles[version.digest] = failure.message
            while len(self._troubles) > _MOST_READINGS:
                self._troubles.popitem(last=False)
            raise failure from error
        finally:
            del self._coming[version.image]

    async def _load_pieces(self, version: Version, say: OnProgress) -> None:
        async with (
            aclosing(self._counted(version, say)) as pieces,
            aclosing(unpack(pieces)) as parts,
        ):
            await self._engine.load(parts)
        if not await self._engine.find(version.image):
            raise Damaged(f"its file {version.digest} holds another image than {version.image}")

    async def _counted(self, version: Version, say: OnProgress) -> AsyncGenerator[bytes]:
        done = 0
        async with aclosing(self._source.pieces(version)) as pieces:
            async for piece in pieces:
                yield piece
                done += len(piece)
                # All but the last per cent: then the engine still works.
                percent = min(99.0, 100 * done / version.size)
                self._coming[version.image] = ImageReading(
                    version.digest, percent=round(percent, 1)
                )
                say(f"preparing {percent:.0f} %")

    async def _note_here(self, environment: str, version: Version) -> None:
        note = self._notes.get(version.image)
        now = self._clock.now()
        self._troubles.pop(version.digest, None)
        if note is not None and note.present:
            await self._notes.touch(version.image, now)
            return
        note = _note_of(environment, version, now)
        note.present = True
        await self._engine.tag(version.image, *note.tag.split(":"))
        await self._notes.put(note)

    async def _explain_load(
        self, environment: str, version: Version, error: KohakuError
    ) -> BackendFailed:
        """Say why an environment is not here, and what to do."""
        again = f"pack it again: kohaku environment pack {environment}"
        if isinstance(error, EngineRefused):
            if is_full(error):
                # What was fetched takes room, too.
                await self._source.forget(version)
                return await self._explain_full(f"environment {environment}")
            return BackendFailed(
                f"Docker on this node cannot load environment {environment}: {error.message}"
            )
        return BackendFailed(f"environment {environment}: {error.message}; {again}")

    async def _explain_full(self, what: str) -> BackendFailed:
        try:
            where = str((await self._dockerd.ask("info"))["DockerRootDir"])
        except KohakuError:
            where = "its data folder"
        return BackendFailed(
            f"no space left for {what} on this node's disk of {where}, where Docker keeps "
            "images: free some there (docker system df), or run the task on another node"
        )

    # Registries -----------------------------------------------------------------------

    async def _bring_reference(
        self, launch: Launch, reference: str, on_progress: OnProgress
    ) -> None:
        """Have here what a reference means to a batch. Raises as ``bring``."""
        name = self._name_of(launch)
        if name and await self._engine.find(name):
            await self._notes.touch(name, self._clock.now())
            return

        async def work(say: OnProgress) -> None:
            await self._pull(launch.batch, reference, say)

        await self._efforts.share(f"{reference} for batch {launch.batch}", work, on_progress)

    async def _pull(self, batch: BatchId, reference: str, say: OnProgress) -> None:
        repository = _repository_of(reference)
        try:
            pinned = await self._source.pin(batch, reference)
            if not pinned.digest:
                say("asking the registry")
                digest = _digest_in(reference) or await self._engine.resolve(
                    reference, pinned.credential
                )
                # The first node to say one has it for all: ours may not be the one.
                pinned = await self._source.pin(batch, reference, digest)
            name = f"{repository}@{pinned.digest}"
            self._pins[batch] = pinned.digest
            while len(self._pins) > _MOST_PINS:
                self._pins.popitem(last=False)
            if await self._engine.find(name):
                return

            async def work(say: OnProgress) -> None:
                # What is there before us is somebody else's, and never collected.
                now = self._clock.now()
                await self._notes.put(ImageNote(name=name, used_at=now))
                async with aclosing(self._engine.pull(name, pinned.credential)) as shares:
                    async for share in shares:
                        say(f"pulling {min(99.0, 100 * share):.0f} %")
                await self._notes.put(ImageNote(name=name, used_at=now, present=True))

            await self._efforts.share(name, work, say)
        except EngineRefused as error:
            if is_full(error):
                raise await self._explain_full(f"image {reference}") from error
            raise BackendFailed(explain_pull(reference, error.message)) from error
        except (BackendAway, Unavailable):
            raise
        except KohakuError as error:
            raise BackendFailed(f"image {reference}: {error.message}") from error

    # What nobody uses -----------------------------------------------------------------

    async def collect(self, wanted: Collection[str] = ()) -> int:
        """Remove images that were brought and are not used, if the disk is short; give how many.

        The one unused longest goes first, and no more than needed. ``wanted`` are names of
        images that stay, as ``name_of`` gives them. Also notes what people removed by hand.

        Raises:
            EngineAway, EngineRefused: The engine could not be asked.
        """
        await self._look()
        return await self._collect(*wanted)

    def name_of(self, launch: Launch) -> str:
        """Give what ``collect`` calls the image of a launch; empty if it has none."""
        return self._name_of(launch)

    async def _look(self) -> None:
        """See which images are there; give those their tags whose bringing was given up late."""
        now = self._clock.now()
        for note in self._notes.by_use():
            if note.name in self._efforts:
                continue
            is_here = bool(await self._engine.find(note.name))
            if is_here and not note.present:
                if note.tag:
                    await self._engine.tag(note.name, *note.tag.split(":"))
                note.present = True
                await self._notes.put(note)
            elif not is_here and (note.present or now - note.used_at > _JUST_USED_S):
                await self._notes.drop(note.name)

    async def _collect(self, *wanted: str, all_unused: bool = False) -> int:
        """Remove as ``collect``; with ``all_unused`` however much room there is."""
        removed = 0
        if not all_unused and not await self._is_short():
            return removed
        used = await self._in_use()
        now = self._clock.now()
        for note in reversed(self._notes.by_use()):
            if note.name in wanted or note.name in self._efforts or not note.present:
                continue
            if now - note.used_at < _JUST_USED_S or await self._engine.find(note.name) in used:
                continue
            if not await self._engine.remove(note.tag or note.name):
                continue
            await self._notes.drop(note.name)
            _log.info("removed an unused image", extra={"image": note.tag or note.name})
            removed += 1
            if not all_unused and not await self._is_short():
                break
        return removed

    async def _in_use(self) -> set[str]:
        """Give the ids of images that containers have, also such as have ended."""
        listed = await self._dockerd.ask("containers/json", params={"all": 1})
        return {str(container["ImageID"]) for container in listed}

    async def _is_short(self) -> bool:
        root = str((await self._dockerd.ask("info"))["DockerRootDir"])
        try:
            disk = await asyncio.to_thread(os.statvfs, root)
        except OSError:
            return False  # the engine sees other disks than this process
        size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
        return free < min(self._free, int(size * _SHARE_FREE))


def _note_of(environment: str, version: Version, now: float) -> ImageNote:
    return ImageNote(
        name=version.image,
        digest=version.digest,
        tag=f"{_REPOSITORY}/{environment}:{version.digest[:_SHORT]}",
        used_at=now,
    )


def _repository_of(reference: str) -> str:
    """Take tag and digest off a reference."""
    name = reference.partition("@")[0]
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(":")[0]


def _digest_in(reference: str) -> str:
    """Give the digest that a reference names itself; empty if it names none."""
    digest = reference.partition("@")[2]
    return digest if _DIGEST.fullmatch(digest) else ""
