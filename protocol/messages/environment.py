"""Making environments, spreading them, and the names the cluster has at registries."""

from __future__ import annotations

from typing import Annotated

import msgspec

from protocol.models.environment import Environment, RegistryAccount


class ListEnvironments(msgspec.Struct, frozen=True, omit_defaults=True):
    """A page of environments, by name."""

    #: Only those whose names come after this one: the last name of the page before.
    after: str = ""


class EnvironmentList(msgspec.Struct, frozen=True, omit_defaults=True):
    """A page of environments, as many as one message holds."""

    environments: tuple[Environment, ...]
    more: bool = False


class OneEnvironment(msgspec.Struct, frozen=True):
    """Names one environment."""

    environment: str


class EnvironmentResult(msgspec.Struct, frozen=True):
    """One environment, as it is after the call."""

    environment: Environment


class CreateEnvironment(msgspec.Struct, frozen=True, kw_only=True):
    """Make an environment on the host machine: a container that people can work in.

    Answered at once; ``environment.show`` and the topic ``environments`` tell how far it is.
    The same again while it is being made changes nothing.
    """

    environment: str
    #: An image of the host machine's engine, or one that its engine can pull.
    image: str


class PullEnvironment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bring the newest version to nodes ahead of the tasks that will want it."""

    environment: str
    #: Empty for all that can run containers.
    nodes: tuple[str, ...] = ()


class Pulling(msgspec.Struct, frozen=True):
    """Who was told to."""

    nodes: tuple[str, ...]


class OpenShell(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ask for a ticket to run a command in an environment, on the host machine."""

    environment: str
    #: Empty for the shell that its image has.
    command: tuple[str, ...] = ()
    #: On a terminal of this size, or without one.
    terminal: bool = False
    columns: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 80
    rows: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 24


class ShellInput(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """What is typed. On the wire ``[1, data]``; no data is the end of it."""

    data: bytes


class ShellSize(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The terminal has another size. On the wire ``[2, columns, rows]``."""

    columns: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    rows: Annotated[int, msgspec.Meta(ge=1, le=10_000)]


ShellSent = ShellInput | ShellSize


class ShellOutput(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """What it says. On the wire ``[1, data, is_error]``."""

    data: bytes
    #: From standard error; a terminal has only one output.
    is_error: bool = False


class ShellEnd(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """It has ended. On the wire ``[2, code, error]``."""

    code: int
    #: Why it did not run, or broke off, as an error's code, message and hint; else empty.
    error: tuple[str, ...] = ()


ShellSaid = ShellOutput | ShellEnd


class SetRegistry(msgspec.Struct, frozen=True, kw_only=True):
    """Have nodes pull from a registry under a name."""

    registry: str
    username: str
    password: str

    def __repr__(self) -> str:
        return f"SetRegistry({self.registry!r}, {self.username!r})"


class OneRegistry(msgspec.Struct, frozen=True):
    """Names one registry."""

    registry: str


class ListRegistries(msgspec.Struct, frozen=True):
    """All registries the cluster has a name at."""


class RegistryList(msgspec.Struct, frozen=True):
    """Under which names, never the passwords."""

    registries: tuple[RegistryAccount, ...]
