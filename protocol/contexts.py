"""Saved hosts and tokens of one OS user, in ``contexts.json`` of the configuration folder.

The file holds tokens: it is only ever readable by its owner, and replaced as a whole.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from protocol.errors import BadRequest, NotFound
from protocol.home import config_dir

_MODE: Final = 0o600


class Context(msgspec.Struct, frozen=True, omit_defaults=True):
    """One host and who one is there."""

    name: str
    url: str
    token: str = ""
    user: str = ""
    #: The cluster's id, as the host said it; another answer later means another host.
    cluster: str = ""

    def __repr__(self) -> str:
        return f"<Context {self.name} {self.url} token {self.token[:6]}>"


class Contexts(msgspec.Struct, frozen=True):
    """All saved contexts, and the name of the one in use; empty for none."""

    current: str = ""
    contexts: tuple[Context, ...] = ()

    def find(self, name: str) -> Context:
        """Give the context of that name.

        Raises:
            NotFound: There is none.
        """
        for context in self.contexts:
            if context.name == name:
                return context
        known = ", ".join(context.name for context in self.contexts)
        raise NotFound(
            f"there is no context {name!r}",
            hint=f"there are: {known}" if known else "save one with: kohaku login URL",
        )


def file_path() -> Path:
    """Say where the contexts are saved."""
    return config_dir() / "contexts.json"


def load() -> Contexts:
    """Read what is saved; a file that others could read is shut to them first.

    Raises:
        BadRequest: The file is damaged.
    """
    path = file_path()
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                with suppress(PermissionError):  # not ours, so not ours to shut
                    os.fchmod(file.fileno(), _MODE)
            data = file.read()
    except FileNotFoundError:
        return Contexts()
    try:
        return msgspec.json.decode(data, type=Contexts)
    except msgspec.MsgspecError as reason:
        raise BadRequest(
            f"{path} is damaged: {reason}", hint="remove it and log in again"
        ) from None


def current() -> Context | None:
    """Give the context in use, if there is one."""
    saved = load()
    return saved.find(saved.current) if saved.current else None


def save(context: Context, *, use: bool = True) -> None:
    """Save a context over the one of its name, and use it from now on if asked."""
    saved = load()
    others = tuple(other for other in saved.contexts if other.name != context.name)
    _write(Contexts(context.name if use else saved.current, (*others, context)))


def use(name: str) -> Context:
    """Use a saved context from now on.

    Raises:
        NotFound: There is none of that name.
    """
    saved = load()
    context = saved.find(name)
    _write(Contexts(name, saved.contexts))
    return context


def remove(name: str) -> None:
    """Forget a context. If it was in use, none is.

    Raises:
        NotFound: There is none of that name.
    """
    saved = load()
    saved.find(name)
    others = tuple(other for other in saved.contexts if other.name != name)
    _write(Contexts("" if saved.current == name else saved.current, others))


def _write(contexts: Contexts) -> None:
    path = file_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkstemp makes the file for its owner only, before a token is in it.
    descriptor, temporary = tempfile.mkstemp(prefix=".contexts-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(contexts), indent=2))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
