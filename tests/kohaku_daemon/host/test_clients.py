"""The clients' door: every method of the table by every role, and what is left in the audit log."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from kohaku_daemon.host.handlers.calls import CALLS
from protocol.connection import Connection
from protocol.errors import BadRequest, Forbidden, KohakuError, Unauthenticated, Unsupported
from protocol.messages.hello import Hello, WhoAmI
from protocol.messages.node import LabelNode, MakeJoinToken
from protocol.messages.task import SteerTasks, SubmitTask
from protocol.methods import (
    HELLO,
    METHODS,
    NODE_JOIN_TOKEN,
    NODE_LABEL,
    TASK_KILL,
    TASK_SUBMIT,
    WATCH,
    WHOAMI,
    Door,
    StreamingMethod,
)
from protocol.models.access import Role
from protocol.models.task import TaskSpec
from protocol.version import OLDEST_VERSION, PROTOCOL_VERSION
from tests.support.host import TOKENS, RunningHost, a_token_record, give_tokens, running_host

OF_CLIENTS = [
    method for method in METHODS.values() if method.door is Door.CLIENT and method is not HELLO
]
OF_RUNNERS = [method for method in METHODS.values() if method.door is Door.RUNNER]


def audit_lines(data: Path) -> list[tuple[Any, ...]]:
    """Read the audit log as an admin would."""
    connection = sqlite3.connect(data / "tasks.sqlite")
    try:
        return connection.execute(
            "SELECT actor, role, address, method, subject, outcome FROM audit ORDER BY id"
        ).fetchall()
    finally:
        connection.close()


async def outcome(connection: Connection, name: str, params: Any) -> type[KohakuError] | None:
    """Call with plain values; give the kind of refusal."""
    try:
        await connection.call_raw(name, params)
    except KohakuError as error:
        return type(error)
    return None


def test_every_method_of_clients_has_its_handler() -> None:
    answered = {method for method in OF_CLIENTS if not isinstance(method, StreamingMethod)}
    assert set(CALLS) == answered
    assert [method for method in OF_CLIENTS if isinstance(method, StreamingMethod)] == [WATCH]


@pytest.mark.parametrize("params", [{}, None, "garbage", {"node": 7, "tasks": "x"}])
async def test_a_stranger_is_refused_every_method_whatever_the_parameters(
    host: RunningHost, params: Any
) -> None:
    async with await host.connect(Role.ANONY) as stranger:
        assert stranger.welcome.role is Role.ANONY
        refusals = {
            name: await outcome(stranger, name, params)
            for name in [*(method.name for method in OF_CLIENTS + OF_RUNNERS), "nothing.such"]
        }
    assert refusals == dict.fromkeys(refusals, Unauthenticated)
    assert len(refusals) == 40
    await host.stop()
    assert audit_lines(host.data) == [], "strangers could fill the disk"


async def test_each_role_is_refused_what_is_above_it_and_let_in_to_the_rest(
    host: RunningHost,
) -> None:
    for role in TOKENS:
        async with await host.connect(role) as connection:
            for method in OF_CLIENTS:
                refusal = await outcome(connection, method.name, "garbage")
                may = role.reaches(method.least)
                # Whoever may call it is told what is wrong with the parameters instead.
                assert refusal is (BadRequest if may else Forbidden), (role, method.name)
            identity = await connection.call(WHOAMI, WhoAmI())
            assert (identity.user, identity.role) == (str(role), role)
            assert identity.token == TOKENS[role][:10]


async def test_methods_of_the_other_door_do_not_exist_here(host: RunningHost) -> None:
    async with await host.connect() as admin:
        for method in OF_RUNNERS:
            with pytest.raises(BadRequest, match="there is no method"):
                await admin.call_raw(method.name, {})
        with pytest.raises(BadRequest, match=r"there is no method 'task\.lst'") as caught:
            await admin.call_raw("task.lst", {})
        assert caught.value.hint == "did you mean task.list?"
        with pytest.raises(BadRequest, match="hello was said already"):
            await admin.call(HELLO, Hello(PROTOCOL_VERSION))
        assert (await admin.call(WHOAMI, WhoAmI())).user == "admin"


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("kht_" + "0" * 64, "not known here"),
        ("kht_short", "not an API token"),
        ("khr_" + "0" * 64, "not an API token"),
        ("kht_" + "\u00e9" * 64, "not an API token"),
        ("kht_" + "e" * 64, "the API token kht_eeeeee... has expired"),
    ],
)
async def test_a_wrong_or_expired_token_is_refused_at_hello(
    tmp_path: Path, token: str, told: str
) -> None:
    expired = a_token_record("kht_" + "e" * 64, Role.ADMIN, expires_at=1_800_000.0)
    give_tokens(tmp_path / "data", expired)
    async with running_host(tmp_path / "data") as host:
        with pytest.raises(Unauthenticated, match=told) as caught:
            await Connection.dial(host.url, token=token)
        assert "kohaku login" in caught.value.hint


async def test_another_version_of_the_protocol_is_told_who_has_to_upgrade(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.connection.PROTOCOL_VERSION", OLDEST_VERSION - 1)
    with pytest.raises(Unsupported, match="is not spoken here") as caught:
        await host.connect()
    assert caught.value.hint == "upgrade this program"


async def test_a_call_that_changes_something_leaves_a_line_without_secrets(
    host: RunningHost,
) -> None:
    secret = TaskSpec(command=("login", "hunter2"), env={"PASSWORD": "hunter3"}, name="job")
    async with await host.connect(Role.USER) as user, await host.connect() as admin:
        submitted = await user.call(TASK_SUBMIT, SubmitTask(request_id="request-1", spec=secret))
        (task,) = submitted.ids()
        with pytest.raises(Forbidden):
            await user.call(NODE_LABEL, LabelNode("n1", {"a": "b"}))
        with pytest.raises(BadRequest):
            await admin.call(NODE_JOIN_TOKEN, MakeJoinToken(uses=0, node="n" * 5000))
        made = await admin.call(NODE_JOIN_TOKEN, MakeJoinToken())
        await user.call(TASK_KILL, SteerTasks(tasks=(task,)))
        await admin.call(WHOAMI, WhoAmI())
    await host.stop()
    here = "127.0.0.1"
    lines = audit_lines(host.data)
    assert [line for line in lines if line[-1] != "bad_request"] == [
        ("user", "user", here, "task.submit", "1 x job, request request-1", "ok"),
        ("user", "user", here, "node.label", "", "forbidden"),
        ("admin", "admin", here, "node.join_token", "1 uses for any name", "ok"),
        ("user", "user", here, "task.kill", f"tasks {task}", "ok"),
    ]
    (refused,) = [line for line in lines if line[-1] == "bad_request"]
    assert len(refused[4]) == 1000, "what was not checked yet is cut"
    said = repr(lines)
    assert made.token not in said
    assert "hunter" not in said


async def test_no_token_comes_into_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with running_host(tmp_path / "data") as host:
        async with await host.connect() as admin:
            made = await admin.call(NODE_JOIN_TOKEN, MakeJoinToken())
        with pytest.raises(Unauthenticated):
            await Connection.dial(host.url, token="kht_" + "0" * 64)
    assert "127.0.0.1" in repr([vars(record) for record in caplog.records])
    for token in (made.token, TOKENS[Role.ADMIN], "0" * 64):
        assert token not in repr([vars(record) for record in caplog.records])
