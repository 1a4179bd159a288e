"""Builds `lowrank_ops._C`.

pip install --no-build-isolation .         into the environment that holds torch
LOWRANK_OPS_CUDA=0|1                       leave the CUDA kernels out / compile them on a CPU build of torch too
TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"         GPU architectures (default: 8.0 8.6 8.9 9.0 10.0 12.0, PTX of 8.0)
CUDA_HOME=folder                           the CUDA toolkit (default: that of the nvcc on PATH); 12.0 or newer
DEBUG=1                                    -O0 -g
MAX_JOBS=n                                 compile jobs (default: cores, at most one for 2 GiB of free memory)
"""

from __future__ import annotations

import functools
import os
import pathlib
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = pathlib.Path(__file__).parent
sys.path.insert(0, str(ROOT))  # pip runs this file from elsewhere
from csrc.compile import compile_source, jobs  # noqa: E402
from csrc.cuda import build_kernels  # noqa: E402
from docs.package_page import package_page, repository  # noqa: E402

VERSION = "0.1.0"
TORCH = ".".join(torch.__version__.split("+")[0].split(".")[:2])
OLDEST_TORCH = "2.11"  # also in pyproject.toml, as a requirement of the build
REQUIRED = ["numpy", "tensorly>=0.9", "rich", "safetensors", "tqdm"]
DEBUG = os.environ.get("DEBUG") == "1"
OPTIMIZE = ["-O0", "-g"] if DEBUG else ["-O3"]
# at::parallel_for is inline: without this it compiles to a plain loop. Not linked with OpenMP: the runtime must
# be the one that libtorch has loaded, or torch.set_num_threads would not reach it.
OPENMP = ["-fopenmp"] if "OpenMP" in torch.__config__.parallel_info() else []

# The kernels of csrc/cpu/kernels know nothing of torch and are compiled once per instruction set, by file suffix.
# Which one runs is decided at run time (csrc/cpu/isa.cpp); nothing depends on the build machine's CPU.
KERNELS = ROOT / "csrc/cpu/kernels"
KERNEL_FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-Wall",
    "-Wno-maybe-uninitialized",
]  # GCC 12 warns in its own intrinsics
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
FLAGS_BY_SUFFIX = {
    "_generic": [],
    "_avx2": AVX2,
    "_avx512": AVX512,
    "_avx512bf16": [*AVX512, "-mavx512bf16"],
}


def git_sha() -> str:
    try:
        return subprocess.check_output(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def is_source() -> bool:
    """Whether this run makes a source distribution, which is for any torch."""
    return "sdist" in sys.argv


def full_version() -> str:
    """0.1.0+torch2.13, with CUDA kernels 0.1.0+torch2.13.cu130: a built extension fits one minor version of torch."""
    if is_source():
        return VERSION
    tools = cuda_toolkit()
    cuda = "" if tools is None else ".cu" + "".join(tools.version.split(".")[:2])
    return f"{VERSION}+torch{TORCH}{cuda}"


def requirements() -> list[str]:
    """The torch that the extension was built for, and what else runs need."""
    return [f"torch>={OLDEST_TORCH}" if is_source() else f"torch=={TORCH}.*", *REQUIRED]


def write_version() -> pathlib.Path:
    """The folder of a generated header with what the build is of: the one file that includes it is compiled anew when
    the commit changes, and not all of them."""
    folder = ROOT / "build/generated"
    values = {"VERSION": VERSION, "GIT_SHA": git_sha(), "TORCH_VERSION": torch.__version__}
    text = "".join(f'#define LOWRANK_OPS_{name} "{value}"\n' for name, value in values.items())
    header = folder / "version.h"
    if not header.exists() or header.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return folder


def set_max_jobs() -> None:
    """One compile job a core, but never more than the free memory carries (torch headers: up to 2 GiB a job)."""
    if "MAX_JOBS" in os.environ:
        return
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        jobs = max(1, min(jobs, free // (2 << 30)))
    except (ValueError, OSError):
        pass
    os.environ["MAX_JOBS"] = str(jobs)


@functools.cache
def cuda_toolkit() -> build_kernels.Toolkit | None:
    """The toolkit that compiles the CUDA kernels; None if none are to be compiled."""
    asked = os.environ.get("LOWRANK_OPS_CUDA")
    if asked not in (None, "", "0", "1"):
        raise RuntimeError(f"LOWRANK_OPS_CUDA must be 0 or 1, got {asked!r}")
    if asked == "0" or (not asked and not torch.version.cuda):
        return None
    found = build_kernels.toolkit()
    if found is None:
        message = "there is no nvcc: set CUDA_HOME or PATH to a CUDA toolkit"
        if asked == "1":
            raise RuntimeError(f"LOWRANK_OPS_CUDA=1 asks for CUDA kernels, but {message}")
        print(f"lowrank_ops: built WITHOUT CUDA kernels, torch has CUDA {torch.version.cuda} but {message}")
    return found


def add_cuda(extension: CppExtension) -> None:
    """The CUDA kernels and the host code that launches them, where they are to be compiled."""
    tools = cuda_toolkit()
    if tools is None:
        return
    wanted = build_kernels.wanted_architectures(tools)
    extension.extra_objects += map(str, build_kernels.compile_kernels(tools, wanted))
    extension.sources += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cpp"))
    numbers = ",".join(str(entry.number) for entry in wanted)
    extension.define_macros += [
        ("LOWRANK_OPS_WITH_CUDA", "1"),
        ("LOWRANK_OPS_CUDA_TOOLKIT", f'"{tools.version}"'),
        ("LOWRANK_OPS_CUDA_ARCHITECTURES", numbers),
        ("LOWRANK_OPS_CUDA_PTX", str(min((entry.number for entry in wanted if entry.ptx), default=0))),
    ]
    extension.include_dirs.append(tools.include)
    extension.library_dirs.append(tools.libraries)
    # The static runtime, its names hidden: it neither needs torch's libcudart (a CPU build has none) nor mixes with it.
    extension.libraries += ["cudart_static", "rt", "pthread", "dl"]
    extension.extra_link_args.append("-Wl,--exclude-libs,libcudart_static.a")


def compile_cpu_kernels(compiler: list[str], folder: pathlib.Path) -> list[str]:
    """The objects of csrc/cpu/kernels, one per instruction set."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    suffixes = [suffix for suffix in FLAGS_BY_SUFFIX if x86 or suffix == "_generic"]
    version = subprocess.check_output([compiler[0], "--version"], text=True).splitlines()[0]

    def compile_one(suffix: str) -> str:
        source, made = KERNELS / f"kernels{suffix}.cpp", folder / f"kernels{suffix}.o"
        command = [*compiler, *KERNEL_FLAGS, *OPTIMIZE, *FLAGS_BY_SUFFIX[suffix], f"-I{ROOT / 'csrc'}"]
        if compile_source(command, version, source, made):
            print(f"[{suffixes.index(suffix) + 1}/{len(suffixes)}] {source.relative_to(ROOT)}", flush=True)
        return str(made)

    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(compile_one, suffixes))


class Build(BuildExtension):
    """Compiles the kernels of each instruction set with their own flags, then everything else through torch's rule."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # setuptools gives `pip install -e` an empty folder: everything would be compiled anew
            self.build_temp = str(ROOT / f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def build_extensions(self) -> None:
        (extension,) = self.extensions
        add_cuda(extension)
        files = len(FLAGS_BY_SUFFIX) + len(extension.sources)
        print(
            f"lowrank_ops: compiling what has changed of {files} files, jobs: {jobs()}; all of them take some minutes",
            flush=True,
        )
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        extension.extra_objects += compile_cpu_kernels(compiler, pathlib.Path(self.build_temp, "kernels"))
        super().build_extensions()


def sources() -> list[str]:
    """All C++ sources but those of the kernels and of CUDA's host code."""
    found = [path for path in ROOT.glob("csrc/**/*.cpp") if path.parent != KERNELS and path.parent.name != "cuda"]
    return sorted(str(path.relative_to(ROOT)) for path in found)


set_max_jobs()
ADDRESS = repository(ROOT)
setup(
    version=full_version(),
    install_requires=requirements(),
    long_description=package_page((ROOT / "README.md").read_text(), ADDRESS, git_sha()),
    long_description_content_type="text/markdown",
    project_urls={} if ADDRESS is None else {"Source": ADDRESS, "Changelog": f"{ADDRESS}/blob/main/CHANGELOG.md"},
    ext_modules=[
        CppExtension(
            "lowrank_ops._C",
            sources(),
            include_dirs=[str(ROOT / "csrc"), str(write_version())],
            extra_compile_args=[*OPTIMIZE, *OPENMP, "-Wall"],
        )
    ],
    cmdclass={"build_ext": Build},
)
