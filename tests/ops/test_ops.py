"""Values, shapes and strides of the three ops against the fp64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lowrank_ops
from lowrank_ops import reference
from lowrank_ops.ops.extension import _C
from tests.support.budgets import assert_output, assert_same_bits_for_any_threads, assert_within_budget
from tests.support.calls import integer_call
from tests.support.problems import ACTIVATIONS, CONVS, DEVICES, DTYPES, GEOMETRIES, LAYOUTS, OPS, Call, Problem


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("op", CONVS)
@pytest.mark.parametrize("device", DEVICES)
def test_convolutions(
    device: str, op: str, geometry: str, layout: torch.memory_format, dtype: torch.dtype, policy: str
) -> None:
    call = Problem(op, device=device, dtype=dtype, layout=layout, **GEOMETRIES[geometry]).make()
    assert_output(call, call.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_merged_depthwise_stages(geometry: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    """The merged depthwise stage that GPUs run for CP gives the same as the two stages one after the other."""
    call = Problem("cp_conv2d", dtype=dtype, layout=layout, activation="relu", **GEOMETRIES[geometry]).make()
    window = [call.problem.stride, call.problem.padding, call.problem.dilation]
    output = _C.merged_cp_chain(*call.tensors.values(), *window, "relu")
    assert_output(call, output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(5, 4, 3), (1, 1, 1), (1, 9, 2), (7, 1, 3), (64, 48, 16), (130, 67, 31)])
@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_linear(device: str, leading: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype, policy: str) -> None:
    s, t, r = sizes
    call = Problem("lowrank_linear", device=device, dtype=dtype, s=s, t=t, r1=r, n=6, h=2).make()
    rows = call.tensors["input"].flatten(0, 1)[: torch.Size(leading).numel()]
    call.tensors["input"] = rows.reshape(*leading, s)
    assert_output(call, call.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", DEVICES)
def test_activations(device: str, op: str, activation: str, bias: bool, dtype: torch.dtype, policy: str) -> None:
    call = Problem(op, device=device, dtype=dtype, activation=activation, bias=bias, n=3).make()
    assert_output(call, call.run())


# Each with its derivative.
EXACT_ACTIVATIONS: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "none": (lambda x: x, lambda x: 1.0),
    "relu": (lambda x: max(x, 0.0), lambda x: float(x > 0)),
    "relu6": (lambda x: min(max(x, 0.0), 6.0), lambda x: float(0 < x < 6)),
    "hardswish": (
        lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
        lambda x: float(x > 0) if abs(x) > 3 else (2 * x + 3) / 6,
    ),
    "silu": (lambda x: x / (1 + math.exp(-x)), lambda x: (1 + math.exp(-x) * (1 + x)) / (1 + math.exp(-x)) ** 2),
    "gelu": (
        lambda x: x * math.erfc(-x * math.sqrt(0.5)) / 2,
        lambda x: math.erfc(-x * math.sqrt(0.5)) / 2 + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    ),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_float64_activations_are_exact(device: str, activation: str, policy: str) -> None:
    """The reference, the op and both gradients against Python's own arithmetic, because torch may have the same error
    in all three."""
    function, derivative = EXACT_ACTIVATIONS[activation]
    values = torch.linspace(-7.9, 7.9, 98, dtype=torch.float64)  # none at a kink
    expected = torch.tensor([function(x) for x in values.tolist()], dtype=torch.float64)
    slopes = torch.tensor([derivative(x) for x in values.tolist()], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64, device=device)
    for op in (reference.lowrank_linear, lowrank_ops.lowrank_linear):
        x = values.to(device).unsqueeze(1).requires_grad_()
        output = op(x, one, one, activation=activation)
        (gradient,) = torch.autograd.grad(output.sum(), x)
        for found, exact in ((output.detach(), expected), (gradient, slopes)):
            torch.testing.assert_close(found.cpu().squeeze(1), exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device: str, op: str, dtype: torch.dtype, layout: torch.memory_format, policy: str) -> None:
    call = Problem(op, device=device, dtype=dtype, layout=layout, n=0).make()
    output = call.run()
    assert output.shape == call.exact().shape and output.dtype == dtype


def _embedded(tensor: Tensor) -> Tensor:
    """The same values as a slice of a larger tensor, on every axis, starting at an odd offset."""
    larger = torch.full([2 * size + 3 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    view = larger[tuple(slice(1, 1 + 2 * size, 2) for size in tensor.shape)]
    view.copy_(tensor)
    return view


VIEWS = {
    "sliced": _embedded,
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
    "reversed strides": lambda tensor: (
        tensor.permute(*range(tensor.dim())[::-1]).contiguous().permute(*range(tensor.dim())[::-1])
    ),
    "odd offset": lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", ["input", "factors"])
@pytest.mark.parametrize("op", OPS)
def test_strided_arguments(op: str, which: str, view: str, dtype: torch.dtype, policy: str) -> None:
    call = Problem(op, dtype=dtype, padding=(1, 1), s=6).make()
    for name, tensor in call.tensors.items():
        if (name == "input") == (which == "input"):
            call.tensors[name] = VIEWS[view](tensor)
            assert torch.equal(call.tensors[name], tensor)
    assert_output(call, call.run())


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("op", OPS)
def test_expanded_input(op: str, axis: int, policy: str) -> None:
    call = Problem(op, padding=(1, 1)).make()
    input = call.tensors["input"]
    call.tensors["input"] = input.narrow(axis, 0, 1).expand(input.shape)
    assert_output(call, call.run())


@pytest.mark.parametrize("op", CONVS)
def test_channel_slice_of_channels_last(op: str, policy: str) -> None:
    """A slice of the channels of a channels_last tensor, as after `chunk` or in a DenseNet."""
    call = Problem(op, s=8, padding=(1, 1), layout=torch.channels_last).make()
    wide = torch.cat([call.tensors["input"]] * 2, 1).contiguous(memory_format=torch.channels_last)
    call.tensors["input"] = wide[:, 8:]
    assert_output(call, call.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("op", OPS)
def test_exact_on_small_integers(
    op: str, activation: str, layout: torch.memory_format, dtype: torch.dtype, policy: str
) -> None:
    """With entries -1, 0, 1 every intermediate is an integer that bf16 holds: nothing is ever rounded."""
    call = integer_call(Problem(op, activation=activation, layout=layout, dtype=dtype, padding=(1, 1)))
    assert torch.equal(call.run().double(), call.exact())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", [1, 5])
def test_bitwise_equal_for_any_number_of_threads(
    batch: int, op: str, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    sizes = dict(n=batch, s=70, t=90, r1=40, r2=33, h=29, w=31, kernel=(3, 3), padding=(1, 1))
    call = Problem(op, dtype=dtype, layout=layout, activation="silu", **sizes).make()
    with lowrank_ops.set_policy("fused"):  # the library may compute other bits for the chain
        assert_same_bits_for_any_threads(call.run, (1, 2, 3, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("padding", [(6, 7), (8, 14), (13, 20)], ids=str)
def test_taps_outside_of_the_image(padding: tuple[int, int], stride: tuple[int, int], dtype: torch.dtype) -> None:
    """Wide dilations, whose outputs at the edges see some taps, or none, inside the image: those are left out."""
    sizes = dict(n=2, s=40, t=50, r1=33, r2=70, h=11, w=45, kernel=(3, 3), dilation=(6, 7))
    call = Problem("tucker_conv2d", dtype=dtype, padding=padding, stride=stride, **sizes).make()
    with lowrank_ops.set_policy("fused"):
        assert_output(call, call.run())
        assert_same_bits_for_any_threads(call.run, (1, 2, 3, 5))


@pytest.mark.parametrize("op", OPS)
def test_same_result_every_time(op: str, policy: str) -> None:
    call = Problem(op, s=33, t=17, r1=9, r2=12, h=20, w=20).make()
    first = call.run()
    assert all(torch.equal(first, call.run()) for _ in range(5))


@pytest.mark.parametrize("op", OPS)
def test_arguments_are_left_alone(op: str, policy: str) -> None:
    call = Problem(op, dtype=torch.bfloat16, activation="relu").make()
    before = {name: tensor.clone() for name, tensor in call.tensors.items()}
    call.run()
    assert all(torch.equal(before[name], tensor) for name, tensor in call.tensors.items())


@pytest.mark.parametrize("op", CONVS)
def test_equals_the_dense_convolution(op: str) -> None:
    """The op computes the convolution with the product of the factors."""
    problem = Problem(op, dtype=torch.float64, stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    tensors = problem.make().tensors
    factors = [tensor for name, tensor in tensors.items() if name not in ("input", "bias")]
    weight_of = reference.tucker_weight if op == "tucker_conv2d" else reference.cp_weight
    dense = torch.nn.functional.conv2d(
        tensors["input"],
        weight_of(*factors),
        tensors["bias"],
        problem.stride,
        problem.padding,
        problem.dilation,
    )
    call = Call(problem, tensors)
    assert_within_budget(call.run(), dense, call.magnitude())


@pytest.mark.parametrize("stride", [2, (2, 2), [2, 2]], ids=str)
def test_options_as_int_pair_or_list(stride: object) -> None:
    call = Problem("tucker_conv2d", stride=(2, 2)).make()
    other = replace(call.problem).make()
    assert torch.equal(call.run(), torch.ops.lowrank_ops.tucker_conv2d(**other.tensors, stride=stride))


def test_input_without_columns_and_without_strides(fused_policy: None) -> None:
    """Width 0 next to a stride of 0: only padding is read."""
    x = torch.empty(1, 8, 1, 0).expand(1, 8, 4, 0)
    factors = torch.randn(3, 8), torch.randn(2, 3, 1, 1), torch.randn(5, 2)
    bias = torch.randn(5)
    found = lowrank_ops.tucker_conv2d(x, *factors, bias, padding=1)
    assert torch.equal(found, bias.view(1, 5, 1, 1).expand(1, 5, 6, 2))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [2**31, 2**54, 2**62])
def test_windows_that_would_overflow_are_refused(name: str, value: int) -> None:
    call = Problem("tucker_conv2d", kernel=(1, 2)).make()
    with pytest.raises(ValueError, match=f"tucker_conv2d: {name} must be at most"):
        lowrank_ops.tucker_conv2d(**call.tensors, **{name: (1, value)})


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_checks_its_arguments(op: str) -> None:
    call = Problem(op).make()
    call.tensors["bias"] = torch.zeros(7)
    with torch.autograd.forward_ad.dual_level():
        x = call.tensors["input"]
        call.tensors["input"] = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match=f"{op}: bias must be"):
            call.run()


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_of_few_rows(rows: int, dtype: torch.dtype, fused_policy: None) -> None:
    """Depths and widths around vectors and blocks of the unpacked kernel, contiguous and transposed rows."""
    for seed, (s, r, t) in enumerate([(1, 1, 1), (16, 4, 17), (31, 5, 16), (33, 16, 35), (64, 33, 100), (129, 40, 6)]):
        call = Problem("lowrank_linear", n=1, h=rows, s=s, r1=r, t=t, dtype=dtype, activation="silu", seed=seed).make()
        assert_output(call, call.run())
        call.tensors["input"] = call.tensors["input"].transpose(1, 2).contiguous().transpose(1, 2)
        exact = call.exact()
        low = call.reference(dtype) if dtype.itemsize == 2 else None
        assert_within_budget(call.run(), exact, call.magnitude(), low)
