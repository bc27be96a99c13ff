"""A machine with two real NUMA nodes: a guest that QEMU emulates, read by our own parser.

The kernel in it makes the files that people's machines have; our samples are only as good as
whoever wrote them. Three seconds with TCG, no KVM, network or disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kohaku_daemon.probe.files import parse_list, read_text
from kohaku_daemon.probe.numa import read_numa, read_pci_numa

MIB = 2**20
#: Of its 512 MiB, what each NUMA node has. The kernel takes some before it counts.
NEAR_MIB, FAR_MIB = 320, 192
#: Prints every file that the parsers read. Its serial line is the only way out of the guest.
INIT = """#!/bin/busybox sh
/bin/busybox mkdir /sys
/bin/busybox mount -t sysfs sys /sys
for file in /sys/devices/system/cpu/online /sys/devices/system/node/node*/cpulist \
    /sys/devices/system/node/node*/distance /sys/devices/system/node/node*/meminfo \
    /sys/bus/pci/devices/*/numa_node; do
  echo "FILE $file"
  /bin/busybox cat $file
done
echo END
/bin/busybox poweroff -f
"""
#: A device behind a bridge of the second node, as GPUs are.
HARDWARE = f"""
-accel tcg -machine q35 -cpu max -smp 4 -m {NEAR_MIB + FAR_MIB}
-object memory-backend-ram,id=near,size={NEAR_MIB}M
-object memory-backend-ram,id=far,size={FAR_MIB}M
-numa node,nodeid=0,cpus=0-1,memdev=near -numa node,nodeid=1,cpus=2-3,memdev=far
-numa dist,src=0,dst=1,val=21
-device pxb-pcie,id=bridge,bus=pcie.0,bus_nr=128,numa_node=1
-device pcie-root-port,id=plug,bus=bridge,chassis=1 -device virtio-rng-pci,bus=plug
-nodefaults -no-user-config -display none -serial stdio -no-reboot
"""
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kohaku-tests"

pytestmark = pytest.mark.slow


def find_kernel(folder: Path) -> Path:
    """Give a kernel to boot: the machine's, or Debian's for clouds, brought once and kept."""
    for place in (Path("/boot"), CACHE):
        for kernel in sorted(place.glob("vmlinuz-*"), reverse=True):
            if os.access(kernel, os.R_OK):
                return kernel
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("no /boot/vmlinuz-* to boot, and no apt-get to bring one")
    rows = subprocess.check_output(["apt-cache", "depends", "linux-image-cloud-amd64"], text=True)
    (package,) = (row.split()[1] for row in rows.splitlines() if "Depends: linux-image-" in row)
    subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, timeout=120)
    (archive,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "--extract", archive, folder / "kernel"], check=True, timeout=120)
    (kernel,) = (folder / "kernel/boot").glob("vmlinuz-*")
    CACHE.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(kernel, CACHE / kernel.name))


def make_initrd(folder: Path) -> Path:
    """Pack a root file system that is busybox and one script."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is missing: on Debian, apt-get install busybox-static")
    tree = folder / "tree"
    (tree / "bin").mkdir(parents=True)
    shutil.copy(busybox, tree / "bin/busybox")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    names = "\n".join(("init", "bin", "bin/busybox"))
    packed = subprocess.run(
        [busybox, "cpio", "-o", "-H", "newc"], cwd=tree, input=names.encode(), check=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    initrd = folder / "initrd"
    initrd.write_bytes(packed.stdout)
    return initrd


def boot(kernel: Path, initrd: Path) -> str:
    """Run the guest to its end and give what it printed."""
    guest = subprocess.run(
        [
            "qemu-system-x86_64", *HARDWARE.split(), "-kernel", kernel, "-initrd", initrd,
            "-append", "console=ttyS0 quiet loglevel=0 panic=-1",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
        check=False,
    )  # fmt: skip
    text = guest.stdout.decode(errors="replace").replace("\r", "")
    assert "\nEND" in text, f"the guest did not come to its end:\n{text[-2000:]}"
    return text.partition("\nEND")[0]


def write_files(printed: str, root: Path) -> list[str]:
    """Write what the guest printed as the files it read."""
    names = []
    for part in printed.split("FILE /")[1:]:
        name, _, text = part.partition("\n")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        names.append(name)
    return names


@pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None,
    reason="qemu-system-x86_64 is missing: on Debian, apt-get install qemu-system-x86",
)
def test_two_real_numa_nodes_are_read_as_the_kernel_shows_them(tmp_path: Path) -> None:
    root = tmp_path / "root"
    names = write_files(boot(find_kernel(tmp_path), make_initrd(tmp_path)), root)
    cores = parse_list(read_text(root / "sys/devices/system/cpu/online"))
    near, far = read_numa(root, cores, memory=0)
    assert (near.number, near.cores, near.distances) == (0, (0, 1), (10, 21))
    assert (far.number, far.cores, far.distances) == (1, (2, 3), (21, 10))
    assert 0.7 * NEAR_MIB < near.memory / MIB <= NEAR_MIB
    assert 0.7 * FAR_MIB < far.memory / MIB <= FAR_MIB

    devices = [name.split("/")[-2] for name in names if name.endswith("/numa_node")]
    # As NVML writes addresses: eight digits of domain, large letters.
    on_far = [bus for bus in devices if read_pci_numa(root, f"0000{bus}".upper()) == 1]
    assert [bus for bus in on_far if bus.startswith("0000:81:")], f"{on_far} of {devices}"
    assert "0000:00:00.0" in devices
    assert read_pci_numa(root, "0000:00:00.0") is None, "its firmware does not say where it is"
