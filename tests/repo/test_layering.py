"""The include rules: the order of csrc/'s folders, and which of them may know of torch and of CUDA."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import CSRC

SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu", ".inc"))
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

TORCH = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$")
# The toolkit's headers. The project's own csrc/cuda/*.h are judged by what they include.
CUDA = re.compile(r"^(cuda\w*\.h$|cuda/std|cublas|cudnn|cute/|cutlass/|nvrtc)")
DEVICE_CODE = re.compile(r".*\.cuh?$")
PLAIN_CPP = re.compile(r"^[a-z_]+$")  # <vector>, <cstdint>: the standard library has no dots or slashes

# folder -> what its files must not include, directly or through other headers
FORBIDDEN = {
    "plan": (TORCH, CUDA, DEVICE_CODE),
    "plan/cpu": (TORCH, CUDA, DEVICE_CODE),
    "plan/gpu": (TORCH, CUDA, DEVICE_CODE),
    "cpu/kernels": (TORCH, CUDA, DEVICE_CODE),
    "cuda/kernels": (TORCH,),
    "ops": (CUDA, DEVICE_CODE),
    "cpu": (CUDA, DEVICE_CODE),
    "cuda": (DEVICE_CODE,),
    "python": (CUDA, DEVICE_CODE),
}
# From the ground up: a folder includes from those before it, and from itself.
FLOORS = (
    ("plan",),
    ("plan/cpu",),
    ("plan/gpu",),
    ("cpu/kernels", "cuda/kernels"),
    ("ops",),
    ("cpu", "cuda"),
    ("python",),
)
HEIGHT = {folder: height for height, folders in enumerate(FLOORS) for folder in folders}


def folder_of(path: Path) -> str:
    return path.relative_to(CSRC).parent.as_posix()


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def reachable(path: Path) -> set[Path]:
    """A source file and every header of this project that it includes, directly or not."""
    seen: set[Path] = set()
    pending = [path.resolve()]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in includes(current):
            candidates = (current.parent / name, CSRC / name)
            pending += [candidate.resolve() for candidate in candidates if candidate.is_file()]
    return seen


def test_the_rules_are_applied_to_something() -> None:
    assert SOURCES
    assert list((CSRC / "plan").glob("*.h"))
    assert any(TORCH.match(name) for path in SOURCES for name in includes(path))


def test_the_patterns_tell_the_toolkit_from_the_project() -> None:
    for name in ("cuda.h", "cuda_runtime_api.h", "cuda_bf16.h", "cuda/std/array", "cublas_v2.h"):
        assert CUDA.match(name), name
    for name in ("cuda/bind_cuda.h", "cuda/device.h", "gpu_device.h"):
        assert not CUDA.match(name), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes(path: Path) -> None:
    """Also through other headers of the project."""
    folder = folder_of(path)
    rules = FORBIDDEN[folder]
    for source in reachable(path):
        for name in includes(source):
            broken = any(rule.match(name) for rule in rules)
            assert not broken, f"{source.relative_to(CSRC)} includes {name}, which {folder}/ must not know"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_come_from_lower_folders(path: Path) -> None:
    own = folder_of(path)
    for name in includes(path):
        other = (CSRC / name).resolve()
        if other.is_file():
            found = folder_of(other)
            assert found == own or HEIGHT[found] < HEIGHT[own], f"csrc/{own} must not include {name}: it is not below"


@pytest.mark.parametrize("folder", ["plan", "cpu/kernels"])
def test_only_the_standard_library_and_the_project(folder: str) -> None:
    # C headers there on purpose: those of C++ bring inline functions that two instruction sets would share.
    intrinsics = {"immintrin.h", "math.h", "stdint.h", "string.h"} if folder == "cpu/kernels" else set()
    for path in SOURCES:
        if not path.relative_to(CSRC).as_posix().startswith(folder + "/"):
            continue
        for name in includes(path):
            own = (path.parent / name).is_file() or (CSRC / name).is_file()
            assert own or PLAIN_CPP.match(name) or name in intrinsics, f"{path.name} includes {name}"


def test_the_cuda_host_code_holds_no_kernels() -> None:
    """It is compiled by the C++ compiler, with torch's headers; kernels by nvcc, without."""
    host = [path for path in SOURCES if folder_of(path) == "cuda"]
    assert host
    for path in host:
        text = path.read_text()
        assert path.suffix in (".h", ".cpp"), path
        for word in ("<<<", "__global__", "__device__", "__CUDACC__"):
            assert word not in text, f"{path.name} contains {word}"


def test_kernels_are_launched_by_one_file_an_op_and_family() -> None:
    launch = (CSRC / "cuda/kernels" / "launch.h").read_text()
    declared = set(re.findall(r"cudaError_t launch_(\w+)\(", launch))
    assert declared == {path.stem for path in (CSRC / "cuda/kernels").glob("*.cu")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_headers_guard_themselves(path: Path) -> None:
    assert path.suffix not in (".h", ".cuh") or "#pragma once" in path.read_text()
