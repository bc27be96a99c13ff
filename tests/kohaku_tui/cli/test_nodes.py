"""Steering nodes, and letting new ones in."""

from __future__ import annotations

import json

import pytest

from protocol.ids import NodeName
from protocol.messages.node import JoinToken, LabelNode, MakeJoinToken, NodeResult, RemoveNode
from protocol.methods import (
    NODE_DRAIN,
    NODE_JOIN_TOKEN,
    NODE_LABEL,
    NODE_REMOVE,
    NODE_UNDRAIN,
)
from protocol.models.node import Node, NodeState
from tests.kohaku_tui.cli.conftest import Kohaku
from tests.kohaku_tui.cli.scripted_host import ScriptedHost

NODE = Node(name=NodeName("node1"), state=NodeState.ONLINE, draining=True, labels={"gpu": "a100"})


@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_several_nodes_are_drained_at_once(host: ScriptedHost, kohaku: Kohaku, verb: str) -> None:
    method = NODE_DRAIN if verb == "drain" else NODE_UNDRAIN
    host.answer(method, NodeResult(NODE))
    ran = kohaku("node", verb, "node1", "node2")
    assert [asked.node for asked in host.asked(method)] == ["node1", "node2"]
    assert ran.out.splitlines()[0] == "node1  online, draining  0 on it"
    assert len(json.loads(kohaku("node", verb, "node1", "--json").out)["nodes"]) == 1


def test_labels_are_set_and_unset(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(NODE_LABEL, NodeResult(NODE))
    ran = kohaku("node", "label", "node1", "gpu=a100", "rack=", "--unset", "old")
    assert ran.out == "node1  gpu=a100\n"
    assert host.asked(NODE_LABEL) == [LabelNode("node1", {"gpu": "a100", "rack": ""}, ("old",))]
    assert kohaku("node", "label", "node1").status == 2
    assert kohaku("node", "label", "node1", "gpu").status == 2


def test_a_node_is_not_removed_without_a_yes(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(NODE_REMOVE, NodeResult(NODE))
    ran = kohaku("node", "remove", "node1")
    assert ran.status == 2
    assert "--yes" in ran.err
    assert host.calls == []
    assert kohaku("node", "remove", "node1", "--yes", "--force").status == 0
    assert host.asked(NODE_REMOVE) == [RemoveNode("node1", force=True)]
    assert json.loads(kohaku("node", "remove", "node1", "-y", "--json").out)["name"] == "node1"


def test_a_join_token_is_printed_alone(host: ScriptedHost, kohaku: Kohaku) -> None:
    host.answer(NODE_JOIN_TOKEN, JoinToken("khj_x", 100.0, 3))
    ran = kohaku("node", "join-token", "--uses", "3", "--lasts", "2h", "--node", "gpu-01")
    assert (ran.out, ran.err) == ("khj_x\n", "")
    assert host.asked(NODE_JOIN_TOKEN) == [MakeJoinToken(uses=3, lasts_s=7200.0, node="gpu-01")]
