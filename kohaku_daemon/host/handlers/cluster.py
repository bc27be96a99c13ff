"""The cluster as a whole: who one is, how it is, its diary."""

from __future__ import annotations

from msgspec.structs import replace

import kohaku_daemon
from kohaku_daemon.core.cluster.records import EventRecord
from kohaku_daemon.core.cluster.views import view_status
from kohaku_daemon.host.handlers.rows import fit
from kohaku_daemon.host.parts import Call
from protocol.messages.cluster import Event, EventPage, GetStatus, ListEvents, Status
from protocol.messages.hello import Identity, WhoAmI


async def whoami(call: Call, params: WhoAmI) -> Identity:
    """Say who one is."""
    actor = call.actor
    return Identity(actor.user, actor.role, actor.token, call.parts.state.cluster)


async def status(call: Call, params: GetStatus) -> Status:
    """Say how the cluster is."""
    parts = call.parts

    def live() -> Status:
        ended = parts.lately.counts(parts.clock.now())
        return view_status(
            parts.state,
            kohaku_daemon.version(),
            parts.started_at,
            {str(state): count for state, count in ended.items()},
        )

    shown = await parts.loop.read(live)
    if parts.loop.trouble:
        return replace(
            shown, problems=(f"nothing can be stored: {parts.loop.trouble}", *shown.problems)
        )
    return shown


async def list_events(call: Call, params: ListEvents) -> EventPage:
    """Give a page of the diary."""
    await call.parts.loop.settled()
    records = call.parts.store.events(before=params.before, limit=params.limit + 1)
    events = [show_event(record) for record in records[: params.limit]]
    count = fit(events)
    return EventPage(tuple(events[:count]), more=count < len(records))


def show_event(record: EventRecord) -> Event:
    """Show a line of the diary."""
    return Event(
        id=record.id,
        at=record.at,
        kind=record.kind,
        text=record.text,
        node=record.node,
        task=record.task,
        actor=record.actor,
    )
