"""``kohaku status``: the cluster at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kohaku_tui.cli import output
from kohaku_tui.cli.options import AsJson, OnContext
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.cli.table import Cell
from kohaku_tui.document import to_document
from kohaku_tui.format import age, counts_text, share, size_share

if TYPE_CHECKING:
    from protocol.client import Cluster
    from protocol.messages.cluster import Status


def status(*, as_json: AsJson = False, context: OnContext = "") -> None:
    """Show the cluster at a glance."""

    async def look(cluster: Cluster) -> Status:
        return await cluster.status()

    answer = ask_cluster(context, look)
    if as_json:
        output.print_document(to_document(answer))
    else:
        _print_status(answer)


def _print_status(status: Status) -> None:
    nodes = counts_text(status.nodes)
    if status.draining:
        nodes += f", {status.draining} draining"
    whole, held = status.capacity, status.claimed
    up = age(status.started_at, output.now())
    output.print_facts(
        [
            *(("problem", Cell(problem, "red")) for problem in status.problems),
            ("cluster", status.cluster),
            ("host", f"version {status.version}, up {up}"),
            ("nodes", nodes),
            ("tasks", counts_text(status.tasks)),
            ("cores", f"{share(held.cores, whole.cores)} claimed" if whole.cores else ""),
            ("memory", f"{size_share(held.memory, whole.memory)} claimed" if whole.memory else ""),
            ("gpus", f"{share(held.gpus, whole.gpus)} claimed" if whole.gpus else ""),
        ]
    )
