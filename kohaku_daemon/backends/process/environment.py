"""The environment of a task's program.

Knows: which variables a task finds. Does not know: the runner's own environment, none of
which is passed on: it may hold credentials.
"""

from __future__ import annotations

from kohaku_daemon.backends.variables import tell_launch
from kohaku_daemon.core.workload import Launch

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def build_environment(
    launch: Launch, *, node: str, home: str, temporary: str, shared_dir: str = ""
) -> dict[str, str]:
    """Build all variables of a launch.

    The spec's variables win over the usual ones. Those that say which launch this is and
    which GPUs it holds win over the spec's.

    Args:
        launch: The launch.
        node: Name of the node.
        home: Its scratch folder.
        temporary: A folder for temporary files.
        shared_dir: The folder all nodes share; empty if there is none.
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
    told = tell_launch(launch, node=node, local_temp=home, shared_dir=shared_dir)
    return {**usual, **launch.spec.env, **told}
