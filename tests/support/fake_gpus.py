"""Fake GPUs: a stand-in for NVIDIA's library, compiled where there is a C compiler."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("fake_nvml.c")


def build_fake_nvml(folder: Path, *flags: str) -> Path:
    """Put ``libnvidia-ml.so.1`` into ``folder``, for LD_LIBRARY_PATH; skip without gcc."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing: it compiles the stand-in for NVIDIA's library")
    library = folder / "libnvidia-ml.so.1"
    soname = f"-Wl,-soname,{library.name}"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        soname,
        *warnings,
        *flags,
        "-o",
        str(library),
        str(SOURCE),
    ]
    subprocess.run(command, check=True)
    return folder
