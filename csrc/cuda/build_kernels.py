"""Compiles csrc/cuda/kernels/*.cu with nvcc, without torch: for setup.py, and as a script.

python -m csrc.cuda.build_kernels      compiles all of them into build/cuda/ and prints the seconds of each

CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are read as setup.py describes. The assembler's report (registers, spills)
lies beside each object (.messages).
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from csrc.compile import compile_source, jobs

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc/cuda/kernels"
# Newer GPUs can run the build only because of a "+PTX"; the PTX of the oldest architecture serves every newer one.
DEFAULT_ARCHITECTURES = "8.0+PTX;8.6;8.9;9.0;10.0;12.0"
OLDEST_NVCC = 12
# torch.utils.cpp_extension takes these names too.
NAMED_ARCHITECTURES = {
    "turing": "7.5+PTX",
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;12.0+PTX",
}
FLAGS = [
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-Werror=all-warnings",
    "-Xcompiler=-fPIC,-Wall",
    "-Xptxas=-v",
    f"-I{ROOT / 'csrc'}",
]
SMALLER = "--compress-mode=size"  # a seventh of the size; needs nvcc 13, whose code needs a driver that can read it


@dataclass(frozen=True)
class Architecture:
    """One entry of an architecture list: 9.0 is number 90; 9.0a has the suffix "a" and runs on that GPU alone."""

    number: int
    suffix: str = ""
    ptx: bool = False

    @property
    def name(self) -> str:
        return f"{self.number}{self.suffix}"

    def flags(self, front_end: str = "") -> list[str]:
        """nvcc's flags for machine code, by the PTX of `front_end` (an older architecture), and for PTX if `ptx`."""
        flags = ["-gencode", f"arch=compute_{front_end or self.name},code=sm_{self.name}"]
        return flags + (["-gencode", f"arch=compute_{self.name},code=compute_{self.name}"] if self.ptx else [])


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: the compiler, its version, the folders of its headers and libraries."""

    compiler: str
    version: str
    include: str
    libraries: str


def architectures(text: str) -> list[Architecture]:
    """TORCH_CUDA_ARCH_LIST's syntax: entries such as 8.0, 9.0a, 8.6+PTX or Ampere, between semicolons or spaces."""
    found = []
    for name in filter(None, re.split(r"[;,\s]+", text)):
        if name.lower() in NAMED_ARCHITECTURES:
            found += architectures(NAMED_ARCHITECTURES[name.lower()])
            continue
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise RuntimeError(
                f"TORCH_CUDA_ARCH_LIST: each entry must be a compute capability such as 8.0, 9.0a or 8.6+PTX, or one "
                f"of {', '.join(map(str.title, NAMED_ARCHITECTURES))}; got {name!r}"
            )
        found.append(Architecture(int(match[1] + match[2]), match[3], bool(match[4])))
    return list(dict.fromkeys(found))


def toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME or of PATH; None if there is none.

    Raises:
        RuntimeError: it is too old, or files of it are missing.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    compiler = shutil.which(str(pathlib.Path(home, "bin", "nvcc")) if home else "nvcc")
    if compiler is None and home is None:
        compiler = shutil.which("/usr/local/cuda/bin/nvcc")
    if compiler is None:
        return None
    told = subprocess.run([compiler, "--version"], check=True, text=True, capture_output=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", told)
    if version is None or int(version[1]) < OLDEST_NVCC:
        raise RuntimeError(
            f"lowrank_ops: {compiler} must be nvcc {OLDEST_NVCC}.0 or newer, got {version[0] if version else told!r}; "
            "set CUDA_HOME to a newer toolkit, or LOWRANK_OPS_CUDA=0 to build without CUDA kernels"
        )
    # The compiler may be a wrapper script somewhere else, so it is asked itself where its headers and libraries are.
    dry = subprocess.run([compiler, "--dryrun", "-E", "-x", "cu", os.devnull], text=True, capture_output=True).stderr
    folders = {name: re.findall(r'"-[IL]([^"]+)"', line) for name, line in re.findall(r"#\$ (\w+)=(.*)", dry)}
    libraries = [
        folder for folder in folders.get("LIBRARIES", []) if pathlib.Path(folder, "libcudart_static.a").exists()
    ]
    includes = [f for f in folders.get("INCLUDES", []) if pathlib.Path(f, "cuda_runtime_api.h").exists()]
    if not libraries or not includes:
        raise RuntimeError(
            f"lowrank_ops: {compiler} has no cuda_runtime_api.h or libcudart_static.a where it looks ({folders}): "
            "install the toolkit's runtime development files (package nvidia-cuda-runtime)"
        )
    return Toolkit(compiler, version[0].split()[1], includes[0], libraries[0])


def wanted_architectures(tools: Toolkit) -> list[Architecture]:
    """The architectures of TORCH_CUDA_ARCH_LIST; if it is not set, the default ones that this nvcc supports."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if listed:
        return architectures(listed)
    told = subprocess.run([tools.compiler, "--list-gpu-code"], check=True, text=True, capture_output=True).stdout
    return [entry for entry in architectures(DEFAULT_ARCHITECTURES) if f"sm_{entry.number}" in told.split()]


def architecture_flags(source: pathlib.Path, wanted: list[Architecture]) -> list[str]:
    """nvcc's -gencode flags of a file: all architectures; `*_sm80.cu`: those from 8.0 on; `*_sm90a.cu`: 9.0a alone."""
    suffix = re.search(r"_sm(\d+)([a-z]?)$", source.stem)
    if suffix and suffix[2]:
        return Architecture(int(suffix[1]), suffix[2]).flags()
    fitting = [entry for entry in wanted if not suffix or entry.number >= int(suffix[1])]
    if not fitting:  # the launchers must exist nevertheless, and PTX takes the least time
        return ["-gencode", f"arch=compute_{suffix[1]},code=compute_{suffix[1]}"] if suffix else []
    # One front end for all takes half of the time; the kernels use only instructions that the oldest architecture has.
    front_end = min((entry.name for entry in fitting if not entry.suffix), key=int, default="")
    return [flag for entry in fitting for flag in entry.flags("" if entry.suffix else front_end)]


def folder_for(wanted: list[Architecture]) -> pathlib.Path:
    """The folder of the objects for these architectures; builds for other architectures have another folder."""
    names = [f"{entry.name}{'p' if entry.ptx else ''}" for entry in wanted]
    return ROOT / "build" / "cuda" / "-".join(names)


def compile_one(source: pathlib.Path, tools: Toolkit, wanted: list[Architecture], folder: pathlib.Path) -> float:
    """Compiles one source file unless its object is up to date (csrc/compile.py). Returns the seconds."""
    command = [tools.compiler, *FLAGS, *architecture_flags(source, wanted)]
    command += [SMALLER] if int(tools.version.split(".")[0]) >= 13 else []
    return compile_source(command, tools.version, source, folder / f"{source.stem}.o")


def compile_kernels(tools: Toolkit, wanted: list[Architecture]) -> dict[pathlib.Path, float]:
    """Compiles csrc/cuda/kernels/*.cu, MAX_JOBS at a time. Returns object -> seconds (0: it was up to date)."""
    folder = folder_for(wanted)
    folder.mkdir(parents=True, exist_ok=True)
    # The larger files first: those of kernels for tensor cores.
    sources = sorted(KERNELS.glob("*.cu"), key=lambda path: ("simt" in path.stem, path.name))
    with ThreadPoolExecutor(jobs()) as pool:
        seconds = list(pool.map(lambda source: compile_one(source, tools, wanted, folder), sources))
    return {folder / f"{source.stem}.o": took for source, took in zip(sources, seconds, strict=True)}


def main() -> int:
    tools = toolkit()
    if tools is None:
        print("build_kernels: there is no nvcc: set CUDA_HOME or PATH", file=sys.stderr)
        return 1
    wanted = wanted_architectures(tools)
    start = time.monotonic()
    made = compile_kernels(tools, wanted)
    for path, seconds in made.items():
        print(f"{path.relative_to(ROOT)}: {f'{seconds:.0f} s' if seconds else 'up to date'}")
    names = ", ".join(f"sm_{entry.name}{' and PTX' if entry.ptx else ''}" for entry in wanted)
    print(f"nvcc {tools.version}, {names}: {time.monotonic() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
