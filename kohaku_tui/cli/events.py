"""``kohaku events``: the cluster's diary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.options import AsJson, Limit, OnContext
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.cli.table import Column, Row
from kohaku_tui.document import to_document
from kohaku_tui.format import moment
from protocol.messages.cluster import Event, EventPage, Topic

if TYPE_CHECKING:
    from protocol.client import Cluster

_COLUMNS: Final = (
    Column("WHEN"),
    Column("KIND"),
    Column("NODE", spare=1),
    Column("ACTOR", yields=True, spare=2),
    Column("WHAT", yields=True),
)


def events(
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new ones.")] = False,
    limit: Limit = 50,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Show what happened in the cluster, oldest first.

    With --follow --json, one document a line.
    """
    if follow:
        try:
            ask_cluster(context, lambda cluster: _follow(cluster, limit, as_json=as_json))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        return
    page = ask_cluster(context, lambda cluster: _gather(cluster, limit))
    if as_json:
        output.print_document(to_document(page))
    else:
        output.print_table(_COLUMNS, map(_row, page.events))


async def _gather(cluster: Cluster, most: int) -> EventPage:
    """Read the newest events; give them oldest first, as a diary is read."""
    newest = await cluster.events(most + 1)  # one more tells whether there are older ones
    return EventPage(tuple(reversed(newest[:most])), len(newest) > most)


async def _follow(cluster: Cluster, most: int, *, as_json: bool) -> None:
    """Write the newest events, then each new one as it comes.

    The snapshot of a watch repeats events that were read already, and comes again when the
    host could not resume it: ids tell what was shown.
    """
    shown = 0
    for event in (await _gather(cluster, most)).events:
        shown = max(shown, event.id)
        _write_one(event, as_json=as_json)
    async for update in cluster.watch([Topic.EVENTS]):
        for event in sorted(update.events, key=lambda event: event.id):
            if event.id > shown:
                shown = event.id
                _write_one(event, as_json=as_json)


def _write_one(event: Event, *, as_json: bool) -> None:
    if as_json:
        output.print_document_line(to_document(event))
    else:
        about = f"  {event.node}" if event.node else ""
        by = f"  by {event.actor}" if event.actor else ""
        output.say(f"{moment(event.at)}  {event.kind}{about}  {event.text}{by}")


def _row(event: Event) -> Row:
    return (moment(event.at), event.kind, event.node or "-", event.actor or "-", event.text)
