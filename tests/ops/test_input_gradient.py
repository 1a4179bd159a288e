"""The input's gradient where no factor's is wanted: the forward op computes it, with exchanged factors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_ops
from tests.support.budgets import assert_gradients
from tests.support.calls import output_gradient
from tests.support.problems import ACTIVATIONS, CHUNKED, CONVS, DEVICES, DTYPES, GEOMETRIES, LAYOUTS, OPS, Call, Problem

STRIDED = {name for name, sizes in GEOMETRIES.items() if "stride" in sizes}
PADDED_FAR = {"padding beyond kernel"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("op", CONVS)
@pytest.mark.parametrize("device", DEVICES)
def test_convolutions(device: str, op: str, geometry: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    call = Problem(op, device=device, dtype=dtype, layout=layout, **GEOMETRIES[geometry]).make()
    with lowrank_ops.set_policy("fused"):
        assert_gradients(call, output_gradient(call), wanted=["input"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", DEVICES)
def test_activations_and_bias(device: str, op: str, activation: str, dtype: torch.dtype) -> None:
    call = Problem(op, device=device, dtype=dtype, activation=activation).make()
    assert_gradients(call, output_gradient(call), wanted=["input", "bias"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_several_chunks(op: str, layout: torch.memory_format) -> None:
    call = Problem(op, layout=layout, activation="silu", **CHUNKED[op]).make()
    assert_gradients(call, output_gradient(call), wanted=["input", "bias"])


@pytest.mark.parametrize("op", OPS)
def test_expanded_gradient(op: str) -> None:
    """What sum().backward() hands over: one element, all strides 0."""
    call = Problem(op, dtype=torch.float64).make()
    (gradient,) = call.gradients(torch.ones((), dtype=torch.float64).expand(call.exact().shape), ["input"]).values()
    everything = call.gradients(torch.ones(call.exact().shape, dtype=torch.float64))
    torch.testing.assert_close(gradient, everything["input"], rtol=1e-12, atol=1e-12)


def _calls(call: Call, wanted: Collection[str], grad: Tensor) -> set[str]:
    """The ops that run in a backward pass."""
    tensors = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in call.tensors.items()}
    output = Call(call.problem, tensors).run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(output, [tensors[name] for name in wanted], grad)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("op", OPS)
def test_the_forward_op_runs(op: str, activation: str) -> None:
    call = Problem(op, kernel=(3, 3), padding=(1, 1), activation=activation).make()
    called = _calls(call, ["input"], output_gradient(call))
    assert f"lowrank_ops::{op}" in called
    assert "aten::convolution_backward" not in called


def _library(call: Call, wanted: Collection[str]) -> bool:
    called = _calls(call, wanted, output_gradient(call))
    return f"lowrank_ops::{call.problem.op}" not in called


@pytest.mark.parametrize("op", OPS)
def test_the_chain_of_gradients_runs_where_a_factor_wants_one(op: str) -> None:
    call = Problem(op, kernel=(3, 3), padding=(1, 1)).make()
    for name in call.tensors:
        if name not in ("input", "bias"):
            assert _library(call, ["input", name])


@pytest.mark.parametrize("geometry", sorted(STRIDED | PADDED_FAR))
@pytest.mark.parametrize("op", CONVS)
def test_the_chain_of_gradients_runs_where_the_gradient_is_no_block(op: str, geometry: str) -> None:
    sizes: dict[str, Any] = GEOMETRIES[geometry]
    assert _library(Problem(op, **sizes).make(), ["input"])


@pytest.mark.parametrize("op", OPS)
def test_policy_chain_means_the_library(op: str) -> None:
    call = Problem(op, kernel=(3, 3), padding=(1, 1)).make()
    with lowrank_ops.set_policy("chain"):
        assert _library(call, ["input"])
