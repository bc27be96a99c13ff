"""Options and arguments that several commands share, so that one thing is spelled one way.

Knows: names, help texts, completion, how words on the command line become values.
Does not know: what any command does with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final

import typer

from kohaku_tui.cli.complete import complete_batches, complete_contexts, complete_nodes
from kohaku_tui.cli.complete import complete_tasks as complete_task_ids
from protocol.errors import BadRequest
from protocol.ids import BatchId, TaskId, parse_id

#: Peers keep numbers in 64 bits with a sign.
_LARGEST: Final = 2**63 - 1

AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON document.")]
OnContext = Annotated[
    str,
    typer.Option(
        "--context",
        metavar="NAME",
        help="Saved context to use instead of the current one.",
        autocompletion=complete_contexts,
        show_default=False,
    ),
]
Timeout = Annotated[
    str,
    typer.Option(
        "--timeout",
        metavar="DURATION",
        help="Stop waiting after this long, such as 30s or 2h.",
        show_default=False,
    ),
]
OneTaskId = Annotated[str, typer.Argument(metavar="ID", autocompletion=complete_task_ids)]
TaskIds = Annotated[list[str], typer.Argument(metavar="ID...", autocompletion=complete_task_ids)]
OneBatchId = Annotated[str, typer.Argument(metavar="ID", autocompletion=complete_batches)]
OneNodeName = Annotated[str, typer.Argument(metavar="NODE", autocompletion=complete_nodes)]
NodeNames = Annotated[list[str], typer.Argument(metavar="NODE...", autocompletion=complete_nodes)]
Limit = Annotated[int, typer.Option("--limit", metavar="N", min=1, help="How many at most.")]
Everything = Annotated[bool, typer.Option("--all", help="All there are, whatever --limit says.")]


def task_id(text: str) -> TaskId:
    """Read a task's id.

    Raises:
        BadRequest: It is none.
    """
    return TaskId(parse_id(text))


def batch_id(text: str) -> BatchId:
    """Read a batch's id.

    Raises:
        BadRequest: It is none.
    """
    return BatchId(parse_id(text))


def task_ids(texts: Iterable[str]) -> list[TaskId]:
    """Read tasks' ids, each once, in the order given.

    Raises:
        BadRequest: One is none.
    """
    return list(dict.fromkeys(map(task_id, texts)))


def sendable(option: str, number: int, written: str = "") -> int:
    """Give a number back that a peer can take; ``written`` is how the option had it, if not so.

    Raises:
        BadRequest: It is too large; the message names the option.
    """
    if abs(number) > _LARGEST:
        raise BadRequest(f"{option} {written or number} is too large", hint=f"at most {_LARGEST}")
    return number


def parse_pairs(texts: Iterable[str], thing: str) -> dict[str, str]:
    """Read ``KEY=VALUE`` words; ``thing`` is what an error calls them, such as ``label``.

    Raises:
        BadRequest: A word has no ``=`` or no key.
    """
    pairs = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not key or not separator:
            raise BadRequest(f"{text!r} is not a {thing}", hint="write KEY=VALUE")
        pairs[key] = value
    return pairs
