"""Options and arguments that several commands share, so that one thing is spelled one way.

Knows: names, help texts, completion, how words on the command line become values.
Does not know: what any command does with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Final, TypeVar

import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.complete import (
    complete_batches,
    complete_contexts,
    complete_environments,
    complete_nodes,
)
from kohaku_tui.cli.complete import complete_tasks as complete_task_ids
from protocol.errors import BadRequest
from protocol.ids import BatchId, TaskId, parse_id
from protocol.units import parse_duration, parse_size

T = TypeVar("T")

_DIGITS: Final = re.compile(r"[0-9]+")
_WHOLE: Final = re.compile(r"[+-]?[0-9]+")
#: Peers keep numbers in 64 bits with a sign.
_LARGEST: Final = 2**63 - 1


def read_whole(text: str) -> int:
    """Read a whole number of 0 or more that peers can keep.

    Raises:
        BadRequest: It is none, or too large.
    """
    if not _DIGITS.fullmatch(text):
        raise BadRequest(f"{text!r} is not a whole number")
    # No number of so many digits is in bounds; Python refuses to read one of 4300.
    number = int(text) if len(text) < 25 else _LARGEST + 1
    if number > _LARGEST:
        raise BadRequest(f"{text[:25]} is too large", hint=f"at most {_LARGEST}")
    return number


def whole(least: int = -_LARGEST, most: int = _LARGEST) -> Callable[[str | int], int]:
    """Make a reader of whole numbers within bounds, for ``parser`` of an option.

    Python's own reads more: digits of all scripts, and ``1_000``.
    """

    def read(text: str | int) -> int:  # a number where it is the option's default
        written = str(text)
        if not _WHOLE.fullmatch(written):
            raise typer.BadParameter(f"{written!r} is not a whole number.")
        # No number of so many digits is in bounds; Python refuses to read one of 4300.
        number = int(written) if len(written) < 25 else _LARGEST + 1
        if abs(number) > _LARGEST:
            raise typer.BadParameter(f"{written[:25]} is too large: at most {_LARGEST}.")
        if not least <= number <= most:
            span = f"from {least} to {most}" if most < _LARGEST else f"{least} or more"
            raise typer.BadParameter(f"{number} is not {span}.")
        return number

    return read


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
    str | None,
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
EnvironmentName = Annotated[
    str, typer.Argument(metavar="NAME", autocompletion=complete_environments)
]
NodeNames = Annotated[list[str], typer.Argument(metavar="NODE...", autocompletion=complete_nodes)]
Limit = Annotated[
    int, typer.Option("--limit", metavar="N", parser=whole(1), help="How many at most.")
]
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


def read_duration(option: str, text: str) -> float:
    """Read an option's duration, in seconds.

    Raises:
        BadRequest: It is none; the message names the option.
    """
    return _read(parse_duration, option, text)


def read_size(option: str, text: str) -> int:
    """Read an option's size, in bytes.

    Raises:
        BadRequest: It is none, or too large; the message names the option.
    """
    size = _read(parse_size, option, text)
    if size > _LARGEST:
        raise BadRequest(f"{option} {text} is too large", hint=f"at most {_LARGEST}")
    return size


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


def confirm(question: str) -> None:
    """Ask before something that cannot be taken back.

    Raises:
        BadRequest: Nobody is there to be asked.
        Abort: The answer was no.
    """
    if not output.can_ask():
        raise BadRequest("this needs a yes, and no terminal is here to ask", hint="add --yes")
    typer.confirm(question, abort=True, err=True)


def _read(parse: Callable[[str], T], option: str, text: str) -> T:
    try:
        return parse(text)
    except BadRequest as error:
        raise BadRequest(f"{option}: {error.message}", hint=error.hint) from None
