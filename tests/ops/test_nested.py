"""Nested tensors (torch.nested): linear layers take jagged ones; all other uses raise errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops
from lowrank_ops import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from tests.support.problems import Problem

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def nested(lengths: tuple[int, ...], *size: int, layout: torch.layout = torch.jagged, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(length, *size, generator=generator) for length in lengths]
    return torch.nested.nested_tensor(parts, layout=layout, **options)


def as_op(layer: LowRankLinear) -> Callable[[Tensor], Tensor]:
    return lambda x: lowrank_ops.lowrank_linear(x, layer.in_factor, layer.out_factor, layer.bias, layer.activation)


def prepared(layer: LowRankLinear) -> Callable[[Tensor], Tensor]:
    lowrank_ops.prepare_for_inference_(layer)
    return layer


@pytest.mark.parametrize("kind", [lambda layer: layer, as_op, prepared], ids=["module", "op", "prepared"])
@pytest.mark.parametrize("size", [(5,), (3, 5)], ids=str)
def test_a_linear_layer_takes_jagged_tensors(kind: Callable, size: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    layer = LowRankLinear(5, 4, 3, activation="silu").eval()
    x = nested((2, 0, 7), *size)
    with torch.no_grad():
        output = kind(layer)(x)
        assert output.is_nested and output.layout == torch.jagged
        assert output.offsets() is x.offsets()
        for found, part in zip(output.unbind(), x.unbind(), strict=True):
            torch.testing.assert_close(found, layer(part))
        dense = nn.functional.linear(x, torch.ones(4, 5))  # of the same ragged axis, so that they can be added
        assert torch.equal((output + dense).values(), output.values() + dense.values())


def test_gradients_of_jagged_tensors() -> None:
    torch.manual_seed(1)
    layer = LowRankLinear(5, 4, 3, activation="gelu", dtype=torch.float64)
    parts = [torch.randn(length, 5, dtype=torch.float64, requires_grad=True) for length in (2, 7)]
    leaves = [*parts, *layer.parameters()]

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((output * torch.linspace(-1, 1, 4, dtype=torch.float64)).square().sum(), leaves)

    output = layer(torch.nested.as_nested_tensor(parts, layout=torch.jagged))
    found, expected = gradients(output.values()), gradients(layer(torch.cat(parts)))
    assert all(torch.any(gradient != 0) for gradient in expected)
    torch.testing.assert_close(found, expected)


def test_hooks_see_the_nested_tensor_once() -> None:
    layer, seen = LowRankLinear(5, 4, 3), []
    layer.register_forward_hook(lambda _, args, output: seen.append((args[0].is_nested, output.is_nested)))
    layer(nested((2, 7), 5))
    assert seen == [(True, True)]


def test_autocast() -> None:
    layer, x = LowRankLinear(5, 4, 3), nested((2, 7), 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def transposed() -> Tensor:
    return nested((2, 7), 3, 5).transpose(1, 2)


def with_holes() -> Tensor:
    return torch.nested.nested_tensor_from_jagged(torch.randn(9, 5), torch.tensor([0, 4, 9]), torch.tensor([2, 3]))


@pytest.mark.parametrize("kind", [lambda layer: layer, as_op], ids=["module", "op"])
def test_other_nested_tensors_are_refused(kind: Callable) -> None:
    layer = LowRankLinear(5, 4, 3)
    strided = nested((2, 7), 5, layout=torch.strided)
    with pytest.raises(ValueError, match=r"inear: a nested input must have the layout torch.jagged, got torch.strided"):
        kind(layer)(strided)
    jagged = torch.nested.as_nested_tensor(strided.unbind(), layout=torch.jagged)  # as the message says
    assert kind(layer)(jagged).is_nested
    for make in (transposed, with_holes):
        with pytest.raises(ValueError, match=r"inear: a nested input must be contiguous, its ragged axis the second"):
            kind(layer)(make())
    assert kind(layer)(transposed().transpose(1, 2)).is_nested and kind(layer)(with_holes().contiguous()).is_nested


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("module", [TuckerConv2d, CPConv2d, TuckerConv1d, CPConv1d])
def test_convolutions_refuse_nested_tensors(module: type, layout: torch.layout) -> None:
    layer = module(5, 4, 3, 2, padding=1)
    images = nested((5, 5), *(8,) * layer.axes, layout=layout)
    with pytest.raises(ValueError, match=rf"{module.__name__}: input must be a dense tensor, got a nested tensor; pad"):
        layer(images)


@pytest.mark.parametrize("op", ["tucker_conv2d", "cp_conv2d"])
def test_convolution_ops_refuse_nested_tensors(op: str) -> None:
    tensors = Problem(op).make().tensors
    tensors["input"] = nested((5, 5), 7, 6, layout=torch.strided)
    with pytest.raises(ValueError, match=f"{op}: input must be a dense tensor, got a nested tensor; pad it"):
        getattr(lowrank_ops, op)(**tensors)


def test_what_is_no_tensor_is_refused_as_before() -> None:
    with pytest.raises(TypeError):
        LowRankLinear(5, 4, 3)([1.0] * 5)
