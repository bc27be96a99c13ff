"""The image of tasks that name none: empty, with the machine's own programs mounted into it.

Knows: what a task sees of the machine, and what that takes. Does not know: tasks, engines.

Mounted, read only: the folders that the administrator names, ``/usr`` and ``/opt`` if nobody
does, and ``/bin``, ``/lib`` and the like where they are folders of their own. Of ``/etc`` it has
copies of what programs of these folders need to run, and none of what says who is who: root and
nobody are the only users. Nothing else of the machine is there.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Repository of these images; the tag is of what is in them.
MACHINE_REPOSITORY: Final = "kohaku/machine"

#: Where programs and libraries are that live outside of /usr on some machines.
_BESIDE_USR: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
#: Files and folders of /etc that programs need, and that are the same for everybody.
_ETC: Final = (
    "alternatives", "ca-certificates.conf", "fonts", "gai.conf", "host.conf", "ld.so.cache",
    "ld.so.conf", "ld.so.conf.d", "localtime", "locale.alias", "magic", "magic.mime",
    "mailcap", "mime.types", "networks", "OpenCL", "os-release", "protocols", "python3",
    "services", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone", "vulkan",
)  # fmt: skip
_MADE: Final = {
    "etc/passwd": "root:x:0:0:root:/local_temp:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/local_temp:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    # Whatever directory service the machine asks, there is none to be asked from here.
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nnetworks: files\n",
}
_FOLDERS: Final = {
    "dev": 0o755, "etc": 0o755, "local_temp": 0o755, "mnt": 0o755, "opt": 0o755, "proc": 0o755,
    "root": 0o700, "run": 0o755, "shared": 0o755, "sys": 0o755, "tmp": 0o1777, "usr": 0o755,
    "var": 0o755, "var/tmp": 0o1777, "etc/ssl": 0o755,
}  # fmt: skip
#: More than any of these has; what is larger is left out.
_LARGEST_FILE: Final = 8 * 2**20


@dataclass(frozen=True, slots=True)
class MachineImage:
    """An image that is not made yet, and what is mounted into its containers."""

    #: Such as ``kohaku/machine:0123456789ab``.
    reference: str
    #: A tar of its files.
    content: bytes
    #: Folders of the machine that are mounted, read only, at their own paths.
    folders: tuple[str, ...]


def build_machine_image(folders: Sequence[Path], root: Path = Path("/")) -> MachineImage:
    """Look at the machine. The same machine gives the same image.

    Args:
        folders: What the administrator names.
        root: Of the machine's files; tests give another one.
    """
    buffer = io.BytesIO()
    # GNU's format has nothing in it that depends on the time it is written.
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, mode in _FOLDERS.items():
            _add_folder(tar, name, mode)
        for name in _links(root):
            _add_link(tar, name, os.readlink(root / name))
        for name, text in _MADE.items():
            _add_file(tar, name, text.encode())
        for name in _ETC:
            _add_tree(tar, root, f"etc/{name}")
    content = buffer.getvalue()
    mounted = [folder for folder in folders if (root / folder.relative_to("/")).is_dir()]
    beside = [f"/{name}" for name in _BESIDE_USR if _is_own_folder(root / name)]
    digest = hashlib.sha256(content).hexdigest()
    return MachineImage(
        f"{MACHINE_REPOSITORY}:{digest[:12]}", content, (*map(str, mounted), *beside)
    )


def _links(root: Path) -> Iterator[str]:
    """Name what is a link into /usr here (merged /usr: file-hierarchy(7))."""
    return (name for name in _BESIDE_USR if (root / name).is_symlink())


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _add_tree(tar: tarfile.TarFile, root: Path, name: str) -> None:
    """Copy a file or folder, links as they are, but that at the top, as far as all may read it."""
    path = root / name
    if path.is_dir():
        _add_folder(tar, name, 0o755)
        for inside in sorted(os.listdir(path)):
            below = f"{name}/{inside}"
            if (root / below).is_symlink():
                _add_link(tar, below, os.readlink(root / below))
            else:
                _add_tree(tar, root, below)
    elif path.is_file() and path.stat().st_mode & 0o004 and path.stat().st_size <= _LARGEST_FILE:
        _add_file(tar, name, path.read_bytes())


def _add_folder(tar: tarfile.TarFile, name: str, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    tar.addfile(entry)


def _add_link(tar: tarfile.TarFile, name: str, target: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    tar.addfile(entry)


def _add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))
