"""What cluster.json promises: changes together or not at all, and always a whole file."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from kohaku_daemon.core.cluster.records import DropDocument, NodeRecord, PutDocument, TokenRecord
from kohaku_daemon.store.documents import Documents
from protocol.errors import Unavailable
from protocol.ids import NodeName
from tests.kohaku_daemon.store.make_samples import JOIN_TOKEN, NODE, TOKEN

PUTS = """
import sys
from pathlib import Path
from kohaku_daemon.core.cluster.records import NodeRecord, PutDocument
from kohaku_daemon.store.documents import Documents
documents = Documents.open(Path(sys.argv[1]), new_cluster="1")
for number in range(1_000_000):
    documents.apply([
        PutDocument(NodeRecord(name=name, credential="c", joined_at=float(number)))
        for name in ("a", "b")
    ])
    print(number, flush=True)
"""


def opened(path: Path) -> Documents:
    return Documents.open(path, new_cluster="4242")


def test_changes_are_read_again_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    documents = opened(path)
    documents.apply([PutDocument(NODE), PutDocument(TOKEN), PutDocument(JOIN_TOKEN)])
    other = msgspec.structs.replace(NODE, name=NodeName("gpu-2"))
    documents.apply([PutDocument(other), DropDocument(TokenRecord, TOKEN.digest)])
    book = documents.read()
    assert (book.nodes, book.tokens) == ({"gpu-1": NODE, "gpu-2": other}, {})
    assert opened(path).read() == replace(book, cluster="4242")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_field_that_goes_back_to_its_default_goes_back(tmp_path: Path) -> None:
    documents = opened(tmp_path / "cluster.json")
    documents.apply([PutDocument(NODE)])
    plain = NodeRecord(name=NODE.name, credential=NODE.credential)
    documents.apply([PutDocument(plain)])
    assert documents.read().nodes == {NODE.name: plain}
    assert opened(tmp_path / "cluster.json").read().nodes == {NODE.name: plain}


def test_the_file_is_json_with_numbers_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    opened(path).apply([PutDocument(NODE)])
    assert '"cores": [0, 1, 2, 3]' in path.read_text()
    assert json.loads(path.read_text())["nodes"]["1"]["labels"] == {"gpu": "a100"}


def test_a_change_that_cannot_be_written_leaves_everything_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    documents = opened(path)
    documents.apply([PutDocument(NODE)])
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(Unavailable, match=r"cluster\.json: File too large"):
            documents.apply([PutDocument(TOKEN), DropDocument(NodeRecord, NODE.name)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert documents.read().nodes == {NODE.name: NODE}
    assert documents.read().tokens == {}
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["cluster.json"]
    documents.apply([PutDocument(TOKEN)])
    assert opened(path).read().tokens == {TOKEN.digest: TOKEN}


def test_kill_9_leaves_the_last_acknowledged_change_or_the_one_after_it(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    for stop_after in (1, 3, 20):
        path.unlink(missing_ok=True)
        with subprocess.Popen(
            [sys.executable, "-c", PUTS, str(path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            last = [int(writer.stdout.readline()) for _ in range(stop_after)][-1]
            os.kill(writer.pid, signal.SIGKILL)
            last = max([last, *(int(line) for line in writer.stdout if line.endswith("\n"))])
        nodes = opened(path).read().nodes
        assert nodes["a"].joined_at == nodes["b"].joined_at
        assert nodes["a"].joined_at in (last, last + 1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "Expecting value"),
        ('{"meta": {"1": {"schema": 1, "cluster": "1"}}, "nodes": {', "Expecting"),
        ('{"nodes": {}}', "no schema version"),
        ('{"meta": {"1": {"schema": 1, "cluster": "1"}}, "nodes": []}', "Expected `object`"),
        ('{"meta": {"1": {"schema": 1, "cluster": "1"}}, "nodes": {"x": {}}}', "not numbered"),
        (
            '{"meta": {"1": {"schema": 1, "cluster": "1"}}, "nodes": {"1": {"name": 5}}}',
            "record 1 of 'nodes' makes no sense",
        ),
        (
            '{"meta": {"1": {"schema": 1, "cluster": "1"}}, "nodes":'
            ' {"1": {"name": "a", "credential": "c"}, "2": {"name": "a", "credential": "c"}}}',
            "two records of 'nodes' are called 'a'",
        ),
    ],
)
def test_a_damaged_file_is_named_and_never_overwritten(
    content: str, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(content)
    with pytest.raises(Unavailable, match=r"cluster\.json is damaged") as caught:
        opened(path)
    assert complaint in caught.value.message
    assert "backup" in caught.value.hint
    assert path.read_text() == content
    assert os.listdir(tmp_path) == ["cluster.json"]
