"""All attacks at once: honest people are served, nothing grows, nothing breaks."""

from __future__ import annotations

from tests.support.chaos import run_phase
from tests.support.siege import Siege

#: Seconds; what takes its time among the attacks takes ten.
SECONDS = 12.0


def test_honest_calls_all_succeed_while_everything_attacks(siege: Siege) -> None:
    calm = run_phase(siege, 2.0, attacked=False)
    assert calm.calls.failed == []
    attacked = run_phase(siege, SECONDS, attacked=True)
    assert attacked.calls.failed == []
    assert attacked.calls.count > 20
    # That each of them is answered rightly is for test_attacks: here they may be too slow.
    assert sum(attacked.attacks.values()) > 10
    # Hundreds of peers were there at once; each may cost what a connection costs.
    assert attacked.rss_mib - calm.rss_mib < 64
    assert siege.home.pid("host") == siege.pid
    assert run_phase(siege, 2.0, attacked=False).calls.failed == []
    assert "Traceback" not in siege.log()
