"""Machines made of files."""

from pathlib import Path

import pytest

#: Two packages of four cores; core 7 is offline, 0 is not ours.
FILES = {
    "proc/sys/kernel/hostname": "gpu-1\n",
    "proc/sys/kernel/ostype": "Linux\n",
    "proc/sys/kernel/osrelease": "6.8.0-41-generic\n",
    "proc/sys/kernel/random/boot_id": "760e3a85-61f3-4427-8f9a-21b3c76fbcd2\n",
    "proc/self/status": "Name:\tpython\nCpus_allowed_list:\t1-7\nMems_allowed_list:\t0-1\n",
    "proc/self/cgroup": "0::/system.slice/kohakud.service\n",
    "proc/meminfo": (
        "MemTotal:       65536000 kB\nMemFree:         1000000 kB\nMemAvailable:   32768000 kB\n"
        "SwapTotal:       2000000 kB\nSwapFree:        1500000 kB\nHugePages_Total:       4\n"
    ),
    "proc/loadavg": "1.25 0.75 0.50 2/345 6789\n",
    "proc/stat": "cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2 3\n",
    "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
    "sys/devices/system/cpu/online": "0-6\n",
    "sys/devices/system/node/possible": "0-1\n",
    "sys/devices/system/node/node0/cpulist": "0-3\n",
    "sys/devices/system/node/node0/distance": "10 21\n",
    "sys/devices/system/node/node0/meminfo": (
        "Node 0 MemTotal:       32768000 kB\nNode 0 MemFree:        1000 kB\n"
    ),
    "sys/devices/system/node/node1/cpulist": "4-6\n",
    "sys/devices/system/node/node1/distance": "21 10\n",
    "sys/devices/system/node/node1/meminfo": "Node 1 MemTotal:       32000000 kB\n",
    "sys/bus/pci/devices/0000:3b:00.0/numa_node": "1\n",
    "sys/bus/pci/devices/0000:5e:00.0/numa_node": "-1\n",
    "sys/class/hwmon/hwmon0/name": "coretemp\n",
    "sys/class/hwmon/hwmon0/temp1_input": "54000\n",
    "sys/class/hwmon/hwmon0/temp1_label": "Package id 0\n",
    "sys/class/hwmon/hwmon0/temp2_input": "50000\n",
    "sys/class/hwmon/hwmon0/temp2_label": "Core 0\n",
    "sys/class/hwmon/hwmon1/name": "nvme\n",
    "sys/class/hwmon/hwmon1/temp1_input": "38850\n",
    "sys/class/hwmon/hwmon2/name": "nvme\n",
    "sys/class/hwmon/hwmon2/temp1_input": "41850\n",
    "sys/class/hwmon/hwmon10/name": "broken\n",
    "sys/class/hwmon/hwmon10/temp1_input": "-128000\n",
    "sys/class/hwmon/hwmon10/temp2_input": "nonsense\n",
    "sys/class/thermal/thermal_zone0/type": "acpitz\n",
    "sys/class/thermal/thermal_zone0/temp": "27800\n",
    "sys/class/thermal/thermal_zone1/type": "coretemp\n",
    "sys/class/thermal/thermal_zone1/temp": "54000\n",
}


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give the root folder of a machine."""
    root = tmp_path / "root"
    for name, text in FILES.items():
        put(root, name, text)
    return root
