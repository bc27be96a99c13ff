"""The first process of a task's container: a static program of ours, in front of the task's.

Docker says 137 for a program that exits with 137 and for one that is killed, and 127 both for one
that is not there and for one that says so. It leads every byte of output through itself, and
loses what comes while nobody holds the other end. A first process that is not written for it
leaves zombies, and does not feel SIGTERM. So each container is started with this program: it is
mounted into it, and needs nothing of its image, no right, and no memory worth counting. It

- opens the files of the output to append to, and the status file, as the container's user;
- runs the program in a session of its own, with no signal ignored or blocked;
- waits for whoever ends, orphans as well, and hands on every other signal that it gets to
  every process of the container, as ``docker stop`` means them all;
- when the program has ended writes its wait status and ends too, with its code, or 128 and the
  number of the signal. The kernel then ends what the program has left behind.

**Arguments**: ``init STDOUT STDERR STATUS [CANDIDATE...] "" NAME [ARGUMENT...]``. The candidates
are tried in their order as by ``execvp`` (``man 3 exec``), but a text without ``#!`` is not given
to a shell. NAME and what follows are the program's own argv. See ``make_arguments``.

**The status file** is emptied at the start and gets one or two records, each by one ``write`` of
24 bytes, little-endian: ``kohaku01``, stage (u32), value (i32), wall-clock time in ns (i64). First
is ``BEGUN`` when the program has been executed, or why it cannot be: such a start has run
nothing. Last is ``ENDED`` with the wait status. The second fits into the block that the first has
got, so that a disk that the task itself has filled loses no exit. Nothing is synced: what a power
cut takes, Docker's word stands in for. So it does if init itself was killed, and never ``ENDED``.

**Exit codes** of its own, always with a record, but for the first two kinds of 125: 127 not found,
126 cannot be run, 125 wrong arguments, not pid 1, no status file (both of these say so on stderr,
which is Docker's log), no output file, no process.

It is assembler because nothing else is a kilobyte, needs no compiler where it is used, and can be
compared with its source: ``init_x86_64.S`` and ``init_aarch64.S`` beside this module. A test does.

Knows: that program, its arguments and records. Does not know: containers, images, tasks.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

#: Of init itself: it could not do its part, and the program has not been run.
REFUSED: Final = 125

_MAGIC: Final = b"kohaku01"
#: Magic, stage, value, time.
_RECORD: Final = struct.Struct("<8sIiq")
#: Longest useful status file.
STATUS_SIZE: Final = 2 * _RECORD.size

#: Greatest ``errno`` that a system call can give (Linux, include/linux/err.h).
_MAX_ERRNO: Final = 4095
#: Highest signal of Linux.
_MAX_SIGNAL: Final = 64

#: Where the program is in its own memory.
_BASE: Final = 0x400000
#: One header of the file and two of what to load.
_HEADERS: Final = 64 + 2 * 56
#: No machine of these has larger pages.
_PAGE: Final = 0x10000
#: ``e_machine`` of the ELF files of a machine (elf.h: EM_X86_64, EM_AARCH64).
_KINDS: Final[Mapping[str, int]] = {"x86_64": 62, "aarch64": 183}


class Stage(IntEnum):
    """How far init got. The numbers are also in its sources."""

    BEGUN = 1
    ENDED = 2
    NO_STDOUT = 3
    NO_STDERR = 4
    NO_PROCESS = 5
    NO_PROGRAM = 6


@dataclass(frozen=True, slots=True)
class Status:
    """What init has said of its program, so far."""

    stage: Stage
    #: When it was executed; None if it was not, or the disk was too full to say so.
    began_at_ns: int | None = None
    #: When it ended, or was found impossible to start; None while it runs.
    ended_at_ns: int | None = None
    #: As of ``waitpid``, once it has ended.
    wait_status: int | None = None
    #: Why it could not be started, else None.
    errno: int | None = None

    @property
    def code(self) -> int | None:
        """Its exit code, if it has ended and by itself."""
        if self.wait_status is None or os.WIFSIGNALED(self.wait_status):
            return None
        return os.WEXITSTATUS(self.wait_status)

    @property
    def signal(self) -> int | None:
        """The signal that ended it, if one did."""
        if self.wait_status is None or not os.WIFSIGNALED(self.wait_status):
            return None
        return os.WTERMSIG(self.wait_status)


def make_init(machine: str) -> bytes | None:
    """Make the program for a machine, as ``platform.machine`` calls it.

    Whoever writes it into a file renames it into its place: a file that anyone still has open for
    writing cannot be executed (ETXTBSY, ``man 2 execve``), not even by a fork that does not know.
    """
    code, kind = _CODE.get(machine), _KINDS.get(machine)
    if code is None or kind is None:
        return None
    size = _HEADERS + len(code)
    # ELF64, little-endian, executable; its code begins behind the headers. All of it is loaded,
    # to be read and run (PT_LOAD); the stack holds no code (PT_GNU_STACK).
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, kind, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, _PAGE)
    stack = struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16)
    return header + load + stack + code


def make_arguments(
    stdout: str, stderr: str, status: str, candidates: Sequence[str], argv: Sequence[str]
) -> list[str]:
    """Make what follows init's own name.

    Args:
        stdout: Path of a file, in the container, as the two after it.
        stderr: The same; may be that of stdout.
        status: The same.
        candidates: Paths of the program, see ``find_candidates``.
        argv: Of the program, its name first.

    Raises:
        ValueError: No argv, or an empty candidate: init would take what follows for argv.
    """
    if not argv:
        raise ValueError("a program has a name")
    if not all(candidates):
        raise ValueError("a path of a program is never empty")
    return [stdout, stderr, status, *candidates, "", *argv]


def find_candidates(name: str, search: str) -> list[str]:
    """Say where a program may be, in the order in which to look.

    Args:
        name: Of the program; with a slash it is a path, and nothing is searched.
        search: ``PATH`` of the container. An empty part of it is the working folder.
    """
    if not name:
        return []
    if "/" in name:
        return [name]
    return [f"{folder}/{name}" if folder else name for folder in search.split(":")]


def parse_status(data: bytes) -> Status | None:
    """Read a status file.

    None if it says nothing that init could have written: it is empty, or cut off, or the task has
    written into it. Who may write there may also write what looks right: a task can only lie
    about itself.
    """
    if len(data) not in (_RECORD.size, STATUS_SIZE):
        return None
    first, *rest = (_parse_record(*values) for values in _RECORD.iter_unpack(data))
    if not rest:
        return first
    last = rest[0]
    if first is None or first.stage is not Stage.BEGUN:
        return None
    if last is None or last.stage is not Stage.ENDED:
        return None
    return Status(last.stage, first.began_at_ns, last.ended_at_ns, last.wait_status)


def _parse_record(magic: bytes, stage: int, value: int, at_ns: int) -> Status | None:
    if magic != _MAGIC or at_ns < 0:
        return None
    match stage:
        case Stage.BEGUN:
            return Status(Stage.BEGUN, began_at_ns=at_ns) if value == 0 else None
        case Stage.ENDED:
            if not _is_wait_status(value):
                return None
            return Status(Stage.ENDED, ended_at_ns=at_ns, wait_status=value)
        case Stage.NO_STDOUT | Stage.NO_STDERR | Stage.NO_PROCESS | Stage.NO_PROGRAM:
            if not 0 < value <= _MAX_ERRNO:
                return None
            return Status(Stage(stage), ended_at_ns=at_ns, errno=value)
        case _:
            return None


def _is_wait_status(value: int) -> bool:
    """Whether it is that of a process that has ended (``man 2 wait``)."""
    number = value & 0x7F
    if number == 0:
        return value & ~0xFF00 == 0
    return number <= _MAX_SIGNAL and value & ~0xFF == 0  # 0x80 of these: it dumped core


# The sources' code, written here by tests/kohaku_daemon/backends/docker/assemble.py.
_CODE: Final[Mapping[str, bytes]] = {
    "x86_64": bytes.fromhex("""
        4889e54883ec30b8270000000f05bf01000000488d35f403000083f8010f8527030000bf16000000488d3508
        04000048837d00060f8210030000488d5d28488b034883c3084885c00f84fc02000080380075eb48833b000f
        84ed020000bf02000000488d355f03000031d241ba08000000b80e0000000f0541bc400000004489e7488d35
        4803000031d241ba08000000b80d0000000f0541ffcc75e2488b7520ba41060800e831020000488b75204189
        c489c7f7df85c00f888d020000488b7510ba41040800e810020000bf030000004189c585c00f885f02000048
        8b7518ba41040800e8f2010000bf040000004189c685c00f8841020000488d7dd0be00000800b8250100000f
        05bf0500000085c00f8824020000bf1100000031f631d24531d24531c0b8380000000f05bf0500000085c00f
        88010200000f84f60000004189c78b7dd4b8030000000f054489efb8030000000f054489f7b8030000000f05
        8b7dd0488d75d8ba0400000031c00f0583f8fc74eb85c00f8f920000008b7dd0b8030000000f05bf01000000
        31f6e865010000bfffffffff488d75d8ba010000404531d2b83d0000000f0585c07e2f4439f875dfbf020000
        008b75d8e8370100008b45f489c783e77f740b81c780000000e9d00100000fb6fce9c8010000488d3de30100
        0031f631d241ba08000000b8800000000f0585c07ee483f8117494bfffffffff89c6b83e0000000f05ebcfbf
        060000008b75d8e8dc000000bf7e000000837df4020f857b010000bf7f000000e971010000b8700000000f05
        4489efbe0100000031d2b8240100000f054489f7be0200000031d2b8240100000f05bf02000000488d356601
        000031d241ba08000000b80e0000000f05488b45004c8d64c5104c8d6d2841be02000000498b7d004983c508
        803f0074214889de4c89e2b83b0000000f0583f8fe74e183f8ec74dcf7d84189c683f80d74d2448975d88b7d
        d4488d75d8ba04000000b8010000000f05bf7f000000e9cb000000bf9cffffff41baa4010000b8010100000f
        0583f8037305b8f7ffffffc3488b05f1000000488945e8897df08975f431ff488d75d8b8e40000000f054869
        45d800ca9a3b480345e0488945f84489e7488d75e8ba18000000b8010000000f05c389c6f7dee8b5ffffffbf
        7d000000eb5c4889f389f8b90a0000004c8d6ddb41c745003a20000041be0300000031d2f7f183c23049ffcd
        4188550041ffce75ed488d3578000000e8280000004c89eee8200000004889dee818000000488d3570000000
        e80c000000bf7d000000b8e70000000f0531d2803c16007404ffc2ebf6bf02000000b8010000000f05c30000
        ffffffffffffffff00000000000000000000000000000000000000000000000000000000000000006b6f6861
        6b7530316b6f68616b752d696e69743a206572726e6f20000a006e6f74207468652066697273742070726f63
        657373206f66206120706964206e616d6573706163650077616e7465643a205354444f555420535444455252
        20535441545553205b43414e4449444154452e2e2e5d202727204e414d45205b415247554d454e542e2e2e5d
        00
    """),
    "aarch64": bytes.fromhex("""
        f3030091ffc300d1881580d2010000d422008052812000501f04007161190054c202805241210070600240f9
        1f1800f1c318005474a20091808640f8601800b400004039a0ffff35800240f9e01700b440008052e11b0010
        020080d2030180d2e81080d2010000d415088052e003152a411b0010020080d2030180d2c81080d2010000d4
        b506007121ffff54611240f9821b001890000094611240f9f503002ae203004b2015f837610a40f9c21a0018
        8900009479008052f603002ae013f837610e40f9021a00188300009499008052f703002a2013f837e0630091
        0101a052680780d2010000d4b90080526012f837200280d2010080d2020080d2030080d2040080d2881b80d2
        010000d46011f83760080034f803002ae01f40b9280780d2010000d4e003162a280780d2010000d4e003172a
        280780d2010000d4e01b40b9e1830091820080d2e80780d2010000d41f10003140ffff541f0000710c050054
        e01b40b9280780d2010000d4390080521a0080526000009400008012e183009142140018030080d2882080d2
        010000d41f0000716d0100541f00186be1feff5459008052fa2340b953000094403f0853411b0072600f0054
        200002117900001480100010010080d2020080d2030180d2281180d2010000d41f0000712dffff541f440071
        a0fcff54e103002a00008012281080d2010000d4f2ffff17d9008052fa2340b93c000094e00f80525f0b0071
        800c0054c00f805262000014a81380d2010000d4e003162a2100805202008052080380d2010000d4e003172a
        4100805202008052080380d2010000d440008052410c0010020080d2030180d2e81080d2010000d4600240f9
        750e008bb542009176a2009157008052c08640f801004039a1010034e10314aae20315aaa81b80d2010000d4
        e003004b1f080071e0feff541f500071a0feff54f703002a1f34007140feff54f72300b9e01f40b9e1830091
        820080d2080880d2010000d4e00f805234000014600c801283348052080780d2010000d41f0c007142000054
        00018012c0035fd6000080d2e1830091280e80d2010000d4e10b42a9200800182108009b40070058e00300f9
        f96b0129e10b00f9e003152ae1030091020380d2080880d2010000d4c0035fd6fa03004beeffff97a00f8052
        17000014f40301aa4301805244078452f68f0091c40200b9640080524508c31aa688031be203052ac6c00011
        c6fe1f388404007141ffff54a10400100a000094e10316aa08000094e10314aa060000948104001004000094
        a00f8052c80b80d2010000d4020080d2236862386300003442040091fdffff1740008052080880d2010000d4
        c0035fd600000000ffffffffffffffff00000000000000000000000000000000000000000000000000000000
        000000006b6f68616b75303141060800410408000100004000ca9a3b6b6f68616b752d696e69743a20657272
        6e6f20000a006e6f74207468652066697273742070726f63657373206f66206120706964206e616d65737061
        63650077616e7465643a205354444f55542053544445525220535441545553205b43414e4449444154452e2e
        2e5d202727204e414d45205b415247554d454e542e2e2e5d00
    """),
}
