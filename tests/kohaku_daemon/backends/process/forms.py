"""The forms of the process backend, and which of them a test is about.

A test that takes ``form`` or ``rig`` is run in every form; one that is marked, in some.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from kohaku_daemon.backends.process.settings import Isolation


class Form(NamedTuple):
    """What keeps tasks from the machine, and what limits them."""

    isolation: Isolation
    cgroups: bool

    def __str__(self) -> str:
        return f"{self.isolation}-cgroups" if self.cgroups else str(self.isolation)

    @property
    def is_walled(self) -> bool:
        """Say whether its tasks live in namespaces of their own."""
        return self.isolation is Isolation.NAMESPACES


FORMS = [
    Form(isolation, cgroups)
    for isolation in (Isolation.PLAIN, Isolation.NAMESPACES)
    for cgroups in (False, True)
]


def _only(is_meant: Callable[[Form], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", [form for form in FORMS if is_meant(form)], ids=str)


#: With namespaces, with and without cgroups.
walled = _only(lambda form: form.is_walled)
#: With cgroups, and without.
grouped = _only(lambda form: form.cgroups)
ungrouped = _only(lambda form: not form.cgroups)
