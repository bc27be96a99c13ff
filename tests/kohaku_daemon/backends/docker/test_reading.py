"""What is read of an engine's answers."""

from kohaku_daemon.backends.docker.facts import parse_container
from kohaku_daemon.backends.docker.reading import describe_engine, read_image
from kohaku_daemon.backends.docker.settings import DockerSettings

STATE = {
    "Status": "running", "Pid": 12, "ExitCode": 0, "OOMKilled": False, "Error": "",
    "StartedAt": "2024-01-01T00:00:01.5Z", "FinishedAt": "0001-01-01T00:00:00Z",
}  # fmt: skip


def test_times_that_never_were_are_zero() -> None:
    facts = parse_container({"Id": "1", "State": STATE})
    assert (facts.started_at, facts.finished_at) == (1704067201.5, 0.0)
    assert (facts.is_alive, facts.is_paused, facts.has_run) == (True, False, True)
    never = {**STATE, "Status": "created", "StartedAt": "0001-01-01T00:00:00Z"}
    assert not parse_container({"Id": "1", "State": never}).has_run


def test_only_what_the_engine_can_hold_to_is_promised() -> None:
    told = {"ServerVersion": "20.10.24", "CgroupVersion": "2", "MemoryLimit": True, "CPUSet": True}
    info = describe_engine(told, DockerSettings(allow_privileged=True), "/mnt/shared")
    assert info.enforces == ("adopt", "cores", "gpus", "memory", "numa", "pause")
    assert info.isolation == "containers, Docker 20.10.24, cgroup v2"
    assert (info.mount_roots, info.allows) == (("/mnt/shared",), ("privileged",))
    assert describe_engine({}, DockerSettings(), "").enforces == ("adopt", "gpus", "pause")


def test_an_image_may_have_said_nothing() -> None:
    assert read_image({"Config": None}) == ({}, "")
    assert read_image({"Config": {"Env": None, "WorkingDir": "/"}}) == ({}, "")
    told = {"Config": {"Env": ["A=b=c", "EMPTY="], "WorkingDir": "/srv"}}
    assert read_image(told) == ({"A": "b=c", "EMPTY": ""}, "/srv")
