"""What the vault promises: what was acknowledged stays, and one process at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kohaku_daemon.store.vault import Vault
from protocol.errors import Conflict, Unavailable

PUTS = """
import sys
from pathlib import Path
from kohaku_daemon.store.vault import Vault
vault = Vault.open(Path(sys.argv[1]))
for number in range(1_000_000):
    vault.write({f"key/{number:06d}": b"x" * (number % 500), "last": b"%d" % number})
    print(number, flush=True)
"""


def test_what_is_written_is_read_again_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "vault.sqlite"
    vault = Vault.open(path)
    vault.write({"a/1": b"one", "a/2": b"two", "b/1": b"three", "a0": b"not under a/"})
    vault.write({"a/1": b"new"}, ["b/1", "never there"])
    vault.close()

    vault = Vault.open(path)
    assert vault.get("a/1") == b"new"
    assert vault.get("b/1") is None
    assert list(vault.items("a/")) == [("a/1", b"new"), ("a/2", b"two")]
    assert [key for key, _ in vault.items()] == ["a/1", "a/2", "a0"]
    vault.close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_write_is_all_or_nothing(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "vault.sqlite")
    vault.write({"kept": b"1"})
    broken: dict[str, bytes] = {"new": b"2", "bad": None}  # type: ignore[dict-item]
    with pytest.raises(Exception, match="NOT NULL"):
        vault.write(broken, ["kept"])
    assert dict(vault.items()) == {"kept": b"1"}
    vault.write({"new": b"3"})
    assert vault.get("new") == b"3"
    vault.close()


def test_every_acknowledged_key_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "vault.sqlite"
    with subprocess.Popen(
        [sys.executable, "-c", PUTS, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline()) for _ in range(200)]
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]

    vault = Vault.open(path)
    kept = dict(vault.items("key/"))
    assert [f"key/{number:06d}" for number in acknowledged] == list(kept)[: len(acknowledged)]
    assert vault.get("last") == list(kept)[-1].removeprefix("key/").lstrip("0").encode()
    assert all(value == b"x" * (int(key[4:]) % 500) for key, value in kept.items())
    vault.close()


def test_a_second_runner_is_told_which_process_has_it(tmp_path: Path) -> None:
    path = tmp_path / "vault.sqlite"
    vault = Vault.open(path)
    with pytest.raises(Conflict, match=f"in use by process {os.getpid()}") as caught:
        Vault.open(path)
    assert caught.value.details == {"pid": os.getpid()}
    vault.close()
    Vault.open(path).close()


def test_a_file_that_is_no_vault_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "vault.sqlite"
    path.write_bytes(b"something else entirely, longer than a header of SQLite" * 50)
    with pytest.raises(Unavailable, match=r"vault\.sqlite failed: file is not a database") as error:
        Vault.open(path)
    assert "backup" in error.value.hint
    assert path.read_bytes().startswith(b"something else")
    path.unlink()
    Vault.open(path).close()  # the lock was let go


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="missing/vault"):
        Vault.open(tmp_path / "missing" / "vault.sqlite")
