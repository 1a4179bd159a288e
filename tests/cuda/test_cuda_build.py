"""Tests of the CUDA build that need no GPU: the build rule, and the kernels as nvcc compiles them.

Compiles csrc/cuda/kernels for sm_80; with LOWRANK_OPS_ALL_ARCHITECTURES=1 for all architectures of a release.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.studies import kernel_report
from benchmarks.studies.kernel_report import Instantiation
from benchmarks.studies.steady_ways import Loop
from csrc.cuda import build_kernels
from csrc.cuda.build_kernels import Architecture, Toolkit
from tests.support.paths import REPOSITORY, SIMULATOR

ALL = os.environ.get("LOWRANK_OPS_ALL_ARCHITECTURES") == "1"
DTYPES = {"sm90a": {"bf16", "fp16"}, "sm80": {"tf32", "bf16", "fp16"}, "simt": {"fp32", "bf16", "fp16"}}
CASES = {
    "sm90a": (),
    "sm80": ("general", "common"),
    "simt": ("general",),
}  # each is compiled for every architecture

# Budgets: instructions per product of 16 x 8 sums, per copy of 16 bytes per lane, per 16 bytes of output per lane. The
# last is held for outputs without an activation; relu takes the same instructions, because rounding clamps.
PRODUCT, COPY, VECTOR = 3.0, 6.0, 30.0


class Lean(NamedTuple):
    """Most instructions in a lean kernel's loops."""

    steps: float = PRODUCT  # per product, in the innermost loop
    first: float = PRODUCT  # per product, in the loop over the chunks of stage 1
    first_linear: float = PRODUCT  # the same of lowrank_linear
    later: float = PRODUCT  # per product, in the loops over the chunks of stages 2 and 3
    copy: float = COPY
    vector: float = VECTOR  # per vector of output, without an activation or with relu
    relu6: float = VECTOR  # per vector of output, on the longest way of the loop without costly activations


# What is reached where a budget is not, on any architecture of a release. The causes:
# - tf32: each word of a factor, and in stage 1 of the input, is rounded by 2 instructions (a NaN needs the second). A
#   warp loads a word of a factor per product, and 0.5 (64 columns) or 1 (32 columns) of the input. Hidden tiles are
#   stored rounded.
# - 128x32, 64x64: a chunk of stage 1 feeds 24 or 32 products of a warp, and some 25 instructions per chunk (barrier,
#   wait, slot, position of the stream, addresses) do not depend on their number. Chunks of 128 bytes would take 3.8 and
#   3.5 in lowrank_linear (counted for sm_80), but twice the shared memory per slot.
# - lowrank_linear: without a halo a chunk of stage 1 feeds two thirds as many products, in 64x128 and 64x64 half.
# - Later stages of 64x128, 64x64, 128x32: the largest chunk has 256 bytes, for which the innermost loop runs twice; it
#   counts once. Counted twice, bf16 and fp16 take 2.3, 2.9 and 2.8 instructions per product.
# - Copies of 128x32: a chunk has at most 7 copies per thread (stage 1 of lowrank_linear 5, later stages 4), and some 20
#   instructions per chunk do not depend on their number. Stage 1 of cp_conv2d in 128x64 takes 49 for 8 copies (sm_80).
# - 128x32_persistent: stages 2 and 3 have no chunks, so their whole loops count as steps. In tf32 those of stage 2 hold
#   the loop over a tap's channels, and of stage 3 the loop over ranks.
# - relu6: a minimum per two elements of bf16 and fp16, 4 per vector, and choosing the way once per pass: for 4 vectors
#   in warps of 32 columns, for 8 in those of 64.
HALVES = {  # bf16, fp16
    "128x32": Lean(first=4.3, first_linear=5.0, later=4.0, copy=8.3, relu6=36.3),
    "128x64": Lean(first_linear=3.3, copy=6.2, relu6=32.7),
    "128x128": Lean(first_linear=3.3, relu6=32.7),
    "64x128": Lean(first_linear=3.9, later=3.1, relu6=32.7),
    "64x64": Lean(first=3.5, first_linear=5.3, later=4.2, relu6=36.3),
    "128x32_persistent": Lean(first=4.0, copy=6.5, vector=30.8, relu6=39.3),
}
TF32 = {
    "128x32": Lean(steps=3.9, first=7.7, first_linear=9.1, later=6.0, copy=8.5),
    "128x64": Lean(steps=3.6, first=5.3, first_linear=6.5, later=4.8),
    "128x128": Lean(steps=3.6, first=5.3, first_linear=6.5, later=4.8),
    "64x128": Lean(steps=3.6, first=4.8, first_linear=7.1, later=5.1),
    "64x64": Lean(steps=3.9, first=6.6, first_linear=9.4, later=6.2),
    "128x32_persistent": Lean(steps=4.5, first=7.5, copy=6.5),
}
# Per vector with hardswish, silu or gelu, for the cheapest of them: 8 values (tf32: 4) with a division each. They run
# in a loop over staged sums, so that they are compiled once, and load sums and bias again.
COSTLY = {"bf16": 88.0, "fp16": 88.0, "tf32": 42.0}
# One thread starts the copy of a box of 4 KiB or more, for which a warp would need 8 copies or more of 16 bytes a lane.
BOX = 8 * COPY
# Not reached: with several planes the wide Tucker kernel's copying thread finds a plane's tensor map and taps for each
# box of the input. It has the time: a box is 13 KiB.
WIDE_PLANES_BOX = 64.0
# Not reached: the linear kernel's loop over chunks of output loads the bias from global memory, and gives slots back to
# the CTAs of a cluster.
LINEAR_VECTOR = 58.0
# Per multiply-add of CP's depthwise stage in sm90a: 3 + 3 taps, two ranks and two pixels per lane.
MULTIPLY_ADD = 2.3


@pytest.fixture(scope="module")
def tools() -> Toolkit:
    found = build_kernels.toolkit()
    if found is None:
        pytest.skip("no nvcc")
    return found


@pytest.fixture(scope="module")
def wanted() -> list[Architecture]:
    return build_kernels.architectures(build_kernels.DEFAULT_ARCHITECTURES if ALL else "8.0")


@pytest.fixture(scope="module")
def folder(tools: Toolkit, wanted: list[Architecture]) -> Path:
    """The folder of the compiled kernels. Warnings of the compiler are errors."""
    build_kernels.compile_kernels(tools, wanted)
    return build_kernels.folder_for(wanted)


@pytest.fixture(scope="module")
def report(folder: Path) -> list[Instantiation]:
    return kernel_report.read_report(folder, sass=False)


@pytest.fixture(scope="module")
def disassembled(folder: Path) -> list[Instantiation]:
    if kernel_report.tool("cuobjdump") is None or kernel_report.tool("nvdisasm") is None:
        pytest.skip("no cuobjdump or nvdisasm")
    return kernel_report.read_report(folder)


def test_every_kernel_of_the_table_was_compiled(report: list[Instantiation], wanted: list[Architecture]) -> None:
    """Each in every dtype of its family, for every architecture."""
    built = {(one.kernel, one.dtype, one.case, one.architecture) for one in report}
    assert len(built) == len(report)
    for (_, family, _), kernel in kernel_report.table().items():
        if family == "sm90a":
            assert {(dtype, number) for name, dtype, _, number in built if name == kernel} == {
                ("bf16", 90),
                ("fp16", 90),
            }
        cases = ("common",) if kernel.endswith("_persistent") else CASES[family]
        for entry, case in itertools.product(wanted, cases):
            dtypes = {dtype for name, dtype, *rest in built if [name, *rest] == [kernel, case, entry.number]}
            assert dtypes - {"fp64"} == DTYPES[family], f"{kernel} for sm_{entry.number}"
    doubles = {kernel for kernel, dtype, *_ in built if dtype == "fp64"}
    assert {kernel.split("_simt_")[0] for kernel in doubles} == set(kernel_report.OPS.values())


def test_nothing_is_spilled(report: list[Instantiation]) -> None:
    for one in report:
        assert (one.spill_stores, one.spill_loads) == (0, 0), one


def test_tensor_core_kernels_use_no_local_memory(report: list[Instantiation]) -> None:
    fast = [one for one in report if one.family in ("sm80", "sm90a")]
    assert fast
    for one in fast:
        assert one.stack == 0, one


def test_shared_memory_is_all_dynamic(report: list[Instantiation]) -> None:
    """The planner counts only the dynamic shared memory of a launch."""
    for one in report:
        assert one.static_shared == 0, one


def test_tensor_core_kernels_use_the_tensor_cores(disassembled: list[Instantiation]) -> None:
    fast = [one for one in disassembled if one.family == "sm80"]
    assert fast
    for one in fast:
        for instruction in ("HMMA", "LDSM", "LDGSTS"):
            assert one.counts[instruction] > 0, f"{instruction} of {one}"
        assert one.counts["LDL"] == one.counts["STL"] == 0, one


def test_hopper_kernels_use_what_hopper_has(disassembled: list[Instantiation]) -> None:
    fast = [one for one in disassembled if one.family == "sm90a"]
    assert fast
    for one in fast:
        for instruction in ("HGMMA", "UTMALDG"):
            assert one.counts[instruction] > 0, f"{instruction} of {one}"
        assert one.counts["LDL"] == one.counts["STL"] == one.counts["HMMA"] == 0, one


def largest(values: Iterable[float | None], *if_empty: float) -> float:
    return max([value for value in values if value is not None] or if_empty)


def of_kind(one: Instantiation, kind: str) -> list[Loop]:
    return [loop for loop in one.loops if loop.kind == kind]


def test_loops_divide_no_integers(disassembled: list[Instantiation]) -> None:
    specialized = [one for one in disassembled if one.specialized]
    assert specialized
    for one in specialized:
        assert one.loops and sum(loop.divisions for loop in one.loops) == 0, one.kernel


def test_lean_kernels_keep_their_budgets(disassembled: list[Instantiation]) -> None:
    lean = [one for one in disassembled if one.case == "common"]
    assert {one.kernel for one in lean} == {
        name for (_, family, _), name in kernel_report.table().items() if family == "sm80"
    }
    for one in lean:
        name = f"{one.kernel} in {one.dtype} for sm_{one.architecture}"
        op, shape = one.kernel.split("_sm80_")
        most = (TF32 if one.dtype == "tf32" else HALVES)[shape]
        chunks, outputs = of_kind(one, "chunk"), of_kind(one, "output")
        stages = 1 if one.persistent else 3 if op == "tucker_conv2d" else 2  # that copy while they multiply
        assert (len(chunks), len(outputs)) == (stages, 2), name
        copying = [*chunks, *of_kind(one, "copies")]
        reached = {
            "steps": (largest(loop.steady.per_product for loop in of_kind(one, "steps")), most.steps),
            "stage 1": (
                largest([chunks[0].steady.per_product]),
                most.first_linear if op == "lowrank_linear" else most.first,
            ),
            "later stages": (largest((loop.steady.per_product for loop in chunks[1:]), 0), most.later),
            "copies": (largest(loop.steady.per_copy for loop in copying), most.copy),
            "output": (largest([outputs[0].steady.per_vector]), most.vector),
            "relu6": (largest([outputs[0].steady.most_per_vector]), most.relu6),
            "costly activations": (largest([outputs[1].steady.per_vector]), COSTLY[one.dtype]),
        }
        assert all(value <= limit for value, limit in reached.values()), f"{name}: {reached}"


def test_hopper_kernels_keep_their_budgets(disassembled: list[Instantiation]) -> None:
    """A wgmma of N columns counts as N / 8 products.

    It does what N / 8 mma.sync do in each of its four warps. So the budget of a loop is 3 N / 8 instructions per wgmma:
    24 for 64 columns, 96 for 256. In a loop that writes output, all instructions count for the output.
    """
    fast = [one for one in disassembled if one.family == "sm90a"]
    assert fast
    for one in fast:
        name = f"{one.kernel}, {one.case}, in {one.dtype}"
        steps, outputs = of_kind(one, "steps"), of_kind(one, "output")
        linear = one.kernel.startswith("lowrank_linear")
        box = WIDE_PLANES_BOX if one.kernel.endswith("_64x128") and one.case.endswith("false") else BOX
        assert (len(steps), len(outputs)) == (2 if one.kernel.startswith("tucker") else 1, 1), name
        reached = {
            "products": (largest(loop.steady.per_product for loop in steps), PRODUCT),
            "output": (largest([outputs[0].steady.per_vector]), LINEAR_VECTOR if linear else VECTOR),
            "copies": (largest(loop.steady.per_copy for loop in one.loops), box),
        }
        if one.kernel.startswith("cp"):
            reached["multiply-adds"] = (largest([steps[0].steady.per_multiply_add]), MULTIPLY_ADD)
        assert all(value <= limit for value, limit in reached.values()), f"{name}: {reached}"


def test_simt_kernels_use_no_tensor_cores(disassembled: list[Instantiation]) -> None:
    """They must keep the precision of float32."""
    plain = [one for one in disassembled if one.family == "simt"]
    assert plain
    for one in plain:
        assert one.counts["HMMA"] == 0 and one.counts["all"] > 0, one


def test_the_committed_report_lists_every_kernel() -> None:
    text = (REPOSITORY / "docs" / "kernel_report.md").read_text()
    for kernel in kernel_report.table().values():
        assert f"| {kernel} |" in text, f"{kernel}: run `make kernel-report`"


def test_the_primitives_of_the_simulator_compile(tools: Toolkit, tmp_path: Path) -> None:
    """nvcc compiles them; test_cuda_kernels.py runs them on a GPU."""
    flags = [*build_kernels.FLAGS, f"-I{SIMULATOR}", "-arch=sm_80", "-c", "-o", str(tmp_path / "primitives.o")]
    done = subprocess.run(
        [tools.compiler, *flags, str(REPOSITORY / "tests/cuda/primitives.cu")], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_an_up_to_date_object_is_not_made_again(tools: Toolkit, wanted: list[Architecture], folder: Path) -> None:
    assert set(build_kernels.compile_kernels(tools, wanted).values()) == {0.0}


@pytest.fixture
def small_kernel(tmp_path: Path) -> Path:
    (tmp_path / "header.cuh").write_text("constexpr int value = 1;\n")
    source = tmp_path / "small.cu"
    source.write_text('#include "header.cuh"\n__global__ void small(int* out) { *out = value; }\n')
    return source


def compile_small(source: Path, tools: Toolkit) -> float:
    return build_kernels.compile_one(source, tools, build_kernels.architectures("8.0"), source.parent)


def test_a_changed_header_or_flag_makes_an_object_again(small_kernel: Path, tools: Toolkit) -> None:
    assert compile_small(small_kernel, tools) > 0
    assert compile_small(small_kernel, tools) == 0
    (small_kernel.parent / "header.cuh").write_text("constexpr int value = 2;\n")
    assert compile_small(small_kernel, tools) > 0
    assert build_kernels.compile_one(small_kernel, tools, build_kernels.architectures("8.6"), small_kernel.parent) > 0


def test_warnings_are_errors(small_kernel: Path, tools: Toolkit) -> None:
    small_kernel.write_text("__global__ void small(int* out) { int unused = 3; }\n")
    with pytest.raises(RuntimeError, match=r"nvcc failed on .*small\.cu(?s:.*)unused"):
        compile_small(small_kernel, tools)


def test_architecture_lists() -> None:
    assert build_kernels.architectures("8.0+PTX; 9.0a 12.0") == [
        Architecture(80, ptx=True),
        Architecture(90, "a"),
        Architecture(120),
    ]
    assert build_kernels.architectures("Ampere") == [Architecture(80), Architecture(86, ptx=True)]
    with pytest.raises(
        RuntimeError, match=r"TORCH_CUDA_ARCH_LIST: .* such as 8\.0, .* or one of .*Hopper.*; got 'sm_80'"
    ):
        build_kernels.architectures("sm_80")


def test_architecture_flags_follow_the_suffix() -> None:
    wanted = build_kernels.architectures("7.5;8.0+PTX;9.0")

    def codes(name: str, listed: list[Architecture] = wanted) -> list[str]:
        return build_kernels.architecture_flags(Path(name), listed)[1::2]

    assert codes("tucker_simt.cu") == [
        "arch=compute_75,code=sm_75",
        "arch=compute_75,code=sm_80",
        "arch=compute_80,code=compute_80",
        "arch=compute_75,code=sm_90",
    ]
    assert codes("tucker_sm80.cu") == [
        "arch=compute_80,code=sm_80",
        "arch=compute_80,code=compute_80",
        "arch=compute_80,code=sm_90",
    ]
    assert codes("tucker_sm90a.cu") == ["arch=compute_90a,code=sm_90a"]
    assert codes("tucker_sm80.cu", build_kernels.architectures("7.5")) == ["arch=compute_80,code=compute_80"]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_an_old_nvcc_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin" / "nvcc", 'echo "Cuda compilation tools, release 11.8, V11.8.89"')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"bin/nvcc must be nvcc 12\.0 or newer, got 'release 11\.8'; set CUDA_HOME"):
        build_kernels.toolkit()


def test_a_toolkit_without_its_runtime_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin" / "nvcc", 'echo "Cuda compilation tools, release 13.0, V13.0.88"')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"no cuda_runtime_api\.h or libcudart_static\.a .* install the toolkit's"):
        build_kernels.toolkit()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1", "LOWRANK_OPS_CUDA=1 asks for CUDA kernels, but there is no nvcc: set CUDA_HOME or PATH"),
        ("yes", "LOWRANK_OPS_CUDA must be 0 or 1, got 'yes'"),
    ],
)
def test_setup_says_what_is_missing(value: str, message: str, tmp_path: Path) -> None:
    """It says so before anything is compiled."""
    environment = {**os.environ, "LOWRANK_OPS_CUDA": value, "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode != 0 and message in done.stderr
