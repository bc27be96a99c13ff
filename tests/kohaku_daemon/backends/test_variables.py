"""The variables by which a task knows itself."""

from kohaku_daemon.backends.variables import tell_launch
from kohaku_daemon.core.workload import Launch
from protocol.ids import BatchId, TaskId
from protocol.models.task import TaskSpec

LAUNCH = Launch(task=TaskId(7), attempt=2, batch=BatchId(6), spec=TaskSpec(command=("true",)))


def test_what_there_is_not_is_not_told() -> None:
    told = tell_launch(LAUNCH, node="node1", local_temp="/scratch")
    assert "KOHAKU_BATCH_HOSTS" not in told
    assert "KOHAKU_SHARED_DIR" not in told
    assert told["CUDA_VISIBLE_DEVICES"] == "", "empty hides every GPU, and absent none"
    assert told["KOHAKU_LOCAL_TEMP"] == "/scratch"


def test_the_shared_folder_is_told_as_the_task_sees_it() -> None:
    told = tell_launch(LAUNCH, node="node1", local_temp="/local_temp", shared_dir="/shared")
    assert told["KOHAKU_SHARED_DIR"] == "/shared"
