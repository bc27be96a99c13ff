"""``kohaku environment``: what tasks run in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.complete import complete_nodes
from kohaku_tui.cli.options import AsJson, EnvironmentName, OnContext, confirm
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.cli.table import Cell, Column, Row
from kohaku_tui.document import to_document
from kohaku_tui.format import age, moment
from protocol.errors import Conflict, ErrorBody, NotFound, Unavailable, from_wire
from protocol.messages.cluster import Topic
from protocol.messages.environment import (
    CreateEnvironment,
    EnvironmentList,
    OneEnvironment,
    PullEnvironment,
    Pulling,
    ShellEnd,
)
from protocol.methods import (
    ENVIRONMENT_CREATE,
    ENVIRONMENT_DELETE,
    ENVIRONMENT_PACK,
    ENVIRONMENT_PULL,
)
from protocol.models.environment import Environment, EnvironmentState, Version
from protocol.models.node import Node, NodeState
from protocol.units import render_size

if TYPE_CHECKING:
    from protocol.client import Cluster

#: Characters of a digest that are shown: enough to tell versions apart.
_SHORT: Final = 12

_COLUMNS: Final = (
    Column("ENVIRONMENT"),
    Column("STATE"),
    Column("VERSION"),
    Column("SIZE", right=True, spare=1),
    Column("PACKED", right=True, spare=2),
    Column("FROM", yields=True, spare=3),
)

Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Stay until it is done.")]


def create(
    name: EnvironmentName,
    image: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="IMAGE",
            help="The image to begin with; the host machine pulls it if it has to.",
        ),
    ],
    *,
    wait: Wait = True,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Make an environment, to be worked in and packed; print its name."""

    async def ask(cluster: Cluster) -> Environment:
        wanted = CreateEnvironment(environment=name, image=image)
        made = (await cluster.call(ENVIRONMENT_CREATE, wanted)).environment
        return await _settled(cluster, name) if wait else made

    made = ask_cluster(context, ask)
    if made.trouble:
        raise Conflict(f"environment {name} could not be made: {made.trouble}")
    if as_json:
        output.print_document(to_document(made))
    else:
        output.say(made.name)


def shell(
    name: EnvironmentName,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND...]", help="Instead of a shell.", show_default=False),
    ] = None,
    *,
    context: OnContext = "",
) -> None:
    """Work in an environment, on a terminal if there is one here."""
    from kohaku_tui.cli import terminal

    _run(name, command or (), terminal=terminal.is_whole(), context=context)


def execute(
    name: EnvironmentName,
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="The command and its arguments.")
    ],
    *,
    context: OnContext = "",
) -> None:
    """Run one command in an environment, without a terminal; exit with its status."""
    _run(name, command, terminal=False, context=context)


def pack(
    name: EnvironmentName,
    *,
    wait: Wait = True,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Pack an environment as it is now, for tasks to run in; print the version's digest.

    Tasks that are submitted from then on run in the new version.
    """

    async def ask(cluster: Cluster) -> Environment:
        begun = (await cluster.call(ENVIRONMENT_PACK, OneEnvironment(name))).environment
        return await _settled(cluster, name) if wait else begun

    packed = ask_cluster(context, ask)
    if packed.trouble:
        raise Conflict(f"environment {name} could not be packed: {packed.trouble}")
    if as_json:
        output.print_document(to_document(packed))
    elif wait:
        output.say(packed.versions[0].digest[:_SHORT])


def pull(
    name: EnvironmentName,
    nodes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NODE...]", autocompletion=complete_nodes, show_default=False),
    ] = None,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until it is there.")] = False,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Bring the newest version to nodes ahead of tasks; print which nodes.

    Without a name: to all that run containers.
    """

    async def ask(cluster: Cluster) -> tuple[Pulling, dict[str, str]]:
        wanted = PullEnvironment(environment=name, nodes=tuple(nodes or ()))
        pulling = await cluster.call(ENVIRONMENT_PULL, wanted)
        return pulling, await _arrived(cluster, name, pulling.nodes) if wait else {}

    pulling, troubles = ask_cluster(context, ask)
    if troubles:
        raise Conflict(
            f"environment {name} did not reach {len(troubles)} of {len(pulling.nodes)} nodes",
            details={"reasons": {node: [why] for node, why in troubles.items()}},
        )
    if as_json:
        output.print_document(to_document(pulling))
        return
    for node in pulling.nodes:
        output.say(node)


def list_environments(*, as_json: AsJson = False, context: OnContext = "") -> None:
    """List environments with what tasks run in."""

    async def look(cluster: Cluster) -> EnvironmentList:
        return EnvironmentList(await cluster.environments())

    answer = ask_cluster(context, look)
    if as_json:
        output.print_document(to_document(answer))
        return
    now = output.now()
    output.print_table(_COLUMNS, (_row(one, now) for one in answer.environments))


def show(name: EnvironmentName, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """Show an environment: its versions, what goes on with it, which nodes have it."""

    async def look(cluster: Cluster) -> Environment:
        return await cluster.environment(name)

    environment = ask_cluster(context, look)
    if as_json:
        output.print_document(to_document(environment))
    else:
        output.print_facts(_facts(environment, output.now()))


def delete(
    name: EnvironmentName,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Remove an environment and all its versions.

    What nodes have of it goes when they need the room.
    """
    if not yes:
        confirm(f"remove environment {name}, with what was done in it and all its versions?")

    async def ask(cluster: Cluster) -> Environment:
        return (await cluster.call(ENVIRONMENT_DELETE, OneEnvironment(name))).environment

    deleted = ask_cluster(context, ask)
    if as_json:
        output.print_document(to_document(deleted))


def _run(name: str, command: Sequence[str], *, terminal: bool, context: str) -> None:
    """Run a command to its end.

    Raises:
        Exit: With its status, if that is not 0.
        KohakuError: It could not be run, or the connection broke.
    """
    from kohaku_tui.cli.terminal import Ended, lend, size

    columns, rows = size()

    async def run(cluster: Cluster) -> ShellEnd:
        async with cluster.shell(
            name, command, terminal=terminal, columns=columns, rows=rows
        ) as running:
            return await lend(running, terminal=terminal)

    try:
        end = ask_cluster(context, run)
    except Ended as ended:
        raise typer.Exit(ended.status) from None
    if end.error:
        code, message, hint, *_ = (*end.error, "", "")
        raise from_wire(ErrorBody(code, message, hint))
    if end.code:
        raise typer.Exit(end.code)


async def _settled(cluster: Cluster, name: str) -> Environment:
    """Wait until nothing goes on with an environment any more, telling a terminal how far it is.

    Raises:
        NotFound: It was deleted meanwhile.
    """
    seen = False
    with output.progress() as tell:
        async with aclosing(cluster.watch([Topic.ENVIRONMENTS])) as updates:
            async for update in updates:
                for one in update.environments:
                    if one.name != name:
                        continue
                    seen = True
                    if one.state in {EnvironmentState.READY, EnvironmentState.FAILED}:
                        return one
                    tell(f"environment {name}: {one.progress or one.state}")
                if name in update.gone_environments or (update.ready and not seen):
                    raise NotFound(f"environment {name} was deleted meanwhile")
    raise Unavailable("the host ended the watch")


async def _arrived(cluster: Cluster, name: str, nodes: Sequence[str]) -> dict[str, str]:
    """Wait until nodes have the newest version; give why some will not, by their names."""
    versions = (await cluster.environment(name)).versions
    states = dict.fromkeys(nodes, "0 %")
    troubles: dict[str, str] = {}
    is_news = False
    with output.progress() as tell:
        async with aclosing(cluster.watch([Topic.READINGS])) as updates:
            async for update in updates:
                for node in update.nodes:
                    if node.name not in states:
                        continue
                    state, why = _arrival(node, versions[0])
                    if state == "present" or (why and is_news):
                        del states[node.name]
                        if why:
                            troubles[node.name] = why
                    else:
                        states[node.name] = state
                if not states:
                    return troubles
                # What failed before this was asked for may be told once more at first.
                is_news = is_news or update.ready
                far = ", ".join(f"{node} {state}" for node, state in sorted(states.items()))
                tell(f"environment {name}: {far}")
    raise Unavailable("the host ended the watch")


def _arrival(node: Node, version: Version) -> tuple[str, str]:
    """Say how far a version is on its way to a node, and why it goes no further."""
    if node.state is not NodeState.ONLINE:
        return "", f"the node is {node.state}"
    for reading in node.readings.images if node.readings is not None else ():
        if reading.digest == version.digest:
            if reading.present:
                return "present", ""
            return f"{reading.percent:.0f} %", reading.trouble
    return "0 %", ""


def _standing(environment: Environment) -> Cell:
    if environment.state is EnvironmentState.FAILED:
        return Cell(environment.state, "red")
    if environment.state is EnvironmentState.READY:
        return Cell(environment.state, "green")
    return Cell(environment.progress or environment.state, "cyan")


def _row(environment: Environment, now: float) -> Row:
    newest = next(iter(environment.versions), None)
    return (
        environment.name,
        _standing(environment),
        newest.digest[:_SHORT] if newest else "-",
        render_size(newest.size) if newest else "-",
        age(newest.packed_at, now) if newest else "-",
        environment.source,
    )


def _facts(environment: Environment, now: float) -> Iterator[tuple[str, str | Cell]]:
    yield "environment", environment.name
    yield "state", _standing(environment)
    yield "problem", Cell(environment.trouble, "red")
    yield "from", environment.source
    yield "created", f"{moment(environment.created_at)} by {environment.created_by}"
    if not environment.versions:
        yield "version", f"none; pack it: kohaku environment pack {environment.name}"
    for version in environment.versions:
        packed = f"packed {age(version.packed_at, now)} ago by {version.packed_by}"
        yield "version", f"{version.digest[:_SHORT]}, {render_size(version.size)}, {packed}"
    for presence in environment.nodes:
        yield f"on {presence.node}", presence.state
