"""Small files of the store as this version writes them, to be opened by every later version.

Run once before a schema changes: ``python -m tests.kohaku_daemon.store.make_samples``.
A sample that is there is never written again.
"""

from pathlib import Path

from kohaku_daemon.core.cluster.records import (
    AuditRecord,
    BatchRecord,
    EnvironmentRecord,
    EventRecord,
    JoinTokenRecord,
    NodeRecord,
    PutDocument,
    RegistryRecord,
    TaskRecord,
    TokenRecord,
)
from kohaku_daemon.store import migrations
from kohaku_daemon.store.documents import Documents
from kohaku_daemon.store.tasks import Group, TaskStore, batch_row, task_row
from kohaku_daemon.store.vault import Vault
from protocol.ids import BatchId, NodeName, TaskId, UserName
from protocol.models.access import Role
from protocol.models.environment import EnvironmentState, Version
from protocol.models.node import Gpu, Inventory, NumaNode
from protocol.models.target import Target
from protocol.models.task import Cause, Change, Claim, Exit, TaskSpec, TaskState

FOLDER = Path(__file__).parent / "samples"
ALICE = UserName("alice")

BATCH = BatchRecord(
    id=BatchId(1000),
    owner=ALICE,
    request_id="request-1",
    digest=bytes(range(32)),
    spec=TaskSpec(command=("python", "train.py"), name="train", memory=2**30, env={"A": "1"}),
    targets=(Target("gpu-1", gpus=(0,)), Target("gpu-2", numa=1)),
    size=2,
    runs=((1001, 2),),
    created_at=1_700_000_000.5,
)
ENDED = TaskRecord(
    id=TaskId(1001),
    batch=BATCH.id,
    owner=ALICE,
    state=TaskState.FAILED,
    node=NodeName("gpu-1"),
    claim=Claim(cores=(0, 1), memory=2**30, gpus=("GPU-1",), numa=0),
    attempt=1,
    reason="exit code 3",
    exit=Exit(Cause.EXITED, code=3),
    created_at=1_700_000_000.5,
    started_at=1_700_000_001.0,
    ended_at=1_700_000_002.0,
    history=(Change(1_700_000_000.5, TaskState.QUEUED, cause="submitted", actor="alice"),),
)
WAITING = TaskRecord(
    id=TaskId(1002), batch=BATCH.id, index=1, owner=ALICE, created_at=1_700_000_000.5
)
EVENT = EventRecord(id=7, at=1_700_000_003.0, kind="node.online", text="hello", node="gpu-1")
AUDIT = AuditRecord(
    at=1_700_000_000.5, actor="alice", role="user", address="10.0.0.9", method="task.submit"
)

NODE = NodeRecord(
    name=NodeName("gpu-1"),
    credential="ab" * 64,
    joined_at=1_700_000_000.0,
    draining=True,
    labels={"gpu": "a100"},
    inventory=Inventory(
        hostname="gpu-1.lab",
        cores=(0, 1, 2, 3),
        memory=2**36,
        numa=(NumaNode(0, (0, 1, 2, 3), 2**36, (10,)),),
        gpus=(Gpu(0, "GPU-1", "A100", 2**36, "00000000:3B:00.0", 0),),
    ),
)
TOKEN = TokenRecord(digest="cd" * 64, prefix="kht_ab", user=ALICE, role=Role.OPERATOR)
JOIN_TOKEN = JoinTokenRecord(digest="ef" * 64, prefix="khj_ab", uses_left=2, expires_at=1.8e9)
ENVIRONMENT = EnvironmentRecord(
    name="torch",
    source="python:3.12-slim",
    state=EnvironmentState.PACKING,
    trouble="no space left",
    created_at=1_700_000_000.0,
    created_by=ALICE,
    versions=(
        Version(digest="12" * 32, size=2**29, pieces="34" * 32, image="sha256:" + "56" * 32),
    ),
    packed_by=ALICE,
    dropped=("78" * 32,),
)
REGISTRY = RegistryRecord(registry="ghcr.io", username="lab", password="secret")

VAULT = {"handle/1001-1": b"\x00binary\xff", "report/1001-1": b"", "unicode/\u00e9": b"x"}


def write_tasks(path: Path) -> None:
    store = TaskStore.open(path)
    store.write(Group([batch_row(BATCH)], [task_row(ENDED), task_row(WAITING)], [EVENT], [AUDIT]))
    store.close()


def write_cluster(path: Path) -> None:
    documents = Documents.open(path, new_cluster="4242")
    records = (NODE, TOKEN, JOIN_TOKEN, ENVIRONMENT, REGISTRY)
    documents.apply([PutDocument(record) for record in records])


def write_vault(path: Path) -> None:
    vault = Vault.open(path)
    vault.write(VAULT)
    vault.close()
    path.with_name(f"{path.name}.lock").unlink()


def main() -> None:
    for path, write in (
        (FOLDER / f"tasks-v{len(migrations.TASKS)}.sqlite", write_tasks),
        (FOLDER / f"cluster-v{len(migrations.CLUSTER)}.json", write_cluster),
        (FOLDER / f"vault-v{len(migrations.VAULT)}.sqlite", write_vault),
    ):
        if not path.exists():
            write(path)


if __name__ == "__main__":
    main()
