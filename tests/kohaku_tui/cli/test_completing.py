"""Tab: what it offers, and that it never talks."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from protocol.ids import NodeName
from protocol.messages.environment import EnvironmentList
from protocol.messages.node import NodeList
from protocol.messages.task import TaskPage
from protocol.methods import ENVIRONMENT_LIST, NODE_LIST, TASK_LIST
from protocol.models.environment import Environment
from protocol.models.node import Node, NodeState
from protocol.models.task import TaskSpec
from tests.kohaku_tui.cli.conftest import ROOT
from tests.kohaku_tui.cli.scripted_host import ScriptedHost, a_task


def press_tab(line: str) -> subprocess.CompletedProcess[str]:
    """Ask as bash does; ``line`` ends with the word to complete."""
    words = line.split(" ")
    return ask(
        {
            "_KOHAKU_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        }
    )


def ask(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the command as a shell's completion does."""
    return subprocess.run(
        [sys.executable, "-m", "kohaku_tui"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_names_and_ids_are_offered(host: ScriptedHost) -> None:
    nodes = [Node(name=NodeName(name), state=NodeState.ONLINE) for name in ("gpu-01", "cpu-01")]
    host.answer(NODE_LIST, NodeList(tuple(nodes)))
    host.answer(TASK_LIST, TaskPage((a_task(71), a_task(82))))
    assert press_tab("kohaku node show ").stdout.split() == ["gpu-01", "cpu-01"]
    assert press_tab("kohaku node drain gpu-01 g").stdout.split() == ["gpu-01"]
    assert press_tab("kohaku task wait 8").stdout.split() == ["82"]
    assert press_tab("kohaku task submit -t c").stdout.split() == ["cpu-01"]
    assert press_tab("kohaku call node.l").stdout.split() == ["node.list", "node.label"]
    made = Environment(name="torch", source="python:3.12")
    host.answer(ENVIRONMENT_LIST, EnvironmentList((made,)))
    assert press_tab("kohaku environment pack t").stdout.split() == ["torch"]
    assert press_tab("kohaku task su").stdout.split() == ["submit"]


def test_a_name_is_no_command_for_the_shell(host: ScriptedHost) -> None:
    name = "\\$(touch /tmp/pwned) `x` 'y' \"z\" [/red] $HOME"
    evil = Node(name=NodeName("$(x)"), state=NodeState.ONLINE)
    host.answer(TASK_LIST, TaskPage((a_task(71, spec=TaskSpec(command=("x",), name=name)),)))
    host.answer(NODE_LIST, NodeList((evil,)))
    zsh = {"_KOHAKU_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "kohaku task wait "}
    answer = ask(zsh)
    assert answer.stdout.strip() == (
        """_arguments '*: :(("71":"running touch /tmp/pwned x y z /red HOME"))'"""
    )
    assert answer.stderr == ""
    assert press_tab("kohaku node show ").stdout.strip() == ""


def test_without_a_host_it_is_quick_and_silent(
    host: ScriptedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHAKU_HOST", "127.0.0.1:1")
    began = time.monotonic()
    answer = press_tab("kohaku node show ")
    assert (answer.returncode, answer.stdout.strip(), answer.stderr) == (0, "", "")
    # A process of its own on a busy machine; the budget of the look itself is PATIENCE_S.
    assert time.monotonic() - began < 5


def test_a_host_that_never_answers_is_given_up(host: ScriptedHost) -> None:
    host.answer(NODE_LIST, host.hold)
    answer = press_tab("kohaku node show ")
    assert (answer.returncode, answer.stdout.strip(), answer.stderr) == (0, "", "")
    assert host.asked(NODE_LIST)


def test_the_shell_is_given_a_script(host: ScriptedHost) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "kohaku_tui", "--show-completion", "bash"],
        cwd=ROOT,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert "_KOHAKU_COMPLETE=complete_bash" in answer.stdout
