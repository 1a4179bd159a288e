"""Every instruction set's kernels on the machine at hand, and the GEMM through oneDNN."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import lowrank_ops
from lowrank_ops.ops.extension import _C
from tests.support.budgets import assert_output
from tests.support.problems import ACTIVATIONS, DTYPES, OPS, Problem


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_instruction_set(isa: str, op: str, dtype: torch.dtype) -> None:
    """Widths around every vector and panel, rows around every block, both layouts."""
    widths = [(1, 1), (15, 17), (16, 64), (33, 48), (65, 130)]
    for seed, (r, t) in enumerate(widths):
        for layout in (torch.contiguous_format, torch.channels_last):
            problem = Problem(
                op, n=2, s=19 + seed, t=t, r1=r, r2=t // 2 + 1, h=6, w=13 + seed, kernel=(3, 2), padding=(1, 1),
                activation=ACTIVATIONS[seed + 1], dtype=dtype, layout=layout, seed=seed,
            )  # fmt: skip
            call = problem.make()
            assert_output(call, call.run())


def test_one_row_in_float64(isa: str) -> None:
    """Few numbers, whose rounding errors do not average out: those of the reference count as much as the kernel's."""
    call = Problem("lowrank_linear", s=5, t=4, r1=3, n=6, h=2, dtype=torch.float64).make()
    call.tensors["input"] = call.tensors["input"][0, 0]
    assert_output(call, call.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise_windows_of_every_length(isa: str, dtype: torch.dtype) -> None:
    """CP's 3x3 window slides in steps of three pixels, two rows at a time: every remainder of both."""
    for h in (1, 2, 3, 6, 7):
        for w in range(1, 8):
            problem = Problem(
                "cp_conv2d", n=1, s=3, h=h, w=w, t=5, r1=33, kernel=(3, 3), padding=(1, 1), dtype=dtype,
                layout=torch.channels_last,
            )  # fmt: skip
            call = problem.make()
            assert_output(call, call.run())


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of generic.*got 'sse9'"):
        _C.set_cpu_isa("sse9")


def test_environment_variable_caps_the_instruction_set() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import lowrank_ops; print(lowrank_ops.ops.extension._C.cpu_isa())"],
        env={**os.environ, "LOWRANK_OPS_CPU_ISA": "generic"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "generic"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits_is_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """An identity layer rounds nothing and must give every value back, ties and infinities included."""
    values = torch.tensor([0.0, 1.0, -1.5, 65504.0, 3.0517578125e-05, 0.333984375, -2.0], dtype=dtype)
    eye = torch.eye(7, dtype=dtype)
    assert torch.equal(lowrank_ops.lowrank_linear(values[None], eye, eye)[0], values)
    # Sums exactly between two numbers of the dtype: 1 + eps / 2 goes down to 1, 1 + 3 eps / 2 up to 1 + 2 eps.
    eps = torch.finfo(dtype).eps
    halves = torch.tensor([[1.0, eps / 2], [1.0 + eps, eps / 2]], dtype=dtype)
    found = lowrank_ops.lowrank_linear(halves, torch.eye(2, dtype=dtype), torch.ones(1, 2, dtype=dtype))
    assert torch.equal(found[:, 0].double(), torch.tensor([1.0, 1.0 + 2 * eps], dtype=torch.float64))


def test_nan_and_infinity_pass_through(isa: str) -> None:
    for dtype in DTYPES:
        x = torch.tensor([[float("nan"), 1.0], [float("inf"), 0.0], [1.0, 2.0]], dtype=dtype)
        eye = torch.eye(2, dtype=dtype)
        for activation in ("none", "relu", "relu6", "silu", "gelu", "hardswish"):
            found = lowrank_ops.lowrank_linear(x, eye, eye, activation=activation)
            assert found[0, 0].isnan() and found[2].isfinite().all(), (dtype, activation)
