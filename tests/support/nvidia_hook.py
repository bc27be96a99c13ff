"""What makes dockerd believe in NVIDIA: a program of the right name in its PATH when it starts.

Knows: how dockerd 20.10 finds the device driver "nvidia" and what it asks of it
(daemon/nvidia_linux.go). Does not know: NVML, see ``fake_gpus``.

dockerd takes DeviceRequests with capability ``gpu`` if ``nvidia-container-runtime-hook`` is in
its PATH. It adds these variables to the container's environment, and the hook to be run before
the program starts, with the container's state as JSON on its standard input:

==============================  ===========================================================
``NVIDIA_VISIBLE_DEVICES``      ``GPU-…,GPU-…`` from DeviceIDs as they were given; ``all``
                                for Count -1; ``0,1`` for Count 2
``NVIDIA_DRIVER_CAPABILITIES``  besides ``gpu``: ``compute,utility``; absent for none
==============================  ===========================================================

Nothing else is in the container: no device, no library. Use::

    hook = NvidiaHook(tmp_path / "hook")
    with Dockerd(path=[hook.folder]) as dockerd:
        dockerd.run(TEST_IMAGE, "env", host={"DeviceRequests": device_requests("GPU-1")})
    hook.containers()                       # ids of those it was called for, in order
    hook.refuse("no such device")           # from now on no such container starts
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

_NAME: Final = "nvidia-container-runtime-hook"

# One line a call: appended at once, so that calls side by side do not mix.
_SCRIPT: Final = """#!/bin/sh
folder={folder}
state=$(cat)
printf '%s\\n' "$state" >>"$folder/calls"
if [ -e "$folder/refusal" ]; then
    cat "$folder/refusal" >&2
    exit 1
fi
"""


class NvidiaHook:
    """A folder for dockerd's PATH with a hook that tells what it was asked."""

    def __init__(self, folder: Path) -> None:
        """Write the hook into ``folder``, which must have no blanks in its path."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        script = folder / _NAME
        script.write_text(_SCRIPT.format(folder=folder))
        script.chmod(0o755)

    def containers(self) -> list[str]:
        """The ids of the containers it was called for, in order."""
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [json.loads(line)["id"] for line in lines]

    def refuse(self, message: str) -> None:
        """Fail from now on, as the real one does when a GPU is not there."""
        (self.folder / "refusal").write_text(message)

    def accept(self) -> None:
        """Fail no more."""
        (self.folder / "refusal").unlink(missing_ok=True)


def device_requests(*uuids: str) -> list[dict[str, object]]:
    """Ask for these GPUs, as ``docker run --gpus device=…`` does."""
    return [{"Driver": "", "DeviceIDs": list(uuids), "Capabilities": [["gpu"]]}]
