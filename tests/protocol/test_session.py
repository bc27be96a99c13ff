"""What two ends may say to each other and when, in bytes and without IO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from protocol.errors import NotFound, TimedOut, TooLarge, Unavailable
from protocol.framing import MAX_GREETING, MAX_ID, MAX_MESSAGE
from protocol.session import (
    Answered,
    Called,
    CancelAsked,
    CloseCode,
    CreditCame,
    Ended,
    Failed,
    ItemCame,
    Notified,
    Session,
    SessionEvent,
    SessionMisuse,
)


def pack(*frame: object) -> bytes:
    return bytes(msgpack.packb(list(frame)))


def raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgpack.packb(value))


def said(session: Session) -> list[Any]:
    return [msgpack.unpackb(data) for data in session.data_to_send()]


def host(**options: Any) -> Session:
    """An accepting end that has answered hello."""
    session = Session("accepting", 0.0, **options)
    session.receive(pack(0, 1, "hello", {}), 0.0)
    session.reply(1, {"version": 1})
    session.data_to_send()
    return session


def client(**options: Any) -> Session:
    """A dialling end that was welcomed; hello was call 1."""
    session = Session("dialling", 0.0, **options)
    session.call("hello", {}, 0.0, timeout_s=10)
    session.data_to_send()
    session.receive(pack(1, 1, None, {"version": 1}), 0.0)
    return session


def ended(events: list[SessionEvent]) -> int | None:
    """Close code that the events ask for; None if they do not."""
    return events[-1].code if events and isinstance(events[-1], Ended) else None


# -- Hello ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        pack(0, 1, "task.list", {}),
        pack(1, 1, None, None),
        pack(2, "news", None),
        pack(3, 1, None),
        pack(4, 1, 1),
        pack(5, 1),
    ],
)
def test_anything_before_hello_closes(first: bytes) -> None:
    session = Session("accepting", 0.0)
    assert ended(session.receive(first, 0.0)) == CloseCode.HELLO_EXPECTED


def test_anything_between_hello_and_its_answer_closes() -> None:
    session = Session("accepting", 0.0)
    assert session.receive(pack(0, 9, "hello", {}), 0.0) == [Called(9, "hello", raw({}))]
    assert ended(session.receive(pack(0, 10, "hello", {}), 0.0)) == CloseCode.HELLO_EXPECTED


def test_hello_is_answered_and_then_all_is_open() -> None:
    session = Session("accepting", 0.0)
    session.receive(pack(0, 9, "hello", {}), 0.0)
    assert not session.is_open
    session.reply(9, {"version": 1})
    assert session.is_open
    assert said(session) == [[1, 9, None, {"version": 1}]]
    assert session.receive(pack(0, 10, "whoami", {}), 0.0) == [Called(10, "whoami", raw({}))]


def test_a_refused_hello_is_answered_before_the_end() -> None:
    session = Session("accepting", 0.0)
    session.receive(pack(0, 9, "hello", {}), 0.0)
    session.fail(9, NotFound("nobody"))
    assert said(session) == [[1, 9, {"code": "not_found", "message": "nobody"}, None]]
    assert session.ended is not None
    assert session.ended.code == CloseCode.REFUSED


def test_a_stranger_has_little_time_and_little_room() -> None:
    session = Session("accepting", 100.0, hello_timeout_s=5)
    assert session.next_deadline() == 105.0
    assert session.tick(104.9) == []
    assert ended(session.tick(105.0)) == CloseCode.HELLO_TIMEOUT

    session = Session("accepting", 0.0)
    assert ended(session.receive(bytes(MAX_GREETING + 1), 0.0)) == CloseCode.TOO_LARGE


def test_the_dialling_end_says_hello_and_nothing_else_first() -> None:
    session = Session("dialling", 0.0)
    with pytest.raises(SessionMisuse):
        session.call("task.list", {}, 0.0, timeout_s=1)
    session.call("hello", {}, 0.0, timeout_s=1)
    with pytest.raises(SessionMisuse):
        session.call("hello", {}, 0.0, timeout_s=1)
    assert ended(session.receive(pack(2, "news", {}), 0.0)) == CloseCode.HELLO_EXPECTED


def test_the_dialling_end_learns_that_it_was_refused() -> None:
    session = Session("dialling", 0.0)
    number = session.call("hello", {}, 0.0, timeout_s=1)
    (event,) = session.receive(
        pack(1, number, {"code": "not_found", "message": "nobody"}, None), 0.0
    )
    assert isinstance(event, Failed)
    assert isinstance(event.error, NotFound)
    assert not session.is_open


# -- A bad peer -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", CloseCode.BAD_FRAME),
        (b"GET / HTTP/1.1\r\n", CloseCode.BAD_FRAME),
        (bytes(MAX_MESSAGE + 1), CloseCode.TOO_LARGE),
        (pack(1, 77, None, None), CloseCode.BAD_NUMBER),
        (pack(3, 77, None), CloseCode.BAD_NUMBER),
    ],
)
def test_what_no_peer_may_send_ends_the_session(data: bytes, code: CloseCode) -> None:
    session = client()
    assert ended(session.receive(data, 1.0)) == code
    assert session.receive(pack(2, "news", {}), 1.0) == []
    assert session.tick(1000.0) == []
    with pytest.raises(Unavailable):
        session.call("task.list", {}, 1.0, timeout_s=1)


def test_a_text_message_ends_the_session() -> None:
    assert ended(client().receive_text()) == CloseCode.BAD_FRAME


def test_a_number_in_use_is_no_number_for_a_new_call() -> None:
    session = host()
    session.receive(pack(0, 5, "whoami", {}), 0.0)
    assert ended(session.receive(pack(0, 5, "whoami", {}), 0.0)) == CloseCode.BAD_NUMBER


def test_a_number_is_free_again_once_answered() -> None:
    session = host()
    for _ in range(3):
        assert session.receive(pack(0, 5, "whoami", {}), 0.0) == [Called(5, "whoami", raw({}))]
        session.reply(5, {})


def test_more_items_than_credit_end_the_session() -> None:
    session = client()
    number = session.call("watch", {}, 0.0, timeout_s=None, credit=2)
    assert session.receive(pack(3, number, "a"), 0.0) == [ItemCame(number, raw("a"))]
    assert session.receive(pack(3, number, "b"), 0.0) == [ItemCame(number, raw("b"))]
    assert ended(session.receive(pack(3, number, "c"), 0.0)) == CloseCode.NO_CREDIT


def test_an_error_that_is_none_ends_the_session() -> None:
    session = client()
    number = session.call("whoami", {}, 0.0, timeout_s=1)
    assert ended(session.receive(pack(1, number, "no", None), 0.0)) == CloseCode.BAD_FRAME


def test_too_many_calls_at_once_are_refused_one_by_one() -> None:
    session = host(max_calls=2)
    for number in (5, 6):
        session.receive(pack(0, number, "task.wait", {}), 0.0)
    assert session.receive(pack(0, 7, "task.wait", {}), 0.0) == []
    ((kind, number, error, _),) = said(session)
    assert (kind, number, error["code"]) == (1, 7, "unavailable")
    session.reply(5, {})
    assert session.receive(pack(0, 7, "task.wait", {}), 0.0) == [Called(7, "task.wait", raw({}))]


# -- Races that are no errors ---------------------------------------------------------


def test_what_comes_after_a_cancel_is_passed_over() -> None:
    session = client()
    number = session.call("watch", {}, 0.0, timeout_s=None, credit=2)
    session.cancel(number)
    session.cancel(number)
    assert said(session) == [[0, number, "watch", {}], [4, number, 2], [5, number]]
    assert session.receive(pack(3, number, "late"), 0.0) == []
    assert session.receive(pack(1, number, None, "late"), 0.0) == []
    assert session.is_open


def test_credit_and_cancel_that_crossed_the_reply_are_passed_over() -> None:
    session = host()
    session.receive(pack(0, 5, "watch", {}), 0.0)
    session.reply(5, {})
    assert session.receive(pack(4, 5, 3), 0.0) == []
    assert session.receive(pack(5, 5), 0.0) == []
    assert session.is_open


def test_unknown_notifies_are_handed_on_and_harmless() -> None:
    session = host()
    assert session.receive(pack(2, "later.version", [1]), 0.0) == [
        Notified("later.version", raw([1]))
    ]
    assert session.is_open


# -- Calls of our own -----------------------------------------------------------------


def test_an_answer_finds_its_call() -> None:
    session = client()
    first = session.call("whoami", {}, 0.0, timeout_s=5)
    second = session.call("cluster.status", {"x": 1}, 0.0, timeout_s=5)
    assert said(session) == [[0, first, "whoami", {}], [0, second, "cluster.status", {"x": 1}]]
    assert session.receive(pack(1, second, None, "s"), 0.0) == [Answered(second, raw("s"))]
    assert session.receive(pack(1, first, None, "f"), 0.0) == [Answered(first, raw("f"))]


def test_a_call_without_answer_fails_in_time_and_is_cancelled() -> None:
    session = client()
    slow = session.call("task.wait", {}, 0.0, timeout_s=9)
    quick = session.call("task.list", {}, 0.0, timeout_s=3)
    assert session.next_deadline() == 3.0
    session.data_to_send()
    (event,) = session.tick(3.0)
    assert isinstance(event, Failed)
    assert event.id == quick
    assert isinstance(event.error, TimedOut)
    assert "task.list" in event.error.message
    assert said(session) == [[5, quick]]
    assert session.next_deadline() == 9.0
    assert session.receive(pack(1, quick, None, "late"), 4.0) == []
    assert session.receive(pack(1, slow, None, "x"), 4.0) == [Answered(slow, raw("x"))]
    assert session.tick(10.0) == []


def test_a_number_is_not_given_twice_while_it_is_in_use() -> None:
    session = client(max_calls=3)
    session._number = MAX_ID - 1
    numbers = [session.call("task.wait", {}, 0.0, timeout_s=None) for _ in range(3)]
    assert numbers == [MAX_ID, 0, 1]
    with pytest.raises(Unavailable, match="3 calls"):
        session.call("task.wait", {}, 0.0, timeout_s=None)
    session._number = MAX_ID - 1
    session.receive(pack(1, 0, None, None), 0.0)
    assert session.call("task.wait", {}, 0.0, timeout_s=None) == 0


def test_a_deadline_is_of_the_call_and_not_of_its_number() -> None:
    session = client()
    number = session.call("task.list", {}, 0.0, timeout_s=3)
    session.receive(pack(1, number, None, None), 0.0)
    session._number = number - 1
    assert session.call("task.list", {}, 0.0, timeout_s=8) == number
    assert session.tick(3.0) == []


# -- Calls of the peer ----------------------------------------------------------------


def test_items_need_credit() -> None:
    session = host()
    session.receive(pack(0, 5, "watch", {}), 0.0)
    with pytest.raises(SessionMisuse, match="no credit"):
        session.send_item(5, "a")
    assert session.receive(pack(4, 5, 1), 0.0) == [CreditCame(5, 1)]
    assert session.receive(pack(4, 5, 1), 0.0) == [CreditCame(5, 2)]
    session.send_item(5, "a")
    session.send_item(5, "b")
    with pytest.raises(SessionMisuse, match="no credit"):
        session.send_item(5, "c")
    session.reply(5, {})
    assert said(session) == [[3, 5, "a"], [3, 5, "b"], [1, 5, None, {}]]


def test_a_cancel_is_handed_on_and_the_reply_is_still_owed() -> None:
    session = host()
    session.receive(pack(0, 5, "watch", {}), 0.0)
    assert session.receive(pack(5, 5), 0.0) == [CancelAsked(5)]
    session.fail(5, Unavailable("cancelled"))
    assert said(session) == [[1, 5, {"code": "unavailable", "message": "cancelled"}, None]]


def test_one_reply_and_no_more() -> None:
    session = host()
    session.receive(pack(0, 5, "whoami", {}), 0.0)
    session.reply(5, {})
    with pytest.raises(SessionMisuse):
        session.reply(5, {})
    with pytest.raises(SessionMisuse):
        session.fail(5, NotFound("x"))
    with pytest.raises(SessionMisuse):
        session.send_item(5, "x")


def test_an_answer_that_is_too_large_leaves_the_reply_owed() -> None:
    session = host()
    session.receive(pack(0, 5, "task.list", {}), 0.0)
    with pytest.raises(TooLarge):
        session.reply(5, bytes(MAX_MESSAGE))
    session.fail(5, TooLarge("too much"))
    ((_, number, error, _),) = said(session)
    assert (number, error["code"]) == (5, "too_large")


def test_after_the_end_answers_go_nowhere_and_harm_nobody() -> None:
    session = host()
    session.receive(pack(0, 5, "watch", {}), 0.0)
    session.end(CloseCode.GOING_AWAY, "stopping")
    session.reply(5, {})
    session.fail(5, NotFound("x"))
    session.send_item(5, "x")
    session.notify("x")
    assert session.data_to_send() == []
    assert session.end(CloseCode.NORMAL, "again").code == CloseCode.GOING_AWAY


# -- Keep-alive -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [host, client])
def test_a_silent_peer_is_pinged_and_then_given_up(make: Callable[..., Session]) -> None:
    session = make(keep_alive_s=20.0)
    assert session.next_deadline() == 20.0
    assert session.tick(19.9) == []
    assert session.tick(20.0) == []
    assert said(session) == [[2, "ping", None]]
    assert session.next_deadline() == 40.0
    assert session.tick(39.9) == []
    assert session.data_to_send() == []
    assert ended(session.tick(40.0)) == CloseCode.SILENT


def test_any_message_is_a_sign_of_life() -> None:
    session = host(keep_alive_s=20.0)
    session.tick(20.0)
    session.receive(pack(2, "pong", None), 30.0)
    assert session.next_deadline() == 50.0
    assert session.tick(40.0) == []
    assert said(session) == [[2, "ping", None]]


def test_a_ping_is_answered_even_before_hello() -> None:
    session = Session("accepting", 0.0)
    assert session.receive(pack(2, "ping", None), 0.0) == []
    assert said(session) == [[2, "pong", None]]


def test_who_slept_asks_before_it_gives_up() -> None:
    session = client(keep_alive_s=20.0)
    assert session.tick(1000.0) == []
    assert said(session) == [[2, "ping", None]]
    assert session.next_deadline() == 1020.0


# -- Both ends together ---------------------------------------------------------------


class Pair(RuleBasedStateMachine):
    """Two joined sessions whose messages wait in two queues, delivered when it pleases.

    What the ends do is drawn at random; what must hold: nobody accuses the other, no item
    exceeds the credit, each call gets exactly one end, and an answer is its own call's.
    """

    calls = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ends = {"a": Session("dialling", 0.0), "b": Session("accepting", 0.0)}
        self.on_way: dict[str, list[bytes]] = {"a": [], "b": []}
        #: What each end has to answer, and what it was told of its own calls.
        self.owed: dict[str, dict[int, str]] = {"a": {}, "b": {}}
        self.open: dict[str, dict[int, str]] = {"a": {}, "b": {}}
        self.granted: dict[tuple[str, int], int] = {}
        self.serial = 0
        self.ends["a"].call("hello", {}, 0.0, timeout_s=None)
        self.open["a"][1] = "hello"
        self.settle()
        self.ends["b"].reply(1, "hello")
        del self.owed["b"][1]
        self.settle()

    def settle(self) -> None:
        for _ in range(3):
            for end in ("a", "b"):
                self.collect()
                while self.on_way[end]:
                    self.deliver(end)

    def collect(self) -> None:
        for end, other in (("a", "b"), ("b", "a")):
            self.on_way[other] += self.ends[end].data_to_send()

    def deliver(self, end: str) -> None:
        for event in self.ends[end].receive(self.on_way[end].pop(0), self.now):
            self.see(end, event)

    def see(self, end: str, event: SessionEvent) -> None:
        match event:
            case Called(id=number, params=params):
                assert number not in self.owed[end]
                name = "hello" if event.method == "hello" else msgspec.msgpack.decode(params)
                self.owed[end][number] = name
            case Answered(id=number, result=result):
                assert msgspec.msgpack.decode(result) == self.open[end].pop(number)
            case Failed(id=number):
                del self.open[end][number]
            case ItemCame(id=number, item=item):
                assert msgspec.msgpack.decode(item) == self.open[end][number]
                self.granted[end, number] -= 1
                assert self.granted[end, number] >= 0
            case CreditCame() | CancelAsked():
                assert event.id in self.owed[end]
            case _:
                raise AssertionError(f"{end} saw {event}")

    @rule(target=calls, end=st.sampled_from("ab"), credit=st.integers(0, 3))
    def call(self, end: str, credit: int) -> tuple[str, int]:
        self.serial += 1
        name = f"call {self.serial}"
        try:
            number = self.ends[end].call("x", name, self.now, timeout_s=5, credit=credit)
        except Unavailable:
            return end, -1
        self.open[end][number] = name
        self.granted[end, number] = credit
        return end, number

    @rule(call=calls, n=st.integers(1, 3))
    def grant(self, call: tuple[str, int], n: int) -> None:
        end, number = call
        if number in self.open[end]:
            self.granted[end, number] += n
            self.ends[end].grant(number, n)

    @rule(call=consumes(calls))
    def cancel(self, call: tuple[str, int]) -> None:
        end, number = call
        if self.open[end].pop(number, None) is not None:
            self.ends[end].cancel(number)

    @rule(end=st.sampled_from("ab"), data=st.data())
    def answer(self, end: str, data: st.DataObject) -> None:
        if self.owed[end]:
            number = data.draw(st.sampled_from(sorted(self.owed[end])))
            name = self.owed[end].pop(number)
            if data.draw(st.booleans()):
                self.ends[end].reply(number, name)
            else:
                self.ends[end].fail(number, NotFound(name))

    @rule(end=st.sampled_from("ab"), data=st.data())
    def send_items(self, end: str, data: st.DataObject) -> None:
        session = self.ends[end]
        for number in sorted(self.owed[end]):
            for _ in range(data.draw(st.integers(0, session.credit_of(number)))):
                session.send_item(number, self.owed[end][number])

    @rule(end=st.sampled_from("ab"), most=st.integers(1, 5))
    def move(self, end: str, most: int) -> None:
        self.collect()
        for _ in range(min(most, len(self.on_way[end]))):
            self.deliver(end)

    @rule(seconds=st.floats(0.1, 9.0))
    def wait(self, seconds: float) -> None:
        self.settle()  # so that no end is silent for long
        self.now += seconds
        for end, session in self.ends.items():
            for event in session.tick(self.now):
                self.see(end, event)
        self.settle()

    @invariant()
    def nobody_accuses_the_other(self) -> None:
        assert all(session.is_open for session in self.ends.values())

    def teardown(self) -> None:
        """All that is owed gets answered, and then no call is left open."""
        self.settle()
        for end, session in self.ends.items():
            for number, name in self.owed[end].items():
                session.reply(number, name)
            self.owed[end].clear()
        self.settle()
        assert self.open == {"a": {}, "b": {}}
        for session in self.ends.values():
            assert not session._own
            assert not session._theirs


TestPair = Pair.TestCase
TestPair.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
