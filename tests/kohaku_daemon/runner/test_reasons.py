"""Whom a failure is told, and how its lines in the log name the launch."""

from __future__ import annotations

import re

import pytest

from kohaku_daemon.backends.base import BackendFailed
from kohaku_daemon.runner.reasons import cut, explain


def test_a_backends_own_words_are_for_people(caplog: pytest.LogCaptureFixture) -> None:
    assert explain(BackendFailed("no such image"), "starting", "7-2", "gpu-01") == "no such image"
    (record,) = caplog.records
    fields = vars(record)
    assert (fields["task"], fields["attempt"], fields["node"]) == ("7", "2", "gpu-01")
    assert record.levelname == "WARNING"


def test_a_bug_is_told_by_its_number_and_logged_whole(caplog: pytest.LogCaptureFixture) -> None:
    said = explain(KeyError("postgres://user:hunter2@db"), "starting", "7-2", "gpu-01")
    assert "hunter2" not in said
    found = re.search(r"incident ([0-9a-f]{8})", said)
    assert found is not None
    (record,) = caplog.records
    assert found[1] in record.getMessage()
    assert record.exc_info is not None
    assert vars(record)["task"] == "7"


def test_a_text_for_people_fits_a_report() -> None:
    assert cut("x" * 2000) == "x" * 2000
    assert cut("x" * 2001) == "x" * 1999 + "…"
