"""``kohaku status``: the cluster at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kohaku_tui.cli import output
from kohaku_tui.cli.options import AsJson, OnContext
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.cli.table import Cell
from kohaku_tui.document import to_document
from kohaku_tui.format import age, counts_text, share, size_share
from protocol.models.task import FINAL_STATES

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
            ("tasks", _live(status)),
            ("ended", _ended(status)),
            ("cores", f"{share(held.cores, whole.cores)} claimed" if whole.cores else ""),
            ("memory", f"{size_share(held.memory, whole.memory)} claimed" if whole.memory else ""),
            ("gpus", f"{share(held.gpus, whole.gpus)} claimed" if whole.gpus else ""),
        ]
    )


def _live(status: Status) -> str:
    return counts_text({k: count for k, count in status.tasks.items() if k not in FINAL_STATES})


def _ended(status: Status) -> str:
    ended = {k: count for k, count in status.tasks.items() if k in FINAL_STATES}
    # Without the time, these would read as all that were ever run here.
    return f"{counts_text(ended)} in the last hour" if any(ended.values()) else ""
