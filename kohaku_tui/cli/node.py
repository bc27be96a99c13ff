"""``kohaku node``: the machines of the cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.options import (
    AsJson,
    NodeNames,
    OnContext,
    OneNodeName,
    confirm,
    parse_pairs,
    read_duration,
    whole,
)
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.cli.table import Cell, Column, Row
from kohaku_tui.document import Plain, to_document
from kohaku_tui.format import (
    age,
    moment,
    node_state,
    number_ranges,
    pairs_text,
    share,
    size_share,
    state_style,
)
from protocol.errors import BadRequest, KohakuError
from protocol.messages.node import (
    JoinToken,
    LabelNode,
    MakeJoinToken,
    NodeList,
    NodeResult,
    OneNode,
    RemoveNode,
)
from protocol.methods import (
    NODE_DRAIN,
    NODE_JOIN_TOKEN,
    NODE_LABEL,
    NODE_REMOVE,
    NODE_SHOW,
    NODE_UNDRAIN,
    Method,
)
from protocol.models.node import Gpu, GpuProcess, GpuReading, Inventory, Node, Readings, mig_place
from protocol.units import render_duration, render_size

if TYPE_CHECKING:
    from protocol.client import Cluster

_COLUMNS: Final = (
    Column("NODE"),
    Column("STATE"),
    Column("TASKS", right=True),
    Column("CORES", right=True),
    Column("MEMORY", right=True),
    Column("GPUS", right=True, spare=1),
    Column("CPU", right=True, spare=2),
    Column("SEEN", right=True, spare=4),
    Column("LABELS", yields=True, spare=3),
)


def list_nodes(*, as_json: AsJson = False, context: OnContext = "") -> None:
    """List nodes with what is claimed of them."""

    async def look(cluster: Cluster) -> NodeList:
        return NodeList(await cluster.nodes())

    answer = ask_cluster(context, look)
    if as_json:
        output.print_document(to_document(answer))
        return
    now = output.now()
    output.print_table(_COLUMNS, (_row(node, now) for node in answer.nodes))


def show(node: OneNodeName, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """Show a node: what it has, what is claimed, how it is."""

    async def look(cluster: Cluster) -> NodeResult:
        return await cluster.call(NODE_SHOW, OneNode(node))

    answer = ask_cluster(context, look)
    if as_json:
        output.print_document(to_document(answer.node))
    else:
        output.print_facts(_facts(answer.node, output.now()))


def drain(nodes: NodeNames, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """Give nodes nothing new; let them finish."""
    _set_draining(NODE_DRAIN, nodes, context=context, as_json=as_json)


def undrain(nodes: NodeNames, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """Give nodes work again."""
    _set_draining(NODE_UNDRAIN, nodes, context=context, as_json=as_json)


def label(
    node: OneNodeName,
    labels: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", show_default=False)
    ] = None,
    unset: Annotated[
        list[str] | None, typer.Option("--unset", metavar="KEY", help="Take a label off.")
    ] = None,
    *,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Set and unset a node's labels.

    task submit --on LABEL=VALUE asks for them.
    """
    wanted = LabelNode(node, parse_pairs(labels or (), "label"), tuple(unset or ()))
    if not wanted.set and not wanted.unset:
        raise BadRequest("no label to set or unset", hint="write KEY=VALUE, or --unset KEY")

    async def ask(cluster: Cluster) -> NodeResult:
        return await cluster.call(NODE_LABEL, wanted)

    answer = ask_cluster(context, ask)
    if as_json:
        output.print_document(to_document(answer.node))
    else:
        output.say(f"{answer.node.name}  {pairs_text(answer.node.labels)}")


def remove(
    node: OneNodeName,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also while tasks are on it; they count as killed.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Take a node out of the cluster.

    Its runner's credential is revoked.
    """
    if not yes:
        confirm(f"take {node} out of the cluster and revoke its runner's credential?")

    async def ask(cluster: Cluster) -> NodeResult:
        return await cluster.call(NODE_REMOVE, RemoveNode(node, force))

    answer = ask_cluster(context, ask)
    if as_json:
        output.print_document(to_document(answer.node))


def join_token(
    uses: Annotated[
        int,
        typer.Option(
            "--uses", metavar="N", parser=whole(1), help="How many runners may join with it."
        ),
    ] = 1,
    lasts: Annotated[
        str, typer.Option("--lasts", metavar="DURATION", help="How long it can be used.")
    ] = "1h",
    node: Annotated[
        str, typer.Option("--node", metavar="NAME", help="Only for a runner of this name.")
    ] = "",
    *,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Make a token that lets runners join.

    It is printed alone, and shown this once.
    """
    wanted = MakeJoinToken(uses=uses, lasts_s=read_duration("--lasts", lasts), node=node)

    async def ask(cluster: Cluster) -> JoinToken:
        return await cluster.call(NODE_JOIN_TOKEN, wanted)

    answer = ask_cluster(context, ask)
    if as_json:
        output.print_document(to_document(answer))
        return
    output.say(answer.token)
    if output.talks_to_terminal():
        runners = "one runner" if answer.uses == 1 else f"{answer.uses} runners"
        left = render_duration(answer.expires_at - output.now())
        output.note(f"for {runners}, within {left}", "dim")


def _set_draining(
    method: Method[OneNode, NodeResult], nodes: Sequence[str], *, context: str, as_json: bool
) -> None:
    """Steer one node after the other; one that is refused does not keep the others from it.

    Raises:
        Exit: With 1, if one was refused.
    """
    steered: list[Node] = []
    refused: list[tuple[str, KohakuError]] = []

    async def ask(cluster: Cluster) -> None:
        for name in dict.fromkeys(nodes):
            try:
                steered.append((await cluster.call(method, OneNode(name))).node)
            except KohakuError as error:
                # Status 1 is the host's word on this one; what else there is meets the next, too.
                if error.exit_status != 1:
                    raise
                refused.append((name, error))

    try:
        ask_cluster(context, ask)
    finally:
        # Also when the cluster goes away half way: these have been steered.
        if steered or refused:
            _tell_steered(steered, refused, as_json=as_json)
    if refused:
        raise typer.Exit(1)


def _tell_steered(
    steered: Sequence[Node], refused: Sequence[tuple[str, KohakuError]], *, as_json: bool
) -> None:
    if as_json:
        told: list[Plain] = [[name, error.message] for name, error in refused]
        nodes: list[Plain] = [to_document(node) for node in steered]
        output.print_document({"nodes": nodes, "refused": told})
        return
    for node in steered:
        output.say(f"{node.name}  {node_state(node)}  {node.claimed.tasks} on it")
    for _, error in refused:
        output.show_error(error, as_json=False)


def _troubles(node: Node) -> Sequence[str]:
    return node.readings.troubles if node.readings is not None else ()


def _standing(node: Node) -> Cell:
    """Say a node's state, and whether it takes nothing new although it is there."""
    if _troubles(node):
        return Cell(f"{node_state(node)}, in trouble", "red")
    return Cell(node_state(node), state_style(node.state))


def _row(node: Node, now: float) -> Row:
    has, held = node.inventory, node.claimed
    cpu = "-" if node.readings is None else f"{node.readings.cpu_percent:.0f} %"
    return (
        node.name,
        _standing(node),
        str(held.tasks),
        share(held.cores, len(has.cores)),
        size_share(held.memory, has.memory),
        share(held.gpus, len(has.claimable_gpus)),
        cpu,
        age(node.seen_at, now),
        pairs_text(node.labels),
    )


def _facts(node: Node, now: float) -> Iterator[tuple[str, str | Cell]]:
    has, held = node.inventory, node.claimed
    yield "node", node.name
    yield "state", _standing(node)
    for trouble in _troubles(node):
        yield "problem", Cell(trouble, "red")
    yield (
        "seen",
        f"{moment(node.seen_at)}, {age(node.seen_at, now)} ago" if node.seen_at else "never",
    )
    yield "joined", moment(node.joined_at) if node.joined_at else ""
    yield "labels", pairs_text(node.labels)
    yield "hostname", has.hostname
    yield "system", " ".join(filter(None, (has.system, has.kernel, has.architecture)))
    yield "runner", has.version
    yield "tasks", f"{held.tasks} of {has.max_tasks} at once"
    yield (
        "cores",
        f"{share(held.cores, len(has.cores))} claimed, numbers {number_ranges(has.cores)}",
    )
    yield "memory", f"{size_share(held.memory, has.memory)} claimed"
    yield "gpus", f"{share(held.gpus, len(has.claimable_gpus))} claimed" if has.gpus else ""
    yield from _numa_facts(has)
    for backend in has.backends:
        standing = "" if backend.healthy else f"does not work: {backend.message}"
        isolation = f"isolation {backend.isolation}" if backend.isolation else ""
        usual = "default" if backend.name == has.default_backend else ""
        told = ", ".join(filter(None, (usual, standing, isolation, " ".join(backend.enforces))))
        yield f"backend {backend.name}", told or "ready"
    if node.readings is not None:
        yield from _reading_facts(node.readings)
    for gpu in has.gpus:
        yield from _gpu_facts(gpu, has, node.readings)


def _reading_facts(readings: Readings) -> Iterator[tuple[str, str]]:
    used = readings.memory_total - readings.memory_available
    yield "cpu", f"{readings.cpu_percent:.0f} %, load {readings.load_1m:.2f}"
    if readings.memory_total:
        yield "memory used", size_share(used, readings.memory_total)
    for disk in readings.disks:
        free = f"{render_size(disk.free)} of {render_size(disk.total)} free"
        yield "disk", f"{free}, {disk.path}"
    if readings.temperatures:
        hottest = max(readings.temperatures, key=lambda sensor: readings.temperatures[sensor])
        yield "hottest", f"{readings.temperatures[hottest]:.0f} °C, {hottest}"


def _numa_facts(has: Inventory) -> Iterator[tuple[str, str]]:
    """Say of each NUMA node what lies on it, and how far it is to the others."""
    for part in has.numa:
        here = [gpu.index for gpu in has.claimable_gpus if gpu.numa == part.number]
        told = [f"cores {number_ranges(part.cores)}", render_size(part.memory)]
        if here:
            told.append(f"gpus {number_ranges(here)}")
        if len(has.numa) > 1 and part.distances:
            # Not by their numbers: those may have gaps, and distances come in their order.
            far = zip((other.number for other in has.numa), part.distances, strict=False)
            told.append("distance " + " ".join(f"{number}:{way}" for number, way in far))
        yield f"numa {part.number}", ", ".join(told)


def _gpu_facts(
    gpu: Gpu, has: Inventory, readings: Readings | None
) -> Iterator[tuple[str, str | Cell]]:
    """Say what a GPU is and does, then what uses it, a line for each process."""
    parts = [gpu.name or gpu.uuid, render_size(gpu.memory)]
    if gpu.parent:
        parts.append(f"MIG {mig_place(gpu)}")
    if gpu.divided:
        parts.append(_instances_text(gpu, has))
    if gpu.numa is not None:
        parts.append(f"numa {gpu.numa}")
    now = next((one for one in readings.gpus if one.uuid == gpu.uuid), None) if readings else None
    if now is not None:
        parts += _gpu_reading_texts(now)
    is_broken = now is not None and bool(now.fault)
    yield f"gpu {gpu.index}", Cell(", ".join(parts), "red" if is_broken else "")
    for process in now.processes if now is not None else ():
        yield "", _process_text(process)
    if now is not None and now.processes_left_out:
        yield "", f"and {now.processes_left_out} more processes"


def _instances_text(divided: Gpu, has: Inventory) -> str:
    indices = [gpu.index for gpu in has.gpus if gpu.parent == divided.uuid]
    if not indices:
        return "divided into no MIG instances yet"
    return f"divided into MIG instances: gpus {number_ranges(indices)}"


def _process_text(process: GpuProcess) -> str:
    whose = "unmanaged" if process.task is None else f"task {process.task}"
    memory = "" if process.memory is None else render_size(process.memory)
    return ", ".join(filter(None, (f"process {process.pid}", process.name, memory, whose)))


def _gpu_reading_texts(now: GpuReading) -> Iterator[str]:
    if now.fault:
        yield f"out of service: {now.fault}"
        return
    yield f"{now.used_percent:.0f} % busy, {render_size(now.memory_used)} used"
    if now.temperature is not None:
        yield f"{now.temperature:.0f} °C"
    if now.power is not None:
        yield f"{now.power:.0f} W"
