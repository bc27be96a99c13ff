"""One end of a control connection, without IO: messages in, events out, messages out.

Knows: what may be said when: ``hello`` first, call numbers, who waits for which reply, credit,
cancelling, deadlines, keep-alive, closing.
Does not know: sockets, the clock (each ``now`` is seconds of any clock that only goes forward),
what a method means.

Both ends are the same but for one thing: the dialling end says ``hello``, the accepting end
insists on it. ``receive`` never raises for what came: it records why the connection cannot go
on and gives an ``Ended``. After any call of a method, send what ``data_to_send`` gives.
"""

from __future__ import annotations

import heapq
import math
from enum import IntEnum
from typing import Final, Literal

import msgspec

from protocol.errors import KohakuError, TimedOut, Unavailable
from protocol.framing import (
    MAX_GREETING,
    MAX_ID,
    MAX_MESSAGE,
    Call,
    Cancel,
    Credit,
    Frame,
    FrameTooLarge,
    Item,
    Notify,
    ProtocolViolation,
    Reply,
    decode_failure,
    decode_frame,
    encode_call,
    encode_cancel,
    encode_credit,
    encode_failure,
    encode_item,
    encode_notify,
    encode_reply,
)

#: Calls one end may have open at once, streams and cancelled ones included.
MAX_CALLS: Final = 256
#: Seconds a stranger has to say ``hello``.
HELLO_TIMEOUT_S: Final = 5.0
#: Seconds of silence before a ping, until the welcome says otherwise.
KEEP_ALIVE_S: Final = 20.0


class CloseCode(IntEnum):
    """Why a connection was closed, as its WebSocket close code (RFC 6455 section 7.4.2)."""

    #: Nothing is wrong.
    NORMAL = 1000
    #: The host stops; dial again later.
    GOING_AWAY = 1001
    #: Never sent: the connection broke without a close frame.
    BROKEN = 1006
    #: Bytes that are no frame, or a text message.
    BAD_FRAME = 4000
    #: Something else than ``hello`` came first.
    HELLO_EXPECTED = 4001
    #: ``hello`` did not come in time.
    HELLO_TIMEOUT = 4002
    #: ``hello`` was answered with an error.
    REFUSED = 4003
    #: A message above its limit.
    TOO_LARGE = 4004
    #: A number that is in use was used for a new call, or one that is not was answered.
    BAD_NUMBER = 4005
    #: More items than there was credit for.
    NO_CREDIT = 4006
    #: Nothing came for twice the keep-alive time.
    SILENT = 4007
    #: The peer does not read what it asked for.
    SLOW_READER = 4008
    #: Its token was revoked, its node removed, or a newer connection took its place.
    REPLACED = 4009
    #: A bug on the side that closes.
    INTERNAL = 4010


class SessionMisuse(RuntimeError):
    """Our own side asked for what may not be: a bug here, not of the peer."""


class Called(msgspec.Struct, frozen=True):
    """The peer calls. Owes it exactly one ``reply`` or ``fail``."""

    id: int
    method: str
    params: msgspec.Raw


class Answered(msgspec.Struct, frozen=True):
    """Our call went well."""

    id: int
    result: msgspec.Raw


class Failed(msgspec.Struct, frozen=True):
    """Our call did not go well, or its time is up."""

    id: int
    error: KohakuError


class ItemCame(msgspec.Struct, frozen=True):
    """One item of our streaming call."""

    id: int
    item: msgspec.Raw


class CreditCame(msgspec.Struct, frozen=True):
    """The peer takes more items of its call: ``credit`` in all."""

    id: int
    credit: int


class CancelAsked(msgspec.Struct, frozen=True):
    """The peer wants no more of its call. The reply is still owed."""

    id: int


class Notified(msgspec.Struct, frozen=True):
    """The peer says something that asks for nothing. Unknown ones are ignored."""

    method: str
    params: msgspec.Raw


class Ended(msgspec.Struct, frozen=True):
    """The connection cannot go on: send what is left, then close it with this code."""

    code: int
    reason: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.code})"


SessionEvent = Called | Answered | Failed | ItemCame | CreditCame | CancelAsked | Notified | Ended


class _OwnCall(msgspec.Struct):
    """A call of ours that has no reply yet."""

    method: str
    #: Items the peer may still send.
    credit: int = 0
    #: Nobody waits for it any more; its number is not free until the reply has come.
    abandoned: bool = False


class Session:
    """One end of a control connection."""

    def __init__(
        self,
        side: Literal["accepting", "dialling"],
        now: float,
        *,
        keep_alive_s: float = KEEP_ALIVE_S,
        hello_timeout_s: float = HELLO_TIMEOUT_S,
        max_calls: int = MAX_CALLS,
    ) -> None:
        self._accepting = side == "accepting"
        self._greeted = False
        self._hello: int | None = None
        self._hello_before = now + hello_timeout_s
        self._keep_alive_s = keep_alive_s
        self._max_calls = max_calls
        self._heard_at = now
        self._pinged_at: float | None = None
        self._number = 0
        self._own: dict[int, _OwnCall] = {}
        #: Credit of each call of the peer that has no reply yet.
        self._theirs: dict[int, int] = {}
        self._deadlines: list[tuple[float, int, _OwnCall]] = []
        self._unsent: list[bytes] = []
        self._ended: Ended | None = None

    def __repr__(self) -> str:
        side = "accepting" if self._accepting else "dialling"
        state = f"ended: {self._ended}" if self._ended else "open" if self._greeted else "new"
        return f"<Session {side} {state}, own {len(self._own)}, theirs {len(self._theirs)}>"

    @property
    def is_open(self) -> bool:
        """Say whether ``hello`` was answered well and the end has not come."""
        return self._greeted and self._ended is None

    @property
    def ended(self) -> Ended | None:
        """Why it cannot go on; None while it can."""
        return self._ended

    def set_keep_alive(self, keep_alive_s: float) -> None:
        """Take the time that the welcome named."""
        self._keep_alive_s = keep_alive_s

    # -- What comes in ----------------------------------------------------------------

    def receive(self, data: bytes, now: float) -> list[SessionEvent]:
        """Take one binary message of the peer."""
        if self._ended is not None:
            return []
        self._heard_at = now
        self._pinged_at = None
        try:
            frame = decode_frame(data, MAX_MESSAGE if self._greeted else MAX_GREETING)
            if not self._greeted and not self._may_greet(frame):
                return [self.end(CloseCode.HELLO_EXPECTED, "the first call must be hello")]
            event = self._take(frame)
        except FrameTooLarge as reason:
            return [self.end(CloseCode.TOO_LARGE, str(reason))]
        except ProtocolViolation as reason:
            return [self.end(CloseCode.BAD_FRAME, str(reason))]
        return [] if event is None else [event]

    def receive_text(self) -> list[SessionEvent]:
        """Take note that the peer sent a text message, which nobody may."""
        return [self.end(CloseCode.BAD_FRAME, "a text message; only binary ones are spoken here")]

    def tick(self, now: float) -> list[SessionEvent]:
        """Do what is due by now."""
        if self._ended is not None:
            return []
        if not self._greeted and self._accepting and now >= self._hello_before:
            return [self.end(CloseCode.HELLO_TIMEOUT, "no hello in time")]
        return [*self._expire_calls(now), *self._keep_alive(now)]

    def next_deadline(self) -> float:
        """Give the time when ``tick`` is due. Moves when something is sent or received."""
        while self._deadlines and not self._is_awaited(self._deadlines[0]):
            heapq.heappop(self._deadlines)
        answer_due = self._deadlines[0][0] if self._deadlines else math.inf
        return min(self._silence_due(), answer_due)

    # -- What goes out ----------------------------------------------------------------

    def data_to_send(self) -> list[bytes]:
        """Take the binary messages to send, in order."""
        unsent, self._unsent = self._unsent, []
        return unsent

    def call(
        self, method: str, params: object, now: float, *, timeout_s: float | None, credit: int = 0
    ) -> int:
        """Call the peer and give the call's number.

        ``credit`` items may come at once, for a streaming method; ``timeout_s`` None waits
        for as long as the connection lasts.

        Raises:
            Unavailable: The connection has ended, or too many calls are open.
            BadRequest, TooLarge: The parameters cannot be sent.
        """
        if self._ended is not None:
            raise Unavailable(f"the connection is closed: {self._ended.reason}")
        if not self._greeted and (self._accepting or self._hello is not None or method != "hello"):
            raise SessionMisuse(f"{method} before hello was answered")
        if len(self._own) >= self._max_calls:
            raise Unavailable(f"{self._max_calls} calls are open on this connection already")
        number = self._free_number()
        self._unsent.append(encode_call(number, method, params))
        own = self._own[number] = _OwnCall(method)
        if not self._greeted:
            self._hello = number
        if credit:
            self.grant(number, credit)
        if timeout_s is not None:
            heapq.heappush(self._deadlines, (now + timeout_s, number, own))
        return number

    def reply(self, number: int, result: object) -> None:
        """Answer a call of the peer.

        Raises:
            TooLarge, BadRequest: The result cannot be sent; the reply is still owed.
        """
        if self._owes(number):
            self._unsent.append(encode_reply(number, result))
            del self._theirs[number]
            if number == self._hello and self._accepting:
                self._greeted, self._hello = True, None

    def fail(self, number: int, error: KohakuError) -> None:
        """Answer a call of the peer with an error."""
        if self._owes(number):
            self._unsent.append(encode_failure(number, error))
            del self._theirs[number]
            if number == self._hello and self._accepting:
                self.end(CloseCode.REFUSED, "hello was refused")

    def notify(self, method: str, params: object = None) -> None:
        """Say something that asks for nothing."""
        if self._ended is None:
            self._unsent.append(encode_notify(method, params))

    def send_item(self, number: int, item: object) -> None:
        """Send one item of a call of the peer.

        Raises:
            TooLarge, BadRequest: The item cannot be sent; the credit is not used.
        """
        if not self._owes(number):
            return
        if self._theirs[number] == 0:
            raise SessionMisuse(f"no credit for an item of call {number}")
        self._unsent.append(encode_item(number, item))
        self._theirs[number] -= 1

    def credit_of(self, number: int) -> int:
        """Give how many items of a call of the peer may be sent now."""
        return self._theirs.get(number, 0)

    def grant(self, number: int, n: int) -> None:
        """Let the peer send n more items of our call. Does nothing once the reply has come."""
        own = self._own.get(number)
        if own is None or own.abandoned or self._ended is not None:
            return
        own.credit += n
        self._unsent.append(encode_credit(number, n))

    def cancel(self, number: int) -> None:
        """Want no more of our call. What still comes of it is passed over."""
        own = self._own.get(number)
        if own is None or own.abandoned or self._ended is not None:
            return
        own.abandoned = True
        self._unsent.append(encode_cancel(number))

    def end(self, code: int, reason: str) -> Ended:
        """End the session, by our own will or because the connection is gone."""
        if self._ended is None:
            self._ended = Ended(code, reason)
            self._own.clear()
            self._theirs.clear()
            self._deadlines.clear()
        return self._ended

    # -- Inside -----------------------------------------------------------------------

    def _may_greet(self, frame: Frame) -> bool:
        """Say whether a frame has its place before ``hello`` was answered."""
        if isinstance(frame, Notify):
            return frame.method in ("ping", "pong")
        if self._accepting:
            return isinstance(frame, Call) and frame.method == "hello" and self._hello is None
        return isinstance(frame, Reply) and frame.id == self._hello

    def _take(self, frame: Frame) -> SessionEvent | None:
        match frame:
            case Call():
                return self._take_call(frame)
            case Reply():
                return self._take_reply(frame)
            case Item():
                return self._take_item(frame)
            case Credit(id=number, n=n):
                if number not in self._theirs:
                    return None  # it crossed our reply
                self._theirs[number] += n
                return CreditCame(number, self._theirs[number])
            case Cancel(id=number):
                return CancelAsked(number) if number in self._theirs else None
            case Notify():
                return self._take_notify(frame)

    def _take_call(self, frame: Call) -> SessionEvent | None:
        number = frame.id
        if number in self._theirs:
            return self.end(CloseCode.BAD_NUMBER, f"call {number} is in use")
        if len(self._theirs) >= self._max_calls:
            self._unsent.append(encode_failure(number, _too_many(self._max_calls)))
            return None
        self._theirs[number] = 0
        if not self._greeted:
            self._hello = number
        return Called(number, frame.method, frame.params)

    def _take_reply(self, frame: Reply) -> SessionEvent | None:
        own = self._own.pop(frame.id, None)
        if own is None:
            return self.end(CloseCode.BAD_NUMBER, f"an answer to call {frame.id}, never made")
        error = decode_failure(frame.error)
        if frame.id == self._hello and not self._accepting:
            self._hello = None
            self._greeted = error is None
        if own.abandoned:
            return None
        return Answered(frame.id, frame.result) if error is None else Failed(frame.id, error)

    def _take_item(self, frame: Item) -> SessionEvent | None:
        own = self._own.get(frame.id)
        if own is None:
            return self.end(CloseCode.BAD_NUMBER, f"an item of call {frame.id}, which is not open")
        if own.credit == 0:
            return self.end(CloseCode.NO_CREDIT, f"more items of {own.method} than credit")
        own.credit -= 1
        return None if own.abandoned else ItemCame(frame.id, frame.item)

    def _take_notify(self, frame: Notify) -> SessionEvent | None:
        if frame.method == "ping":
            self._unsent.append(encode_notify("pong"))
            return None
        return None if frame.method == "pong" else Notified(frame.method, frame.params)

    def _owes(self, number: int) -> bool:
        """Say whether a reply can still be given; after the end nobody is there to take it."""
        if self._ended is not None:
            return False
        if number not in self._theirs:
            raise SessionMisuse(f"call {number} was answered already, or never made")
        return True

    def _free_number(self) -> int:
        while True:
            self._number = self._number + 1 if self._number < MAX_ID else 0
            if self._number not in self._own:
                return self._number

    def _silence_due(self) -> float:
        if self._greeted:
            since = self._heard_at if self._pinged_at is None else self._pinged_at
            return since + self._keep_alive_s
        return self._hello_before if self._accepting else math.inf

    def _is_awaited(self, entry: tuple[float, int, _OwnCall]) -> bool:
        # Numbers come round again: the call is the same only if the object is.
        return self._own.get(entry[1]) is entry[2] and not entry[2].abandoned

    def _expire_calls(self, now: float) -> list[SessionEvent]:
        expired: list[SessionEvent] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heapq.heappop(self._deadlines)
            if self._is_awaited(entry):
                _, number, own = entry
                self.cancel(number)
                expired.append(Failed(number, TimedOut(f"no answer to {own.method} in time")))
        return expired

    def _keep_alive(self, now: float) -> list[SessionEvent]:
        if not self._greeted or now < self._heard_at + self._keep_alive_s:
            return []
        if self._pinged_at is None:
            # Counted from the ping, not from the last message: a process that slept must
            # first hear whether the peer is there.
            self._pinged_at = now
            self._unsent.append(encode_notify("ping"))
        elif now >= self._pinged_at + self._keep_alive_s:
            silence_s = now - self._heard_at
            return [self.end(CloseCode.SILENT, f"nothing heard for {silence_s:.0f} s")]
        return []


def _too_many(limit: int) -> KohakuError:
    return Unavailable(
        f"{limit} calls are open on this connection already",
        hint="wait for some answers, or open another connection",
    )
