"""Sensors by name, without nonsense and without duplicates."""

from pathlib import Path

from kohaku_daemon.probe.temperatures import Thermometers
from tests.kohaku_daemon.probe.conftest import put


def test_sensors_are_read(root: Path) -> None:
    assert Thermometers(root).read() == {
        "coretemp Package id 0": 54.0,
        "nvme": 38.85,
        "nvme #2": 41.85,
        "acpitz": 27.8,
    }


def test_a_sensor_is_read_anew_each_time_and_may_go_away(root: Path) -> None:
    thermometers = Thermometers(root)
    put(root, "sys/class/hwmon/hwmon1/temp1_input", "60000\n")
    (root / "sys/class/hwmon/hwmon2/temp1_input").unlink()
    readings = thermometers.read()
    assert readings["nvme"] == 60.0
    assert "nvme #2" not in readings


def test_a_machine_without_sensors_has_no_readings(tmp_path: Path) -> None:
    assert Thermometers(tmp_path).read() == {}
