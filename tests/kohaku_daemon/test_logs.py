"""Log lines: one an event, ids at the end, and nothing in them can forge another line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from kohaku_daemon import logs


@pytest.fixture(autouse=True)
def _root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(capture=False)


def log(*, as_json: bool) -> io.StringIO:
    stream = io.StringIO()
    logs.set_up("info", as_json=as_json, stream=stream)
    return stream


def test_ids_follow_the_text_of_one_line() -> None:
    stream = log(as_json=False)
    logging.getLogger("kohaku.x").info("task %s", "began", extra={"task": 7, "node": "a b"})
    logging.getLogger("kohaku.x").debug("too quiet")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith('INFO    kohaku.x  task began  task=7 node="a b"')


def test_what_a_stranger_sent_stays_on_its_line() -> None:
    stream = log(as_json=False)
    hostile = "x\n2030-01-01 ERROR forged\x1b[2J\x9b31m\u2028"
    logging.getLogger("kohaku.x").warning("from %s", hostile, extra={"agent": hostile})
    (line,) = stream.getvalue().splitlines()
    assert "\x1b" not in line
    assert "\x9b" not in line


def test_a_traceback_is_indented_below_its_line() -> None:
    stream = log(as_json=False)
    try:
        raise ValueError("one\nERROR two")
    except ValueError:
        logging.getLogger("kohaku.x").exception("it failed")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("it failed")
    assert rest
    assert all(line.startswith("    ") for line in rest)


def test_json_lines_keep_fields_apart() -> None:
    stream = log(as_json=True)
    logging.getLogger("kohaku.x").info("said", extra={"task": 7, "level": "forged"})
    record = json.loads(stream.getvalue())
    assert (record["message"], record["task"], record["level"]) == ("said", 7, "info")
