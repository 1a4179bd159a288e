"""Calls drawn and made in ways that several tests need."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.problems import FACTORS, Call, Problem

SMOOTH = ("none", "silu", "gelu")


def output_gradient(call: Call) -> Tensor:
    generator = torch.Generator().manual_seed(call.problem.seed + 1)
    exact = call.exact()
    return torch.randn(exact.shape, generator=generator, dtype=torch.float64).to(exact.device, call.problem.dtype)


def factors_of(tensors: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """The factors in the order of FACTORS; None for those that the op does not have."""
    return tuple(tensors.get(name) for name in FACTORS)


def backward_op(call: Call, grad_output: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    op = getattr(torch.ops.lowrank_ops, f"{call.problem.op}_backward")
    return op(grad_output, **call.tensors, **call.problem.options(), output_mask=mask)


def integer_call(problem: Problem) -> Call:
    call = problem.make()
    call.tensors = {name: tensor.clamp(-1.4, 1.4).round() for name, tensor in call.tensors.items()}
    assert call.magnitude().max() <= 256
    return call


WINDOW = dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2))


def schema_options(call: Call) -> tuple[object, ...]:
    """The arguments after the tensors, in the schema's order."""
    options = call.problem.options()
    activation = options.pop("activation")
    return (*(list(value) for value in options.values()), activation)


def sliced(tensor: Tensor) -> Tensor:
    """The same values in the middle of a larger tensor that is NaN elsewhere."""
    larger = torch.full([size + 3 for size in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = larger[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


VIEWS = {
    "sliced": sliced,
    "sliced in channels_last": lambda tensor: (
        sliced(tensor.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if tensor.dim() == 4 else sliced(tensor)
    ),
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
    "batch last": lambda tensor: tensor.movedim(0, -1).contiguous().movedim(-1, 0),
    "odd offset": lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape),
    "every second": lambda tensor: torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0],
}
