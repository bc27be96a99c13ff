"""The variables by which every task knows itself, whatever it runs in.

Knows: their names and what each says. Does not know: other variables, which each backend has of
its own; paths, which differ from one backend to the other.
"""

from __future__ import annotations

from kohaku_daemon.backends.process.record import mark_launch
from kohaku_daemon.core.workload import Launch


def tell_launch(
    launch: Launch, *, node: str, local_temp: str, shared_dir: str = ""
) -> dict[str, str]:
    """Build the variables that say which launch this is and what it was given.

    Args:
        launch: The launch.
        node: Name of the node.
        local_temp: Its own scratch folder, as it sees it.
        shared_dir: The folder all nodes share, as it sees it; empty if there is none.
    """
    told = {
        # Empty hides every GPU: none is used that was not claimed.
        "CUDA_VISIBLE_DEVICES": ",".join(launch.claim.gpus),
        "KOHAKU_NODE": node,
        "KOHAKU_BATCH_ID": str(launch.batch),
        "KOHAKU_TASK_INDEX": str(launch.index),
        "KOHAKU_BATCH_SIZE": str(launch.size),
        "KOHAKU_LOCAL_TEMP": local_temp,
    }
    if launch.hosts:
        told["KOHAKU_BATCH_HOSTS"] = ",".join(launch.hosts)
    if shared_dir:
        told["KOHAKU_SHARED_DIR"] = shared_dir
    return told | mark_launch(launch.task, launch.attempt)
