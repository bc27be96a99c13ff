"""The host's settings: defaults that work, and refusals that say what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kohaku_daemon.host.config import load, template
from protocol.errors import BadRequest


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHAKU_HOME", str(tmp_path))


def test_without_any_source_the_host_is_safe_to_start(tmp_path: Path) -> None:
    config = load({}, environ={})
    assert (config.listen, config.port) == ("127.0.0.1", 8000)
    assert config.data == tmp_path / "data/host"


def test_packed_environments_are_in_the_shared_folder_if_there_is_one(tmp_path: Path) -> None:
    config = load({}, environ={})
    assert config.environments == config.data / "environments"
    assert (config.docker_socket, config.environment_versions) == (Path("/var/run/docker.sock"), 3)
    shared = load({"shared_dir": str(tmp_path / "nfs")}, environ={})
    assert shared.environments == tmp_path / "nfs/environments"
    assert load({"shared_dir": ""}, environ={}).environments == config.environments
    with pytest.raises(BadRequest, match="environment_versions"):
        load({"environment_versions": "0"}, environ={})


def test_host_toml_is_read_where_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/host.toml").write_text("port = 8123\n")
    assert load({}, environ={}).port == 8123
    (tmp_path / "other.toml").write_text("")
    assert load({}, file=tmp_path / "other.toml", environ={}).port == 8000


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.1.2.3", "lab-host"])
def test_other_machines_are_reached_in_the_clear_only_by_leave(address: str) -> None:
    with pytest.raises(BadRequest, match=f"listening on {address} would send") as caught:
        load({"listen": address}, environ={})
    assert "insecure_plaintext" in caught.value.hint
    assert "TLS" in caught.value.hint
    assert load({"listen": address, "insecure_plaintext": True}, environ={}).listen == address


@pytest.mark.parametrize(
    "address",
    ["not an address", "", "300.1.1.1", "1.2.3", "0", "[::1]", "127.0.0.1:9000", "http://h", "a\0b",
     "-x", "a..b", "x" * 64, ".".join(["a"] * 200), "127.0.0.1\n"],
)  # fmt: skip
@pytest.mark.parametrize("leave", [True, False])
def test_what_is_no_address_is_said_to_be_none(address: str, leave: bool) -> None:
    with pytest.raises(BadRequest) as caught:
        load({"listen": address, "insecure_plaintext": leave}, environ={})
    told = caught.value.message
    assert told.startswith("listen in the command line must be an IP address or the name of a ma")
    assert 'such as "127.0.0.1", not "' in told


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_leave(address: str) -> None:
    assert load({"listen": address}, environ={}).listen == address


def test_a_grace_shorter_than_the_heartbeats_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"lost_after \(5s\) must be at least three times"):
        load({}, environ={"KOHAKU_HOSTD_LOST_AFTER": "5"})


def test_the_clients_variables_are_not_the_hosts() -> None:
    load({}, environ={"KOHAKU_HOST": "http://x", "KOHAKU_TOKEN": "t", "KOHAKU_HOME": "/h"})


def test_the_written_file_is_read_back_as_the_defaults(tmp_path: Path) -> None:
    text = template()
    assert re.search(r"(?m)^# \S.*\n# Here .*KOHAKU_HOSTD_PORT\.\n#port = 8000$", text)
    file = tmp_path / "host.toml"
    file.write_text(re.sub(r"(?m)^#(?=\w)", "", text))
    assert load({}, file=file, environ={}) == load({}, environ={})
