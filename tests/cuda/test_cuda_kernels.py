"""The CUDA kernels one by one on a real GPU: the tests that tests/simulator runs on the simulator, on the hardware.

First the primitives alone against their host versions, then every kernel of the planner's table with the cuts of
tests/support/simulator/cases.py, at the edges of its tiles, against the fp64 reference.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_ops
from csrc.cuda import build_kernels
from lowrank_ops.ops.extension import _C
from tests.support.paths import CSRC, REPOSITORY, SIMULATOR
from tests.support.problems import Call
from tests.support.simulator import building, harness
from tests.support.simulator.cases import (
    CONVOLUTION_CASES,
    CONVOLUTIONS,
    LINEAR,
    LINEAR_CASES,
    Case,
    convolution_case,
    linear_case,
    name_of,
)
from tests.support.simulator.harness import Kernel, Result
from tests.support.simulator.hopper_cases import (
    CASES,
    CP,
    HALF,
    HALVES,
    SAME,
    TUCKER,
    WIDE,
    WIDER,
    case_for_a_gpu,
    hopper_case,
)
from tests.support.simulator.hopper_cases import LINEAR as HOPPER_LINEAR
from tests.support.simulator.persistent_cases import CASES as PERSISTENT_CASES
from tests.support.simulator.persistent_cases import DTYPES as PERSISTENT_DTYPES
from tests.support.simulator.persistent_cases import case_of as persistent_case

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(lowrank_ops.build_info()["cuda"] is None, reason="lowrank_ops was built without CUDA kernels"),
]

NAMES = {(line["op"], line["family"], line["config"]): line["name"] for line in _C.gpu_kernels()}


def identify(value: object) -> str | None:
    return name_of(value) if isinstance(value, torch.dtype) else None if isinstance(value, str) else str(value)


def architecture() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def name_for(kernel: Kernel) -> str:
    """The kernel's name in the table. Skips the test where this GPU cannot run it."""
    name = NAMES[kernel.op, kernel.family, kernel.config]
    if kernel.family == "sm90a" and architecture() != 90:
        pytest.skip(f"{name} runs on sm_90 alone, this GPU is sm_{architecture()}")
    (first,) = [line["first_architecture"] for line in _C.gpu_kernels() if line["name"] == name]
    if first > architecture():
        pytest.skip(f"{name} runs from sm_{first} on, this GPU is sm_{architecture()}")
    return name


# ---- The primitives


@pytest.fixture(scope="module")
def primitives(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels of tests/support/simulator/primitive_kernels.cuh, compiled by nvcc."""
    if building.missing():
        pytest.skip(building.missing())
    tools = build_kernels.toolkit()
    if tools is None:
        pytest.skip("no nvcc")
    made = tmp_path_factory.mktemp("primitives") / "primitives.so"
    flags = ["-std=c++17", f"-arch=sm_{architecture()}", "--shared", "-Xcompiler=-fPIC"]
    folders = [f"-I{CSRC}", f"-I{SIMULATOR}"]
    command = [tools.compiler, *flags, *folders, str(REPOSITORY / "tests/cuda/primitives.cu"), "-o", str(made)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(made))


def both(primitives: ctypes.CDLL, name: str, data: Tensor, output: Tensor, *arguments: int, threads: int) -> Tensor:
    """Runs a primitive on both. Returns the GPU's output and writes the simulator's to ``output``."""
    found = torch.full_like(output, -1)
    numbers = (ctypes.c_int64 * 6)(*arguments)
    sizes = [ctypes.c_int64(tensor.nbytes) for tensor in (data, found)]
    places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (data, found)]
    code = primitives.run_primitive(name.encode(), places[0], sizes[0], places[1], sizes[1], numbers)
    assert code == 0, f"cudaError_t {code}"
    assert harness.selftest(name, data, output, *arguments, threads=threads, shared_bytes=32 * 80).error == ""
    return found


def random_words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_multiply_add(primitives: ctypes.CDLL, dtype: torch.dtype) -> None:
    """The two may differ as sums of 17 terms in fp32 do that are added in another order."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32"}[dtype]
    depth = 32 // dtype.itemsize
    a, b, c = torch.randn(16, depth).to(dtype), torch.randn(8, depth).to(dtype), torch.randn(16, 8)
    if dtype == torch.float32:  # cuts off the bits that a GPU may or may not look at
        a, b = ((values.view(torch.int32) & ~0x1FFF).view(torch.float32) for values in (a, b))
    data = torch.cat([values.contiguous().view(torch.int32).flatten() for values in (a, b, c)])
    simulated = torch.zeros(16, 8)
    found = both(primitives, f"multiply_{name}", data, simulated.view(torch.int32), threads=32).view(torch.float32)
    exact = a.double() @ b.double().T + c.double()
    bound = 17 * 2**-23 * (a.double().abs() @ b.double().abs().T + c.double().abs())
    assert ((found.double() - exact).abs() <= bound).all()
    assert ((found - simulated).double().abs() <= bound).all()
    assert (exact - c).norm() > 1


@pytest.mark.parametrize("name", ["matrices", "matrices_lean"])
def test_load_matrices(primitives: ctypes.CDLL, name: str) -> None:
    data, simulated = random_words(32, 4), torch.zeros(32, 4, dtype=torch.int32)
    assert torch.equal(both(primitives, name, data, simulated, threads=32), simulated)


@pytest.mark.parametrize(("name", "width"), [("copy_4", 4), ("copy_8", 8), ("copy_16", 16), ("copy_lean", 16)])
def test_copies(primitives: ctypes.CDLL, name: str, width: int) -> None:
    data = random_words(128 * width // 4)
    simulated = torch.zeros_like(data)
    assert torch.equal(both(primitives, name, data, simulated, 3, threads=64), simulated)


CONVERSIONS = ["to bf16", "to fp16", "to tf32", "from bf16", "from fp16", "to two bf16", "to two fp16"]
CLAMPS = ["relu6", "relu6 to two bf16", "relu6 to two fp16", "relu to two bf16", "relu to two fp16"]


@pytest.mark.parametrize("kind", range(12), ids=CONVERSIONS + CLAMPS)
def test_conversions(primitives: ctypes.CDLL, kind: int) -> None:
    words = torch.arange(2**16, dtype=torch.int32)
    data = (
        words if kind in (3, 4) else torch.cat([(words << 16) + low for low in (0, 1, 0x7FFF, 0x8000, 0x1000, 0x1001)])
    )
    if kind == 2 or kind >= 7:  # the bits of a NaN are not specified
        data = data[~data.view(torch.float32).isnan()]
    if kind == 4:
        data = data[~data.to(torch.int16).view(torch.float16).isnan()]
    simulated = torch.zeros_like(data)
    found = both(primitives, "convert", data, simulated, data.numel(), kind, threads=128)
    if kind >= 7:  # compared as floats: whether -0.0 becomes 0.0 is not specified either
        dtype = (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float16)[kind - 7]
        found, simulated = found.view(dtype), simulated.view(dtype)
    assert torch.equal(found, simulated)


# ---- The kernels


def on_gpu(tensor: Tensor | None) -> Tensor | None:
    """A copy on the GPU with the same values and strides, and of the whole storage around them."""
    if tensor is None:
        return None
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return whole.cuda().as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def launch(case: Case) -> Tensor:
    """Runs a case's kernel with the case's cut."""
    name = name_for(case.kernel)
    problem, cut = case.call.problem, case.cut
    order = ("input", "in_factor", "core", "height_factor", "width_factor", "out_factor", "bias")
    tensors = [on_gpu(case.call.tensors.get(name)) for name in order]
    windows = [list(problem.stride), list(problem.padding), list(problem.dilation)]
    numbers = [cut.n, cut.h, cut.w, cut.stages, cut.splits, cut.cluster]
    output: Tensor = _C.launch_gpu_kernel(name, numbers, *tensors, windows, problem.activation, None)
    return output


def assert_right(case: Case) -> None:
    """Asserts that the result is right, and that a second launch gives the same bits."""
    output = launch(case)
    case.assert_right(Result(output.cpu(), 0, {"error": ""}))
    assert torch.equal(launch(case), output)


@pytest.mark.parametrize("case", CONVOLUTION_CASES)
@pytest.mark.parametrize(("kernel", "dtype"), CONVOLUTIONS, ids=identify)
def test_convolutions(kernel: Kernel, dtype: torch.dtype, case: str) -> None:
    assert_right(convolution_case(case, kernel, dtype))


@pytest.mark.parametrize("case", LINEAR_CASES)
@pytest.mark.parametrize(("kernel", "dtype"), LINEAR, ids=identify)
def test_linear(kernel: Kernel, dtype: torch.dtype, case: str) -> None:
    assert_right(linear_case(case, kernel, dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("kernel", "case"), CASES, ids=str)
def test_hopper(kernel: Kernel, case: str, dtype: torch.dtype) -> None:
    assert_right(hopper_case(kernel, case, dtype))


@pytest.mark.parametrize(
    ("kernel", "window"),
    [(kernel, SAME) for kernel in (TUCKER, CP, WIDE, HOPPER_LINEAR)]
    + [(kernel, window) for kernel in (TUCKER, CP, WIDE) for window in (HALF, WIDER)],
    ids=str,
)
def test_several_tiles_a_multiprocessor(kernel: Kernel, window: dict[str, Any]) -> None:
    assert_right(case_for_a_gpu(kernel, torch.bfloat16, window))


@pytest.mark.parametrize("cluster", (1, 2))
@pytest.mark.parametrize("kernel", (CP, HOPPER_LINEAR), ids=str)
def test_several_tiles_a_multiprocessor_in_clusters(kernel: Kernel, cluster: int) -> None:
    case = case_for_a_gpu(kernel, torch.bfloat16)
    assert_right(replace(case, cut=replace(case.cut, cluster=cluster)))


# For compute-sanitizer, under which all cases would take hours: one case per kernel, with as many features as it can
# have.
@pytest.mark.parametrize(("kernel", "dtype"), [*CONVOLUTIONS, *LINEAR], ids=identify)
def test_sanitized(kernel: Kernel, dtype: torch.dtype) -> None:
    make = linear_case if kernel.op == "lowrank_linear" else convolution_case
    for case in ("one above", "lean edges"):
        assert_right(make(case, kernel, dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("kernel", "case"), CASES, ids=str)
def test_sanitized_hopper(kernel: Kernel, case: str, dtype: torch.dtype) -> None:
    assert_right(hopper_case(kernel, case, dtype))


@pytest.mark.parametrize("ctas", (1, 3))
@pytest.mark.parametrize("name", PERSISTENT_CASES)
@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES, ids=name_of)
def test_sanitized_persistent(dtype: torch.dtype, name: str, ctas: int) -> None:
    """Few CTAs, and so several tiles each."""
    _C.limit_gpu_ctas(ctas)
    try:
        assert_right(persistent_case(name, dtype))
    finally:
        _C.limit_gpu_ctas(0)


# ---- The check before first use


HOPPERS = [(kernel, dtype) for kernel in (TUCKER, CP, WIDE, HOPPER_LINEAR) for dtype in HALVES]


@pytest.mark.parametrize(("kernel", "dtype"), [*CONVOLUTIONS, *LINEAR, *HOPPERS], ids=identify)
def test_the_check_before_first_use(kernel: Kernel, dtype: torch.dtype) -> None:
    """A right kernel passes the check; one wrong channel fails it."""
    name = name_for(kernel)
    tf32 = kernel.family == "sm80" and dtype == torch.float32
    assert _C.check_gpu_kernel(name, name_of(dtype), tf32, 0, False) == ""
    assert "is off by" in _C.check_gpu_kernel(name, name_of(dtype), tf32, 0, True)


def test_a_cut_beyond_the_gpu_is_refused() -> None:
    """The message has all facts that a bug report needs."""
    kernel = CONVOLUTIONS[0][0]
    case = convolution_case("whole tiles", kernel, torch.bfloat16)
    options = dict(s=64, r1=4096, r2=64, h=20, w=20, layout=torch.channels_last)
    large = replace(case.call.problem, **options)
    case = replace(case, call=Call(large, large.make().tensors))
    with pytest.raises(RuntimeError) as error:
        launch(case)
    for part in (
        "cudaErrorInvalidValue",
        "[1, 64, 20, 20]",
        "BFloat16",
        "stages",
        "bytes of shared memory",
        "set_policy",
    ):
        assert part in str(error.value), part
