"""``kohaku environment pull``: who is told, and when it has arrived."""

from __future__ import annotations

import json

from protocol.errors import Conflict
from protocol.ids import NodeName
from protocol.messages.cluster import Update
from protocol.messages.environment import EnvironmentResult, PullEnvironment, Pulling
from protocol.methods import ENVIRONMENT_PULL, ENVIRONMENT_SHOW
from protocol.models.environment import Environment, ImageReading, Version
from protocol.models.node import Node, NodeState, Readings
from tests.kohaku_tui.cli.conftest import Kohaku
from tests.kohaku_tui.cli.scripted_host import ScriptedHost

VERSION = Version(digest="ab" * 32, size=5, pieces="cd" * 32, image="sha256:x")


def a_node(name: str, *images: ImageReading, state: NodeState = NodeState.ONLINE) -> Node:
    return Node(name=NodeName(name), state=state, readings=Readings(images=images))


def script(host: ScriptedHost, *nodes: str) -> None:
    host.answer(ENVIRONMENT_PULL, Pulling(nodes))
    host.answer(ENVIRONMENT_SHOW, EnvironmentResult(Environment(name="torch", versions=(VERSION,))))


def test_those_who_were_told_are_printed(host: ScriptedHost, kohaku: Kohaku) -> None:
    script(host, "n1", "n2")
    ran = kohaku("environment", "pull", "torch", "n1", "n2")
    assert (ran.status, ran.out, ran.err) == (0, "n1\nn2\n", "")
    assert host.calls == [
        ("environment.pull", PullEnvironment(environment="torch", nodes=("n1", "n2")))
    ]


def test_wait_stays_until_all_have_it(host: ScriptedHost, kohaku: Kohaku) -> None:
    script(host, "n1", "n2")
    there, older = ImageReading(VERSION.digest, present=True), ImageReading("0" * 64, present=True)
    failed_before = ImageReading(VERSION.digest, percent=3, trouble="of yesterday")
    host.updates = [
        Update(start=True, nodes=(a_node("n1", older), a_node("n2", failed_before), a_node("n3"))),
        Update(revision="e.1", ready=True),
        Update(revision="e.2", nodes=(a_node("n1", there),)),
        Update(revision="e.3", nodes=(a_node("n2", ImageReading(VERSION.digest, percent=50)),)),
        Update(revision="e.4", nodes=(a_node("n2", there),)),
    ]
    ran = kohaku("environment", "pull", "torch", "--wait", "--json")
    assert (ran.status, json.loads(ran.out)) == (0, {"nodes": ["n1", "n2"]})


def test_a_node_that_cannot_take_it_ends_with_1_and_its_reason(
    host: ScriptedHost, kohaku: Kohaku
) -> None:
    script(host, "n1", "n2")
    damaged = ImageReading(VERSION.digest, percent=3, trouble="its file is damaged")
    host.updates = [
        Update(start=True, nodes=(a_node("n1"), a_node("n2"))),
        Update(revision="e.1", ready=True),
        Update(revision="e.2", nodes=(a_node("n1", damaged),)),
        Update(revision="e.3", nodes=(a_node("n2", state=NodeState.OFFLINE),)),
    ]
    ran = kohaku("environment", "pull", "torch", "--wait")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.splitlines() == [
        "error: environment torch did not reach 2 of 2 nodes",
        "  n1  its file is damaged",
        "  n2  the node is offline",
    ]


def test_a_refusal_shows_each_node_with_its_reason(host: ScriptedHost, kohaku: Kohaku) -> None:
    reasons = {"reasons": {"n2": ["it has no backend docker"]}}
    host.answer(ENVIRONMENT_PULL, Conflict("1 of 2 nodes cannot take it", details=reasons))
    ran = kohaku("env", "pull", "torch", "n1", "n2")
    assert (ran.status, "  n2  it has no backend docker" in ran.err) == (1, True)
