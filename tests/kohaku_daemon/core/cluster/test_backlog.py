"""The queue: who is next, who may go past, and that nobody waits for ever."""

import copy
import math
from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kohaku_daemon.core.cluster import backlog as backlog_module
from kohaku_daemon.core.cluster.backlog import Backlog
from kohaku_daemon.core.cluster.fair_order import cost_of
from kohaku_daemon.core.placement.backfill import Hold
from kohaku_daemon.core.placement.choose import choose_claim
from kohaku_daemon.core.placement.gang import Seat, plan_gang, seat_gang
from kohaku_daemon.core.placement.place import Site, can_take, candidates, choose_held, rank
from kohaku_daemon.core.placement.request import Request
from protocol.ids import BatchId, NodeName, TaskId, UserName
from tests.support.builders import an_inventory


class Queue:
    """A backlog with its sites, the way the engine uses it."""

    def __init__(self, *cores: int, gpus: int = 0) -> None:
        self.backlog = Backlog()
        self.sites: dict[NodeName, Site] = {}
        self.now = 1000.0
        self.shapes: dict[TaskId, Request] = {}
        for number, count in enumerate(cores, 1):
            site = Site(NodeName(f"n{number}"))
            site.books.refit(an_inventory(count, gpus=gpus))
            self.sites[site.name] = site

    def add(
        self, *tasks: int, owner: str = "ada", priority: int = 0, **need: int | str | float
    ) -> None:
        for task in tasks:
            request = self.shapes[TaskId(task)] = Request(**need)  # type: ignore[arg-type]
            self.backlog.add(TaskId(task), request, UserName(owner), priority)

    def add_gang(self, *tasks: int, owner: str = "ada", **need: int | str) -> None:
        request = Request(**need)  # type: ignore[arg-type]
        members = [(TaskId(task), request) for task in tasks]
        self.backlog.add_gang(BatchId(10**6 + tasks[0]), members, UserName(owner), 0)

    def ends_at(self, task: TaskId) -> float:
        """Give when a running task ends for sure: it began when time was at its beginning."""
        longest_s = self.shapes[task].longest_s
        return 1000.0 + longest_s if longest_s else math.inf

    def run(self) -> list[tuple[int, str]]:
        """Place what fits."""
        placed = []
        for one in self.backlog.place_waiting(self.sites, self.now, self.ends_at):
            self.sites[one.node].books.enter(one.task, one.claim)
            placed.append((int(one.task), str(one.node)))
        return placed

    def end(self, *tasks: int) -> None:
        for task in tasks:
            site = next(s for s in self.sites.values() if task in s.books.claims)
            site.books.strike(TaskId(task))
            self.backlog.loosen(site.name)

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


def test_a_long_pass_is_taken_in_parts_and_a_gang_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog_module, "_MOST_PLACED", 2)
    queue = Queue(8)
    queue.add(1, 2, 3, cores=1)
    queue.add_gang(4, 5, 6, cores=1)
    queue.add(7, cores=1)
    parts = []
    while not queue.backlog.is_settled:
        parts.append([task for task, _ in queue.run()])
    assert parts[0] == [1, 2]
    assert [4, 5, 6] in [part[-3:] for part in parts]
    assert [task for part in parts for task in part] == [1, 2, 3, 4, 5, 6, 7]
    assert queue.run() == []


def test_an_owners_other_shapes_wait_for_the_turn_that_one_shape_has_had() -> None:
    queue = Queue(4)
    # Two shapes of one owner: with each task placed, both come after what was submitted before.
    queue.add(2, cores=2)
    queue.add(3, cores=1)
    queue.add(5, cores=2)
    queue.add(4, cores=3)
    assert queue.run() == [(2, "n1"), (3, "n1")]
    assert queue.backlog.held_for(NodeName("n1")) == 4


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
    queue.backlog.renew()
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
    asked: list[NodeName] = []

    def counting(request: Request, site: Site) -> bool:  # as can_take
        asked.append(site.name)
        return can_take(request, site)

    monkeypatch.setattr(backlog_module, "can_take", counting)
    queue = Queue(4, 4)
    queue.add(1, 2, cores=4)
    queue.run()
    asked.clear()
    queue.add(*range(1000, 2000), cores=3)
    assert queue.run() == []
    queue.add(*range(2000, 3000), cores=3)
    assert queue.run() == []
    assert asked == ["n1", "n2"]
    assert queue.run() == []
    assert asked == ["n1", "n2"]
    queue.end(1)
    assert queue.run() == [(1000, "n1")]
    # Only the node where something became free, once to choose it and once it is full.
    assert set(asked[2:]) == {"n1"}
    assert len(asked) <= 6
    assert queue.backlog.ahead_of(TaskId(1001)) == 0
    assert queue.backlog.ahead_of(TaskId(2999)) == 1998


def test_whether_there_is_hope_is_asked_again_once_nodes_have_changed() -> None:
    queue = Queue(4, 2)
    wide = Request(cores=3)
    assert queue.backlog.has_hope(wide, queue.sites)
    assert not queue.backlog.has_hope(Request(cores=5), queue.sites)
    queue.sites[NodeName("n1")].closed = "the node is draining"
    queue.backlog.renew()
    assert not queue.backlog.has_hope(wide, queue.sites)


def test_a_line_of_which_most_are_gone_is_not_kept_and_stays_in_order() -> None:
    queue = Queue(2)
    queue.add(*range(1, 5001), cores=1)
    for task in range(5000, 2, -1):
        queue.backlog.discard(TaskId(task))
    lane = queue.backlog._waiting[TaskId(1)]
    assert len(lane.line) < 1100
    assert queue.backlog.ahead_of(TaskId(2)) == 1
    assert queue.run() == [(1, "n1"), (2, "n1")]


SHAPES = [
    Request(cores=1), Request(cores=2), Request(cores=3), Request(cores=4), Request(cores=9),
    Request(cores=2, node="n1"), Request(cores=4, node="n2"), Request(cores=1, gpus=1),
    Request(gpus=2), Request(cores=2, longest_s=5), Request(cores=1, longest_s=50),
]  # fmt: skip
OWNERS = [UserName("ada"), UserName("bob"), UserName("cyd")]

#: What waits: a task's shape, or a gang's, with its owner and priority.
Lane = tuple[Request | tuple[tuple[TaskId, Request], ...], UserName, int]


class Against(RuleBasedStateMachine):
    """Every pass of the backlog does what the rule says when nothing is remembered of answers."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()
        self.waiting: dict[TaskId, Lane] = {}
        self.kept: dict[Lane, list[NodeName]] = {}
        self.next = 1

    @initialize(cores=st.lists(st.sampled_from([2, 4]), min_size=1, max_size=3))
    def begin(self, cores: list[int]) -> None:
        self.queue = Queue(*cores, gpus=2)

    @rule(
        shapes=st.lists(st.sampled_from(SHAPES), max_size=4),
        owner=st.sampled_from(OWNERS),
        priority=st.integers(-1, 1),
    )
    def add(self, shapes: list[Request], owner: UserName, priority: int) -> None:
        for shape in shapes:
            task = self.new_task()
            self.waiting[task] = (shape, owner, priority)
            self.queue.shapes[task] = shape
            self.queue.backlog.add(task, shape, owner, priority)
        self.run_a_pass()

    @rule(
        shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
        owner=st.sampled_from(OWNERS),
        priority=st.integers(-1, 1),
    )
    def add_gang(self, shapes: list[Request], owner: UserName, priority: int) -> None:
        members = tuple((self.new_task(), shape) for shape in shapes)
        for task, shape in members:
            self.waiting[task] = (members, owner, priority)
            self.queue.shapes[task] = shape
        self.queue.backlog.add_gang(BatchId(members[0][0] + 10**6), members, owner, priority)

    def new_task(self) -> TaskId:
        self.next += 1
        return TaskId(self.next)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(sorted(self.waiting)))
        shape = self.waiting[task][0]
        # The engine ends a gang as a whole.
        for one in [task] if isinstance(shape, Request) else [member for member, _ in shape]:
            self.forget(one)
            self.queue.backlog.discard(one)

    @precondition(lambda self: self.queue.running())
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.queue.end(data.draw(st.sampled_from(sorted(self.queue.running()))))

    @rule(data=st.data())
    def close_or_open(self, data: st.DataObject) -> None:
        site = self.queue.sites[data.draw(st.sampled_from(sorted(self.queue.sites)))]
        site.closed = "" if site.closed else "the node is draining"
        self.queue.backlog.renew()

    @rule()
    def run_a_pass(self) -> None:
        if not self.queue.backlog._changed:
            assert self.queue.run() == []
            return
        wanted, held = self.reference(copy.deepcopy(self.queue.sites))
        assert self.queue.run() == wanted
        for name in self.queue.sites:
            assert self.queue.backlog.held_for(name) == held.get(name)
        for task, _ in wanted:
            self.forget(TaskId(task))

    def forget(self, task: TaskId) -> None:
        """A lane whose first leaves chooses anew which nodes are kept for its next."""
        lane = self.waiting.pop(task)
        if not isinstance(lane[0], Request) or task < min(self.tasks_of(lane), default=task + 1):
            self.kept.pop(lane, None)

    def tasks_of(self, lane: Lane) -> list[TaskId]:
        return [task for task, own in self.waiting.items() if own == lane]

    def reference(
        self, sites: dict[NodeName, Site]
    ) -> tuple[list[tuple[int, str]], dict[NodeName, TaskId]]:
        """Place by asking every shape about every node at its turn."""
        placed, held = list[tuple[int, str]](), dict[NodeName, TaskId]()
        holds = dict[NodeName, Hold]()
        turns = copy.deepcopy(self.queue.backlog._turns)
        waiting = dict(self.waiting)
        blocked = set[Lane]()
        while left := {lane for lane in waiting.values() if lane not in blocked}:
            heads = {lane: min(t for t, own in waiting.items() if own == lane) for lane in left}
            lane = min(left, key=lambda lane: (-lane[2], turns.of(lane[1]), heads[lane]))
            shape, owner, _ = lane
            seats = self.find(lane, heads[lane], sites, holds)
            for seat in seats:
                sites[seat.node].books.enter(seat.task, seat.claim)
                placed.append((int(seat.task), str(seat.node)))
                del waiting[seat.task]
            if seats:
                gang = () if isinstance(shape, Request) else shape
                cost = cost_of(shape) if isinstance(shape, Request) else 0.0
                turns.take(owner, cost or sum(cost_of(request) for _, request in gang))
                self.kept.pop(lane, None)
                if owner not in {own[1] for own in waiting.values()}:
                    turns.leave(owner)
                continue
            blocked.add(lane)
            self.kept[lane] = self.keep(lane, sites, holds)
            for name in self.kept[lane]:
                held[name] = heads[lane]
                request = shape if isinstance(shape, Request) else None
                holds[name] = Hold(name, heads[lane], request)
        return placed, held

    def find(
        self,
        lane: Lane,
        head: TaskId,
        sites: dict[NodeName, Site],
        holds: dict[NodeName, Hold],
    ) -> list[Seat]:
        shape = lane[0]
        if not isinstance(shape, Request):
            return seat_gang(shape, sites, holds, self.kept.get(lane, [])) or []
        able = [
            site
            for site in candidates(shape, sites)
            if can_take(shape, site)
            and (
                site.name not in holds
                or holds[site.name].lets_pass(shape, site.books, self.queue.now, self.queue.ends_at)
            )
        ]
        best = min(able, key=lambda site: rank(shape, site), default=None)
        return [] if best is None else [Seat(head, best.name, choose_claim(shape, best.books))]

    def keep(
        self, lane: Lane, sites: dict[NodeName, Site], holds: dict[NodeName, Hold]
    ) -> list[NodeName]:
        shape = lane[0]
        before = self.kept.get(lane, [])
        if isinstance(shape, Request):
            kept = choose_held(
                shape, candidates(shape, sites), holds, before[0] if before else None
            )
            return [] if kept is None else [kept.name]
        still_good = before and all(name not in holds and not sites[name].closed for name in before)
        return before if still_good else plan_gang(shape, sites, holds) or []


TestAgainstTheRule = Against.TestCase
TestAgainstTheRule.settings = settings(
    max_examples=200, stateful_step_count=20, deadline=None, phases=[Phase.generate, Phase.shrink]
)


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
