"""Two runners from one data folder: what the first has run, the second must not run again.

Host and runner engines talk to each other here; a folder is copied between the acceptance of
an order and its start.
"""

from __future__ import annotations

from kohaku_daemon.core.cluster.events import RunnerGone
from kohaku_daemon.core.node.actions import NodeAction, Remember, StartLaunch
from kohaku_daemon.core.node.engine import NodeEngine
from kohaku_daemon.core.node.events import LaunchFound, LaunchStarted, StartOrdered
from kohaku_daemon.core.node.records import LaunchRecord
from kohaku_daemon.core.workload import Finding, Found, Handle, Launch, Started
from protocol.ids import NodeName
from protocol.messages.runner import AttemptState, OrderStart
from tests.support.builders import a_cluster, a_node, a_submission, an_inventory, registered
from tests.support.playbook import Playbook, recoded

N1 = NodeName("n1")
HANDLE, FRESH = (Handle(backend="mock", data={"plan": plan}) for plan in "12")


def start_ordered(order: OrderStart) -> StartOrdered:
    launch = Launch(
        task=order.task, attempt=order.attempt, batch=order.batch, spec=order.spec,
        claim=order.claim,
    )  # fmt: skip
    return StartOrdered(launch, HANDLE)


def vault_of(actions: list[NodeAction]) -> list[LaunchRecord]:
    return [recoded(action.record) for action in actions if isinstance(action, Remember)]


def starts(actions: list[NodeAction]) -> int:
    return sum(isinstance(action, StartLaunch) for action in actions)


def a_copy(play: Playbook) -> tuple[NodeEngine, str]:
    """Have the original run a task, and give a runner from a copy that knows of no start."""
    play.tell(a_submission())
    play.place()
    (order,) = play.orders
    assert isinstance(order, OrderStart)
    original, copy = NodeEngine(), NodeEngine()
    actions = original.handle(start_ordered(order), play.now)
    assert starts(actions) == 1
    key = f"{order.task}-{order.attempt}"
    copy.recover(vault_of(actions), play.now)
    original.handle(LaunchStarted(key, Started(started_at=play.now)), play.now)
    play.hear(1, AttemptState.RUNNING)
    never = Finding(found=Found.NEVER_STARTED)
    assert starts(copy.handle(LaunchFound(key, never, FRESH), play.now)) == 0
    return copy, key


def test_a_copy_starts_nothing_before_the_host_has_taken_it_in() -> None:
    a_copy(Playbook(a_cluster([a_node("n1")])))


def test_a_copy_that_comes_when_the_original_is_gone_does_not_repeat_what_that_ran() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    copy, _ = a_copy(play)
    play.tell(RunnerGone(N1, "the link broke"))
    said = copy.attempts()
    assert play.tell(registered("n1", an_inventory(), attempts=said)) == ["refuse conflict"]
    assert "which has run there already: its data is an old copy" in str(play.refusal)


def test_a_copy_does_not_repeat_what_has_ended_either() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    copy, _ = a_copy(play)
    play.hear(1, AttemptState.ENDED)
    play.tell(RunnerGone(N1, "the link broke"))
    ended = frozenset({play.id(1)})
    event = registered("n1", an_inventory(), attempts=copy.attempts(), ended=ended, begun=ended)
    assert play.tell(event) == ["refuse conflict"]


def test_a_runner_that_never_began_what_it_was_ordered_is_taken_in() -> None:
    play = Playbook(a_cluster([a_node("n1")]))
    play.tell(a_submission())
    play.place()
    play.hear(1, AttemptState.ACCEPTED)
    play.tell(RunnerGone(N1, "the link broke"))
    said = (play.report(play.id(1), AttemptState.ACCEPTED),)
    lines = play.tell(registered("n1", an_inventory(), attempts=said))
    assert lines[-1] == "answer"
