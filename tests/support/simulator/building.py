"""Compiles the CUDA kernels and the simulator with g++.

Objects are kept in build/simulator under a hash of the flags, the source and all files that it includes.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.paths import CSRC, REPOSITORY, SIMULATOR

SOURCES = (
    *(
        path for path in sorted((CSRC / "cuda/kernels").glob("*.cu")) if "sm90a" not in path.stem
    ),  # hopper.cpp includes those
    *sorted((CSRC / "plan").rglob("*.cpp")),
    *sorted(SIMULATOR.glob("*.cpp")),
)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def missing() -> str:
    """Why the simulator cannot be built here; empty: it can."""
    if compiler() is None:
        return "the simulated kernels are compiled by g++, which is not installed"
    return ""


def _flags(sanitize: bool) -> list[str]:
    flags = [
        "-x",
        "c++",
        "-std=c++20",
        "-O0" if sanitize else "-O2",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",  # nvcc's `unroll`
    ]
    flags += ["-Icsrc", f"-I{SIMULATOR}"]
    if platform.machine() == "x86_64" and "avx2" in _cpu_flags() and "f16c" in _cpu_flags():
        flags += ["-march=x86-64-v3"]
    if sanitize:
        flags += ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
    return flags


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return frozenset(found.group(1).split() if found else ())


def _content(source: Path, seen: set[Path]) -> bytes:
    """The text of a source and of all our files that it includes."""
    seen.add(source)
    text = source.read_bytes()
    parts = [text]
    for name in re.findall(rb'^#include "(.+)"', text, re.MULTILINE):
        for folder in (source.parent, CSRC, SIMULATOR):
            path = (folder / name.decode()).resolve()
            if path.exists() and path not in seen:
                parts.append(_content(path, seen))
    return b"".join(parts)


@functools.cache
def build(sanitize: bool = False) -> Path:
    """The library of all kernels; with ``sanitize`` the program that `harness.sanitized` runs."""
    command = compiler()
    assert command is not None, missing()
    folder = REPOSITORY / "build/simulator"
    folder.mkdir(parents=True, exist_ok=True)

    def flags_for(source: Path) -> list[str]:
        return _flags(sanitize and CSRC / "plan" not in source.parents)  # the planner is checked elsewhere

    def object_for(source: Path) -> Path:
        key = hashlib.sha256(
            repr((Path(command).name, flags_for(source))).encode() + _content(source, set())
        ).hexdigest()[:16]
        return folder / f"{source.stem}-{key}.o"

    def compile_one(source: Path, target: Path) -> None:
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.part")  # a process that is killed leaves no half-written object
            _call([command, *flags_for(source), "-c", str(source.relative_to(REPOSITORY)), "-o", str(part)])
            os.replace(part, target)

    sources = [source for source in SOURCES if sanitize or source.name != "replay.cpp"]
    objects = [object_for(source) for source in sources]
    names = [path.name for path in objects]  # not the folder: the library may be carried to another machine
    key = hashlib.sha256(repr(names).encode()).hexdigest()[:16]
    target = folder / (f"kernels_sanitized-{key}" if sanitize else f"kernels-{key}.so")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of a test run's processes, which all need it, one compiles
        if target.exists():
            return target
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(compile_one, sources, objects))
        kind = ["-fsanitize=address,undefined"] if sanitize else ["-shared", "-Wl,--no-undefined"]
        part = target.with_suffix(f".{os.getpid()}.part")
        _call([command, *kind, *map(str, objects), "-o", str(part)])
        os.replace(part, target)
    return target


def _call(command: list[str]) -> None:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
