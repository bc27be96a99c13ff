"""``scripts/bench``: its document, its verdicts, its exit status, and that it cleans up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from frame import Row

BENCHES = Path(__file__).parents[2] / "scripts" / "benches"
DEADLINE_S = 90.0


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHES / "run.py", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> type[Row]:
    monkeypatch.syspath_prepend(BENCHES)
    from frame import Row

    return Row


@pytest.mark.slow
def test_a_row_is_measured_and_told_as_one_document(tmp_path: Path) -> None:
    done = bench("cli", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert "measuring cli ... warming up 1/1 " in done.stderr
    document = json.loads(done.stdout)
    assert document["format"] == 1
    assert document["rounds"] == 1
    assert document["failed"] == {}
    (row,) = document["rows"]
    assert row["name"] == "cli"
    assert row["unit"] == "s"
    assert 0 < row["figure"]["median"] < DEADLINE_S
    assert row["figure"]["rounds"] == [row["figure"]["median"]]
    ratio = row["figure"]["median"] / row["baseline"]["median"]
    assert row["ratio"]["median"] == pytest.approx(ratio)
    limit_s = float(row["goal"].removeprefix("<= ").removesuffix(" s"))
    reached = row["figure"]["median"] <= limit_s
    assert row["verdict"] == ("reached" if reached else "missed")


@pytest.mark.slow
def test_interrupted_it_ends_what_it_started(tmp_path: Path) -> None:
    marked = {**os.environ, "TMPDIR": str(tmp_path)}
    running = subprocess.Popen(
        [sys.executable, BENCHES / "run.py", "submissions", "--rounds", "50"],
        env=marked,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        # Its host is there, and so is the load: submissions have begun.
        wait_for(lambda: len(children_of(tmp_path)) == 2 and any(tmp_path.rglob("nulls-*.log")))
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate(timeout=DEADLINE_S)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 130, said
    assert "what was started has been ended" in said
    assert children_of(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_every_goal_of_the_list_has_a_group() -> None:
    listed = bench("--list").stdout.split("\n")
    names = {line.split()[0] for line in listed if line}
    assert names >= {
        "control", "commands", "latency", "stored", "heartbeats", "watchers", "placement",
        "idle", "cli", "logs", "restart", "submissions", "faults", "chaos",
    }  # fmt: skip


def test_an_unknown_row_is_a_usage_error_that_names_the_known_ones() -> None:
    done = bench("contrl")
    assert done.returncode == 2
    assert "no row is called contrl" in done.stderr
    assert "control" in done.stderr


@pytest.mark.parametrize(
    ("goal", "ours", "theirs", "verdict"),
    [
        ("<= 60 us", [50, 60, 90], [], "reached"),
        ("<= 60 us", [50, 61, 62], [], "missed"),
        (">= 2 x", [10, 20, 30], [5, 10, 100], "reached"),
        (">= 2 x", [10, 19, 30], [5, 10, 100], "missed"),
        (">= 2 x", [10, 20, 30], [], "not measured"),
        ("", [1], [], ""),
    ],
)
def test_the_verdict_is_on_the_median(
    row: type[Row], goal: str, ours: list[float], theirs: list[float], verdict: str
) -> None:
    assert row("a", "what", "us", ours, "them", theirs, goal).verdict == verdict


def test_a_row_whose_goal_is_in_another_unit_is_refused(row: type[Row]) -> None:
    with pytest.raises(ValueError, match="is in us"):
        row("a", "what", "us", [1.0], goal="<= 60 ms")
    with pytest.raises(ValueError, match="is no goal"):
        row("a", "what", "us", [1.0], goal="as fast as possible")


def test_rounds_are_interleaved_and_the_first_only_warms_up(row: type[Row]) -> None:
    from frame import interleave

    order: list[str] = []
    counts: dict[str, float] = {"a": 0, "b": 0}

    def measure(name: str) -> float:
        order.append(name)
        counts[name] += 1
        return counts[name]

    figures = interleave(2, lambda: measure("a"), None, lambda: measure("b"))
    assert "".join(order) == "ababab"
    assert figures == [[2, 3], [], [2, 3]]


def test_percentiles_are_of_the_nearest_rank(row: type[Row]) -> None:
    from frame import percentile

    samples = [float(number) for number in range(1, 101)]
    assert percentile(samples, 0.99) == 99
    assert percentile(samples, 0.5) == 50
    assert percentile([7.0], 0.99) == 7


def children_of(folder: Path) -> list[int]:
    """Find processes whose environment names a home below ``folder`` (man 5 proc)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environ = (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"KOHAKU_HOME={folder}".encode() in environ:
            found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
