"""Modules that are timed in their layers' places compute about what the layers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_ops.budget.menu import Block, empty_module
from lowrank_ops.budget.sketch import sketched


def lowrank_(layer: Any, rank: int) -> None:
    """Gives the layer a weight of this rank in both channel modes, and a bias."""
    outputs, inputs, *taps = layer.weight.shape
    core = torch.randn(rank, rank, *taps)
    layer.weight.data = torch.einsum("tq,qr...,rs->ts...", torch.randn(outputs, rank), core, torch.randn(rank, inputs))
    layer.bias.data = torch.randn(outputs)


@pytest.mark.parametrize(
    ("layer", "block", "input"),
    [
        (nn.Linear(40, 30), Block("svd", 5), torch.randn(7, 40)),
        (nn.Conv2d(20, 12, 1), Block("tucker", (5, 5)), torch.randn(2, 20, 6, 6)),
        (nn.Conv2d(20, 12, 3, padding=1, stride=2), Block("tucker", (5, 6)), torch.randn(2, 20, 9, 8)),
        (nn.Conv1d(20, 12, 3), Block("tucker", (7, 5)), torch.randn(2, 20, 9)),
        (nn.Conv2d(20, 12, 1), Block("cp", 5), torch.randn(2, 20, 6, 6)),
    ],
    ids=lambda value: repr(value) if isinstance(value, (nn.Module, Block)) else "",
)
@torch.no_grad()
def test_a_rank_that_the_weight_has_gives_its_outputs(layer: Any, block: Block, input: Tensor) -> None:
    lowrank_(layer, 5)
    found = sketched(empty_module(layer, block), layer)
    torch.testing.assert_close(found(input), layer(input), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_cp_keeps_what_constant_images_give() -> None:
    """With the mean over the taps at each of them; ranks beyond the channels are zeros."""
    layer = nn.Conv2d(6, 9, 3)
    found = sketched(empty_module(layer, Block("cp", 20)), layer)
    image = torch.randn(2, 6, 1, 1).expand(2, 6, 5, 7).contiguous()
    torch.testing.assert_close(found(image), layer(image), rtol=1e-4, atol=1e-4)
    assert not found.out_factor[:, 6:].any()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_it_stands_where_and_as_the_layer_does(format: torch.memory_format) -> None:
    """As the module that will be made: a contiguous core takes longer to pack than one in channels_last."""
    layer: Any = nn.Conv2d(8, 8, 3, dtype=torch.bfloat16).to(memory_format=format)
    state = torch.get_rng_state()
    found = sketched(empty_module(layer, Block("tucker", (4, 4))), layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.core.is_contiguous(memory_format=format) and found.core.dtype == torch.bfloat16
    assert all(torch.isfinite(factor).all() for factor in found.factors().values())
