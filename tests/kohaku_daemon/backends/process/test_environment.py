"""Which variables a task finds, and which of them win."""

from kohaku_daemon.backends.process.environment import build_environment
from kohaku_daemon.core.workload import Launch
from protocol.ids import BatchId, TaskId
from protocol.models.task import Claim, TaskSpec


def build(env: dict[str, str], gpus: tuple[str, ...] = ()) -> dict[str, str]:
    launch = Launch(
        task=TaskId(7), attempt=2, batch=BatchId(6), index=3, size=9,
        spec=TaskSpec(command=("true",), env=env), claim=Claim(gpus=gpus),
    )  # fmt: skip
    return build_environment(launch, node="node1", home="/scratch", temporary="/tmp")


def test_the_specs_variables_win_over_the_usual_ones() -> None:
    env = build({"PATH": "/opt/bin", "LANG": "de_DE.UTF-8", "MINE": "1"})
    assert (env["PATH"], env["LANG"], env["MINE"]) == ("/opt/bin", "de_DE.UTF-8", "1")
    assert env["HOME"] == "/scratch"


def test_which_launch_it_is_and_what_it_holds_cannot_be_told_otherwise() -> None:
    lies = {"KOHAKU_TASK_ID": "1", "KOHAKU_ATTEMPT": "9", "CUDA_VISIBLE_DEVICES": "0,1,2"}
    env = build(lies, gpus=("GPU-a", "GPU-b"))
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert {name: env[name] for name in env if name.startswith("KOHAKU_")} == {
        "KOHAKU_TASK_ID": "7",
        "KOHAKU_ATTEMPT": "2",
        "KOHAKU_BATCH_ID": "6",
        "KOHAKU_TASK_INDEX": "3",
        "KOHAKU_BATCH_SIZE": "9",
        "KOHAKU_NODE": "node1",
        "KOHAKU_LOCAL_TEMP": "/scratch",
    }


def test_without_a_claim_no_gpu_is_seen() -> None:
    assert build({})["CUDA_VISIBLE_DEVICES"] == ""
