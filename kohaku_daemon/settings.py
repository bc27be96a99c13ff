"""Settings of a daemon: a TOML file, then environment variables, then flags.

Knows: how a frozen dataclass becomes a list of keys, and how to say which key of which
file is wrong. Does not know: any setting; how a value is read is ``setting_kinds``.

The dataclass is the only list there is: a field's name is its key, its type is its kind,
its ``#:`` comment is its explanation in the file that ``kohakud init`` writes. A field of
seconds is named ``..._s`` and its key is not, because a value there has a unit of its own.
A field that is a dataclass is a table. A field made with ``field(repr=False)`` is a
secret: no message shows its value.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_type_hints

from kohaku_daemon.setting_kinds import Kind, NotOfKind, kind_of
from protocol.errors import BadRequest

_HEADING: Final = """\
# Settings of a {name} of KohakuRiver. What is commented out is the default.
# Environment variables beat this file, and flags beat both. In a variable a list is
# written a,b and a table gpu=a100,rack=3.
"""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the settings of one daemon come from, weakest first."""

    #: A TOML file; None for no file.
    file: Path | None
    #: All environment variables there are; those that begin with ``prefix`` are ours.
    environ: Mapping[str, str]
    prefix: str
    #: By key. Text is read as from the environment, other values as from TOML.
    flags: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a settings class."""

    #: As in the file, with its table: ``log_level`` or ``process.isolation``.
    key: str
    kind: Kind
    #: ``dataclasses.MISSING`` where the class has none.
    default: Any
    secret: bool
    #: The class that has the field, and the field's name.
    owner: type
    name: str

    def variable(self, prefix: str) -> str:
        """Give the name of its environment variable."""
        return prefix + self.key.replace(".", "_").upper()


def collect(owner: type, sources: Sources) -> dict[str, Any]:
    """Give the constructor's arguments that the sources name; what none names is left out.

    Raises:
        BadRequest: A file that cannot be read, an unknown key, or a value of a wrong kind.
    """
    known = {setting.key: setting for setting in settings_of(owner)}
    values = _from_file(known, sources.file) if sources.file else {}
    values |= _from_environment(known, sources)
    values |= _from_flags(known, sources.flags)
    return _arguments(owner, values)


def settings_of(owner: type, table: str = "") -> Iterator[Setting]:
    """List the keys of a settings class, those of its tables after its own."""
    tables = []
    for key, field, hint in _fields(owner, table):
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            tables.append((hint, key + "."))
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Setting(key, kind_of(hint), default, not field.repr, owner, field.name)
    for inner, prefix in tables:
        yield from settings_of(inner, prefix)


def render(owner: type, name: str, prefix: str, computed: Mapping[str, object]) -> str:
    """Write a settings file with every key, its explanation and its default, commented out.

    ``computed`` has the defaults of the keys that the class itself has none for.
    """
    lines = [_HEADING.format(name=name)]
    table = ""
    for setting in settings_of(owner):
        inner, _, key = setting.key.rpartition(".")
        if inner != table:
            lines += [f"[{inner}]", ""]
            table = inner
        default = computed.get(setting.key, setting.default)
        lines += [f"# {line}" for line in _explanations(setting.owner)[setting.name]]
        lines += [
            f"# Here {setting.kind.expected}; or set {setting.variable(prefix)}.",
            f"#{key} = {setting.kind.write(default)}",
            "",
        ]
    return "\n".join(lines)


# --- the three sources ----------------------------------------------------------------------


def _from_file(known: Mapping[str, Setting], path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise BadRequest(f"cannot read the settings in {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} is not TOML: {error}") from error
    values = {}
    for key, raw in _flatten(content, known):
        where = _place(path, text, key)
        if key not in known:
            raise _unknown(key, where, _near_key(key, known))
        values[key] = _checked(known[key], raw, where, path.parent)
    return values


def _from_environment(known: Mapping[str, Setting], sources: Sources) -> dict[str, Any]:
    by_variable = {setting.variable(sources.prefix): setting for setting in known.values()}
    values = {}
    for variable, text in sources.environ.items():
        if variable.startswith(sources.prefix):
            setting = by_variable.get(variable)
            if setting is None:
                raise _unknown(
                    variable, "the environment", _near_variable(variable, known, sources.prefix)
                )
            raw = setting.kind.of_text(text)
            values[setting.key] = _checked(setting, raw, variable, Path.cwd())
    return values


def _from_flags(known: Mapping[str, Setting], flags: Mapping[str, Any]) -> dict[str, Any]:
    where = "the command line"
    values = {}
    for key, given in flags.items():
        setting = known[key]
        raw = setting.kind.of_text(given) if isinstance(given, str) else given
        values[key] = _checked(setting, raw, where, Path.cwd())
    return values


def _flatten(
    content: Mapping[str, Any], known: Mapping[str, Setting], table: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = table + name
        if isinstance(value, dict) and any(other.startswith(key + ".") for other in known):
            yield from _flatten(value, known, key + ".")
        else:
            yield key, value


def _arguments(owner: type, values: Mapping[str, Any], table: str = "") -> dict[str, Any]:
    arguments = {}
    for key, field, hint in _fields(owner, table):
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            arguments[field.name] = hint(**_arguments(hint, values, key + "."))
        elif key in values:
            arguments[field.name] = values[key]
    return arguments


# --- what is wrong, and where ---------------------------------------------------------------


def _unknown(name: str, where: str, near: str) -> BadRequest:
    hint = near or "kohakud init writes a file with all of them"
    return BadRequest(f"unknown setting {name} in {where}", hint=hint)


def _near_key(key: str, known: Iterable[str]) -> str:
    """Say which key of a file was meant; nothing if none is like it.

    A line added at the end of a file lands in its last table, so names are compared without
    their tables: with them, all keys of a table look alike.
    """
    table, _, name = key.rpartition(".")
    places: dict[str, list[str]] = {}
    for other in known:
        place, _, last = other.rpartition(".")
        places.setdefault(last, []).append(place)
    near = difflib.get_close_matches(name, places, n=1)
    if not near:
        return ""
    if table in places[near[0]]:
        return f"did you mean {f'{table}.' if table else ''}{near[0]}?"
    place = places[near[0]][0]
    where = f"{near[0]} belongs " + (f"below [{place}]" if place else f"above [{table}]")
    return where if near[0] == name else f"did you mean {near[0]}? {where}"


def _near_variable(variable: str, known: Mapping[str, Setting], prefix: str) -> str:
    """Say which variable was meant; that all of them begin with ``prefix`` makes none alike."""
    by_rest = {setting.variable(""): setting for setting in known.values()}
    # Strict, because the variables of one table begin alike as well.
    near = difflib.get_close_matches(variable.removeprefix(prefix), by_rest, n=1, cutoff=0.75)
    return f"did you mean {by_rest[near[0]].variable(prefix)}?" if near else ""


def _checked(setting: Setting, raw: Any, where: str, base: Path) -> Any:
    try:
        return setting.kind.read(raw, base)
    except (NotOfKind, BadRequest):
        message = f"{setting.key} in {where} must be {setting.kind.expected}"
        if not setting.secret:
            message += f", not {json.dumps(raw, default=str, ensure_ascii=False)}"
        # Without the cause: it may show a secret's value.
        raise BadRequest(message) from None


def _place(path: Path, text: str, key: str) -> str:
    """Name the file and, where the key is written in the plain way, its line."""
    table, _, name = key.rpartition(".")
    here = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            here = header[1].strip()
        assigned = re.match(r"\s*[\"']?([\w.-]+)[\"']?\s*=", line)
        wanted = name if here == table else key if here == "" else None
        if here == key or (assigned and assigned[1] == wanted):
            return f"{path}, line {number}"
    return str(path)


# --- the dataclass --------------------------------------------------------------------------


def _fields(owner: type, table: str) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """List key, field and type of a settings class."""
    hints = get_type_hints(owner, include_extras=True)
    for field in dataclasses.fields(owner):
        yield table + field.name.removesuffix("_s"), field, hints[field.name]


def _explanations(owner: type) -> dict[str, list[str]]:
    """Read the ``#:`` comments above the fields of a class."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in textwrap.dedent(inspect.getsource(owner)).splitlines():
        if comment := re.match(r"\s*#: ?(.*)", line):
            lines.append(comment[1].replace("``", '"'))  # the mark of code means nothing in TOML
            continue
        if field := re.match(r"    (\w+):", line):
            found[field[1]] = lines
        lines = []
    return found
