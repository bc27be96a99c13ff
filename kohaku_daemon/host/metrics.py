"""``GET /metrics`` in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from kohaku_daemon.host.parts import Parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

_BUCKETS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)


class CommitTimes:
    """How long commits took, and how much they wrote."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BUCKETS_S) + 1)
        self._total_s = 0.0
        self.tasks = 0

    def observe(self, seconds: float, tasks: int) -> None:
        """Count one commit."""
        spot = next((i for i, top in enumerate(_BUCKETS_S) if seconds <= top), len(_BUCKETS_S))
        self._counts[spot] += 1
        self._total_s += seconds
        self.tasks += tasks

    def buckets(self) -> list[tuple[str, float]]:
        """Give cumulative counts by upper bound, as Prometheus wants them."""
        total = 0
        out: list[tuple[str, float]] = []
        for top, count in zip((*map(str, _BUCKETS_S), "+Inf"), self._counts, strict=True):
            total += count
            out.append((top, total))
        return out

    @property
    def total_s(self) -> float:
        """Seconds of all commits together."""
        return self._total_s


def render_metrics(parts: Parts, commits: CommitTimes) -> tuple[bytes, str]:
    """Write all metrics; give them with their content type."""
    # Loaded when first asked for: a host without Prometheus need not carry it.
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

    class _Host:
        def collect(self) -> Iterator[Metric]:
            return _collect(parts, commits)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Host())
    return generate_latest(registry), CONTENT_TYPE_LATEST


def _collect(parts: Parts, commits: CommitTimes) -> Iterator[Metric]:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    state = parts.state
    tasks = GaugeMetricFamily("kohaku_tasks", "Tasks that have not ended.", labels=["state"])
    for name, count in Counter(str(task.state) for task in state.tasks.values()).items():
        tasks.add_metric([name], count)
    yield tasks

    up = GaugeMetricFamily("kohaku_node_up", "1 if the node's runner is there.", labels=["node"])
    cpu = GaugeMetricFamily("kohaku_node_cpu_percent", "CPU in use.", labels=["node"])
    memory = GaugeMetricFamily(
        "kohaku_node_memory_available_bytes", "Memory available.", labels=["node"]
    )
    cores = GaugeMetricFamily(
        "kohaku_node_cores", "Cores by whether tasks hold them.", labels=["node", "held"]
    )
    gpu = GaugeMetricFamily("kohaku_gpu_used_percent", "GPU in use.", labels=["node", "gpu"])
    for node in state.fleet.nodes.values():
        up.add_metric([node.name], float(node.is_online))
        held = node.site.books.claimed().cores
        cores.add_metric([node.name, "yes"], held)
        cores.add_metric([node.name, "no"], len(node.record.inventory.cores) - held)
        if node.readings is not None:
            cpu.add_metric([node.name], node.readings.cpu_percent)
            memory.add_metric([node.name], node.readings.memory_available)
            for reading in node.readings.gpus:
                gpu.add_metric([node.name, reading.uuid], reading.used_percent)
    yield from (up, cores, cpu, memory, gpu)

    yield HistogramMetricFamily(
        "kohaku_commit_seconds",
        "Time of one group commit.",
        buckets=commits.buckets(),
        sum_value=commits.total_s,
    )
    yield CounterMetricFamily(
        "kohaku_task_writes", "Rows of tasks written.", value=float(commits.tasks)
    )
    storing = GaugeMetricFamily("kohaku_storing", "1 if changes can be stored.")
    storing.add_metric([], float(not parts.loop.trouble))
    yield storing
