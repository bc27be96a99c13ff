"""Where the files of a user or a daemon live.

``KOHAKU_HOME=DIR`` puts everything under one folder, so that trials never touch the real ones.
The folders are named, not made.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import platformdirs

_APP: Final = "kohaku"
#: Data of daemons that run as root.
_ROOT_DATA: Final = Path("/var/lib/kohaku")


def config_dir() -> Path:
    """Give the folder of what people write or save: ``KOHAKU_HOME/config``, or the system's."""
    home = _home()
    return platformdirs.user_config_path(_APP) if home is None else home / "config"


def data_dir() -> Path:
    """Give the folder of what daemons keep: ``KOHAKU_HOME/data``, or the system's."""
    home = _home()
    if home is not None:
        return home / "data"
    return _ROOT_DATA if os.geteuid() == 0 else platformdirs.user_data_path(_APP)


def _home() -> Path | None:
    """Give KOHAKU_HOME as an absolute path: daemons leave the directory they start in."""
    text = os.environ.get("KOHAKU_HOME", "")
    return Path(text).expanduser().absolute() if text else None
