"""The hands that make and pack environments, with the Docker engine of the host machine.

Knows: the container of each environment, found by its labels and never by its name; how a
packed version comes to be and is removed; how far each work is.
Does not know: what is to be done, but by the records of environments: each is worked on until
its record asks for nothing more, so whatever a host did when it was killed is taken up by the
next. How far a work is, is not stored: it is of the moment.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from msgspec.structs import replace

from kohaku_daemon.core.cluster.environments import find_environment, view_environment
from kohaku_daemon.core.cluster.events import EnvironmentMade, EnvironmentPacked, FilesRemoved
from kohaku_daemon.core.cluster.records import EnvironmentRecord
from kohaku_daemon.core.cluster.registries import credential_for, registry_of
from kohaku_daemon.core.cluster.state import ClusterState
from kohaku_daemon.dockerd.connection import Dockerd
from kohaku_daemon.dockerd.errors import EngineAbsent, EngineAway, EngineRefused
from kohaku_daemon.dockerd.images import EngineImages
from kohaku_daemon.host.config import HostConfig
from kohaku_daemon.host.loop import HostLoop
from kohaku_daemon.host.subscriptions import Hub
from kohaku_daemon.packing.pieces import list_name, pack_name
from kohaku_daemon.packing.writer import PackWriter, remove_unfinished
from kohaku_daemon.supervise import spawn
from protocol.errors import Conflict, KohakuError, Unavailable
from protocol.models.environment import Environment, EnvironmentState, Version

_log = logging.getLogger(__name__)

#: Labels of our containers.
_NAME: Final = "kohaku.environment"
_CLUSTER: Final = "kohaku.cluster"
_SOURCE: Final = "kohaku.source"
#: What keeps a container there to be entered. It takes SIGTERM, and reaps what is left to it.
_WAIT_FOR_EVER: Final = (
    "sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 86400 & wait $!; done",
)  # fmt: skip
#: Seconds that the engine may take to make an image of a container: it copies all that changed.
_COMMIT_S: Final = 3600.0
#: Seconds between two steps of progress that are shown.
_SHOWN_EACH_S: Final = 1.0
#: Seconds until what could not be removed is tried again.
_AGAIN_S: Final = 30.0
#: Seconds that what a host leaves behind may keep it from ending.
_FAREWELL_S: Final = 5.0
_INSTALL_HINT: Final = (
    "environments are made on the host machine: install Docker there, such as apt install"
    " docker.io, or say where its socket is: docker_socket in host.toml"
)
#: What registries and engines say to whom they do not let in.
_REFUSALS: Final = ("unauthorized", "denied", "no basic auth", "authentication required")


@dataclass(frozen=True, slots=True)
class _Container:
    """What the engine has of an environment."""

    id: str
    #: The image it was made from, as it was asked for.
    source: str


class Workshop:
    """Works on environments, one job for each, and lets people into them."""

    def __init__(self, config: HostConfig, state: ClusterState, hub: Hub) -> None:
        self._folder = config.environments
        self._is_shared = config.shared_dir is not None
        self._state = state
        self._hub = hub
        self._dockerd = Dockerd(config.docker_socket)
        self._images = EngineImages(self._dockerd)
        self._loop: HostLoop | None = None
        self._jobs: dict[str, asyncio.Task[None]] = {}
        #: Those whose record has changed since their job looked at it.
        self._due: set[str] = set()
        #: Those that are being made: given up when they are deleted.
        self._making: set[str] = set()
        #: As they were shown last, without progress.
        self._shown: dict[str, Environment] = {}
        self._progress: dict[str, str] = {}
        self._told_at: dict[str, float] = {}

    async def run(self, loop: HostLoop) -> NoReturn:
        """Take up what is to be done, and go on until cancelled."""
        self._loop = loop
        try:
            await asyncio.to_thread(self._clean_folder)
            for name, record in tuple(self._state.environments.items()):
                if not record.deleted:
                    self._shown.setdefault(name, view_environment(record))
                self._wake(name)
            await asyncio.Event().wait()
            raise AssertionError("nobody sets this")
        finally:
            self._loop = None
            jobs = tuple(self._jobs.values())
            for job in jobs:
                job.cancel()
            if jobs:
                await asyncio.wait(jobs, timeout=2 * _FAREWELL_S)
            await self._dockerd.close()

    # What others ask -----------------------------------------------------------------

    def changed(self, environments: Mapping[str, Environment | None]) -> None:
        """Show environments as they are committed, and see what is to be done about them."""
        for name, environment in environments.items():
            if environment is None:
                self._shown.pop(name, None)
                self._hub.put_environment(name, None)
            else:
                self._shown[name] = environment
                self._hub.put_environment(name, self.with_progress(environment))
            self._wake(name)

    def with_progress(self, environment: Environment) -> Environment:
        """Add how far the work at hand is."""
        return replace(environment, progress=self._progress.get(environment.name, ""))

    async def check(self) -> None:
        """Make sure that there is an engine to work with.

        Raises:
            EngineAbsent, EngineAway: There is none, or it does not answer.
        """
        try:
            await self._dockerd.open()
        except EngineAbsent as error:
            raise EngineAbsent(error.message, hint=error.hint or _INSTALL_HINT) from error

    async def enter(self, name: str) -> tuple[Dockerd, str]:
        """Give the engine and the id of an environment's container, which runs now.

        Raises:
            NotFound: There is no such environment.
            Conflict: It is not made yet, or cannot be entered.
            Unavailable: There is no engine.
        """
        record = find_environment(self._state, name)
        if record.state in {EnvironmentState.CREATING, EnvironmentState.FAILED}:
            trouble = f": {record.trouble}" if record.trouble else ""
            raise Conflict(
                f"environment {name} is {record.state}{trouble}",
                hint=f"see: kohaku environment show {name}",
            )
        await self.check()
        container = await self._find(name)
        if container is None:
            raise _is_gone(record)
        try:
            await self._dockerd.ask(f"containers/{container.id}/start", "POST")
        except EngineRefused as error:
            if "executable file not found" in error.message or "no such file" in error.message:
                raise Conflict(
                    f"environment {name} cannot be entered: there is no sh in {record.source}",
                    hint="it can be packed as it is, and tasks can run in it",
                ) from error
            raise Conflict(
                f"the container of environment {name} cannot be started: {error.message}"
            ) from error
        return self._dockerd, container.id

    # Jobs -----------------------------------------------------------------------------

    def _wake(self, name: str) -> None:
        if self._loop is None:
            return
        job = self._jobs.get(name)
        if job is None:
            job = self._jobs[name] = spawn(self._attend(name), name=f"environment {name}")
            job.add_done_callback(lambda _: self._ended(name))
            return
        self._due.add(name)
        record = self._state.environments.get(name)
        if record is not None and record.deleted and name in self._making:
            job.cancel()  # nobody wants any more what may take hours

    def _ended(self, name: str) -> None:
        del self._jobs[name]
        self._making.discard(name)
        self._progress.pop(name, None)
        if name in self._due:
            self._due.discard(name)
            self._wake(name)

    async def _attend(self, name: str) -> None:
        """Work on an environment until there is nothing more to do."""
        while True:
            self._due.discard(name)
            work = self._choose(await self._committed(name))
            if name in self._due:
                continue  # it has changed since, such as to being deleted
            if work is None:
                return
            await work()

    def _choose(self, record: EnvironmentRecord | None) -> Callable[[], Awaitable[None]] | None:
        if record is None:
            return None
        if record.deleted:
            return lambda: self._clear(record)
        match record.state:
            case EnvironmentState.CREATING:
                return lambda: self._create(record)
            case EnvironmentState.PACKING:
                return lambda: self._pack(record)
            case _:
                return (lambda: self._drop(record)) if record.dropped else None

    async def _committed(self, name: str) -> EnvironmentRecord | None:
        """Give a record as it is on the disk: what is removed must not come back in it."""
        loop = self._loop
        assert loop is not None, "jobs end before the loop"
        while True:
            record = await loop.read(lambda: self._state.environments.get(name))
            if not loop.trouble:
                return record
            await asyncio.sleep(_SHOWN_EACH_S)  # memory is ahead of the disk as long as that lasts

    # Making ---------------------------------------------------------------------------

    async def _create(self, record: EnvironmentRecord) -> None:
        self._making.add(record.name)
        trouble = ""
        try:
            await self._make(record)
        except KohakuError as error:
            trouble = _in_words(error)
        except Exception:  # else it would be made for ever; the log has what it is
            _log.exception("environment %s could not be made", record.name)
            trouble = "the host failed at it; its log says how"
        finally:
            self._making.discard(record.name)
            self._progress.pop(record.name, None)
        self._tell(EnvironmentMade(record.name, trouble))

    async def _make(self, record: EnvironmentRecord) -> None:
        self._note(record.name, "making its container", now=True)
        await self.check()
        there = await self._find(record.name)
        if there is not None and there.source == record.source:
            return  # of the host before this one
        if there is not None:
            raise Conflict(
                f"the engine has a container of an environment {record.name} made from"
                f" {there.source}, as after a backup was brought back",
                hint=f"look at it, then remove it: docker rm --force {there.id[:12]}",
            )
        image = await self._bring(record)
        await self._make_container(record, image)

    async def _bring(self, record: EnvironmentRecord) -> str:
        """Give the id of the image, pulled if the engine does not have it."""
        reference = _with_tag(record.source)
        if found := await self._images.find(record.source):
            return found
        self._note(record.name, "pulling", now=True)
        try:
            async for share in self._images.pull(reference, self._credential(reference)):
                self._note(record.name, f"pulling {share * 100:.0f} %")
        except EngineRefused as error:
            raise _explain_pull(record.source, error) from error
        found = await self._images.find(record.source)
        if not found:
            raise Unavailable(f"image {record.source} was pulled and is not there")
        return found

    def _credential(self, reference: str) -> Any:
        return credential_for(self._state, reference)

    async def _make_container(self, record: EnvironmentRecord, image: str) -> None:
        body = {
            "Image": image,
            "Entrypoint": list(_WAIT_FOR_EVER),
            "Cmd": [],
            "Labels": {
                _NAME: record.name,
                _CLUSTER: self._state.cluster,
                _SOURCE: record.source,
            },
            # Nobody reads what it says.
            "HostConfig": {"LogConfig": {"Type": "none"}},
        }
        # For people; another cluster may have one of that name on the same engine.
        names = (f"kohaku-env-{record.name}", f"kohaku-env-{record.name}-{self._state.cluster}")
        for name in names:
            try:
                await self._dockerd.ask(
                    "containers/create", "POST", params={"name": name}, body=body
                )
            except EngineRefused as error:
                if error.status == 409 and name != names[-1]:
                    continue
                raise
            return

    async def _find(self, name: str) -> _Container | None:
        filters = f'{{"label":["{_NAME}={name}","{_CLUSTER}={self._state.cluster}"]}}'
        found = await self._dockerd.ask("containers/json", params={"all": 1, "filters": filters})
        for one in found or ():
            return _Container(one["Id"], one["Labels"].get(_SOURCE, ""))
        return None

    async def _remove_container(self, container: str) -> None:
        try:
            await self._dockerd.ask(
                f"containers/{container}", "DELETE", params={"force": 1, "v": 1}
            )
        except EngineRefused as error:
            if error.status != 404:
                raise

    # Packing --------------------------------------------------------------------------

    async def _pack(self, record: EnvironmentRecord) -> None:
        told = EnvironmentPacked(record.name)
        try:
            told = await self._make_version(record)
        except KohakuError as error:
            told = EnvironmentPacked(record.name, trouble=_in_words(error))
        except Exception:  # else it would be packed for ever; the log has what it is
            _log.exception("environment %s could not be packed", record.name)
            trouble = "the host failed at it; its log says how"
            told = EnvironmentPacked(record.name, trouble=trouble)
        finally:
            self._progress.pop(record.name, None)
        self._tell(told)

    async def _make_version(self, record: EnvironmentRecord) -> EnvironmentPacked:
        self._note(record.name, "packing", now=True)
        await self.check()
        container = await self._find(record.name)
        if container is None:
            trouble = _in_words(_is_gone(record))
            return EnvironmentPacked(record.name, trouble=trouble, is_gone=True)
        repository = f"kohaku-packing/{self._state.cluster}"
        image = f"{repository}:{record.name}"
        await self._images.remove(image)  # of a host that was killed
        try:
            identity = await self._commit(container, repository, record.name)
            version = await self._save(record.name, identity)
        finally:
            # Before the version is known: a node with this same engine must not find that image
            # there, and miss it a moment later.
            await self._remove_image(image)
        return EnvironmentPacked(record.name, version)

    async def _commit(self, container: _Container, repository: str, tag: str) -> str:
        """Make an image of a container, and give its id."""
        found = await self._dockerd.ask(f"containers/{container.id}/json")
        try:
            usual = (await self._images.inspect(found["Image"]))["Config"] or {}
        except KohakuError as error:  # it was removed by force; all it lacks then is its command
            _log.warning("the image of container %s is not there: %s", container.id[:12], error)
            usual = {}
        body = {
            # Those of the image it was made from, and not what keeps the container waiting.
            "Entrypoint": usual.get("Entrypoint") or [],
            "Cmd": usual.get("Cmd") or [],
            # Containers inherit the labels of their image: those of tasks must not be ours.
            "Labels": dict.fromkeys((_NAME, _CLUSTER, _SOURCE), ""),
        }
        params = {"container": container.id, "repo": repository, "tag": tag}
        told = await self._dockerd.ask(
            "commit", "POST", params=params, body=body, timeout_s=_COMMIT_S
        )
        return str(told["Id"])

    async def _save(self, name: str, image: str) -> Version:
        size = max(1, int((await self._images.inspect(image))["Size"]))
        saved = 0
        async with PackWriter(self._folder) as writer:
            # By its id: so it brings no name into the engines that load it.
            async for part in self._images.save(image):
                await writer.write(part)
                saved += len(part)
                self._note(name, f"packing {min(99, saved * 100 // size)} %")
            packed = await writer.finish()
        return Version(digest=packed.digest, size=packed.size, pieces=packed.pieces, image=image)

    async def _remove_image(self, image: str) -> None:
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self._images.remove(image)
        except (KohakuError, TimeoutError) as error:
            _log.warning("image %s stays until the next packing: %s", image, error)

    # Removing -------------------------------------------------------------------------

    async def _clear(self, record: EnvironmentRecord) -> None:
        """Remove all there is of an environment that was deleted."""
        try:
            await self.check()
            while (container := await self._find(record.name)) is not None:
                await self._remove_container(container.id)
        except EngineAbsent as error:
            _log.warning("environment %s leaves no container behind: %s", record.name, error)
        except (EngineAway, EngineRefused) as error:
            _log.warning("the container of environment %s is still there: %s", record.name, error)
            await asyncio.sleep(_AGAIN_S)
            return
        await self._drop(record)

    async def _drop(self, record: EnvironmentRecord) -> None:
        """Remove the files of versions that were dropped."""
        kept = {
            version.digest
            for other in self._state.environments.values()
            for version in other.versions
        }
        gone = [digest for digest in record.dropped if digest not in kept]
        try:
            await asyncio.to_thread(self._unlink, gone)
        except OSError as error:
            _log.warning("files of environment %s are still there: %s", record.name, error)
            await asyncio.sleep(_AGAIN_S)
            return
        self._tell(FilesRemoved(record.name, record.dropped))

    def _unlink(self, digests: list[str]) -> None:
        for digest in digests:
            for name in (pack_name(digest), list_name(digest)):
                (self._folder / name).unlink(missing_ok=True)

    def _clean_folder(self) -> None:
        """Remove what was left half-written, and whole versions that never came to be known."""
        if not self._folder.is_dir():
            return
        try:
            remove_unfinished(self._folder)
            if self._is_shared:
                return  # another cluster may have its own there
            known = {
                name
                for record in self._state.environments.values()
                for digest in (*(one.digest for one in record.versions), *record.dropped)
                for name in (pack_name(digest), list_name(digest))
            }
            for path in _files_in(self._folder):
                if path.name not in known:
                    _log.info("%s is of no environment", path)
                    path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s cannot be cleaned: %s", self._folder, error)

    # Telling --------------------------------------------------------------------------

    def _tell(self, event: EnvironmentMade | EnvironmentPacked | FilesRemoved) -> None:
        if self._loop is not None:  # else the host stops, and the next one takes it up
            self._loop.tell(event)

    def _note(self, name: str, text: str, *, now: bool = False) -> None:
        """Show how far a work is, not too often; ``now``: in any case."""
        self._progress[name] = text
        at = asyncio.get_running_loop().time()
        if not now and at - self._told_at.get(name, 0.0) < _SHOWN_EACH_S:
            return
        self._told_at[name] = at
        shown = self._shown.get(name)
        if shown is not None:
            self._hub.put_environment(name, self.with_progress(shown))


def _files_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith((pack_name(""), list_name("")))]


def _with_tag(reference: str) -> str:
    """Name one image: without a tag the engine would pull all there are."""
    last = reference.rpartition("/")[2]
    return reference if ":" in last or "@" in last else f"{reference}:latest"


def _is_gone(record: EnvironmentRecord) -> Conflict:
    return Conflict(
        f"the container of environment {record.name} is not on the host machine any more",
        hint="create it again, what was packed of it is kept: "
        f"kohaku environment create {record.name} --from {record.source}",
    )


def _explain_pull(source: str, error: EngineRefused) -> Unavailable:
    said = error.message.lower()
    hint = "is it called so, and can the host machine reach that registry?"
    if any(word in said for word in _REFUSALS):
        registry = registry_of(source)
        hint = f"if it is private: kohaku registry set {registry} --username NAME"
    return Unavailable(f"image {source} cannot be pulled: {error.message}", hint=hint)


def _in_words(error: KohakuError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message
