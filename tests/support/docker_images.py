"""Images made from the machine's own programs, without a network: files as `docker load` takes.

Knows: the format that ``docker save`` writes (Docker image specification v1.2, "Combined Image
JSON + Filesystem Changeset Format"), which programs of Debian run in a container. Does not know:
engines.

The same machine gives the same bytes, so an image keeps its id over loads and engines.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}

#: The only ordinary user of these images, uid and gid 1000.
WORKER: Final = "worker"

_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_PASSWD: Final = f"root:x:0:0:root:/root:/bin/sh\n{WORKER}:x:1000:1000::/home/{WORKER}:/bin/sh\n"
_GROUP: Final = f"root:x:0:\n{WORKER}:x:1000:\n"


def busybox_image(
    tag: str,
    *,
    env: Mapping[str, str] | None = None,
    workdir: str = "",
    user: str = "",
    command: Sequence[str] = ("/bin/sh",),
    files: Mapping[str, bytes] | None = None,
) -> bytes:
    """Make an image of busybox with all its names, 2 MB: a shell, /tmp, root and ``worker``.

    Args:
        tag: Such as ``bb:1``.
        env: Variables besides PATH.
        workdir: WORKDIR.
        user: USER.
        command: CMD.
        files: More files by absolute path, in a layer of their own.
    """
    config = {
        "Env": [f"{name}={value}" for name, value in {"PATH": _PATH, **(env or {})}.items()],
        "Cmd": list(command),
        "WorkingDir": workdir,
        "User": user,
    }
    layers = [_busybox_layer()]
    if files:
        layers.append(_layer_of(files))
    return saved(tag, layers, config)


def bare_image(tag: str) -> bytes:
    """Make an image of one file, ``/busybox``: no /bin/sh, no /tmp, no user, not even a PATH.

    Run ``/busybox echo hi``: by any other name it would look for a program of that name.
    """
    program = _program("busybox", "busybox-static").read_bytes()
    return saved(tag, [_layer_of({"/busybox": program})], {"Cmd": ["/busybox", "true"]})


def python_image(tag: str) -> bytes:
    """Make an image of busybox and the machine's own Python with its library, about 40 MB.

    ``python3 -c 'print(6*7)'`` runs in it, and every module of the standard library that needs
    neither a screen nor pip.
    """
    return saved(
        tag, [_busybox_layer(), _python_layer()], {"Env": [f"PATH={_PATH}"], "Cmd": ["python3"]}
    )


def big_image(file: Path, tag: str, size: int, *, layers: int = 4) -> Path:
    """Write an image with ``size`` bytes that do not compress, in as many ``layers``, to ``file``.

    Under busybox, so that it runs. Layer N holds ``/noise/N``. 500 MB take about 2 s.
    """
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
        system = _busybox_layer()
        digests, names = [hashlib.sha256(system).hexdigest()], ["0/layer.tar"]
        _add(archive, names[0], system)
        for number in range(1, layers + 1):
            length = size // layers + (size % layers if number == layers else 0)
            noise = _NoiseLayer(number, length)
            entry = tarfile.TarInfo(f"{number}/layer.tar")
            entry.size = noise.size
            archive.addfile(entry, io.BufferedReader(noise, 2**20))
            digests.append(noise.digest())
            names.append(entry.name)
        _add_manifest(archive, tag, names, digests, {"Env": [f"PATH={_PATH}"], "Cmd": ["/bin/sh"]})
    return file


def saved(tag: str, layers: Sequence[bytes], config: Mapping[str, object]) -> bytes:
    """Give what ``docker save`` writes for these layers, each an uncompressed tar."""
    digests = [hashlib.sha256(layer).hexdigest() for layer in layers]
    names = [f"{digest}/layer.tar" for digest in digests]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, layer in zip(names, layers, strict=True):
            _add(archive, name, layer)
        _add_manifest(archive, tag, names, digests, config)
    return buffer.getvalue()


def _add_manifest(
    archive: tarfile.TarFile,
    tag: str,
    names: Sequence[str],
    digests: Sequence[str],
    config: Mapping[str, object],
) -> None:
    described = json.dumps(
        {
            "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "created": "2024-01-01T00:00:00Z",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
        }
    ).encode()
    name = f"{hashlib.sha256(described).hexdigest()}.json"
    manifest = [{"Config": name, "RepoTags": [tag], "Layers": list(names)}]
    _add(archive, name, described)
    _add(archive, "manifest.json", json.dumps(manifest).encode())


def _add(archive: tarfile.TarFile, path: str, content: bytes, mode: int = 0o644) -> None:
    # Without times and owners of whoever makes it: the same content is the same bytes.
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))


def _add_folder(archive: tarfile.TarFile, path: str, mode: int = 0o755, owner: int = 0) -> None:
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, mode, owner, owner
    archive.addfile(entry)


def _add_link(archive: tarfile.TarFile, path: str, target: str) -> None:
    entry = tarfile.TarInfo(path)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    archive.addfile(entry)


@contextmanager
def _layer() -> Iterator[tuple[io.BytesIO, tarfile.TarFile]]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as layer:
        yield buffer, layer


def _layer_of(files: Mapping[str, bytes]) -> bytes:
    with _layer() as (buffer, layer):
        for path, content in sorted(files.items()):
            _add(layer, path.lstrip("/"), content, mode=0o755)
    return buffer.getvalue()


@cache
def _busybox_layer() -> bytes:
    busybox = _program("busybox", "busybox-static")
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    with _layer() as (buffer, layer):
        for folder in ("bin", "etc", "home", "proc", "root", "sys", "usr", "usr/bin", "var"):
            _add_folder(layer, folder)
        _add_folder(layer, "tmp", mode=0o1777)
        _add_folder(layer, f"home/{WORKER}", owner=1000)
        _add(layer, "etc/passwd", _PASSWD.encode())
        _add(layer, "etc/group", _GROUP.encode())
        _add(layer, "bin/busybox", busybox.read_bytes(), mode=0o755)
        for name in sorted(set(listed.stdout.split()) - {"busybox"}):
            _add_link(layer, f"bin/{name}", "/bin/busybox")
    return buffer.getvalue()


@cache
def _python_layer() -> bytes:
    # Debian's own: one that was built elsewhere keeps its files somewhere else.
    python = _program("python3", "python3").resolve()
    asked = "import sysconfig; print(sysconfig.get_path('stdlib'))"
    told = subprocess.run([python, "-I", "-c", asked], capture_output=True, text=True, check=True)
    library = Path(told.stdout.strip())
    modules = [
        file
        for file in sorted(library.rglob("*"))
        if file.is_file() and not _UNUSED.search(f"/{file.relative_to(library)}")
    ]
    programs = [python, *(file for file in modules if file.suffix == ".so")]
    with _layer() as (buffer, layer):
        for file in [*programs[:1], *modules, *_libraries_of(programs)]:
            # Through links: what they lead to may be left out.
            _add(layer, str(file).lstrip("/"), file.read_bytes(), mode=0o755)
        if python != Path("/usr/bin/python3"):
            _add_link(layer, "usr/bin/python3", str(python))
    return buffer.getvalue()


#: What nobody runs in a test, two thirds of all the bytes.
_UNUSED: Final = re.compile(
    r"/(__pycache__|config-[^/]*|(dist|site)-packages|distutils|ensurepip|idlelib|lib2to3"
    r"|pydoc_data|test|tests|tkinter|turtledemo)/"
)


def _libraries_of(programs: Sequence[Path]) -> list[Path]:
    """The shared libraries that these files load, and the loader itself."""
    told = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True)
    # man 1 ldd: "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)", "/lib64/ld-linux… (0x…)".
    found = re.findall(r"^\s+(?:\S+ => )?(/\S+) \(0x", told.stdout, re.MULTILINE)
    return [Path(path) for path in sorted(set(found))]


class _NoiseLayer(io.RawIOBase):
    """A layer of one file that nothing compresses, made while it is read."""

    def __init__(self, number: int, length: int) -> None:
        entry = tarfile.TarInfo(f"noise/{number}")
        entry.size = length
        head = entry.tobuf(tarfile.GNU_FORMAT)
        # Padded to whole blocks, then two blocks of zeros end the archive.
        tail = bytes(-length % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)
        self.size = len(head) + length + len(tail)
        self._pieces = chain([head], _noise(number, length), [tail])
        self._rest = b""
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        """Yes: BufferedReader asks."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Give the next bytes, as the readers of ``io`` want them."""
        place = memoryview(buffer)
        self._rest = self._rest or next(self._pieces, b"")
        taken, self._rest = self._rest[: len(place)], self._rest[len(place) :]
        self._digest.update(taken)
        place[: len(taken)] = taken
        return len(taken)

    def digest(self) -> str:
        """Give SHA-256 of what was read."""
        return self._digest.hexdigest()


def _noise(seed: int, length: int) -> Iterator[bytes]:
    chance = Random(seed)
    while length:
        piece = chance.randbytes(min(length, 2**20))
        length -= len(piece)
        yield piece


def _program(name: str, package: str) -> Path:
    found = shutil.which(name, path="/usr/bin:/bin") or shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is missing; on Debian: apt-get install {package}")
    return Path(found)
