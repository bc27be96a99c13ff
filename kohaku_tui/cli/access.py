"""``kohaku login|logout|whoami`` and ``kohaku context``: which cluster, and as whom.

A token is never printed, and never taken from an option where a pipe or a prompt will do:
options are seen by everyone on the machine who runs ``ps``.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.complete import complete_contexts
from kohaku_tui.cli.options import AsJson, OnContext
from kohaku_tui.cli.reach import ask_cluster, ask_host
from kohaku_tui.cli.table import Cell, Column
from kohaku_tui.document import Plain, to_document
from protocol.errors import BadRequest, Unavailable
from protocol.messages.hello import Identity, WhoAmI
from protocol.methods import WHOAMI

if TYPE_CHECKING:
    from protocol.client import Cluster
    from protocol.contexts import Context, Contexts

_COLUMNS = (
    Column("IN USE"),
    Column("NAME"),
    Column("HOST"),
    Column("USER", yields=True, spare=1),
    Column("CLUSTER", yields=True, spare=2),
)

ContextName = Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete_contexts)]


def login(
    url: Annotated[str, typer.Argument(metavar="URL", help="The host: http://HOST:PORT.")],
    token: Annotated[
        str,
        typer.Option(
            "--token",
            metavar="TOKEN",
            help="Your API token; - reads it from stdin. Without it: KOHAKU_TOKEN, or a prompt.",
            show_default=False,
        ),
    ] = "",
    name: Annotated[
        str,
        typer.Option("--name", metavar="CONTEXT", help="What to save it as.", show_default=False),
    ] = "",
    *,
    as_json: AsJson = False,
) -> None:
    """Save a host and your token for it.

    The token is checked with the host, and both are used from now on.
    """
    from protocol import contexts
    from protocol.connection import parse_url

    address = parse_url(url)
    secret = _take_token(token, address)
    who = ask_host(address, secret, _whoami)
    saved = contexts.Context(
        name=_check_name(name) if name else urlsplit(address).netloc,
        url=address,
        token=secret,
        user=who.user,
        cluster=who.cluster,
    )
    contexts.save(saved)
    if as_json:
        output.print_document(_document(saved, in_use=True))
        return
    output.note(f"logged in to {address} as {who.user} ({who.role}), saved as context {saved.name}")


def logout(*, as_json: AsJson = False, context: OnContext = "") -> None:
    """Forget the current context and its token."""
    from protocol import contexts

    forgotten = contexts.load().find(context) if context else current_context()
    contexts.remove(forgotten.name)
    if as_json:
        output.print_document(_document(forgotten, in_use=False))
        return
    output.note(f"context {forgotten.name} is forgotten; its token stays valid until it is revoked")
    left = contexts.load()
    if left.contexts and not left.current:
        output.note(f"none is in use now; {_way_back(left)}")


def whoami(*, as_json: AsJson = False, context: OnContext = "") -> None:
    """Show who you are to the cluster."""

    async def look(cluster: Cluster) -> tuple[str, Identity]:
        return cluster.url, await _whoami(cluster)

    url, who = ask_cluster(context, look)
    if as_json:
        output.print_document({**to_document(who), "url": url})
        return
    output.print_facts(
        [
            ("user", who.user or "nobody"),
            ("role", who.role),
            ("token", f"{who.token}…" if who.token else ""),
            ("host", url),
            ("cluster", who.cluster),
        ]
    )


def list_contexts(*, as_json: AsJson = False) -> None:
    """List saved contexts."""
    from protocol import contexts

    saved = contexts.load()
    if as_json:
        documents: list[Plain] = [
            _document(context, in_use=context.name == saved.current) for context in saved.contexts
        ]
        output.print_document({"contexts": documents})
        return
    rows = [
        (
            Cell("*" if context.name == saved.current else "", "green"),
            context.name,
            context.url,
            context.user or "-",
            context.cluster or "-",
        )
        for context in saved.contexts
    ]
    output.print_table(_COLUMNS, rows)
    if os.environ.get("KOHAKU_HOST") and output.talks_to_terminal():
        output.note("KOHAKU_HOST is set and goes before them", "yellow")


def use_context(name: ContextName, *, as_json: AsJson = False) -> None:
    """Use a saved context from now on."""
    from protocol import contexts

    context = contexts.use(name)
    if as_json:
        output.print_document(_document(context, in_use=True))
        return
    output.note(f"now using {context.name}: {context.url}")


def show_context(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", autocompletion=complete_contexts, show_default=False),
    ] = "",
    *,
    as_json: AsJson = False,
) -> None:
    """Show a saved context; without a name, the one in use."""
    from protocol import contexts

    saved = contexts.load()
    context = saved.find(name) if name else current_context()
    in_use = context.name == saved.current
    if as_json:
        output.print_document(_document(context, in_use=in_use))
        return
    output.print_facts(
        [
            ("name", context.name),
            ("host", context.url),
            ("user", context.user),
            ("cluster", context.cluster),
            ("in use", "yes" if in_use else "no"),
        ]
    )


def current_context() -> Context:
    """Give the saved context in use.

    Raises:
        Unavailable: None is.
    """
    from protocol import contexts

    saved = contexts.load()
    if not saved.current:
        raise Unavailable("no context is in use", hint=_way_back(saved))
    return saved.find(saved.current)


async def _whoami(cluster: Cluster) -> Identity:
    return await cluster.call(WHOAMI, WhoAmI())


def _way_back(saved: Contexts) -> str:
    """Say what to do where no context is in use."""
    match [context.name for context in saved.contexts]:
        case []:
            return "log in with: kohaku login URL"
        case [name]:
            return f"choose it with: kohaku context use {name}"
        case names:
            return f"choose one of {', '.join(names)} with: kohaku context use NAME"


def _document(context: Context, *, in_use: bool) -> dict[str, Plain]:
    """Give a context as scripts may see it: without its token."""
    return {
        "name": context.name,
        "url": context.url,
        "user": context.user,
        "cluster": context.cluster,
        "in_use": in_use,
    }


def _take_token(given: str, address: str) -> str:
    if given == "-":
        token = sys.stdin.readline()
    elif given:
        token = given
    elif "KOHAKU_TOKEN" in os.environ:
        token = os.environ["KOHAKU_TOKEN"]
    elif output.can_ask():
        token = typer.prompt(f"API token for {address}", hide_input=True, err=True)
    else:
        token = ""
    token = token.strip()
    if not token:
        raise BadRequest(
            "no token was given", hint="pipe it in with --token -, or set KOHAKU_TOKEN"
        )
    if not token.isascii() or not token.isprintable():
        raise BadRequest("this is not an API token", hint="a token begins with kht_")
    return token


def _check_name(name: str) -> str:
    if not name.isprintable() or name != name.strip():
        raise BadRequest(f"{name!r} cannot be the name of a context")
    return name
