"""The queue: who is next, who may go past, and that nobody waits for ever."""

import copy
from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kohaku_daemon.core.cluster import backlog as backlog_module
from kohaku_daemon.core.cluster.backlog import Backlog
from kohaku_daemon.core.placement.place import Site, candidates, choose_held, place
from kohaku_daemon.core.placement.request import Request
from protocol.ids import NodeName, TaskId
from tests.support.builders import an_inventory


class Queue:
    """A backlog with its sites, the way the engine uses it."""

    def __init__(self, *cores: int, gpus: int = 0) -> None:
        self.backlog = Backlog()
        self.sites: dict[NodeName, Site] = {}
        for number, count in enumerate(cores, 1):
            site = Site(NodeName(f"n{number}"))
            site.books.refit(an_inventory(count, gpus=gpus))
            self.sites[site.name] = site

    def add(self, *tasks: int, priority: int = 0, **need: int | str) -> None:
        for task in tasks:
            self.backlog.add(TaskId(task), Request(**need), priority)  # type: ignore[arg-type]

    def run(self) -> list[tuple[int, str]]:
        """Place what fits."""
        placed = []
        for one in self.backlog.place_waiting(self.sites):
            self.sites[one.node].books.enter(one.task, one.claim)
            placed.append((int(one.task), str(one.node)))
        return placed

    def end(self, *tasks: int) -> None:
        for task in tasks:
            next(s for s in self.sites.values() if task in s.books.claims).books.strike(
                TaskId(task)
            )
        self.backlog.loosen()

    def running(self) -> set[TaskId]:
        return {task for site in self.sites.values() for task in site.books.claims}


def test_higher_priority_goes_first_then_earlier_submission() -> None:
    queue = Queue(4)
    queue.add(3, 1, cores=1)
    queue.add(4, cores=1, priority=-5)
    queue.add(2, cores=2, priority=7)
    assert [queue.backlog.ahead_of(TaskId(task)) for task in (2, 1, 3, 4)] == [0, 1, 2, 3]
    assert queue.run() == [(2, "n1"), (1, "n1"), (3, "n1")]
    assert len(queue.backlog) == 1
    assert TaskId(4) in queue.backlog


def test_a_big_task_keeps_a_node_free_and_small_ones_use_the_others() -> None:
    queue = Queue(4, 4)
    queue.add(1, 2, cores=2)
    assert queue.run() == [(1, "n1"), (2, "n2")]
    queue.add(10, cores=4)
    queue.add(11, 12, 13, cores=1)
    assert queue.run() == [(11, "n2"), (12, "n2")]
    assert queue.backlog.held_for(NodeName("n1")) == 10
    queue.end(1)
    assert queue.run() == [(10, "n1")]
    assert queue.backlog.held_for(NodeName("n2")) == 13  # kept since it was second in line


def test_the_kept_node_does_not_change_because_another_lacks_less_for_a_moment() -> None:
    queue = Queue(4, 4)
    queue.add(1, cores=2, node="n1")
    queue.add(2, 3, 4, cores=1, node="n2")
    assert queue.run() == [(1, "n1"), (2, "n2"), (3, "n2"), (4, "n2")]
    queue.add(10, cores=4)
    assert queue.run() == []
    queue.end(2, 3)  # n2 now lacks less, but its last task may take for ever
    queue.add(20, 21, cores=1)
    assert queue.run() == [(20, "n2"), (21, "n2")]
    queue.end(1)
    assert queue.run() == [(10, "n1")]


def test_a_node_that_goes_out_of_service_is_no_longer_kept_free() -> None:
    queue = Queue(4, 4)
    queue.add(1, 2, cores=1)
    queue.run()
    queue.add(10, cores=4)
    queue.run()
    assert queue.backlog.held_for(NodeName("n1")) == 10
    queue.sites[NodeName("n1")].closed = "the node is draining"
    queue.backlog.loosen()
    queue.run()
    assert queue.backlog.held_for(NodeName("n1")) is None
    assert queue.backlog.held_for(NodeName("n2")) == 10


def test_what_no_node_could_hold_keeps_none_free() -> None:
    queue = Queue(4)
    queue.add(1, cores=5)
    queue.add(2, cores=4)
    assert queue.run() == [(2, "n1")]


def test_a_gpu_out_of_service_makes_nobody_wait_for_it() -> None:
    queue = Queue(4, gpus=2)
    books = queue.sites[NodeName("n1")].books
    books.refit(books.inventory, {"GPU-0": "fell off the bus"})
    queue.add(1, gpus=2)
    queue.add(2, cores=1)
    assert queue.run() == [(2, "n1")]


def test_tasks_for_other_nodes_go_past() -> None:
    queue = Queue(2, 2)
    queue.add(1, cores=2, node="n1")
    queue.run()
    queue.add(2, cores=1, node="n1")
    queue.add(3, cores=1, node="n2")
    queue.add(4, cores=1)
    assert queue.run() == [(3, "n2"), (4, "n2")]


def test_the_end_of_the_first_in_line_frees_the_node_kept_for_it() -> None:
    queue = Queue(4)
    queue.add(1, cores=2)
    queue.run()
    queue.add(2, cores=4)
    queue.add(3, cores=2)
    assert queue.run() == []
    queue.backlog.discard(TaskId(2))
    assert queue.backlog.held_for(NodeName("n1")) is None
    assert queue.run() == [(3, "n1")]


def test_more_urgent_work_of_a_shape_that_was_blocked_is_asked_again() -> None:
    queue = Queue(4, 2)
    queue.add(1, cores=2, node="n1")
    queue.add(2, cores=2, node="n2")
    queue.run()
    queue.add(3, cores=4)
    queue.add(4, cores=2)
    assert queue.run() == []  # 4 would fit on n1, but that is kept for 3
    queue.add(5, cores=2, priority=1)
    assert queue.run() == [(5, "n1")]


def test_a_node_is_kept_for_the_more_urgent_and_the_other_takes_the_next() -> None:
    queue = Queue(4, 4)
    queue.add(1, 2, cores=2)
    queue.run()
    queue.add(3, cores=4)
    queue.run()
    assert queue.backlog.held_for(NodeName("n1")) == 3
    queue.add(4, cores=3, priority=1)
    queue.run()
    assert queue.backlog.held_for(NodeName("n1")) == 4
    assert queue.backlog.held_for(NodeName("n2")) == 3


def test_the_next_of_a_shape_that_was_placed_has_a_node_kept_for_it_too() -> None:
    queue = Queue(4, 4)
    queue.add(1, cores=3, node="n1")
    queue.add(2, cores=4, node="n2")
    queue.run()
    queue.add(3, cores=4)
    queue.add(4, cores=1)
    queue.add(5, cores=3)
    queue.add(6, cores=1)
    assert queue.run() == []
    queue.backlog.discard(TaskId(3))
    assert queue.run() == [(4, "n1")]
    assert queue.backlog.held_for(NodeName("n1")) == 5
    assert queue.backlog.held_for(NodeName("n2")) == 6


def test_a_thousand_equal_tasks_wait_in_order_and_cost_one_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Request] = []

    def counting(
        request: Request, sites: Iterable[Site], held: Iterable[NodeName]
    ) -> object:  # as place
        asked.append(request)
        return place(request, sites, list(held))

    monkeypatch.setattr(backlog_module, "place", counting)
    queue = Queue(4, 4)
    queue.add(1, 2, cores=4)
    queue.run()
    asked.clear()
    queue.add(*range(1000, 2000), cores=3)
    assert queue.run() == []
    queue.add(*range(2000, 3000), cores=3)
    assert queue.run() == []
    assert len(asked) == 1
    assert queue.run() == []
    assert len(asked) == 1
    queue.end(1)
    assert queue.run() == [(1000, "n1")]
    assert len(asked) == 3
    assert queue.backlog.ahead_of(TaskId(1001)) == 0
    assert queue.backlog.ahead_of(TaskId(2999)) == 1998


SHAPES = [
    Request(cores=1), Request(cores=2), Request(cores=3), Request(cores=4), Request(cores=9),
    Request(cores=2, node="n1"), Request(cores=4, node="n2"), Request(cores=1, gpus=1),
    Request(gpus=2),
]  # fmt: skip


class Against(RuleBasedStateMachine):
    """Every pass of the backlog does what the rule says when nothing is remembered of answers."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()
        self.waiting: dict[TaskId, tuple[int, Request]] = {}
        self.kept: dict[Request, NodeName] = {}
        self.next = 1

    @initialize(cores=st.lists(st.sampled_from([2, 4]), min_size=1, max_size=3))
    def begin(self, cores: list[int]) -> None:
        self.queue = Queue(*cores, gpus=2)

    @rule(shapes=st.lists(st.sampled_from(SHAPES), max_size=4), priority=st.integers(-1, 1))
    def add(self, shapes: list[Request], priority: int) -> None:
        for shape in shapes:
            task = TaskId(self.next)
            self.next += 1
            self.waiting[task] = (-priority, shape)
            self.queue.backlog.add(task, shape, priority)
        self.run_a_pass()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[task]
        self.queue.backlog.discard(task)

    @precondition(lambda self: self.queue.running())
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.queue.end(data.draw(st.sampled_from(sorted(self.queue.running()))))

    @rule(data=st.data())
    def close_or_open(self, data: st.DataObject) -> None:
        site = self.queue.sites[data.draw(st.sampled_from(sorted(self.queue.sites)))]
        site.closed = "" if site.closed else "the node is draining"
        self.queue.backlog.loosen()

    @rule()
    def run_a_pass(self) -> None:
        wanted, held = self.reference(copy.deepcopy(self.queue.sites))
        assert self.queue.run() == wanted
        for name in self.queue.sites:
            assert self.queue.backlog.held_for(name) == held.get(name)
        for task, _ in wanted:
            del self.waiting[TaskId(task)]

    def reference(
        self, sites: dict[NodeName, Site]
    ) -> tuple[list[tuple[int, str]], dict[NodeName, TaskId]]:
        """Place by asking every shape about every node at its turn."""
        in_service = {site.name for site in sites.values() if not site.closed}
        placed, held, blocked = list[tuple[int, str]](), dict[NodeName, TaskId](), set[Request]()
        shapes = {shape for _, shape in self.waiting.values()}
        self.kept = {shape: name for shape, name in self.kept.items() if shape in shapes}
        for task in sorted(self.waiting, key=lambda task: (self.waiting[task][0], task)):
            shape = self.waiting[task][1]
            if shape in blocked:
                continue
            if held.keys() >= in_service:
                break
            found = place(shape, candidates(shape, sites), held)
            if found is not None:
                site, claim = found
                site.books.enter(task, claim)
                placed.append((int(task), str(site.name)))
                self.kept.pop(shape, None)
                continue
            blocked.add(shape)
            kept = choose_held(shape, candidates(shape, sites), held, self.kept.pop(shape, None))
            if kept is not None:
                held[kept.name] = task
                self.kept[shape] = kept.name
        return placed, held


TestAgainstTheRule = Against.TestCase
TestAgainstTheRule.settings = settings(max_examples=200, stateful_step_count=20, deadline=None)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_a_big_task_gets_its_turn_when_those_that_ran_before_it_have_ended(
    seed: int, nodes: int
) -> None:
    """Small tasks keep coming and ending at random; the big one is served all the same."""
    random = Random(seed)
    queue = Queue(*[4] * nodes)
    big = TaskId(51)
    before: set[TaskId] | None = None
    for step in range(1000):
        for number in range(2):
            queue.add(2 * step + number + (step >= 25), cores=random.randint(1, 3))
        if step == 25:
            queue.add(big, cores=4)
        running = sorted(queue.running())
        queue.end(*random.sample(running, random.randint(0, len(running))))
        queue.run()
        if step < 25:
            continue
        if big not in queue.backlog:
            return
        if before is None and queue.backlog.ahead_of(big) == 0:
            before = queue.running()
        assert before is None or before & queue.running(), "all before it ended, and it waits"
    raise AssertionError("it never came to its turn")
