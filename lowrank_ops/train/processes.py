"""Training over the processes of torch.distributed's default group: equal starts, averages, checks.

Without such a group there is one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_ops.runtime.torch_internals import is_sharded


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return distributed.get_rank() if count() > 1 else 0


def mean(values: Tensor) -> Tensor:
    """The mean over the processes, in place."""
    if count() > 1:
        distributed.all_reduce(values)
        values /= count()
    return values


def start_equal(model: nn.Module) -> None:
    """Gives every process the parameters and buffers of process 0, except for sharded ones (FSDP2), and for those in
    DistributedDataParallel, which does so itself."""
    if not isinstance(model, DistributedDataParallel):
        values = [value for value in (*model.parameters(), *model.buffers()) if not is_sharded(value)]
        _together(values, lambda flat: distributed.broadcast(flat, src=0))


def average_gradients(model: nn.Module) -> None:
    """Averages the gradients of all parameters that no wrapper (DistributedDataParallel, FSDP2) has averaged."""
    if count() == 1 or isinstance(model, DistributedDataParallel):
        return
    gradients = []
    for parameter in model.parameters():
        if parameter.requires_grad and not is_sharded(parameter):
            if parameter.grad is None:  # this process' batch did not reach it; that of another may have
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    _together(gradients, mean)


def average_buffers(model: nn.Module) -> None:
    """Averages floating-point buffers (BatchNorm's statistics) over the processes. With DistributedDataParallel, which
    itself uses those of process 0, all processes get these."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if isinstance(model, DistributedDataParallel):
        _together(buffers, lambda flat: distributed.broadcast(flat, src=0))
    else:
        _together(buffers, mean)


def all_finite(model: nn.Module) -> bool:
    """Whether the parameters are finite, here and in all other processes."""
    parts = [p.to_local() if is_sharded(p) else p.detach() for p in model.parameters()]  # type: ignore[attr-defined]
    bad = sum((~torch.isfinite(part)).sum() for part in parts if part.numel())
    return not float(mean(torch.as_tensor(bad, device=parts[0].device).float()))


def _together(tensors: Sequence[Tensor], operation: Callable[[Tensor], object]) -> None:
    """Applies an in-place collective to several tensors of any strides: one call per dtype."""
    if count() == 1:
        return
    with torch.no_grad():
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            group = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.detach().flatten() for tensor in group])
            operation(flat)
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view(tensor.shape))
