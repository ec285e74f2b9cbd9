"""Compiles the native kernels on first use and keeps the library in the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

__all__ = ["BuildError", "cache_folder", "library"]

SOURCES = Path(__file__).parent / "csrc"

# Contraction would fuse the multiplications and additions whose order is part of the contract.
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w")
_AVX512 = ("-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_X86 = {
    "TUTELAGE_AVX2": (("avx2",), ("-mavx2", "-mfma")),
    "TUTELAGE_VNNI": (("vnni", "block512", "rows512"), _AVX512),
    "TUTELAGE_AMX": (("amx",), (*_AVX512, "-mamx-tile", "-mamx-int8")),
}
"""Files that need instructions of their own; what the compiler does not know is left out."""
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
_SECONDS = 300


class BuildError(Exception):
    """The kernels could not be compiled; the message says why."""


def cache_folder() -> Path:
    """Returns where compiled kernels are kept.

    ``TUTELAGE_CACHE`` names it; else it is ``tutelage`` under ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    named = os.environ.get("TUTELAGE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tutelage"


def library() -> Path:
    """Returns the compiled library, compiling it where the cache has none that fits.

    Raises:
        BuildError: There is no compiler, it failed, or the cache cannot be written.
    """
    if sys.platform not in ("linux", "darwin"):
        raise BuildError(f"they are not built on {sys.platform}")
    compiler = _compiler()
    folder = cache_folder()
    target = folder / f"kernels-{_key(compiler)}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as work:
            os.replace(_compile(compiler, Path(work)), target)
    except OSError as error:
        raise BuildError(f"{folder} could not be written ({error.strerror or error})") from error
    return target


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        if shutil.which(command[0]) is None:
            raise BuildError(f"the compiler that CXX names, {command[0]!r}, was not found")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise BuildError("no C++ compiler was found; install g++ or clang++")


def _key(compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    parts = [version, torch.__version__.encode(), platform.machine().encode()]
    parts += [repr((_FLAGS, _X86, _STABLE_ABI)).encode()]
    for file in sorted(SOURCES.iterdir()):
        parts += [file.name.encode(), file.read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _compile(compiler: list[str], work: Path) -> Path:
    from torch.utils.cpp_extension import include_paths, library_paths

    objects, defines = [], [_STABLE_ABI]
    _run([*compiler, *_FLAGS, "-c", SOURCES / "scalar.cpp", "-o", work / "scalar.o"])
    objects.append(work / "scalar.o")
    if platform.machine().lower() in ("x86_64", "amd64"):
        for define, (names, flags) in _X86.items():
            made = [work / f"{name}.o" for name in names]
            try:
                for name, file in zip(names, made, strict=True):
                    _run([*compiler, *_FLAGS, *flags, "-c", SOURCES / f"{name}.cpp", "-o", file])
            except BuildError:
                break  # a compiler that does not know these knows none of the later ones
            objects += made
            defines.append(f"-D{define}")
    include = [f"-I{path}" for path in include_paths()]
    for name in ("ops", "encoder", "train"):
        file = work / f"{name}.o"
        _run([*compiler, *_FLAGS, *defines, *include, "-c", SOURCES / f"{name}.cpp", "-o", file])
        objects.append(file)
    link = [f"-L{path}" for path in library_paths()]
    built = work / "kernels.so"
    _run([*compiler, "-shared", *objects, *link, "-ltorch_cpu", "-lc10", "-o", built])
    return built


def _run(command: list[str | Path]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {_SECONDS} seconds") from error
    if done.returncode != 0:
        line = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr.strip())
        raise BuildError(f"{command[0]} failed: {line}")
