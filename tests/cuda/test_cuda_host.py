"""The parameters that csrc/cuda passes to a kernel (pointers, strides, widths of copies), without a GPU: the simulator
runs the kernel with them.

Needs a build with CUDA kernels, of any torch: `make check-cuda`.
"""

from __future__ import annotations

import ctypes
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_ops
from lowrank_ops.ops.extension import _C
from tests.support.budgets import assert_strides, assert_within_budget
from tests.support.calls import VIEWS, factors_of
from tests.support.problems import FACTORS, LAYOUTS, OPS, Call, Problem
from tests.support.simulator import building, harness
from tests.support.simulator.harness import Cut, Kernel, Result

pytestmark = [
    pytest.mark.skipif(lowrank_ops.build_info()["cuda"] is None, reason="lowrank_ops was built without CUDA kernels"),
    pytest.mark.skipif(bool(building.missing()), reason=building.missing() or "g++ is there"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CUTS = {"tucker_conv2d": Cut(1, 4, 8), "cp_conv2d": Cut(1, 4, 8), "lowrank_linear": Cut(1, 1, 32, splits=2)}


def kernel_for(op: str) -> tuple[Kernel, str]:
    """The simt kernel with the small tile, which takes every dtype, and its name."""
    (line,) = [line for line in _C.gpu_kernels() if (line["op"], line["family"], line["config"]) == (op, "simt", 1)]
    return Kernel(op, "simt", 1), line["name"]


def described(call: Call, packed: Tensor | None = None) -> dict[str, Any]:
    """The parameters that csrc/cuda would pass to the kernel. `packed`: factors prepared for the call."""
    problem, cut = call.problem, CUTS[call.problem.op]
    tensors = [call.tensors.get(name) for name in ("input", *FACTORS, "bias")]
    windows = [list(problem.stride), list(problem.padding), list(problem.dilation)]
    numbers = [cut.n, cut.h, cut.w, cut.stages, cut.splits, cut.cluster]
    _, name = kernel_for(problem.op)
    found: dict[str, Any] = _C.describe_launch(name, numbers, *tensors, windows, problem.activation, packed)
    return found


def simulate(call: Call, found: dict[str, Any]) -> Result:
    """Runs the kernel with exactly the numbers that csrc/cuda gave; `block_call` adds the bounds of the tensors."""
    kernel, _ = kernel_for(call.problem.op)
    output: Tensor = found["output_tensor"]
    kept = zip(("input", "core", "bias"), found["kept"], strict=True)  # a linear layer's input as rows
    tensors = {**call.tensors, **{name: tensor for name, tensor in kept if tensor is not None}}
    block = harness.block_call(kernel, CUTS[kernel.op], tensors, call.problem.options(), output, {})
    for side in ("input", "output"):
        assert list(getattr(block, f"{side}_stride"))[1] == found[f"{side}_stride"][1]
        setattr(block, f"{side}_stride", (ctypes.c_int64 * 4)(*found[f"{side}_stride"]))
        setattr(block, f"{side}_vector", found[f"{side}_vector"])
    block.input, block.bias = found["input"], found["bias"]
    for name in FACTORS:
        factor = getattr(block, name)
        factor.data, factor.vector = found[name]["data"], found[name]["vector"]
        factor.row_stride, factor.column_stride = found[name]["row_stride"], found[name]["column_stride"]
        factor.tap_stride = (ctypes.c_int64 * 2)(*found[name]["tap_stride"])
    output.fill_(torch.nan)
    code = harness.library().simulator_run(ctypes.byref(block), ctypes.byref(harness._settings(None)))
    return Result(output, code, json.loads(harness.library().simulator_report().decode()))


def assert_right(call: Call, packed: Tensor | None = None) -> dict[str, Any]:
    """Asserts that the simulator finds no mistake and that the values are right."""
    found = described(call, packed)
    factors = factors_of(call.tensors)
    copies = {} if packed is None else _C.padded_factors(packed, factors) or {}
    copies.pop("taps", None)
    result = simulate(Call(call.problem, {**call.tensors, **copies}), found)
    assert (result.code, result.error) == (0, "")
    exact = call.exact()
    output = result.output.reshape(exact.shape)
    if call.problem.op != "lowrank_linear":
        assert_strides(output, call.tensors["input"])
    library = call.reference(output.dtype) if output.dtype.itemsize < 4 else None
    assert_within_budget(output, exact, call.magnitude(), library)
    return found


WINDOW = dict(kernel=(3, 2), stride=(1, 2), padding=(1, 1), dilation=(2, 1))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_views(op: str, layout: torch.memory_format, dtype: torch.dtype, view: str) -> None:
    call = Problem(op, n=2, s=20, t=24, r1=12, r2=10, h=9, w=8, dtype=dtype, layout=layout, **WINDOW).make()
    call.tensors = {name: VIEWS[view](tensor) for name, tensor in call.tensors.items()}
    assert_right(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_widest_copies(op: str, dtype: torch.dtype) -> None:
    """With whole vectors of channels in channels_last and a contiguous core all copies take 16 bytes."""
    call = Problem(op, s=32, t=24, r1=16, r2=8, dtype=dtype, layout=torch.channels_last, kernel=(3, 3)).make()
    if op == "tucker_conv2d":
        call.tensors["core"] = call.tensors["core"].contiguous()
    found = assert_right(call)
    assert found["planned_vectors"] == [16, 16, 16]
    assert found["input_vector"] == found["output_vector"] == 16
    assert found["in_factor"]["vector"] == found["out_factor"]["vector"] == 16
    if op == "tucker_conv2d":
        assert (found["core"]["vector"], found["core"]["column_stride"]) == (16, 1)


@pytest.mark.parametrize(("channels", "width"), [(7, 2), (6, 4), (4, 8), (12, 8), (8, 16)])
def test_widths_follow_the_channels(channels: int, width: int) -> None:
    sizes = dict(s=channels, t=channels, r1=channels, r2=channels)
    call = Problem("tucker_conv2d", **sizes, dtype=torch.bfloat16, layout=torch.channels_last, kernel=(3, 3)).make()
    found = assert_right(call)
    # Outputs are written either in 16-byte vectors or in elements.
    assert found["planned_vectors"] == [width, width, 16 if width == 16 else 2]


def test_a_pointer_off_its_vector() -> None:
    call = Problem("lowrank_linear", s=32, t=8, r1=16, dtype=torch.float32).make()
    call.tensors["input"] = VIEWS["odd offset"](call.tensors["input"])
    found = assert_right(call)
    assert found["planned_vectors"] == [4, 16, 16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_prepared_factors(op: str, dtype: torch.dtype) -> None:
    """All copies of the padded factors take 16 bytes, wherever the given ones and whatever their ranks are."""
    call = Problem(op, s=32, t=24, r1=13, r2=11, dtype=dtype, layout=torch.channels_last, kernel=(3, 3)).make()
    call.tensors = {**call.tensors, "in_factor": VIEWS["odd offset"](call.tensors["in_factor"])}
    if op == "tucker_conv2d":
        call.tensors["core"] = call.tensors["core"].contiguous()
    factors = factors_of(call.tensors)
    packed = _C.pad_factors(factors)
    found, copies = assert_right(call, packed), _C.padded_factors(packed, factors)
    assert found["planned_vectors"] == [16, 16, 16] and assert_right(call)["planned_vectors"][1] < 16
    for name, padded in copies.items():
        assert name == "taps" or found[name]["data"] == padded.data_ptr()
    with torch.no_grad():
        call.tensors["out_factor"].mul_(2)
    assert assert_right(call, packed)["out_factor"]["data"] == call.tensors["out_factor"].data_ptr()


def test_contiguous_cores_are_packed_and_others_taken_as_they_are() -> None:
    call = Problem("tucker_conv2d", r1=8, r2=8, kernel=(3, 3)).make()
    contiguous = described(call)
    assert contiguous["core"]["column_stride"] == 1
    assert contiguous["core"]["data"] != call.tensors["core"].data_ptr()
    call.tensors["core"] = call.tensors["core"].contiguous(memory_format=torch.channels_last)
    assert described(call)["core"]["data"] == call.tensors["core"].data_ptr()


def test_a_batch_that_is_one_image_expanded() -> None:
    call = Problem("cp_conv2d", n=1, s=16, t=16, r1=8, h=9, w=9).make()
    call.tensors["input"] = call.tensors["input"].expand(3, -1, -1, -1)
    assert assert_right(call)["input_stride"][0] == 0


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        pytest.param(1, True, id="cudaErrorInvalidValue"),
        pytest.param(701, True, id="cudaErrorLaunchOutOfResources"),
        pytest.param(209, True, id="cudaErrorNoKernelImageForDevice"),
        pytest.param(700, False, id="cudaErrorIllegalAddress"),
        pytest.param(719, False, id="cudaErrorLaunchFailure"),
        pytest.param(0, False, id="cudaSuccess"),
    ],
)
def test_after_a_refused_launch_the_chain_can_run(error: int, refused: bool) -> None:
    assert _C.is_launch_refusal(error) is refused
