"""The command ``kohaku``: its families of commands, and what becomes of every error.

Knows: the names of commands, exit statuses, who is told what when something fails.
Does not know: what any command does.

Exit statuses: 0 done; 1 the cluster said no; 2 the command line makes no sense; 3 the cluster
cannot be reached, or cannot do it now; 130 left with Ctrl-C; 141 nobody reads our output any more.
``task wait``, ``batch wait``, ``task submit --wait`` and ``--follow`` exit with the task's own
status.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command

from kohaku_tui import find_version
from kohaku_tui.cli import (
    access,
    batch,
    call,
    environment,
    events,
    node,
    output,
    registry,
    retry,
    status,
    submit,
    task,
    wait,
)
from kohaku_tui.cli.command import Command
from kohaku_tui.cli.options import AsJson
from protocol.errors import BadRequest, Internal, KohakuError

#: 128 + SIGPIPE: what a shell shows for a program whose reader went away.
_READER_GONE: Final = 141
_DEBUG: Final = "KOHAKU_DEBUG"

_FIRST_STEPS: Final = """\
No cluster is known yet.

  kohakud up --detach   starts one on this machine
  kohaku login URL      logs in to one that runs elsewhere
  kohaku --help         shows all commands"""


class _ReaderGone(Exception):
    """Whoever read our output stopped reading."""


class _Family(TyperGroup):
    """A group of commands that shows its help when none of them is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not self.invoke_without_command and not ctx.resilient_parsing:
            output.note(ctx.get_help())
            raise typer.Exit(BadRequest.exit_status)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Hand ``kohaku --json COMMAND`` on: a command that has no such option refuses it."""
        name, command, rest = super().resolve_command(ctx, args)
        if ctx.find_root().params.get("as_json") and not isinstance(command, TyperGroup):
            rest = ["--json", *rest]
        return name, command, rest


class _Root(_Family):
    """The whole command. Takes a broken pipe before Typer makes an exit status 1 of it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ReaderGone from None


def _make_family(about: str) -> typer.Typer:
    return typer.Typer(cls=_Family, help=about, rich_markup_mode=None)


app: Final = typer.Typer(
    name="kohaku",
    cls=_Root,
    help="Run commands on a cluster of machines as on one big computer.",
    # Rich's help draws boxes, in pipes too, and reads brackets as markup.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command)(status.status)
app.command(cls=Command)(events.events)
app.command(cls=Command)(access.login)
app.command(cls=Command)(access.logout)
app.command(cls=Command)(access.whoami)
app.command(cls=Command)(call.call)

_task: Final = _make_family("Submit tasks, read them, steer them.")
_task.command("submit", cls=Command, context_settings=dict(submit.SUBMIT_SETTINGS))(submit.submit)
_task.command("list", cls=Command)(task.list_tasks)
_task.command("show", cls=Command)(task.show)
_task.command("explain", cls=Command)(task.explain)
_task.command("logs", cls=Command)(wait.logs)
_task.command("watch", cls=Command)(wait.watch)
_task.command("wait", cls=Command)(wait.wait)
_task.command("kill", cls=Command)(task.kill)
_task.command("pause", cls=Command)(task.pause)
_task.command("resume", cls=Command)(task.resume)
_task.command("retry", cls=Command)(retry.retry)
app.add_typer(_task, name="task")

_batch: Final = _make_family("Tasks that were submitted together.")
_batch.command("list", cls=Command)(batch.list_batches)
_batch.command("show", cls=Command)(batch.show)
_batch.command("wait", cls=Command)(batch.wait)
_batch.command("kill", cls=Command)(batch.kill)
app.add_typer(_batch, name="batch")

_node: Final = _make_family("The machines of the cluster.")
_node.command("list", cls=Command)(node.list_nodes)
_node.command("show", cls=Command)(node.show)
_node.command("drain", cls=Command)(node.drain)
_node.command("undrain", cls=Command)(node.undrain)
_node.command("label", cls=Command)(node.label)
_node.command("remove", cls=Command)(node.remove)
_node.command("join-token", cls=Command)(node.join_token)
app.add_typer(_node, name="node")

_environment: Final = _make_family(
    "What tasks run in: made on the host machine, packed for the nodes."
)
_environment.command("create", cls=Command)(environment.create)
_environment.command("shell", cls=Command)(environment.shell)
_environment.command("exec", cls=Command)(environment.execute)
_environment.command("pack", cls=Command)(environment.pack)
_environment.command("pull", cls=Command)(environment.pull)
_environment.command("list", cls=Command)(environment.list_environments)
_environment.command("show", cls=Command)(environment.show)
_environment.command("delete", cls=Command)(environment.delete)
app.add_typer(_environment, name="environment")
app.add_typer(_environment, name="env", hidden=True)

_registry: Final = _make_family("Whom the cluster is to registries of images.")
_registry.command("set", cls=Command)(registry.set_account)
_registry.command("list", cls=Command)(registry.list_accounts)
_registry.command("remove", cls=Command)(registry.remove)
app.add_typer(_registry, name="registry")

_context: Final = _make_family("Saved hosts and who you are there.")
_context.command("list", cls=Command)(access.list_contexts)
_context.command("use", cls=Command)(access.use_context)
_context.command("show", cls=Command)(access.show_context)
app.add_typer(_context, name="context")


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Log to stderr; show where a bug is.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    if version:
        if as_json:
            output.print_document({"version": find_version()})
        else:
            output.say(f"kohaku {find_version()}")
        raise typer.Exit
    if debug:
        os.environ[_DEBUG] = "1"
    _set_up_logging()
    if ctx.invoked_subcommand is None:
        _start_here(as_json=as_json)


def run() -> None:
    """Run the command line of this process and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A locale that lacks a character of some node's name must not end the command.
            stream.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run a command line; give its exit status. Whatever fails is told on stderr."""
    as_json = _wants_json(arguments)
    try:
        result = get_command(app).main(list(arguments), prog_name="kohaku", standalone_mode=False)
        sys.stdout.flush()
    except KohakuError as error:
        output.show_error(error, as_json=as_json)
        return error.exit_status
    except typer.TyperException as error:
        output.show_error(_explain_usage(error), as_json=as_json)
        return BadRequest.exit_status
    except typer.Abort:
        output.note("nothing was done")
        return 1
    except (_ReaderGone, BrokenPipeError):
        # What is still buffered has nowhere to go, and Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    except KeyboardInterrupt:
        return 130
    except Exception as bug:
        if os.environ.get(_DEBUG):
            raise
        output.show_error(_explain_bug(bug), as_json=as_json)
        return 1
    # Typer gives the status of an Exit, or what the command returned, which is nothing.
    return result if isinstance(result, int) else 0


def _start_here(*, as_json: bool) -> None:
    from protocol import contexts

    if os.environ.get("KOHAKU_HOST"):
        status.status(as_json=as_json)
    elif as_json or contexts.load().contexts:
        access.current_context()  # or say how to choose one
        status.status(as_json=as_json)
    else:
        output.say(_FIRST_STEPS)


def _wants_json(arguments: Sequence[str]) -> bool:
    """Say whether ``--json`` is among our own options, also when they cannot be understood."""
    own = list(arguments)
    return "--json" in (own[: own.index("--")] if "--" in own else own)


def _set_up_logging() -> None:
    if os.environ.get(_DEBUG):
        logging.basicConfig(level=logging.DEBUG)
    else:
        # Without any handler Python writes warnings of libraries on stderr.
        logging.getLogger().addHandler(logging.NullHandler())


def _explain_usage(error: typer.TyperException) -> BadRequest:
    ctx = getattr(error, "ctx", None)
    path = "kohaku" if ctx is None else ctx.command_path
    return BadRequest(error.format_message(), hint=f"see: {path} --help")


def _explain_bug(bug: Exception) -> Internal:
    return Internal(
        f"internal error: {type(bug).__name__}",
        hint=f"this is a bug; to see where, run it again with {_DEBUG}=1",
    )
