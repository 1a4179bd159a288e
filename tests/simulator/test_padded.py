"""The lean kernels on factors that were prepared for GPUs (csrc/ops/padded_factors.h): every rank is a common case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_ops.ops.extension import _C
from tests.support.calls import factors_of
from tests.support.problems import Problem
from tests.support.simulator import building, harness
from tests.support.simulator.cases import Case, dtypes_of, name_of, tile_of
from tests.support.simulator.harness import Cut, Kernel, Result

pytestmark = pytest.mark.skipif(bool(building.missing()), reason=building.missing() or "g++ is there")

KERNELS = [
    (kernel, dtype) for kernel in harness.kernels() if kernel.family == "sm80" for dtype in dtypes_of(kernel)
]  # fmt: skip
CHANNELS_LAST = torch.channels_last

# Ranks that are no multiples of 16 bytes, alone and above one pass of the widest configuration.
RANKS = {"37 and 20": (37, 21), "one": (1, 1), "above a pass": (131, 133)}
WINDOWS: dict[str, dict[str, Any]] = {
    "3x3": dict(kernel=(3, 3), padding=(1, 1)),
    "2x5, stride, dilation": dict(kernel=(2, 5), padding=(1, 3), stride=(2, 1), dilation=(1, 2)),
}


def padded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a prepared call, as csrc/cuda gives them to a kernel."""
    factors = factors_of(tensors)
    found = _C.padded_factors(_C.pad_factors(factors), factors)
    assert found is not None
    return {**tensors, **{name: tensor for name, tensor in found.items() if name != "taps"}}


def assert_lean_and_right(case: Case) -> Result:
    """The kernel on the padded factors against the float64 reference of the given ones."""
    kernel, cut, tensors, options, output = case.launch()
    assert not harness.is_common_case(kernel, cut, tensors, options, output)
    tensors = padded(tensors)
    assert harness.is_common_case(kernel, cut, tensors, options, output)
    result = harness.run(kernel, cut, tensors, options, output)
    case.assert_right(result)
    return result


def ids(value: object) -> str:
    return name_of(value) if isinstance(value, torch.dtype) else str(value)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("kernel", "dtype"), [one for one in KERNELS if one[0].op != "lowrank_linear"], ids=ids)
def test_convolutions(kernel: Kernel, dtype: torch.dtype, ranks: str, window: str) -> None:
    r1, r2 = RANKS[ranks]
    height, width = tile_of(kernel)
    sizes = dict(n=2, s=40, t=200, r1=r1, r2=r2, h=height // 2 + 3, w=width // 2 + 5)
    call = Problem(kernel.op, **sizes, dtype=dtype, layout=CHANNELS_LAST, activation="silu", **WINDOWS[window]).make()
    cut = Cut(1, height // 2, width // 2, stages=3, splits=2)
    assert_lean_and_right(Case(kernel, cut, call))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("kernel", "dtype"), [one for one in KERNELS if one[0].op == "lowrank_linear"], ids=ids)
def test_linear(kernel: Kernel, dtype: torch.dtype, ranks: str) -> None:
    call = Problem(kernel.op, n=3, h=67, s=72, t=136, r1=RANKS[ranks][0], dtype=dtype, activation="gelu").make()
    assert_lean_and_right(Case(kernel, Cut(1, 1, 64, stages=2, splits=2), call))


@pytest.mark.parametrize("op", ["tucker_conv2d", "cp_conv2d"])
def test_no_call_copies_a_core_or_reads_beyond_the_copies(op: str) -> None:
    """The kernel's reads of a factor stay inside of its copy, whose bounds the simulator checks: it reads each value of
    the copy, zeros included, once per CTA."""
    kernel = Kernel(op, "sm80", 0)
    call = Problem(
        op, n=1, s=32, t=32, r1=20, r2=20, h=6, w=6, kernel=(3, 3), padding=(1, 1), dtype=torch.bfloat16,
        layout=CHANNELS_LAST,
    ).make()  # fmt: skip
    result = assert_lean_and_right(Case(kernel, Cut(1, 6, 6, stages=2), call))
    assert result.traffic("in_factor")["bytes"] == 24 * 32 * 2
    assert result.traffic("out_factor")["bytes"] == 32 * 24 * 2
    if op == "tucker_conv2d":
        assert result.traffic("core")["bytes"] == 24 * 24 * 9 * 2
