"""The daemon as a whole, over the backends of its configuration."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from kohaku_daemon.probe.prober import Prober
from kohaku_daemon.runner.config import RunnerConfig
from kohaku_daemon.runner.daemon import run_runner
from kohaku_daemon.supervise import spawn
from protocol.errors import BadRequest, Conflict
from protocol.ids import NodeName
from protocol.messages.runner import AttemptState
from protocol.models.node import Readings
from tests.kohaku_daemon.runner.fake_host import JOIN_TOKEN, FakeHost
from tests.kohaku_daemon.runner.machine import a_start
from tests.kohaku_daemon.runner.waiting import until


@pytest.fixture
def config(tmp_path: Path, host: FakeHost) -> RunnerConfig:
    return RunnerConfig(
        name=NodeName("gpu-01"),
        data=tmp_path / "node",
        host=host.url,
        join_token=JOIN_TOKEN,
        backends=("mock",),
        reconnect_max_s=0.2,
        log_cap=64 * 1024,
    )


async def test_it_serves_until_told_to_stop_and_keeps_its_folder_to_itself(
    host: FakeHost, config: RunnerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    stop, ready = asyncio.Event(), list[str]()
    job = spawn(run_runner(config, stop=stop, on_ready=ready.append), name="runner")
    await until(lambda: host.registers)
    assert ready == ["gpu-01"]
    (info,) = host.registers[0].inventory.backends
    assert (info.name, info.isolation) == ("mock", "none: nothing is run")
    told = next(record for record in caplog.records if record.getMessage() == "backend ready")
    assert vars(told)["isolation"] == info.isolation

    with pytest.raises(Conflict, match="in use by process"):
        await run_runner(config, stop=stop, on_ready=ready.append)

    stop.set()
    await job
    await until(lambda: host.links == 0)
    assert "does not answer" not in caplog.text


async def test_an_output_that_never_ends_is_trimmed_while_its_task_runs(
    host: FakeHost, config: RunnerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.upkeep._TRIM_S", 0.01)
    stop = asyncio.Event()
    job = spawn(run_runner(config, stop=stop, on_ready=lambda _: None), name="runner")
    host.order(a_start(1, run_s="forever"))
    await until(lambda: host.state(1) is AttemptState.RUNNING)
    output = config.data / "logs" / "1-1.stdout"
    with output.open("ab") as file:  # as the task would, whose first output makes the file
        file.write(b"x" * 40 * config.log_cap)
    await until(lambda: output.stat().st_blocks * 512 < 3 * config.log_cap)
    assert output.stat().st_size == 40 * config.log_cap
    stop.set()
    await job


async def test_a_wrong_setting_is_told_before_anything_starts(config: RunnerConfig) -> None:
    wrong = replace(config, cores=(4095,))
    with pytest.raises(BadRequest, match="cores 4095"):
        await run_runner(wrong, stop=asyncio.Event(), on_ready=lambda _: None)
    # The vault is free again.
    with pytest.raises(BadRequest):
        await run_runner(wrong, stop=asyncio.Event(), on_ready=lambda _: None)


async def test_figures_that_cannot_be_read_do_not_end_the_runner(
    host: FakeHost,
    config: RunnerConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("kohaku_daemon.runner.readings._PERIOD_S", 0.01)
    reads = 0

    def broken(*_: object) -> Readings:
        nonlocal reads
        reads += 1
        raise ValueError("no such sensor")

    monkeypatch.setattr(Prober, "read", broken)
    stop = asyncio.Event()
    job = spawn(run_runner(config, stop=stop, on_ready=lambda _: None), name="runner")
    await until(lambda: reads >= 3 and host.beats)
    assert caplog.text.count("cannot read the machine") == 1
    host.order(a_start(1))
    await until(lambda: host.state(1) is AttemptState.ENDED)
    stop.set()
    await job
