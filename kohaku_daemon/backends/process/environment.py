"""The environment of a task's program.

Knows: which variables a task finds. Does not know: the runner's own environment, none of
which is passed on: it may hold credentials.
"""

from __future__ import annotations

from kohaku_daemon.backends.process.record import mark_launch
from kohaku_daemon.core.workload import Launch

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def build_environment(launch: Launch, *, node: str, home: str, temporary: str) -> dict[str, str]:
    """Build all variables of a launch.

    The spec's variables win over the usual ones. Those that say which launch this is and
    which GPUs it holds win over the spec's.

    Args:
        launch: The launch.
        node: Name of the node.
        home: Its scratch folder.
        temporary: A folder for temporary files.
    """
    usual = {
        "PATH": _PATH,
        "HOME": home,
        "TMPDIR": temporary,
        "LANG": "C.UTF-8",
        "SHELL": "/bin/sh",
        "USER": "kohaku",
        "LOGNAME": "kohaku",
    }
    fixed = {
        # Empty hides every GPU: none is used that was not claimed.
        "CUDA_VISIBLE_DEVICES": ",".join(launch.claim.gpus),
        "KOHAKU_NODE": node,
        "KOHAKU_BATCH_ID": str(launch.batch),
        "KOHAKU_TASK_INDEX": str(launch.index),
        "KOHAKU_BATCH_SIZE": str(launch.size),
    }
    return {**usual, **launch.spec.env, **fixed, **mark_launch(launch.task, launch.attempt)}
