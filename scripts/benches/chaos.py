"""What honest people notice while everything that is known to break such hosts goes on."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from frame import Row

_SECONDS = 6.0


def chaos(rounds: int) -> list[Row]:
    """Honest calls with all attacks going on, and with none, in turn."""
    root = str(Path(__file__).parents[2])
    if root not in sys.path:
        sys.path.insert(0, root)  # the attacks are shared with the tests
    from tests.support.chaos import run_phase
    from tests.support.siege import besieged

    with (
        tempfile.TemporaryDirectory(prefix="kohaku-chaos-") as folder,
        besieged(Path(folder)) as siege,
    ):
        run_phase(siege, _SECONDS, attacked=True)  # warms up
        before_mib = siege.rss_mib()
        pairs = []
        for _ in range(rounds):
            attacked = run_phase(siege, _SECONDS, attacked=True)
            calm = run_phase(siege, _SECONDS, attacked=False)
            pairs.append((attacked, calm))
        grown_mib = [attacked.rss_mib - before_mib for attacked, _ in pairs]
    for attacked, calm in pairs:
        for wrong in (*attacked.calls.failed, *attacked.missed, *calm.calls.failed):
            print(f"chaos: {wrong}", file=sys.stderr)
    bad = [attacked for attacked, _ in pairs]
    good = [calm for _, calm in pairs]
    kinds = sorted(bad[0].calls.kinds)
    return [
        Row(
            "chaos.p99", "honest calls under attack, p99", "ms",
            [phase.calls.p99 for phase in bad], "no attack",
            [phase.calls.p99 for phase in good], "<= 20 ms",
            "the host has one core; both sides share the others, attackers come last there, for "
            "theirs are other machines; some two dozen attacks at once",
        ),
        Row(
            "chaos.p50", "honest calls under attack, p50", "ms",
            [phase.calls.p50 for phase in bad], "no attack",
            [phase.calls.p50 for phase in good],
        ),
        *(
            Row(
                f"chaos.{kind}", f"... {kind}, p99", "ms",
                [phase.calls.kinds[kind] for phase in bad], "no attack",
                [phase.calls.kinds[kind] for phase in good],
            )
            for kind in kinds
        ),
        Row(
            "chaos.failed", "honest calls that failed", "calls",
            [float(len(phase.calls.failed)) for phase in bad], goal="<= 0 calls",
        ),
        Row(
            "chaos.cpu", "CPU of the host", "cores",
            [phase.cpu for phase in bad], "no attack", [phase.cpu for phase in good],
        ),
        Row(
            "chaos.attacks", "attacks carried out a second", "1/s",
            [sum(phase.attacks.values()) / _SECONDS for phase in bad],
        ),
        Row(
            "chaos.rss", "host RSS grown since the first round", "MiB",
            grown_mib, goal="<= 16 MiB",
        ),
    ]  # fmt: skip
