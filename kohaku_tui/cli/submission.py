"""From words on the command line to a request for tasks.

Knows: how sizes, targets, variables and tables of variables are written, what excludes what.
Does not know: Typer, the connection. Reads the table's file and this process's environment.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kohaku_tui.cli.options import parse_pairs, read_duration, read_size, read_whole, task_ids
from protocol.errors import BadRequest
from protocol.messages.task import LARGEST_BATCH, SubmitTask
from protocol.models.target import parse_target
from protocol.models.task import DOCKER, Mount, Network, TaskSpec

#: How a value of a JSON table is written into the environment, where ``str`` would say it
#: the Python way.
_JSON_WORDS: Final[Mapping[Any, str]] = {True: "true", False: "false", None: ""}


#: As SubmitTask wants it; told here by the option's name.
_SHORTEST_REQUEST_ID: Final = 8
_LONGEST_REQUEST_ID: Final = 64
_NO_LIMIT: Final = -1
_USUAL_GRACE_S: Final = TaskSpec(command=()).grace_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What was said on the command line, as words; None is what was not said."""

    command: Sequence[str]
    request_id: str
    targets: Sequence[str] = ()
    cores: int = 1
    memory: str | None = None
    gpus: int = 0
    backend: str = ""
    env: Sequence[str] = ()
    name: str = ""
    priority: int = 0
    array: int | None = None
    rows: Path | None = None
    labels: Sequence[str] = ()
    workdir: str = ""
    grace: str | None = None
    after: Sequence[str] = ()
    gang: bool = False
    time_limit: str | None = None
    retries: int = 0
    requeue_on_lost: bool = False
    container: str = ""
    image: str = ""
    mounts: Sequence[str] = ()
    user: str = ""
    network: Network = Network.DEFAULT
    shm_size: str | None = None
    ulimits: Sequence[str] = ()
    privileged: bool = False


def make_request(wish: Wish, environment: Mapping[str, str]) -> SubmitTask:
    """Make the request, taking variables named without a value from ``environment``.

    Raises:
        BadRequest: Something makes no sense; the message names the option.
    """
    many = [
        option
        for option, is_set in (
            ("several -t", len(wish.targets) > 1),
            ("--array", wish.array is not None),
            ("--rows", wish.rows is not None),
        )
        if is_set
    ]
    if len(many) > 1 or (wish.targets and many and many != ["several -t"]):
        raise BadRequest(
            f"{' and '.join(many if len(many) > 1 else ['-t', *many])} exclude each other",
            hint="choose one of them to say how many tasks there are",
        )
    if not _SHORTEST_REQUEST_ID <= len(wish.request_id) <= _LONGEST_REQUEST_ID:
        raise BadRequest(
            f"--request-id {wish.request_id!r} is not of {_SHORTEST_REQUEST_ID} to"
            f" {_LONGEST_REQUEST_ID} characters",
            hint="such as: $(uuidgen)",
        )
    _check_container(wish)
    spec = TaskSpec(
        command=tuple(wish.command),
        name=wish.name,
        env=read_variables(wish.env, environment),
        workdir=wish.workdir,
        cores=wish.cores,
        memory=0 if wish.memory is None else read_size("-m", wish.memory),
        gpus=wish.gpus,
        labels=parse_pairs(wish.labels, "label"),
        priority=wish.priority,
        backend=wish.backend,
        grace_s=_USUAL_GRACE_S if wish.grace is None else read_duration("--grace", wish.grace),
        time_limit_s=_read_time_limit(wish.time_limit),
        retries=wish.retries,
        requeue_on_lost=wish.requeue_on_lost,
        container=wish.container,
        image=wish.image,
        mounts=tuple(map(read_mount, wish.mounts)),
        user=wish.user,
        network=wish.network,
        shm_size=0 if wish.shm_size is None else read_size("--shm-size", wish.shm_size),
        ulimits=dict(map(read_ulimit, wish.ulimits)),
        privileged=wish.privileged,
    )
    return SubmitTask(
        request_id=wish.request_id,
        spec=spec,
        targets=tuple(map(parse_target, wish.targets)),
        array=wish.array or 0,
        rows=read_rows(wish.rows) if wish.rows is not None else (),
        after=tuple(task_ids(wish.after)),
        gang=wish.gang,
    )


def _check_container(wish: Wish) -> None:
    """Refuse options of containers that exclude each other, or the backend that was named."""
    if wish.container and wish.image:
        raise BadRequest(
            "--container and --image exclude each other",
            hint="choose one: an environment of the cluster, or an image of a registry",
        )
    asked = {
        "--container": wish.container,
        "--image": wish.image,
        "--mount": wish.mounts,
        "--user": wish.user,
        "--network none": wish.network is Network.NONE,
        "--shm-size": wish.shm_size is not None,
        "--ulimit": wish.ulimits,
        "--privileged": wish.privileged,
    }
    option = next((option for option, is_set in asked.items() if is_set), "")
    if option and wish.backend not in {"", DOCKER}:
        raise BadRequest(
            f"{option} is about containers, and --backend {wish.backend} has none",
            hint="leave out one of the two",
        )


def read_mount(text: str) -> Mount:
    """Read ``SRC:DST``, with ``:ro`` where the task may only read.

    Raises:
        BadRequest: It is neither.
    """
    source, _, rest = text.partition(":")
    destination, _, mode = rest.partition(":")
    if not source or not destination or mode not in {"", "ro", "rw"} or text.endswith(":"):
        raise BadRequest(
            f"--mount {text!r} is not SRC:DST or SRC:DST:ro",
            hint="give a path on the node and one in the container: --mount /data/set:/data:ro",
        )
    return Mount(source, destination, read_only=mode == "ro")


def read_ulimit(text: str) -> tuple[str, tuple[int, int]]:
    """Read ``NAME=SOFT:HARD``, or ``NAME=BOTH``; ``unlimited`` is -1.

    Raises:
        BadRequest: It is neither.
    """
    name, _, limits = text.partition("=")
    soft, separator, hard = limits.partition(":")
    try:
        if not name:
            raise BadRequest("no name")
        low = _read_limit(soft)
        return name, (low, _read_limit(hard) if separator else low)
    except BadRequest:
        raise BadRequest(
            f"--ulimit {text!r} is not NAME=SOFT or NAME=SOFT:HARD",
            hint="give numbers, or unlimited: --ulimit nofile=4096:unlimited",
        ) from None


def _read_limit(text: str) -> int:
    return _NO_LIMIT if text in {"unlimited", "-1"} else read_whole(text)


def _read_time_limit(text: str | None) -> float:
    if text is None:
        return 0.0
    limit_s = read_duration("--time-limit", text)
    if not limit_s:  # 0.0 is no limit on the wire, which is not what this says
        raise BadRequest(
            f"--time-limit {text} leaves no time to run", hint="leave it out for no limit"
        )
    return limit_s


def read_variables(words: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Read ``KEY=VALUE`` words; a bare ``KEY`` has its value in ``environment``.

    Raises:
        BadRequest: A bare key is not there, or a word has no key.
    """
    variables = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not key:
            raise BadRequest(f"-e {word!r} names no variable", hint="write KEY=VALUE, or KEY")
        if not separator:
            if key not in environment:
                raise BadRequest(
                    f"the variable {key} is not set here",
                    hint=f"give its value: -e {key}=VALUE",
                )
            value = environment[key]
        variables[key] = value
    return variables


def read_rows(path: Path) -> tuple[dict[str, str], ...]:
    """Read a table of variables: a CSV file with a line of names, or a JSON list of objects.

    Raises:
        BadRequest: The file cannot be read, or is neither.
    """
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _read_json(json.load(file)) if path.suffix == ".json" else _read_csv(file)
    except OSError as reason:
        raise BadRequest(f"cannot read {path}: {reason.strerror}") from None
    except (ValueError, csv.Error) as reason:
        raise BadRequest(
            f"{path} is no table of variables: {reason}",
            hint="write a .csv file with a line of names, or a .json list of objects",
        ) from None
    if not 0 < len(rows) <= LARGEST_BATCH:
        raise BadRequest(f"{path} has {len(rows)} rows, not between 1 and {LARGEST_BATCH}")
    return tuple(rows)


def _read_csv(file: Any) -> list[dict[str, str]]:
    reader = csv.DictReader(file, strict=True)
    names = reader.fieldnames or ()
    if not all(names) or len(set(names)) != len(names):
        raise ValueError("its first line does not name each column once")
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not {len(names)} values")
        rows.append(dict(row))
    return rows


def _read_json(table: Any) -> list[dict[str, str]]:
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        raise ValueError("it is not a list of objects")
    return [{key: _as_variable(key, value) for key, value in row.items()} for row in table]


def _as_variable(key: str, value: Any) -> str:
    if isinstance(value, list | dict):
        raise ValueError(f"the value of {key!r} is not text, a number, true, false or null")
    if isinstance(value, bool) or value is None:
        return _JSON_WORDS[value]
    return str(value)
