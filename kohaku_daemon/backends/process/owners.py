"""From a process to the task it belongs to.

Knows: the names of launches' cgroups, and the variables that launches are started with.
Does not know: which launches there are.
"""

from __future__ import annotations

from typing import Final

from kohaku_daemon.backends.process.files import read_text
from protocol.ids import TaskId

#: As ``cgroups`` names the folder above all sites, and ``record.mark_launch`` the variable.
_ABOVE: Final = "kohaku"
_MARK: Final = "KOHAKU_TASK_ID="
_DIGITS: Final = 20


def find_group_owner(cgroup: str, site: str) -> TaskId | None:
    """Find the launch of a site that a process runs in; its keepers run in none.

    Args:
        cgroup: Text of /proc/PID/cgroup: lines ``number:controllers:path`` (``man 7 cgroups``).
        site: Name of the folder that the groups of this runner's launches are in.
    """
    for line in cgroup.splitlines():
        parts = line.split(":", 2)[-1].split("/")
        # Below the group may be others, which the task itself has made; above it a service's.
        for above, folder, key in zip(parts, parts[1:], parts[2:], strict=False):
            if (above, folder) == (_ABOVE, site):
                task = _read_id(key.partition("-")[0])
                if task is not None:
                    return task
    return None


def find_marked_owner(pid: int) -> TaskId | None:
    """Find the task whose variables a process was started with, where no cgroup tells.

    Of processes of other users that needs root; and it is what the process itself says.
    """
    try:
        variables = read_text(f"/proc/{pid}/environ").split("\0")
    except OSError:  # it is over, or belongs to somebody else
        return None
    marked = (text.removeprefix(_MARK) for text in variables if text.startswith(_MARK))
    return _read_id(next(marked, ""))


def _read_id(text: str) -> TaskId | None:
    # An id has 64 bits; a process may say anything, also more digits than ``int`` takes.
    is_number = text.isascii() and text.isdigit() and len(text) <= _DIGITS
    return TaskId(int(text)) if is_number else None
