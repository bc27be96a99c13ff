"""From the sources of a container's first process to the code that its module carries.

``python -m tests.kohaku_daemon.backends.docker.assemble`` writes the code anew. It needs the
binutils of each machine: of Debian ``binutils`` and ``binutils-aarch64-linux-gnu`` on x86-64.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
import textwrap
from pathlib import Path
from typing import Final

from kohaku_daemon.backends.docker import init

MODULE: Final = Path(init.__file__)
MACHINES: Final = ("x86_64", "aarch64")


def source_of(machine: str) -> Path:
    return MODULE.with_name(f"init_{machine}.S")


def can_assemble(machine: str) -> bool:
    return shutil.which(_tool("as", machine)) is not None


def assemble(machine: str) -> bytes:
    """Give the code of one machine.

    Raises:
        subprocess.CalledProcessError: The source is wrong, or refers to what is not in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        made, linked, code = (Path(folder, name) for name in ("made", "linked", "code"))
        _run("as", machine, "--fatal-warnings", "-o", made, source_of(machine))
        # Though nothing is left to link: it fails if a name is not defined. Nothing in the code
        # depends on where it is, so any place will do for where it begins.
        _run("ld", machine, "--entry", "0", "-o", linked, made)
        _run("objcopy", machine, "--output-target", "binary", "--only-section", ".text",
             linked, code)  # fmt: skip
        return code.read_bytes()


def main() -> None:
    text = MODULE.read_text()
    for machine in MACHINES:
        lines = textwrap.indent(textwrap.fill(assemble(machine).hex(), 88), " " * 8)
        front, back = f'    "{machine}": bytes.fromhex("""\n', '\n    """)'
        before, _, rest = text.partition(front)
        old, end, after = rest.partition(back)
        assert end, f"{MODULE} has no place for the code of {machine}"
        assert not set(old) - set("0123456789abcdef \n"), f"{MODULE} has text among code"
        text = before + front + lines + back + after
    MODULE.write_text(text)


def _tool(name: str, machine: str) -> str:
    return name if machine == platform.machine() else f"{machine}-linux-gnu-{name}"


def _run(tool: str, machine: str, *arguments: str | Path) -> None:
    subprocess.run([_tool(tool, machine), *arguments], check=True, timeout=60)


if __name__ == "__main__":
    main()
