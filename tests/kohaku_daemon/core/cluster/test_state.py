"""What the host keeps in memory of requests that are over, and for how long."""

import pytest

from kohaku_daemon.core.cluster import state as state_module
from kohaku_daemon.core.cluster.state import ClusterState
from tests.support.builders import a_cluster, a_node, a_submission
from tests.support.playbook import Playbook


def test_ended_requests_are_forgotten_the_longest_over_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state_module, "_REMEMBERED_BATCHES", 2)
    play = Playbook(a_cluster([a_node("n1")]))
    for number in range(1, 6):
        play.tell(a_submission(request_id=f"request-{number}", array=2))
    assert known(play.engine.state) == [1, 2, 3, 4, 5]
    play.kill(5, 6, 1, 2)  # request 3, then request 1
    assert known(play.engine.state) == [1, 2, 3, 4, 5]
    play.kill(3)  # half of request 2
    assert known(play.engine.state) == [1, 2, 3, 4, 5]
    play.kill(4)
    assert known(play.engine.state) == [1, 2, 4, 5]
    play.kill(7, 8)
    assert known(play.engine.state) == [2, 4, 5]


def known(state: ClusterState) -> list[int]:
    assert sorted(state.by_request.values()) == sorted(state.batches)
    return sorted(int(request_id.removeprefix("request-")) for _, request_id in state.by_request)
