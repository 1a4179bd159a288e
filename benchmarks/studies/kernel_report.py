"""The CUDA kernels as nvcc compiled them: registers, spills, and counts of the instructions that matter.

python -m benchmarks.studies.kernel_report [FOLDER] [--output docs/kernel_report.md]

Compiles csrc/cuda/kernels unless that is up to date, reads the assembler's report and disassembles the objects. Needs
neither a GPU nor torch. cuobjdump and nvdisasm come from PATH or from the PyPI packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from csrc.cuda import build_kernels

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "csrc/plan/gpu/kernel_table.inc"
OPS = {"tucker": "tucker_conv2d", "cp": "cp_conv2d", "linear": "lowrank_linear"}
HOPPER_CONFIGS = {"tucker": 0, "cp": 1, "tucker_wide": 2, "linear": 3}  # by the kernel's name
ELEMENTS = {"Tf32": "tf32", "BFloat16": "bf16", "Half": "fp16", "double": "fp64", "float": "fp32"}
# Tensor cores by warp (HMMA) and by warpgroup (HGMMA); ldmatrix; asynchronous copies, TMA's loads; shared, global and
# local memory; barriers.
INSTRUCTIONS = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "LDS", "STS", "LDG", "STG", "BAR", "LDL", "STL")

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")
_FUNCTION = re.compile(r"^\s+Function : (\w+)")
_ARCHITECTURE = re.compile(r"^\s+code for sm_(\w+)")
_TABLE_LINE = re.compile(r'^GPU_KERNEL\((\w+), (\w+), (\d+), (\w+), "(.*)"\)', re.MULTILINE)


@dataclass
class Instantiation:
    """One kernel in one dtype for one architecture."""

    kernel: str  # the name in kernel_table.inc
    dtype: str
    case: str  # common (csrc/cuda/kernels/common_case.h) or general; sm90a: its other template arguments
    architecture: int
    registers: int
    stack: int  # bytes of local memory per thread, spills included
    spill_stores: int
    spill_loads: int
    static_shared: int
    counts: Counter[str] = field(default_factory=Counter)  # counts of INSTRUCTIONS; "all": of all instructions

    @property
    def family(self) -> str:
        return self.kernel.rsplit("_", 2)[1]


def table() -> dict[tuple[str, str, int], str]:
    """The kernels of kernel_table.inc: (op, family, configuration) -> name."""
    return {
        (op, family, int(config)): f"{OPS[op]}_{family}_{shape}"
        for op, family, config, shape, _ in _TABLE_LINE.findall(TABLE.read_text())
    }


def tool(name: str) -> str | None:
    """The path of cuobjdump or nvdisasm; None if it is not installed."""
    found = shutil.which(name)
    if found:
        return found
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package else []:
        for path in Path(folder).glob(f"*/bin/{name}"):
            return str(path)
    return None


def _demangle(names: set[str]) -> dict[str, str]:
    """Mangled -> C++ names."""
    ordered = sorted(names)
    told = subprocess.run(["c++filt"], input="\n".join(ordered), text=True, capture_output=True, check=True).stdout
    return dict(zip(ordered, told.splitlines(), strict=True))


def _label(source: str, function: str, names: dict[tuple[str, str, int], str]) -> tuple[str, str, str] | None:
    """(kernel, dtype, case) of block_kernel<(Op)0, TensorCores<Tf32>, (Family)1, 3, true> and the like.

    None: not in the table.
    """
    if hopper := re.search(r"(\w+)_sm90a_kernel<(true|false), ([^>]*)>", function):
        config = HOPPER_CONFIGS.get(hopper[1], -1)
        name = names.get((hopper[1].split("_")[0], "sm90a", config))
        return (name, "fp16" if hopper[2] == "true" else "bf16", str(hopper[3])) if name else None
    match = re.search(r"block_kernel<.*?, \w+::\w+<(?:\w+::)?(\w+)[^>]*>, .*?(\d+), (true|false)>", function)
    op, family = source.split("_", 1)
    if match is None or match[1] not in ELEMENTS or (op, family, int(match[2])) not in names:
        return None
    return names[op, family, int(match[2])], ELEMENTS[match[1]], "common" if match[3] == "true" else "general"


def _disassemble(path: Path) -> dict[tuple[str, str], Counter[str]]:
    """(architecture, mangled name) -> counts of instructions, of one object file."""
    program = tool("cuobjdump")
    if program is None or tool("nvdisasm") is None:
        raise RuntimeError(
            "kernel_report: cuobjdump and nvdisasm are needed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    folders = os.pathsep.join([str(Path(program).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": folders}
    counts: dict[tuple[str, str], Counter[str]] = {}
    architecture, current = "", Counter[str]()
    with subprocess.Popen([program, "-sass", str(path)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := _INSTRUCTION.match(line):
                current["all"] += 1
                if match[1] in INSTRUCTIONS:
                    current[match[1]] += 1
            elif match := _FUNCTION.match(line):
                current = counts.setdefault((architecture, match[1]), Counter())
            elif match := _ARCHITECTURE.match(line):
                architecture = match[1]
    if process.returncode != 0:
        raise RuntimeError(f"kernel_report: {program} -sass {path} failed with exit code {process.returncode}")
    return counts


def read_report(folder: Path, sass: bool = True) -> list[Instantiation]:
    """Every kernel of the table in `folder`, a folder of csrc/cuda/build_kernels.py.

    Raises:
        RuntimeError: a kernel that is not in the table, or no disassembler (with `sass`).
    """
    names = table()
    found = []
    for report in sorted(folder.glob("*.messages")):
        blocks = _ENTRY.split(report.read_text())[1:]
        functions = _demangle(set(blocks[0::3]))
        counts = _disassemble(report.with_suffix(".o")) if sass else {}
        for mangled, architecture, text in zip(blocks[0::3], blocks[1::3], blocks[2::3], strict=True):
            label = _label(report.stem, functions[mangled], names)
            if label is None:
                raise RuntimeError(
                    f"kernel_report: {report.stem} has a kernel not in kernel_table.inc: {functions[mangled]}"
                )
            frame, used = _FRAME.search(text), _USED.search(text)
            if frame is None or used is None:
                raise RuntimeError(f"kernel_report: ptxas's report of {functions[mangled]} was not understood:\n{text}")
            found.append(
                Instantiation(
                    *label,
                    int(re.sub(r"\D", "", architecture)),
                    int(used[1]),
                    int(frame[1]),
                    int(frame[2]),
                    int(frame[3]),
                    int(used[2] or 0),
                    counts.get((architecture, mangled), Counter()),
                )
            )
    order = list(names.values())
    return sorted(found, key=lambda one: (order.index(one.kernel), one.dtype, one.case, one.architecture))


def markdown(report: list[Instantiation], version: str) -> str:
    """The report as a table with one line per kernel, dtype and case."""
    architectures = sorted({one.architecture for one in report})
    first = architectures[0]
    lines = [
        "# The CUDA kernels as nvcc compiles them",
        "",
        f"Written by `make kernel-report` with nvcc {version}; nothing here was measured on a GPU. A number for each "
        f"of {', '.join(f'sm_{number}' for number in architectures)} where they differ; instructions of sm_{first}. "
        "Shared memory is dynamic (`shared_layout` of csrc/plan/geometry.h). Kernels of sm90a are compiled for "
        "sm_90a alone, once per case: padded ranks and rows of a slice (Tucker 64x64), parts of "
        "64 of R1 and R2 (Tucker 64x128), padded output channels and input slices (CP), parts of 64 ranks (linear).",
        "",
        "| kernel | dtype | case | registers | spilled bytes | stack bytes | instructions | "
        + " | ".join(INSTRUCTIONS)
        + " |",
        "|---|---|---|" + "---|" * (4 + len(INSTRUCTIONS)),
    ]
    grouped: dict[tuple[str, str, str], list[Instantiation]] = {}
    for one in report:
        grouped.setdefault((one.kernel, one.dtype, one.case), []).append(one)
    for (kernel, dtype, case), ones in grouped.items():
        counts = ones[0].counts

        def each(values: list[int]) -> str:
            return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))

        cells = [
            kernel,
            dtype,
            case,
            each([one.registers for one in ones]),
            each([one.spill_stores + one.spill_loads for one in ones]),
            each([one.stack for one in ones]),
            *(str(counts[name]) for name in ("all", *INSTRUCTIONS)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="objects of an earlier build (default: compiles them)")
    parser.add_argument("--output", type=Path, help="a Markdown file to write the table to")
    options = parser.parse_args()
    tools = build_kernels.toolkit()
    if tools is None:
        print("kernel_report: there is no nvcc: set CUDA_HOME or PATH", file=sys.stderr)
        return 1
    folder = options.folder
    if folder is None:
        wanted = build_kernels.wanted_architectures(tools)
        build_kernels.compile_kernels(tools, wanted)
        folder = build_kernels.folder_for(wanted)
    text = markdown(read_report(folder), tools.version)
    print(text, end="")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
