"""NUMA nodes, and which one a device is on."""

import shutil
from pathlib import Path

import pytest

from kohaku_daemon.probe.numa import read_numa, read_pci_numa
from protocol.models.node import NumaNode
from tests.kohaku_daemon.probe.conftest import put


def test_nodes_have_those_cores_that_are_ours(root: Path) -> None:
    assert read_numa(root, (1, 2, 4), memory=1) == (
        NumaNode(0, (1, 2), 32768000 * 1024, (10, 21)),
        NumaNode(1, (4,), 32000000 * 1024, (21, 10)),
    )


def test_nodes_are_in_order_of_their_numbers(root: Path) -> None:
    for number in (2, 10):
        put(root, f"sys/devices/system/node/node{number}/cpulist", "\n")
    nodes = read_numa(root, (1,), memory=1)
    assert [node.number for node in nodes] == [0, 1, 2, 10]
    assert nodes[3] == NumaNode(10)


def test_a_machine_of_one_node_has_everything_on_it(root: Path) -> None:
    one = (NumaNode(0, (1, 2), 5 * 2**30, (10,)),)
    shutil.rmtree(root / "sys/devices/system/node/node1")
    assert read_numa(root, (2, 1), memory=5 * 2**30) == one
    shutil.rmtree(root / "sys/devices/system/node")
    assert read_numa(root, (2, 1), memory=5 * 2**30) == one


@pytest.mark.parametrize(
    ("bus", "node"),
    [
        ("00000000:3B:00.0", 1),
        ("0000:3b:00.0", 1),
        ("00000000:5E:00.0", None),
        ("00000000:FF:00.0", None),
        ("../../../etc", None),
        ("", None),
    ],
)
def test_the_node_of_a_device(bus: str, node: int | None, root: Path) -> None:
    assert read_pci_numa(root, bus) == node
