"""The CUDA kernels as nvcc compiled them: registers, spills, instructions, and what their loops issue (steady_ways.py).

python -m benchmarks.studies.kernel_report [FOLDER] [--output docs/kernel_report.md]

Compiles csrc/cuda/kernels unless that is up to date, reads the assembler's report and disassembles the objects. Needs
neither a GPU nor torch. cuobjdump and nvdisasm come from PATH or from the PyPI packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.studies import machine_code, steady_ways
from benchmarks.studies.steady_ways import Loop
from csrc.cuda import build_kernels

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "csrc/plan/gpu/kernel_table.inc"
OPS = {"tucker": "tucker_conv2d", "cp": "cp_conv2d", "linear": "lowrank_linear"}
HOPPER_CONFIGS = {"tucker": 0, "cp": 1, "tucker_wide": 2, "linear": 3}  # by the kernel's name
ELEMENTS = {"Tf32": "tf32", "BFloat16": "bf16", "Half": "fp16", "double": "fp64", "float": "fp32"}
# Tensor cores by warp (HMMA) and by warpgroup (HGMMA); ldmatrix; asynchronous copies, TMA's loads; shared, global and
# local memory; barriers.
INSTRUCTIONS = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "LDS", "STS", "LDG", "STG", "BAR", "LDL", "STL")

LOOP_ARCHITECTURES = (80, 90, 120)  # of the table of loops
MAIN_CASES = {  # of Hopper's kernels: 3x3 windows without steps; ranks of 64, 128, 256; 256 channels
    "tucker_conv2d_sm90a_64x64": "64, 104, true",
    "tucker_conv2d_sm90a_64x128": "2, 2, true",
    "cp_conv2d_sm90a_112x64": "256, 4, true",
    "lowrank_linear_sm90a_128x256": "4",
}

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
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
    loops: list[Loop] = field(default_factory=list)  # of specialized kernels

    @property
    def family(self) -> str:
        return next(family for family in ("simt", "sm80", "sm90a") if f"_{family}_" in self.kernel)

    @property
    def persistent(self) -> bool:
        """Whether it is the persistent kernel of sm80, whose stages 2 and 3 copy nothing."""
        return self.kernel.endswith("_persistent")

    @property
    def specialized(self) -> bool:
        """Whether its machine code has a budget: the lean kernels and Hopper's own."""
        return self.case == "common" or self.family == "sm90a"


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


def _disassemble(path: Path, found: dict[tuple[str, str], Instantiation]) -> None:
    """Adds the counts and loops to the kernels of an object file, which are found by (architecture, mangled name)."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        raise RuntimeError(
            "kernel_report: cuobjdump and nvdisasm are needed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    for architecture, name, function in machine_code.disassemble(path, cuobjdump, nvdisasm):
        one = found[architecture, name]
        opcodes = Counter(instruction.opcode for instruction in function.instructions)
        one.counts = Counter({opcode: opcodes[opcode] for opcode in INSTRUCTIONS} | {"all": opcodes.total()})
        if one.specialized:
            one.loops = steady_ways.loops_of(function)


def read_report(folder: Path, sass: bool = True) -> list[Instantiation]:
    """Every kernel of the table in `folder`, a folder of csrc/cuda/build_kernels.py.

    Raises:
        RuntimeError: a kernel that is not in the table, or no disassembler (with `sass`).
    """
    names = table()
    found: list[Instantiation] = []
    for report in sorted(folder.glob("*.messages")):
        blocks = _ENTRY.split(report.read_text())[1:]
        functions = _demangle(set(blocks[0::3]))
        of_file: dict[tuple[str, str], Instantiation] = {}
        for mangled, architecture, text in zip(blocks[0::3], blocks[1::3], blocks[2::3], strict=True):
            label = _label(report.stem, functions[mangled], names)
            if label is None:
                raise RuntimeError(
                    f"kernel_report: {report.stem} has a kernel not in kernel_table.inc: {functions[mangled]}"
                )
            frame, used = _FRAME.search(text), _USED.search(text)
            if frame is None or used is None:
                raise RuntimeError(f"kernel_report: ptxas's report of {functions[mangled]} was not understood:\n{text}")
            number = int(re.sub(r"\D", "", architecture))
            stack, spill_stores, spill_loads = (int(count) for count in frame.groups())
            of_file[architecture, mangled] = Instantiation(
                *label, number, int(used[1]), stack, spill_stores, spill_loads, int(used[2] or 0)
            )
        if sass and of_file:
            _disassemble(report.with_suffix(".o"), of_file)
        found += of_file.values()
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
        "sm_90a alone, once per case: padded ranks, rows of a slice, one plane or not (Tucker 64x64), parts of "
        "64 of R1 and R2, one plane or not (Tucker 64x128), padded output channels, input slices, plain or with "
        "strides and dilations (CP), parts of 64 ranks (linear).",
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


def _by_architecture(values: list[float | None]) -> str:
    """A number for each architecture, or one where all are alike."""
    texts = ["-" if value is None else f"{value:.1f}" for value in values]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def _outermost(loops: list[Loop]) -> list[Loop]:
    """Those that lie in none of the others."""
    return [
        one
        for one in loops
        if not any(other.first <= one.first and one.last <= other.last for other in loops if other is not one)
    ]


def _lean_row(ones: list[Instantiation]) -> str:
    """One kernel of sm80 on each architecture."""
    stages = 1 if ones[0].persistent else 3 if ones[0].kernel.startswith(OPS["tucker"]) else 2
    chunks = [[loop.steady for loop in one.loops if loop.kind == "chunk"] for one in ones]
    steps = [[loop.steady for loop in one.loops if loop.kind == "steps"] for one in ones]
    outputs = [[loop.steady for loop in one.loops if loop.kind == "output"] for one in ones]
    if {len(ways) for ways in chunks} != {stages} or {len(ways) for ways in outputs} != {2}:
        raise RuntimeError(
            f"kernel_report: {ones[0].kernel} must have {stages} loops over chunks and 2 that write output, got "
            f"{[len(ways) for ways in chunks]} and {[len(ways) for ways in outputs]}"
        )
    orders: dict[int, list[int | None]] = {3: [0, 1, 2], 2: [0, None, 1], 1: [0, None, None]}
    order = orders[stages]  # stages 1, 2 and 3 of a block
    cells = [ones[0].kernel, ones[0].dtype, _by_architecture([ways[-1].per_product for ways in steps])]
    products = ["-" if i is None else _by_architecture([ways[i].per_product for ways in chunks]) for i in order]
    if ones[0].persistent:  # no chunks in stages 2 and 3, whose loops hold the loop over steps
        around = [_outermost([loop for loop in one.loops if loop.kind == "steps"]) for one in ones]
        products[1:] = [_by_architecture([loops[i].steady.per_product for loops in around]) for i in (0, 1)]
    cells += products
    cells += ["-" if i is None else _by_architecture([ways[i].per_copy for ways in chunks]) for i in order]
    cells += [_by_architecture([ways[0].per_vector for ways in outputs])]
    cells += [_by_architecture([ways[0].most_per_vector for ways in outputs])]
    cells += [_by_architecture([ways[1].per_vector for ways in outputs])]
    return f"| {' | '.join(cells)} |"


def _hopper_rows(one: Instantiation) -> list[str]:
    rows = []
    for loop in one.loops:
        way = loop.steady
        if loop.kind == "" or way.count.products == 0:
            continue
        length = str(way.instructions) + (f" to {way.longest}" if way.longest > way.instructions else "")
        cells = [one.kernel, loop.kind, str(way.count.issued), length, f"{way.instructions / way.count.issued:.1f}"]
        cells += [_by_architecture([value]) for value in (way.per_product, way.per_multiply_add, way.per_vector)]
        rows.append(f"| {' | '.join(cells)} |")
    boxes = [loop.steady.per_copy or 0 for loop in one.loops]
    rows.append(f"| {one.kernel} | copies by TMA | 0 | at most {max(boxes):.1f} per box | - | - | - | - |")
    return rows


def loop_tables(report: list[Instantiation]) -> str:
    """What the loops of the specialized kernels issue: the second section of the report."""
    shown = [one for one in report if one.specialized and one.dtype in ("bf16", "tf32")]
    lean: dict[tuple[str, str], list[Instantiation]] = {}
    for one in shown:
        if one.family == "sm80" and one.architecture in LOOP_ARCHITECTURES:
            lean.setdefault((one.kernel, one.dtype), []).append(one)
    numbers = sorted({one.architecture for ones in lean.values() for one in ones})
    lines = [
        "",
        "## What the loops issue",
        "",
        "Counted in the machine code, on the steady way of a loop, which benchmarks/studies/steady_ways.py describes. "
        "tests/cuda/test_cuda_build.py holds budgets (3 instructions per product, 6 per copy, 30 per vector of output, "
        "no division of integers in a loop) and lists the loops that do not reach them.",
        "",
        f"The lean kernels of sm80. A number for each of {', '.join(f'sm_{number}' for number in numbers)} where they "
        "differ. Product: an `mma.sync`. Steps: the innermost loop of stages 2 and 3. Stages 1 to 3: their loops over "
        "chunks, everything included, for the largest chunk; that of 256 bytes runs the innermost loop twice and is "
        "counted as running it once; the persistent kernel has chunks in stage 1 alone. Copy: "
        "16 bytes per lane. Output: 16 bytes per lane, without an activation (relu "
        "takes the same instructions, because rounding clamps) and with relu6, the longest way; costly activations are "
        "hardswish, silu and gelu, here with the cheapest of them.",
        "",
        "| kernel | dtype | per product: steps | stage 1 | stage 2 | stage 3 | per copy: stage 1 | stage 2 | stage 3 "
        "| per vector of output | with relu6 | with a costly activation |",
        "|---|---|" + "---|" * 10,
        *(_lean_row(ones) for ones in lean.values()),
        "",
        "The kernels of sm90a, bf16, each in its main case. Product: 16 x 8 sums of a warp; a `wgmma` of N columns "
        "computes N / 8 of them. Per product: without what serves the multiply-adds of CP's depthwise stage. A box has "
        "4 KiB or more, for which a warp would need 8 copies or more of 16 bytes per lane.",
        "",
        "| kernel | loop | wgmma | instructions | per wgmma | per product | per multiply-add | per vector of output |",
        "|---|---|" + "---|" * 6,
    ]
    for one in shown:
        if one.family == "sm90a" and one.case == MAIN_CASES[one.kernel]:
            lines += _hopper_rows(one)
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
    report = read_report(folder)
    text = markdown(report, tools.version) + loop_tables(report)
    print(text, end="")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
