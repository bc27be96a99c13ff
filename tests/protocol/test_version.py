"""Which versions meet in which: a table, and what the dialling side makes of the answer."""

from __future__ import annotations

import pytest

from protocol import version
from protocol.version import agree

#: What a host speaks, what a peer offers as newest and oldest, and what they then speak.
MEETINGS = [
    ((1, 1), (1, 0), 1),
    ((2, 1), (1, 0), 1),  # a host one version newer than its runner
    ((2, 1), (1, 1), 1),
    ((2, 1), (2, 1), 2),
    ((1, 1), (2, 1), 1),  # a client that was upgraded before the host, and still knows its words
    ((1, 1), (2, 0), None),
    ((1, 1), (2, 2), None),
    ((3, 2), (1, 0), None),  # two versions behind
    ((3, 2), (1, 1), None),
    ((3, 2), (4, 3), 3),
    ((1, 1), (0, 0), None),
    ((1, 1), (-1, 0), None),
    ((1, 1), (1, 7), None),  # nonsense agrees with nobody
]


@pytest.mark.parametrize(("ours", "theirs", "spoken"), MEETINGS)
def test_the_newest_both_know_is_spoken(
    ours: tuple[int, int],
    theirs: tuple[int, int],
    spoken: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(version, "PROTOCOL_VERSION", ours[0])
    monkeypatch.setattr(version, "OLDEST_VERSION", ours[1])
    assert agree(*theirs) == spoken
