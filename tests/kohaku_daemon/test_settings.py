"""Settings: three sources in their order, every kind of value, and errors that say where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from kohaku_daemon.setting_kinds import Between, Cores, Port, Size
from kohaku_daemon.settings import Sources, collect, render, settings_of
from protocol.errors import BadRequest


class Shade(StrEnum):
    DARK = "dark"
    LIGHT = "light"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    #: How hard.
    mode: Literal["soft", "hard"] = "soft"
    #: How many.
    count: Annotated[int, Between(1, 9)] = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    #: A name.
    name: str = "x"
    #: A switch.
    on: bool = False
    #: A port.
    port: Port = 8000
    #: A wait of
    #: two lines.
    wait_s: float = 90.0
    #: Bytes.
    memory: Size | None = None
    #: More bytes.
    cap: Size = 64 * 2**20
    #: Some cores.
    cores: Cores | None = None
    #: Words.
    words: tuple[str, ...] = ("auto",)
    #: Labels.
    labels: dict[str, str] = field(default_factory=dict)
    #: A shade.
    shade: Shade = Shade.DARK
    #: Folders.
    folders: tuple[Path, ...] = (Path("/a"), Path("/b"))
    #: A folder.
    data: Path = Path("/d")
    #: Tell nobody.
    secret: str = field(default="", repr=False)
    #: A table.
    process: Inner = Inner()


def read(
    tmp_path: Path,
    toml: str = "",
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Everything:
    file = tmp_path / "some.toml"
    file.write_text(toml)
    sources = Sources(file, {"PATH": "/bin", **(environ or {})}, "KOHAKU_X_", flags or {})
    return Everything(**collect(Everything, sources))


def test_the_environment_beats_the_file_and_a_flag_beats_both(tmp_path: Path) -> None:
    toml = 'name = "file"\nport = 1\nwait = 1\n'
    environ = {"KOHAKU_X_NAME": "environment", "KOHAKU_X_PORT": "2"}
    assert read(tmp_path, toml, environ, {"name": "flag"}) == Everything(
        name="flag", port=2, wait_s=1.0
    )


@pytest.mark.parametrize(
    ("toml", "text", "name", "wanted"),
    [
        ('name = "7"', "7", "name", "7"),
        ("on = true", "yes", "on", True),
        ("port = 65535", "65535", "port", 65535),
        ('wait = "1h30m"', "1h30m", "wait_s", 5400.0),
        ("wait = 2", "2", "wait_s", 2.0),
        ('memory = "1.5Gi"', "1.5Gi", "memory", 3 * 2**29),
        ('memory = "auto"', "auto", "memory", None),
        ("cap = 4096", "4096", "cap", 4096),
        ('cores = "0-2,8"', "0-2,8", "cores", (0, 1, 2, 8)),
        ("cores = [8, 0, 8]", "8,0", "cores", (0, 8)),
        ('words = ["a", "b"]', "a, b", "words", ("a", "b")),
        ('labels = { gpu = "a100" }', "gpu=a100", "labels", {"gpu": "a100"}),
        ('[labels]\ngpu = "a100"', "gpu=a100,", "labels", {"gpu": "a100"}),
        ('shade = "light"', "light", "shade", Shade.LIGHT),
        ('folders = ["/c"]', "/c,", "folders", (Path("/c"),)),
        ('data = "/tmp/k"', "/tmp/k", "data", Path("/tmp/k")),
    ],
)
def test_every_kind_reads_the_same_from_the_file_and_from_text(
    tmp_path: Path, toml: str, text: str, name: str, wanted: object
) -> None:
    variable = "KOHAKU_X_" + name.removesuffix("_s").upper()
    assert getattr(read(tmp_path, toml), name) == wanted
    assert getattr(read(tmp_path, environ={variable: text}), name) == wanted


def test_a_table_is_set_from_every_source(tmp_path: Path) -> None:
    toml = '[process]\nmode = "hard"\ncount = 4\n'
    assert read(tmp_path, toml).process == Inner(mode="hard", count=4)
    environ = {"KOHAKU_X_PROCESS_COUNT": "5"}
    assert read(tmp_path, toml, environ).process == Inner(mode="hard", count=5)
    assert read(tmp_path, toml, environ, {"process.count": 6}).process.count == 6


def test_a_relative_path_starts_from_the_folder_of_its_file(tmp_path: Path) -> None:
    assert read(tmp_path, 'data = "here"').data == tmp_path / "here"
    assert read(tmp_path, environ={"KOHAKU_X_DATA": "here"}).data == Path.cwd() / "here"


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("port = 65536", "port in FILE, line 1 must be a whole number, from 0 to 65535, not 65536"),
        ("\nport = true", "port in FILE, line 2 must be .*, not true"),
        ('on = "yes"', 'on in FILE, line 1 must be true or false, not "yes"'),
        ('wait = "soon"', 'wait in FILE, line 1 must be a duration .*, not "soon"'),
        ("wait = -1", "wait in .* must be a duration"),
        ("wait = inf", "wait in .* must be a duration"),
        ('cap = "64X"', 'cap in .* must be a size .*, not "64X"'),
        ("cap = -1", "cap in .* must be a size"),
        ('cores = "٣"', "cores in .* must be numbers of cores"),
        ('cores = "3-1,"', "cores in .* must be numbers of cores"),
        ("cores = [70000]", "cores in .* must be numbers of cores"),
        ('words = "a"', "words in .* must be a list"),
        ("labels = { gpu = 1 }", "labels in .* must be a table"),
        ('shade = "grey"', 'shade in .* must be one of "dark", "light", not "grey"'),
        ("shade = ['dark']", "shade in .* must be one of"),
        ('folders = [""]', "folders in .* must be a list of paths"),
        ('data = ""', "data in .* must be a path"),
        ('[process]\n\nmode = "odd"', 'process.mode in FILE, line 3 must be one of "soft", "hard"'),
        ('process.mode = "odd"', "process.mode in FILE, line 1 must be"),
        ("process = 3", "unknown setting process in"),
        ("port = = 1", "FILE is not TOML: .*line 1"),
    ],
)
def test_a_wrong_value_names_its_key_and_its_place(tmp_path: Path, toml: str, message: str) -> None:
    file = re.escape(str(tmp_path / "some.toml"))
    with pytest.raises(BadRequest, match=message.replace("FILE", file)):
        read(tmp_path, toml)


@pytest.mark.parametrize("text", ["٣", "1_000", "+1", "1.0", "1e3"])
def test_text_is_a_whole_number_only_in_plain_digits(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadRequest, match="port in KOHAKU_X_PORT must be a whole number"):
        read(tmp_path, environ={"KOHAKU_X_PORT": text})


def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"unknown setting prot in .*some.toml, line 1") as caught:
        read(tmp_path, "prot = 1")
    assert caught.value.hint == "did you mean port?"

    with pytest.raises(BadRequest, match="KOHAKU_X_PROCESS_MODUS in the environment") as caught:
        read(tmp_path, environ={"KOHAKU_X_PROCESS_MODUS": "1"})
    assert caught.value.hint == "did you mean KOHAKU_X_PROCESS_MODE?"

    with pytest.raises(BadRequest, match="KOHAKU_X_QQQQ") as caught:
        read(tmp_path, environ={"KOHAKU_X_QQQQ": "1"})
    assert "kohakud init" in caught.value.hint

    with pytest.raises(BadRequest, match="unknown setting qqqq") as caught:
        read(tmp_path, "qqqq = 1")
    assert "kohakud init" in caught.value.hint


@pytest.mark.parametrize(
    ("toml", "hint"),
    [
        ("[process]\nport = 1", "port belongs above [process]"),
        ("[process]\nprot = 1", "did you mean port? port belongs above [process]"),
        ("[process]\nmodus = 1", "did you mean process.mode?"),
        ("mode = 1", "mode belongs below [process]"),
        ("[process]\nqqqq = 1", "kohakud init writes a file with all of them"),
    ],
)
def test_a_key_in_the_wrong_table_is_told_where_it_belongs(
    tmp_path: Path, toml: str, hint: str
) -> None:
    with pytest.raises(BadRequest, match="unknown setting") as caught:
        read(tmp_path, toml)
    assert caught.value.hint == hint


def test_a_wrong_variable_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="port in KOHAKU_X_PORT must be a whole number"):
        read(tmp_path, environ={"KOHAKU_X_PORT": "http"})


def test_no_message_shows_a_secret(tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        read(tmp_path, "secret = 123456")
    assert "123456" not in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "absent.toml", {}, "KOHAKU_X_", {})
    with pytest.raises(BadRequest, match=r"cannot read the settings in .*absent\.toml: No such"):
        collect(Everything, sources)


def test_the_written_file_lists_every_key_and_says_the_defaults(tmp_path: Path) -> None:
    text = render(Everything, "test", "KOHAKU_X_", {})
    assert "# A wait of\n# two lines.\n" in text
    assert all(setting.variable("KOHAKU_X_") in text for setting in settings_of(Everything))
    assert read(tmp_path, text) == Everything()

    active = re.sub(r"(?m)^#(?=\w)", "", text)
    assert len(re.findall(r"(?m)^\w+ = ", active)) == len(list(settings_of(Everything)))
    assert read(tmp_path, active) == Everything()


def test_a_key_without_a_default_is_written_with_the_computed_one() -> None:
    @dataclass(frozen=True)
    class Needy:
        #: Needed.
        data: Path

    assert next(settings_of(Needy)).default is MISSING
    assert '#data = "/srv"' in render(Needy, "test", "KOHAKU_X_", {"data": Path("/srv")})
