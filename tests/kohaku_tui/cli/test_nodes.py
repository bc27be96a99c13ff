"""Steering nodes, and letting new ones in."""

from __future__ import annotations

import json

import pytest

from protocol.errors import KohakuError, NotFound, Unavailable
from protocol.ids import NodeName, TaskId
from protocol.messages.node import (
    JoinToken,
    LabelNode,
    MakeJoinToken,
    NodeResult,
    OneNode,
    RemoveNode,
)
from protocol.methods import (
    NODE_DRAIN,
    NODE_JOIN_TOKEN,
    NODE_LABEL,
    NODE_REMOVE,
    NODE_SHOW,
    NODE_UNDRAIN,
)
from protocol.models.node import (
    Gpu,
    GpuProcess,
    GpuReading,
    Inventory,
    Node,
    NodeState,
    NumaNode,
    Readings,
)
from tests.kohaku_tui.cli.conftest import Kohaku
from tests.kohaku_tui.cli.scripted_host import ScriptedHost

NODE = Node(name=NodeName("node1"), state=NodeState.ONLINE, draining=True, labels={"gpu": "a100"})


MANY_GPUS = Node(
    name=NodeName("node1"),
    state=NodeState.ONLINE,
    inventory=Inventory(
        cores=tuple(range(8)),
        numa=(
            NumaNode(0, (0, 1, 2, 3), 2**30, (10, 21)),
            NumaNode(2, (4, 5, 6, 7), 2**31, (21, 10)),
        ),
        gpus=(
            Gpu(0, "GPU-a", "A100", 2**30, numa=0, divided=True),
            Gpu(100, "MIG-a", "A100 MIG 1g", 2**29, numa=0, parent="GPU-a"),
            Gpu(101, "MIG-b", "A100 MIG 1g", 2**29, numa=0, parent="GPU-a"),
            Gpu(1, "GPU-b", "H100", 2**31, numa=2),
            Gpu(2, "GPU-c", "H100", 2**31),
        ),
    ),
    readings=Readings(
        gpus=(
            GpuReading("GPU-a"),
            GpuReading(
                "MIG-b",
                processes=(
                    GpuProcess(41, "python3", 2**20, TaskId(7)),
                    GpuProcess(42, "x\x1b[31m"),
                ),
                processes_left_out=3,
            ),
            GpuReading("GPU-b", fault="lost"),
        )
    ),
)  # fmt: skip


def test_a_node_is_shown_with_its_gpus_what_uses_them_and_where_they_lie(
    host: ScriptedHost, kohaku: Kohaku
) -> None:
    host.answer(NODE_SHOW, NodeResult(MANY_GPUS))
    lines = [line.rstrip() for line in kohaku("node", "show", "node1").out.splitlines()]
    facts = [tuple(line.split("  ", 1)) for line in lines if line.startswith(("numa", "gpu", " "))]
    assert [(name, value.strip()) for name, value in facts] == [
        ("gpus", "0 of 4 claimed"),
        ("numa 0", "cores 0-3, 1 GiB, gpus 100-101, distance 0:10 2:21"),
        ("numa 2", "cores 4-7, 2 GiB, gpus 1, distance 0:21 2:10"),
        (
            "gpu 0",
            "A100, 1 GiB, divided into MIG instances: gpus 100-101, numa 0, 0 % busy, 0 B used",
        ),
        ("gpu 100", "A100 MIG 1g, 512 MiB, MIG 0:0, numa 0"),
        ("gpu 101", "A100 MIG 1g, 512 MiB, MIG 0:1, numa 0, 0 % busy, 0 B used"),
        ("", "process 41, python3, 1 MiB, task 7"),
        ("", "process 42, x, unmanaged"),
        ("", "and 3 more processes"),
        ("gpu 1", "H100, 2 GiB, numa 2, out of service: lost"),
        ("gpu 2", "H100, 2 GiB"),
    ]  # fmt: skip
    document = json.loads(kohaku("node", "show", "node1", "--json").out)
    process = document["readings"]["gpus"][1]["processes"][0]
    assert process == {"pid": 41, "name": "python3", "memory": 2**20, "task": "7"}
    assert document["inventory"]["gpus"][2]["parent"] == "GPU-a"


@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_several_nodes_are_drained_at_once(host: ScriptedHost, kohaku: Kohaku, verb: str) -> None:
    method = NODE_DRAIN if verb == "drain" else NODE_UNDRAIN
    host.answer(method, NodeResult(NODE))
    ran = kohaku("node", verb, "node1", "node2")
    assert [asked.node for asked in host.asked(method)] == ["node1", "node2"]
    assert ran.out.splitlines()[0] == "node1  online, draining  0 on it"
    assert len(json.loads(kohaku("node", verb, "node1", "--json").out)["nodes"]) == 1


def answer_but_for(host: ScriptedHost, name: str, refusal: KohakuError) -> None:
    """Have one node refused, and any other drained."""

    def answer(asked: OneNode) -> NodeResult:
        if asked.node == name:
            raise refusal
        return NodeResult(NODE)

    host.answer(NODE_DRAIN, answer)


def test_a_node_that_is_refused_does_not_keep_the_others_from_being_drained(
    host: ScriptedHost, kohaku: Kohaku
) -> None:
    answer_but_for(host, "nope", NotFound("no node is called 'nope'"))
    ran = kohaku("node", "drain", "nope", "node1")
    assert (ran.status, ran.out) == (1, "node1  online, draining  0 on it\n")
    assert ran.err == "error: no node is called 'nope'\n"
    ran = kohaku("node", "drain", "nope", "node1", "--json")
    assert (ran.status, ran.err) == (1, "")
    told = json.loads(ran.out)
    assert [node["name"] for node in told["nodes"]] == ["node1"]
    assert told["refused"] == [["nope", "no node is called 'nope'"]]


def test_nodes_that_were_drained_are_told_although_the_host_fails_at_the_next(
    host: ScriptedHost, kohaku: Kohaku
) -> None:
    answer_but_for(host, "node2", Unavailable("the disk is full"))
    ran = kohaku("node", "drain", "node1", "node2", "node3")
    assert (ran.status, ran.out) == (3, "node1  online, draining  0 on it\n")
    assert "the disk is full" in ran.err
    assert [asked.node for asked in host.asked(NODE_DRAIN)] == ["node1", "node2"]


def test_a_token_for_any_node_is_not_made_of_an_empty_name(
    host: ScriptedHost, kohaku: Kohaku
) -> None:
    ran = kohaku("node", "join-token", "--node", "")
    assert (ran.status, ran.out) == (2, "")
    assert "--node is empty" in ran.err
    assert host.calls == []


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
