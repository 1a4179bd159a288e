"""Linear layers on the CPU: few rows unpacked, some hundred streamed, many packed; depths cut into blocks."""

from __future__ import annotations

import pytest
import torch

import lowrank_ops
from lowrank_ops.ops.extension import _C
from tests.support.budgets import assert_output, assert_same_bits_for_any_threads
from tests.support.problems import DTYPES, ISAS, Call, Problem

# Deeper than a block of either kind (2 KB a row), a page wide, odd; ranks of one panel, of more, deeper than a block.
SIZES = [(2048, 17, 100), (1101, 33, 131), (600, 1030, 24), (4097, 5, 16)]
ROWS = [1, 2, 3, 5, 8, 9, 64, 131]


def linear(rows: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> Call:
    s, r, t = sizes
    call = Problem("lowrank_linear", n=rows, h=1, s=s, r1=r, t=t, dtype=dtype, activation="relu").make()
    for name, fan_in in (("in_factor", s), ("out_factor", r)):
        call.tensors[name] /= fan_in**0.5
    return call


def kernel_of(call: Call) -> str:
    (found,) = lowrank_ops.explain(lowrank_ops.lowrank_linear, dict(call.tensors), verbose=False)
    return str(found.chosen["kernel"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_and_depths(fused_policy: None, rows: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    call = linear(rows, sizes, dtype)
    assert kernel_of(call).endswith("_unpacked") == (rows <= 8)
    assert_output(call, call.run())
    strided = torch.empty(rows, 1, sizes[0] + 3, dtype=dtype)[:, :, :-3]
    other = Call(call.problem, {**call.tensors, "input": strided.copy_(call.tensors["input"])})
    assert torch.equal(other.run(), call.run())


def test_streamed_are_some_hundred_rows_of_large_weights(fused_policy: None) -> None:
    kernels = {rows: kernel_of(linear(rows, (2048, 64, 2048), torch.float32)) for rows in (8, 9, 512, 513)}
    assert [kernel.rsplit("_", 1)[-1] for kernel in (kernels[8], kernels[9], kernels[512])] == [
        "unpacked", "streamed", "streamed",
    ]  # fmt: skip
    assert "streamed" not in kernels[513]
    assert "streamed" not in kernel_of(linear(256, (512, 8, 10), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(fused_policy: None, isa: str, dtype: torch.dtype) -> None:
    try:
        _C.set_cpu_isa(isa)
    except ValueError as error:
        pytest.skip(f"not on this CPU: {error}")
    try:
        for rows in ROWS:
            call = linear(rows, SIZES[1], dtype)
            assert_output(call, call.run())
    finally:
        _C.set_cpu_isa("")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 40, 600])
def test_bitwise_equal_for_any_number_of_threads(
    fused_policy: None, rows: int, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    call = linear(rows, sizes, dtype)
    assert_same_bits_for_any_threads(call.run, (1, 2, 3, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_do_not_depend_on_each_other(fused_policy: None, dtype: torch.dtype) -> None:
    """Few rows: each alone, in pairs and all together, bit for bit; a NaN stays in its row."""
    call = linear(8, SIZES[1], dtype)
    x = call.tensors["input"]
    whole = call.run()
    for count in (1, 2, 4):
        parts = [Call(call.problem, {**call.tensors, "input": part}).run() for part in x.split(count)]
        assert torch.equal(torch.cat(parts), whole)
    x[3, 0, 700] = float("nan")
    assert call.run().isnan().flatten(1).any(1).tolist() == [row == 3 for row in range(8)]
