"""Trying again what is lost or has failed: ids of tasks and of batches, and neither."""

from __future__ import annotations

import json

import pytest

from protocol.errors import Conflict, KohakuError, NoFit, NotFound, QuotaExceeded, Unavailable
from protocol.ids import BatchId
from protocol.messages.task import Retried, RetryTask, Submitted
from protocol.methods import TASK_RETRY
from tests.kohaku_tui.cli.conftest import Kohaku
from tests.kohaku_tui.cli.scripted_host import ScriptedHost


def test_the_id_of_a_batch_stands_for_its_tasks(host: ScriptedHost, kohaku: Kohaku) -> None:
    def answer(asked: RetryTask) -> Retried:
        if asked.batch is None:
            raise NotFound("there is no task 12")
        return Retried(submitted=Submitted(BatchId(40), ((41, 2),)))

    host.answer(TASK_RETRY, answer)
    assert kohaku("task", "retry", "12").out == "41\n42\n"


def test_an_id_of_nothing_is_called_neither_a_task_nor_a_batch(
    host: ScriptedHost, kohaku: Kohaku
) -> None:
    def answer(asked: RetryTask) -> Retried:
        raise NotFound("there is no task 12" if asked.batch is None else "there is no batch 12")

    host.answer(TASK_RETRY, answer)
    ran = kohaku("task", "retry", "12")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("error: there is no task or batch 12\n")


@pytest.mark.parametrize("words", [["12"], ["12", "13"]])
def test_what_is_refused_gives_the_status_1(
    host: ScriptedHost, kohaku: Kohaku, words: list[str]
) -> None:
    host.answer(TASK_RETRY, Conflict("task is queued"))
    ran = kohaku("task", "retry", *words)
    assert ran.status == 1
    assert ran.err.count("task is queued") == len(words)


def answer_until(host: ScriptedHost, refusal: KohakuError) -> None:
    """Have 13 refused, and any other id made anew as ten times that."""

    def answer(asked: RetryTask) -> Retried:
        if asked.task == 13:
            raise refusal
        assert asked.task is not None
        return Retried(submitted=Submitted(BatchId(asked.task), ((asked.task * 10, 1),)))

    host.answer(TASK_RETRY, answer)


@pytest.mark.parametrize("refusal", [NoFit("no node could hold it"), QuotaExceeded("no more")])
def test_one_that_is_refused_does_not_keep_the_others_from_being_tried(
    host: ScriptedHost, kohaku: Kohaku, refusal: KohakuError
) -> None:
    answer_until(host, refusal)
    ran = kohaku("task", "retry", "12", "13", "14")
    assert (ran.status, ran.out) == (1, "120\n140\n")
    assert ran.err == f"error: {refusal.message}\n"
    ran = kohaku("task", "retry", "12", "13", "14", "--json")
    assert (ran.status, ran.err) == (1, "")
    told = json.loads(ran.out)["retried"]
    assert [(one["tasks"], one["error"]) for one in told] == [
        (["120"], ""),
        ([], refusal.message),
        (["140"], ""),
    ]


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_ids_that_were_made_are_told_although_the_host_fails_at_the_next(
    host: ScriptedHost, kohaku: Kohaku, words: list[str]
) -> None:
    answer_until(host, Unavailable("the disk is full"))
    ran = kohaku("task", "retry", "12", "13", "14", *words)
    assert ran.status == 3
    made = json.loads(ran.out)["retried"][0]["tasks"] if words else ran.out.split()
    assert made == ["120"]
    assert "the disk is full" in ran.err
    assert [asked.task for asked in host.asked(TASK_RETRY)] == [12, 13]
