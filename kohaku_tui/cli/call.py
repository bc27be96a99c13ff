"""``kohaku call``: any method of the protocol, straight from the table of methods."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import msgspec
import typer

from kohaku_tui.cli import output
from kohaku_tui.cli.complete import complete_methods
from kohaku_tui.cli.options import AsJson, OnContext
from kohaku_tui.cli.reach import ask_cluster
from kohaku_tui.document import to_document
from protocol.errors import BadRequest
from protocol.messages.cluster import Watch
from protocol.methods import METHODS, WATCH, Door, Method, StreamingMethod
from protocol.mismatch import explain_mismatch

if TYPE_CHECKING:
    from protocol.client import Cluster

#: How msgspec (0.22) says that a value is missing which dotted keys can give.
_MISSING: Final = re.compile(
    r"Object missing required field `(?P<field>\w+)`(?: - at `\$\.(?P<inside>[\w.]+)`)?"
)

MethodName = Annotated[str, typer.Argument(metavar="METHOD", autocompletion=complete_methods)]


def call(
    name: MethodName,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", show_default=False),
    ] = None,
    *,
    as_json: AsJson = False,
    context: OnContext = "",
) -> None:
    """Call any method of the protocol; JSON out.

    Keys may have dots, as in spec.cores=2. Values are JSON where they read as JSON, else text.
    A streaming method gives one document a line.
    """
    del as_json  # the answer is JSON anyway; for errors the flag is read with the command line
    method = _find(name)
    params = read_params(method, words or ())
    if isinstance(method, StreamingMethod):
        try:
            ask_cluster(context, lambda cluster: _stream(cluster, method, params))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        return

    async def ask(cluster: Cluster) -> msgspec.Struct:
        answer: msgspec.Struct = await cluster.call(method, params)
        return answer

    output.print_document(to_document(ask_cluster(context, ask)))


def read_params(method: Method[Any, Any], words: Sequence[str]) -> msgspec.Struct:
    """Make a method's parameters of ``KEY=VALUE`` words.

    Raises:
        BadRequest: They do not fit the method; the message names the key.
    """
    plain: dict[str, Any] = {}
    for word in words:
        path, separator, text = word.partition("=")
        if not path or not separator:
            raise BadRequest(f"{word!r} is no parameter", hint="write KEY=VALUE")
        _put(plain, path.split("."), _read_value(text), word)
    try:
        # Not strict: ids may be given as they are printed, as strings.
        params: msgspec.Struct = msgspec.convert(plain, method.params, strict=False)
    except msgspec.ValidationError as reason:
        said = explain_mismatch(reason, method.params)
        raise BadRequest(f"{method.name}: {said}", hint=_hint_for(str(reason))) from None
    _refuse_unknown(plain, params, method.name)
    return params


def _hint_for(reason: str) -> str:
    """Say what to write instead, where msgspec's reason shows it."""
    if reason.startswith("Expected `str`"):
        return "text that reads as JSON needs its own quotes: KEY='\"1\"'"
    if missing := _MISSING.fullmatch(reason):
        return f"add {'.'.join(filter(None, missing.group('inside', 'field')))}=VALUE"
    return ""


async def _stream(
    cluster: Cluster, method: StreamingMethod[Any, Any, Any], params: msgspec.Struct
) -> None:
    if method is not WATCH or not isinstance(params, Watch):
        raise BadRequest(f"{method.name} cannot be followed from the command line")
    if params.since:
        raise BadRequest("since: the command resumes by itself", hint="leave it out")
    updates = cluster.watch(params.topics, batch=params.batch, tasks=params.tasks)
    async with aclosing(updates) as items:
        async for update in items:
            output.print_document_line(to_document(update))


def _find(name: str) -> Method[Any, Any]:
    method = METHODS.get(name)
    if method is not None and method.door is not Door.RUNNER:
        return method
    known = [entry.name for entry in METHODS.values() if entry.door is not Door.RUNNER]
    if method is not None:
        raise BadRequest(f"{name} is for runners only")
    raise _unknown(f"there is no method {name!r}", name, known)


def _put(plain: dict[str, Any], path: Sequence[str], value: Any, word: str) -> None:
    for key in path[:-1]:
        plain = plain.setdefault(key, {})
        if not isinstance(plain, dict):
            raise BadRequest(f"{word!r}: {key} has a value already")
    if path[-1] in plain:
        raise BadRequest(f"{word!r}: {'.'.join(path)} has a value already")
    plain[path[-1]] = value


def _read_value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError:
        return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON (RFC 8259 section 6)")


def _refuse_unknown(plain: Any, value: Any, where: str) -> None:
    """Refuse keys that no struct has: the wire ignores them, and a typing error would too."""
    if isinstance(value, msgspec.Struct) and isinstance(plain, dict):
        for key, inner in plain.items():
            if key not in value.__struct_fields__:
                raise _unknown(f"{where} has no parameter {key!r}", key, value.__struct_fields__)
            _refuse_unknown(inner, getattr(value, key), f"{where} {key}")
    elif isinstance(value, list | tuple) and isinstance(plain, list | tuple):
        for inner, item in zip(plain, value, strict=False):
            _refuse_unknown(inner, item, where)


def _unknown(message: str, name: str, known: Sequence[str]) -> BadRequest:
    from difflib import get_close_matches

    if not known:
        return BadRequest(message, hint="it takes none")
    # Python's 0.6 takes task.get for task.retry: worse than the list of all.
    near = get_close_matches(name, known, n=1, cutoff=0.8)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(known))}"
    return BadRequest(message, hint=hint)
