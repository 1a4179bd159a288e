"""Images of one column, in and out: the fused CPU kernels read them as images of one row."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lowrank_ops
from tests.support.budgets import assert_gradients, assert_output
from tests.support.problems import Problem

LAYOUTS = (torch.contiguous_format, torch.channels_last)
CONVS = ("tucker_conv2d", "cp_conv2d")

COLUMN = dict(s=24, h=97, w=1, t=20, r1=16, r2=12, kernel=(9, 1), padding=(4, 0))
WINDOWS = {
    "plain": {},
    "stride": dict(stride=(4, 1)),
    "stride along the width too": dict(stride=(2, 3)),
    "dilation": dict(dilation=(2, 5), padding=(0, 0)),
    "one output": dict(padding=(0, 0), kernel=(97, 1)),
    "one tap": dict(padding=(0, 0), kernel=(1, 1)),
    "wider than the image": dict(padding=(1, 1), kernel=(3, 3)),
    "wider, stride and dilation": dict(padding=(1, 2), kernel=(3, 3), stride=(2, 2), dilation=(1, 2)),
    "sees padding only": dict(padding=(1, 1), kernel=(3, 2), dilation=(1, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("op", CONVS)
def test_against_the_reference(op: str, window: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    call = Problem(op, dtype=dtype, layout=layout, activation="silu", **{**COLUMN, **WINDOWS[window]}).make()
    with lowrank_ops.set_policy("chain"):
        chain = call.run()
    with lowrank_ops.set_policy("fused"):
        fused = call.run()
    assert_output(call, fused)
    assert fused.shape == chain.shape and fused.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("op", CONVS)
def test_gradients(op: str) -> None:
    call = Problem(op, activation="silu", **COLUMN).make()
    with lowrank_ops.set_policy("fused"):
        assert_gradients(call, torch.randn(call.exact().shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", CONVS)
def test_the_bits_are_those_of_a_row(op: str, layout: torch.memory_format, width: int) -> None:
    call = Problem(op, layout=layout, **{**COLUMN, "kernel": (9, width), "padding": (4, width // 2)}).make()
    row = dataclasses.replace(call.problem, h=1, w=97, kernel=(width, 9), padding=(width // 2, 4)).make()
    for name, tensor in call.tensors.items():
        turned = tensor.transpose(2, 3).contiguous(memory_format=layout) if tensor.dim() == 4 else tensor
        row.tensors[{"height_factor": "width_factor", "width_factor": "height_factor"}.get(name, name)] = turned
    with lowrank_ops.set_policy("fused"):
        assert torch.equal(call.run().transpose(2, 3), row.run())


@pytest.mark.parametrize("op", CONVS)
def test_input_and_core_that_are_not_dense(op: str) -> None:
    call = Problem(op, **COLUMN).make()
    for name, tensor in call.tensors.items():
        larger = torch.zeros([2 * size for size in tensor.shape])
        call.tensors[name] = larger[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
    with lowrank_ops.set_policy("fused"):
        assert_output(call, call.run())


@pytest.mark.parametrize("kernel", [(9, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_prepared_weights_serve(layout: torch.memory_format, kernel: tuple[int, int]) -> None:
    """The direct core's are those of the column; Winograd's are packed for a row only, and the plan counts on none. A
    wider core is packed anew, as its axes are exchanged."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    module = lowrank_ops.TuckerConv2d(32, 32, kernel, rank=16, padding=padding).eval().to(memory_format=layout)
    input = torch.randn(2, 32, 64, 1).contiguous(memory_format=layout)
    with torch.inference_mode(), lowrank_ops.set_policy("fused"):
        before = module(input)
        lowrank_ops.prepare_for_inference_(module)
        assert torch.equal(module(input), before)


def test_explain_says_so() -> None:
    module = lowrank_ops.TuckerConv2d(32, 32, (9, 1), rank=16, padding=(4, 0))
    note = "images of one column are read as images of one row"
    with lowrank_ops.set_policy("fused"):
        assert note in str(lowrank_ops.explain(module, (2, 32, 64, 1)))
        assert note not in str(lowrank_ops.explain(module, (2, 32, 64, 2)))
    module = lowrank_ops.TuckerConv2d(32, 32, 3, rank=16, padding=1)
    with lowrank_ops.set_policy("fused"):
        assert note in str(lowrank_ops.explain(module, (2, 32, 64, 1)))


def test_bf16_with_a_stride_along_the_column_may_take_the_chain() -> None:
    """torch's bf16 convolutions cannot be trusted with a stride along the width: here it lies along the height."""
    module = lowrank_ops.TuckerConv2d(32, 32, (9, 1), rank=16, stride=(4, 1), dtype=torch.bfloat16)
    with lowrank_ops.set_policy("auto"):
        assert "would run in fp32" not in str(lowrank_ops.explain(module, (2, 32, 64, 1)))
