"""What Prometheus gets: read by Prometheus's own parser."""

from __future__ import annotations

from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from protocol.messages.runner import AttemptState
from protocol.messages.task import SubmitTask
from protocol.methods import TASK_SUBMIT
from protocol.models.access import Role
from protocol.models.node import GpuReading
from protocol.models.task import TaskSpec
from tests.support.builders import an_inventory
from tests.support.host import TOKENS, RunningHost, linked_runner

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(host: RunningHost) -> Samples:
    headers = {"Authorization": f"Bearer {TOKENS[Role.VIEWER]}"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.get(host.url + "/metrics") as answer,
    ):
        assert answer.status == 200
        assert answer.content_type == "text/plain"
        families: Any = text_string_to_metric_families(await answer.text())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


async def test_an_empty_cluster_has_numbers_too(host: RunningHost) -> None:
    samples = await scrape(host)
    assert samples["kohaku_storing", ()] == 1.0
    assert not [name for name, _ in samples if name == "kohaku_node_up"]


async def test_tasks_nodes_and_commits_are_counted(host: RunningHost) -> None:
    async with linked_runner(host, inventory=an_inventory(cores=4, gpus=1)) as runner:
        async with await host.connect() as admin:
            spec = TaskSpec(command=("true",), cores=3)
            await admin.call(TASK_SUBMIT, SubmitTask(request_id="request-1", spec=spec, array=3))
        await runner.report(await runner.start(), AttemptState.RUNNING)
        await runner.beat(
            cpu_percent=12.5, memory_available=2**30, gpus=(GpuReading("GPU-0", used_percent=50.0),)
        )
        samples = await scrape(host)
    of_node = ("node", "n1")
    assert samples["kohaku_tasks", (("state", "running"),)] == 1
    assert samples["kohaku_tasks", (("state", "queued"),)] == 2
    assert samples["kohaku_node_up", (of_node,)] == 1
    assert samples["kohaku_node_cores", (("held", "yes"), of_node)] == 3
    assert samples["kohaku_node_cores", (("held", "no"), of_node)] == 1
    assert samples["kohaku_node_cpu_percent", (of_node,)] == 12.5
    assert samples["kohaku_node_memory_available_bytes", (of_node,)] == 2**30
    assert samples["kohaku_gpu_used_percent", (("gpu", "GPU-0"), of_node)] == 50
    # The three as submitted with the one placed; then it runs.
    assert samples["kohaku_task_writes_total", ()] == 4
    assert samples["kohaku_queue_tasks", (("reason", "room"),)] == 2
    assert samples["kohaku_node_takes_work", (of_node,)] == 1
    assert samples["kohaku_node_state", (of_node, ("state", "online"))] == 1
    assert samples["kohaku_node_state", (of_node, ("state", "lost"))] == 0
    assert samples["kohaku_placement_seconds_count", ()] >= 1
    assert samples["kohaku_commit_seconds_count", ()] >= 3
    assert samples["kohaku_commit_seconds_sum", ()] > 0
