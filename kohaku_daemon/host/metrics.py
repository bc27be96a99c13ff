"""``GET /metrics`` in the text format of Prometheus.

Knows: which numbers answer which question of an operator: why tasks wait, how long decisions
and the disk take, which nodes are there and how they are.
Does not know: how anything is counted (``meters``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from kohaku_daemon.core.cluster.fleet import FleetNode
from kohaku_daemon.core.cluster.views import count_reasons
from kohaku_daemon.host.meters import Meters
from kohaku_daemon.host.parts import Parts
from protocol.ids import NodeName
from protocol.models.node import NodeState
from protocol.models.task import TaskState

if TYPE_CHECKING:
    from prometheus_client.core import Metric

#: A family of gauges: label values with the number of each.
_Values = Iterable[tuple[tuple[str, ...], float]]


def render_metrics(parts: Parts, meters: Meters) -> tuple[bytes, str]:
    """Write all metrics; give them with their content type."""
    # Loaded when first asked for: a host without Prometheus need not carry it.
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

    class _Host:
        def collect(self) -> Iterator[Metric]:
            yield from _collect_tasks(parts)
            yield from _collect_nodes(parts)
            yield from _collect_work(parts, meters)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Host())
    return generate_latest(registry), CONTENT_TYPE_LATEST


def _gauge(name: str, text: str, labels: tuple[str, ...], values: _Values) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"kohaku_{name}", text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def _collect_tasks(parts: Parts) -> Iterator[Metric]:
    state, now = parts.state, parts.clock.now()
    live = Counter(str(task.state) for task in state.tasks.values())
    yield _gauge(
        "tasks", "Tasks that have not ended.", ("state",), (((n,), c) for n, c in live.items())
    )
    ended = parts.lately.counts(now)
    yield _gauge(
        "tasks_ended_last_hour", "Tasks that ended in the last hour.", ("state",),
        (((str(name),), count) for name, count in ended.items()),
    )  # fmt: skip
    reasons = count_reasons(state)
    yield _gauge(
        "queue_tasks", "Waiting tasks by what they wait for.", ("reason",),
        (((reason,), count) for reason, count in reasons.items()),
    )  # fmt: skip
    queued = (t.created_at for t in state.tasks.values() if t.state is TaskState.QUEUED)
    oldest = min(queued, default=now)
    yield _gauge(
        "queue_oldest_seconds", "How long the task has waited that was submitted first.", (),
        [((), max(now - oldest, 0.0))],
    )  # fmt: skip


def _collect_nodes(parts: Parts) -> Iterator[Metric]:
    nodes, now = list(parts.state.fleet.nodes.values()), parts.clock.now()

    def of_nodes(name: str, text: str, values: _Values, *labels: str) -> Metric:
        return _gauge(f"node_{name}", text, ("node", *labels), values)

    yield of_nodes(
        "up", "1 if the node's runner is there.", (((n.name,), float(n.is_online)) for n in nodes)
    )
    yield of_nodes(
        "state", "1 for the state the node is in.",
        (((n.name, str(s)), float(n.state is s)) for n in nodes for s in NodeState), "state",
    )  # fmt: skip
    yield of_nodes(
        "takes_work", "1 if the node is given new tasks.",
        (((n.name,), float(not n.site.closed)) for n in nodes),
    )  # fmt: skip
    yield of_nodes(
        "silent_seconds", "Since the last word of the node's runner.",
        (((n.name,), max(now - n.seen_at, 0.0)) for n in nodes if n.seen_at),
    )  # fmt: skip
    yield of_nodes(
        "tasks", "Tasks that hold something of the node.",
        (((n.name,), n.site.books.places_taken) for n in nodes),
    )  # fmt: skip
    yield of_nodes(
        "cores", "Cores by whether tasks hold them.", (v for n in nodes for v in _cores(n)), "held"
    )
    yield from _collect_readings(nodes)


def _cores(node: FleetNode) -> _Values:
    held = node.site.books.claimed().cores
    yield (node.name, "yes"), held
    yield (node.name, "no"), len(node.record.inventory.cores) - held


def _collect_readings(nodes: list[FleetNode]) -> Iterator[Metric]:
    read = [(node.name, node.readings) for node in nodes if node.readings is not None]
    simple: dict[str, tuple[str, list[tuple[NodeName, float]]]] = {
        "cpu_percent": ("CPU in use.", [(n, r.cpu_percent) for n, r in read]),
        "load_1m": ("Load average of one minute.", [(n, r.load_1m) for n, r in read]),
        "memory_total_bytes": ("Memory.", [(n, r.memory_total) for n, r in read]),
        "memory_available_bytes": (
            "Memory available.", [(n, r.memory_available) for n, r in read],
        ),
        "swap_used_bytes": ("Swap in use.", [(n, r.swap_used) for n, r in read]),
    }  # fmt: skip
    for name, (text, values) in simple.items():
        yield _gauge(f"node_{name}", text, ("node",), (((n,), v) for n, v in values))
    disks = [((n, d.path), d) for n, r in read for d in r.disks]
    of_disk = ("node", "path")
    yield _gauge("disk_total_bytes", "Size.", of_disk, ((k, d.total) for k, d in disks))
    yield _gauge("disk_free_bytes", "Free.", of_disk, ((k, d.free) for k, d in disks))
    gpus = [((n, g.uuid), g) for n, r in read for g in r.gpus]
    of_gpu = ("node", "gpu")
    yield _gauge("gpu_used_percent", "GPU in use.", of_gpu, ((k, g.used_percent) for k, g in gpus))
    yield _gauge(
        "gpu_memory_used_bytes", "GPU memory in use.", of_gpu, ((k, g.memory_used) for k, g in gpus)
    )
    yield _gauge(
        "gpu_fault", "1 if the GPU is out of service.", of_gpu,
        ((k, float(bool(g.fault))) for k, g in gpus),
    )  # fmt: skip


def _collect_work(parts: Parts, meters: Meters) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

    yield HistogramMetricFamily(
        "kohaku_commit_seconds",
        "Time of one group commit.",
        buckets=meters.commits.buckets(),
        sum_value=meters.commits.total_s,
    )
    yield HistogramMetricFamily(
        "kohaku_placement_seconds",
        "Time of one pass through the queue.",
        buckets=meters.placements.buckets(),
        sum_value=meters.placements.total_s,
    )
    yield CounterMetricFamily(
        "kohaku_task_writes", "Rows of tasks written.", value=float(meters.task_rows)
    )
    storing = float(not parts.loop.trouble)
    yield _gauge("storing", "1 if changes can be stored.", (), [((), storing)])
