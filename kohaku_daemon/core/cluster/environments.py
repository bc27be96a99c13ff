"""Environments: what tasks run in, made and packed on the host machine.

Knows: that one work at a time goes on with each, which versions are kept, which one a batch
runs in, what is refused.
Does not know: Docker, files, how far a work is. What is to be done is told by a record alone:
while it is CREATING its container is to be made, while it is PACKING a version is; what it has
``dropped`` is to be removed; once it is ``deleted`` all of it is. So a host that was killed
goes on where it was.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from kohaku_daemon.core.cluster.actions import Answer, EnvironmentChanged, SendOrder
from kohaku_daemon.core.cluster.events import (
    CreateAsked,
    DeleteAsked,
    EnvironmentMade,
    EnvironmentPacked,
    FilesRemoved,
    PackAsked,
    PullAsked,
)
from kohaku_daemon.core.cluster.fleet import FleetNode
from kohaku_daemon.core.cluster.records import DropDocument, EnvironmentRecord, PutDocument
from kohaku_daemon.core.cluster.scribe import Scribe
from kohaku_daemon.core.cluster.state import ClusterState
from protocol.errors import BadRequest, Conflict, NotFound, Unavailable
from protocol.ids import NodeName, parse_environment_name
from protocol.messages.environment import Pulling
from protocol.messages.runner import OrderPull
from protocol.models.environment import (
    Environment,
    EnvironmentState,
    ImageReading,
    Presence,
    Version,
    WantedImage,
)
from protocol.models.task import DOCKER, TaskSpec

#: Versions that are kept unless the host is told otherwise.
KEPT_VERSIONS: Final = 3
#: All are in one file that is written anew at each change.
_MOST: Final = 1000
#: What a reference to an image is made of; the engine says whether it is one.
_IMAGE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,511}")
#: Characters of an engine's words that are kept.
_LONGEST_TROUBLE: Final = 2000


def find_environment(state: ClusterState, name: str) -> EnvironmentRecord:
    """Give an environment.

    Raises:
        NotFound: With the nearest name there is.
    """
    record = state.environments.get(name)
    if record is not None and not record.deleted:
        return record
    known = sorted(one for one, record in state.environments.items() if not record.deleted)
    # To compare a very long name takes long, and no environment has one.
    near = difflib.get_close_matches(name[:200], known, n=1)
    hint = "see: kohaku environment list"
    if near:
        hint = f"did you mean {near[0]}? {hint}"
    elif not known:
        hint = "there is none yet; make one with: kohaku environment create NAME --from IMAGE"
    raise NotFound(f"no environment is called {name[:100]!r}", hint=hint)


def choose_image(state: ClusterState, spec: TaskSpec) -> WantedImage | None:
    """Choose what a submission runs in now; None for what each node itself is.

    Raises:
        NotFound: There is no such environment.
        Conflict: It was never packed.
    """
    if spec.container:
        version = newest_version(find_environment(state, spec.container))
        return WantedImage(environment=spec.container, version=version)
    return WantedImage(reference=spec.image) if spec.image else None


def newest_version(record: EnvironmentRecord) -> Version:
    """Give the version that tasks run in from now on.

    Raises:
        Conflict: There is none.
    """
    if record.versions:
        return record.versions[0]
    if record.state is EnvironmentState.FAILED:
        hint = f"create it again: kohaku environment create {record.name} --from IMAGE"
    else:
        hint = f"pack it: kohaku environment pack {record.name}"
    raise Conflict(f"environment {record.name} is not packed yet", hint=hint)


def view_environment(record: EnvironmentRecord, nodes: tuple[Presence, ...] = ()) -> Environment:
    """Show it to people."""
    return Environment(
        name=record.name,
        source=record.source,
        state=record.state,
        trouble=record.trouble,
        created_at=record.created_at,
        created_by=record.created_by,
        versions=record.versions,
        nodes=nodes,
    )


def show_environment(state: ClusterState, name: str) -> Environment | None:
    """Show one to those who watch; None if there is none any more."""
    record = state.environments.get(name)
    return None if record is None or record.deleted else view_environment(record)


def presences(state: ClusterState, record: EnvironmentRecord) -> tuple[Presence, ...]:
    """Say how far each node is with the newest version, as they said last."""
    if not record.versions:
        return ()
    digest = record.versions[0].digest
    return tuple(
        Presence(name, _say_presence(reading))
        for name, node in sorted(state.fleet.nodes.items())
        if node.readings is not None
        for reading in node.readings.images
        if reading.digest == digest
    )


def _say_presence(reading: ImageReading) -> str:
    if reading.present:
        return "present"
    return reading.trouble or f"{reading.percent:.0f} %"


class Environments:
    """Carries out what is asked of environments, and takes what became of it."""

    def __init__(self, state: ClusterState, scribe: Scribe, kept_versions: int) -> None:
        self._state = state
        self._scribe = scribe
        self._kept_versions = kept_versions

    # What people ask ----------------------------------------------------------------

    def create(self, event: CreateAsked) -> None:
        """Begin to make an environment.

        Raises:
            BadRequest: It cannot be called so, or made from that.
            Conflict: There is one, or what was called so is not gone yet.
        """
        name, image = parse_environment_name(event.name), event.image
        if not _IMAGE.fullmatch(image):
            raise BadRequest(
                f"{image[:100]!r} is not the name of an image", hint="such as python:3.12-slim"
            )
        there = self._state.environments.get(name)
        if there is not None and _is_made_from(there, image):
            self._scribe.add(Answer(view_environment(there)))  # asked for twice
            return
        _refuse_if_there(there, image)
        if there is None and len(self._state.environments) >= _MOST:
            raise BadRequest(f"a cluster has at most {_MOST} environments")
        fresh = EnvironmentRecord(
            name=name,
            source=image,
            created_at=self._scribe.now,
            created_by=event.actor.user,
            # What was packed before its container was lost goes on to be what tasks run in.
            versions=there.versions if there is not None else (),
            dropped=there.dropped if there is not None else (),
        )
        self._keep(fresh)
        self._scribe.add(Answer(view_environment(fresh)))

    def pack(self, event: PackAsked) -> None:
        """Begin to pack an environment.

        Raises:
            NotFound: There is none.
            Conflict: Something else goes on with it, or it was never made.
        """
        record = find_environment(self._state, event.name)
        if record.state is EnvironmentState.FAILED:
            raise Conflict(
                f"environment {record.name} could not be made: {record.trouble}",
                hint=f"create it again: kohaku environment create {record.name} --from IMAGE",
            )
        if record.state is not EnvironmentState.READY:
            raise _is_busy(record)
        record = replace(
            record, state=EnvironmentState.PACKING, trouble="", packed_by=event.actor.user
        )
        self._keep(record)
        self._scribe.add(Answer(view_environment(record)))

    def delete(self, event: DeleteAsked) -> None:
        """Have an environment removed. One that is still being made is given up.

        Raises:
            NotFound: There is none.
            Conflict: It is being packed, or tasks that have not ended run in it.
        """
        record = find_environment(self._state, event.name)
        if record.state is EnvironmentState.PACKING:
            raise _is_busy(record)
        batches = [
            batch
            for batch in self._state.batches.values()
            if batch.live and batch.record.image and batch.record.image.environment == record.name
        ]
        if batches:
            live = sum(batch.live for batch in batches)
            tasks = f"{live} task{'s' if live > 1 else ''}"
            raise Conflict(
                f"{tasks} that {'have' if live > 1 else 'has'} not ended"
                f" run{'' if live > 1 else 's'} in environment {record.name}",
                hint="wait until they have ended, or end them: "
                f"kohaku batch kill {batches[0].record.id}",
            )
        seen = view_environment(record)
        digests = tuple(version.digest for version in record.versions)
        self._keep(replace(record, deleted=True, versions=(), dropped=(*record.dropped, *digests)))
        text = f"environment {record.name} was deleted"
        self._scribe.tell("environment.deleted", text, actor=event.actor.user)
        self._scribe.add(Answer(seen))

    def pull(self, event: PullAsked) -> None:
        """Have nodes bring the newest version in.

        Raises:
            NotFound: There is no such environment or node.
            Conflict: It was never packed, or a node that is named cannot run containers.
            Unavailable: No node can.
        """
        record = find_environment(self._state, event.name)
        image = WantedImage(environment=record.name, version=newest_version(record))
        nodes = self._choose_nodes(event.nodes)
        for node in nodes:
            self._scribe.add(SendOrder(node, OrderPull(image=image)))
        self._scribe.add(Answer(Pulling(tuple(nodes))))

    def _choose_nodes(self, named: Iterable[str]) -> list[NodeName]:
        fleet = self._state.fleet
        if not (asked := [fleet.find(name) for name in dict.fromkeys(named)]):
            able = [name for name, node in sorted(fleet.nodes.items()) if not _obstacle(node)]
            if not able:
                raise Unavailable(
                    "no node that is online runs containers",
                    hint="see the backends of a node: kohaku node show NODE",
                )
            return able
        reasons = {node.name: [why] for node in asked if (why := _obstacle(node))}
        if reasons:
            raise Conflict(
                f"{len(reasons)} of {len(asked)} nodes cannot take it",
                hint="leave them out; nobody was told to pull",
                details={"reasons": reasons},
            )
        return [node.name for node in asked]

    # What became of it --------------------------------------------------------------

    def take_made(self, event: EnvironmentMade) -> None:
        """Note that a container is there, or why not."""
        record = self._state.environments.get(event.name)
        if record is None or record.deleted or record.state is not EnvironmentState.CREATING:
            return  # deleted meanwhile
        if event.trouble:
            self._fail(record, "made", event.trouble, EnvironmentState.FAILED)
            return
        self._keep(replace(record, state=EnvironmentState.READY, trouble=""))
        text = f"environment {record.name} was made from {record.source}"
        self._scribe.tell("environment.created", text, actor=record.created_by)

    def take_packed(self, event: EnvironmentPacked) -> None:
        """Note a new version, which tasks run in from now on, or why there is none."""
        record = self._state.environments.get(event.name)
        if record is None or record.state is not EnvironmentState.PACKING:
            return
        if event.version is None:
            after = EnvironmentState.FAILED if event.is_gone else EnvironmentState.READY
            self._fail(record, "packed", event.trouble, after)
            return
        version = replace(event.version, packed_at=self._scribe.now, packed_by=record.packed_by)
        older = [one for one in record.versions if one.digest != version.digest]
        kept, dropped = self._sort_out([version, *older])
        self._keep(
            replace(
                record,
                state=EnvironmentState.READY,
                trouble="",
                versions=tuple(kept),
                # What came to be again is not to be removed any more.
                dropped=tuple(
                    digest
                    for digest in dict.fromkeys((*record.dropped, *dropped))
                    if digest != version.digest
                ),
            )
        )
        text = f"environment {record.name} was packed as {version.digest[:12]}"
        self._scribe.tell("environment.packed", text, actor=record.packed_by)

    def take_removed(self, event: FilesRemoved) -> None:
        """Note that what was dropped is gone; what was deleted is forgotten then."""
        record = self._state.environments.get(event.name)
        if record is None:
            return
        left = tuple(digest for digest in record.dropped if digest not in event.digests)
        if record.deleted and not left:
            del self._state.environments[record.name]
            self._scribe.add(DropDocument(EnvironmentRecord, record.name))
        elif left != record.dropped:
            self._keep(replace(record, dropped=left))

    def _sort_out(self, versions: list[Version]) -> tuple[list[Version], list[str]]:
        """Give the versions that are kept, and the digests of those that are not.

        The newest are kept, and those in which tasks run that have not ended.
        """
        pinned = {
            batch.record.image.version.digest
            for batch in self._state.batches.values()
            if batch.live and batch.record.image and batch.record.image.version
        }
        kept = [
            version
            for place, version in enumerate(versions)
            if place < self._kept_versions or version.digest in pinned
        ]
        return kept, [version.digest for version in versions if version not in kept]

    def _fail(
        self, record: EnvironmentRecord, done: str, trouble: str, after: EnvironmentState
    ) -> None:
        trouble = trouble[:_LONGEST_TROUBLE]
        self._keep(replace(record, state=after, trouble=trouble))
        text = f"environment {record.name} could not be {done}: {trouble}"
        self._scribe.tell("environment.failed", text)

    def _keep(self, record: EnvironmentRecord) -> None:
        self._state.environments[record.name] = record
        self._scribe.add(PutDocument(record))
        self._scribe.add(EnvironmentChanged(record.name))


def _is_made_from(there: EnvironmentRecord, image: str) -> bool:
    return not there.deleted and (there.state, there.source) == (EnvironmentState.CREATING, image)


def _refuse_if_there(there: EnvironmentRecord | None, image: str) -> None:
    """Refuse to make what is there already, unless it could not be made before.

    Raises:
        Conflict: It is.
    """
    if there is None or (there.state is EnvironmentState.FAILED and not there.deleted):
        return
    if there.deleted:
        raise Conflict(
            f"what is left of the environment {there.name} that was deleted is being removed",
            hint="try again in a moment",
        )
    if there.state is EnvironmentState.CREATING:
        raise Conflict(
            f"environment {there.name} is being made from {there.source}, not from {image}",
            hint=f"wait for it, or give it up: kohaku environment delete {there.name}",
        )
    raise Conflict(
        f"there is an environment {there.name} already, made from {there.source}",
        hint=f"choose another name, or delete it first: kohaku environment delete {there.name}",
    )


def _is_busy(record: EnvironmentRecord) -> Conflict:
    done = "packed" if record.state is EnvironmentState.PACKING else "made"
    return Conflict(
        f"environment {record.name} is being {done}",
        hint=f"wait for it; see how far it is: kohaku environment show {record.name}",
    )


def _obstacle(node: FleetNode) -> str:
    """Say why a node cannot bring an image in; empty if it can."""
    if not node.is_online:
        return f"the node is {node.state}"
    for backend in node.record.inventory.backends:
        if backend.name == DOCKER:
            return "" if backend.healthy else f"its Docker engine: {backend.message}"
    return "it has no backend docker"
