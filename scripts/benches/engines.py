"""Docker engines of the bench's own, each in namespaces of its own, shared with the tests.

Knows: where they come from, and that a machine without Docker measures nothing of this.
Does not know: what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from frame import NotMeasured


@contextmanager
def docker_engine(*, image: str = "", live_restore: bool = False) -> Iterator[Any]:
    """Keep an engine for as long as the context lasts, with a small ``image`` if one is named.

    Raises:
        NotMeasured: The machine has no Docker, or does not let us have one.
    """
    root = str(Path(__file__).parents[2])
    if root not in sys.path:
        sys.path.insert(0, root)
    from tests.support import dockerds
    from tests.support.docker_images import busybox_image

    if missing := dockerds.what_is_missing():
        raise NotMeasured(missing)
    with dockerds.Dockerd(live_restore=live_restore) as engine:
        if image:
            engine.load(busybox_image(image))
        yield engine
