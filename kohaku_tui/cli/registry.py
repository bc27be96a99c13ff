"""``kohaku registry``: whom the cluster is where images come from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.options import AsJson, OnContext
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.cli.table import Column
from kohaku_tui.document import to_document
from kohaku_tui.format import age
from protocol.errors import BadRequest
from protocol.messages.environment import ListRegistries, OneRegistry, RegistryList, SetRegistry
from protocol.methods import REGISTRY_LIST, REGISTRY_REMOVE, REGISTRY_SET

if TYPE_CHECKING:
    from protocol.client import Cluster

_COLUMNS: Final = (
    Column("REGISTRY"),
    Column("USERNAME", yields=True),
    Column("CHANGED", right=True, spare=1),
    Column("BY", spare=2),
)
#: Characters. More is no password, and perhaps a whole disk by mistake.
_LONGEST: Final = 64 * 1024

RegistryName = Annotated[
    str, typer.Argument(metavar="REGISTRY", help="Such as ghcr.io, or docker.io.")
]


def set_account(
    registry: RegistryName,
    username: Annotated[str, typer.Option("--username", "-u", metavar="NAME")],
    *,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the password from stdin.")
    ] = False,
    password_file: Annotated[
        Path | None,
        typer.Option("--password-file", metavar="FILE", help="Read the password from a file."),
    ] = None,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Have images pulled from a registry under a name.

    The host keeps the password, readable by its own user only, and tells it to nodes that pull.
    It is never shown again.
    """
    password = _take_password(registry, file=password_file, stdin=password_stdin)
    wanted = SetRegistry(registry=registry, username=username, password=password)

    async def ask(cluster: Cluster) -> RegistryList:
        return await cluster.call(REGISTRY_SET, wanted)

    answer = ask_cluster(context, ask)
    if as_json:
        output.print_document(to_document(answer))


def list_accounts(*, as_json: AsJson = False, context: OnContext = "") -> None:
    """List the registries the cluster has a name at, without the passwords."""

    async def look(cluster: Cluster) -> RegistryList:
        return await cluster.call(REGISTRY_LIST, ListRegistries())

    answer = ask_cluster(context, look)
    if as_json:
        output.print_document(to_document(answer))
        return
    now = output.now()
    rows = (
        (one.registry, one.username, age(one.changed_at, now), str(one.changed_by))
        for one in answer.registries
    )
    output.print_table(_COLUMNS, rows)


def remove(registry: RegistryName, *, as_json: AsJson = False, context: OnContext = "") -> None:
    """Forget the cluster's name at a registry."""

    async def ask(cluster: Cluster) -> RegistryList:
        return await cluster.call(REGISTRY_REMOVE, OneRegistry(registry))

    answer = ask_cluster(context, ask)
    if as_json:
        output.print_document(to_document(answer))


def _take_password(registry: str, *, file: Path | None, stdin: bool) -> str:
    """Read a password from where it was said to be, or ask for it.

    Raises:
        BadRequest: It is nowhere, or in two places.
    """
    if stdin and file is not None:
        raise BadRequest("--password-stdin and --password-file: choose one")
    if file is not None:
        try:
            with file.open(encoding="utf-8") as opened:
                text = opened.read(_LONGEST)
        except (OSError, UnicodeDecodeError) as error:
            raise BadRequest(f"--password-file: cannot read {file}: {error}") from None
    elif stdin:
        text = sys.stdin.read(_LONGEST)
    elif output.can_ask():
        text = typer.prompt(f"password at {registry}", hide_input=True, err=True)
    else:
        raise BadRequest(
            "the password is not said, and no terminal is here to ask",
            hint="give it on stdin with --password-stdin, or in a file with --password-file FILE",
        )
    # What an editor or echo puts at the end is no part of it.
    password = text.removesuffix("\n").removesuffix("\r")
    if not password:
        raise BadRequest("the password is empty")
    return password
