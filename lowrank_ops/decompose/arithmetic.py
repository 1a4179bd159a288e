"""What all decompositions share: TensorLy's settings, copies of weights to compute with, the relative error.

TensorLy runs on torch during a call and in its thread only; the global random state and TensorLy's backend elsewhere do
not change. Its products of an unfolded tensor with a Khatri-Rao matrix are replaced, see `_ShortProducts`. Singular
vectors are computed in `lowrank_ops.linalg.singular`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import tensorly as tl
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.tenalg.core_tenalg import CoreTenalgBackend
from torch import Tensor

from lowrank_ops.decompose.ranks import require_finite
from lowrank_ops.linalg.singular import computing_device
from lowrank_ops.runtime.autocast import no_autocast


class _ShortProducts(CoreTenalgBackend, backend_name="lowrank_ops"):  # type: ignore[misc, call-arg]
    """TensorLy's tensor algebra, but with products that never form the Khatri-Rao matrix of the factors.

    In the update of the height factor that matrix has T S KW R elements: 0.8 GB and 4.5 s per sweep for 512x512x3x3 at
    R 256, 51 GB for 2048x2048x3x3 at R 1024 (TensorLy 0.10, one thread). TensorLy's "einsum" algebra starts from the
    outer product of tensor and weights, [T, S, KH, KW, R], and is slower still.
    """


def unfolding_dot_khatri_rao(tensor: Tensor, cp_tensor: CPTensor, mode: int) -> Tensor:
    """The tensor contracted with all factors except that of `mode`: `[dim(mode), R]`.

    The longest mode is contracted first, by one GEMM, after which little is left (Phan et al., IEEE Trans. Signal
    Processing 61 (2013), section III). Rank columns are processed in blocks, so that the intermediate result is never
    larger than the tensor.
    """
    weights, factors = cp_tensor
    axes = "abcdefgh"[: tensor.ndim]
    longest, *others = sorted((m for m in range(tensor.ndim) if m != mode), key=lambda m: -tensor.shape[m])
    lengths = [length for m, length in enumerate(tensor.shape) if m != longest]
    matrix = tensor.movedim(longest, 0).flatten(1)
    parts = []
    for start in range(0, factors[0].shape[1], tensor.shape[longest]):
        columns = slice(start, start + tensor.shape[longest])
        block = (factors[longest][:, columns].T @ matrix).unflatten(1, lengths)
        left = axes.replace(axes[longest], "")
        for m in others:
            kept = left.replace(axes[m], "")
            block = torch.einsum(f"z{left},{axes[m]}z->z{kept}", block, factors[m][:, columns])
            left = kept
        parts.append(block.T)
    return torch.cat(parts, dim=1) * weights


_ShortProducts.register_method("unfolding_dot_khatri_rao", unfolding_dot_khatri_rao)
tl.tenalg.available_backend_names.append("lowrank_ops")  # TensorLy 0.9 selects a backend by name only


@contextmanager
def arithmetic() -> Iterator[None]:
    """Inside the block, and in this thread only, TensorLy runs on torch with `_ShortProducts`; autograd and autocast
    are off.

    `tensorly.backend_context` is not used, because on leaving it sets the backend of all threads.
    """
    previous = tl.get_backend(), tl.tenalg.get_backend()
    try:
        tl.set_backend("pytorch", local_threadsafe=True)
        tl.tenalg.set_backend("lowrank_ops", local_threadsafe=True)
        with torch.inference_mode(False), torch.no_grad(), no_autocast(), torch.device("cpu"):
            yield
    finally:
        tl.set_backend(previous[0], local_threadsafe=True)
        tl.tenalg.set_backend(previous[1], local_threadsafe=True)


# A weight whose largest magnitude lies between these can be used without scaling: its squares are far from overflow.
_ORDINARY = 2.0**-30, 2.0**30


def prepare(
    weight: Tensor, dimensions: int, name: str, least: torch.dtype = torch.float32, copied: bool = True
) -> tuple[Tensor, float]:
    """A copy of the weight, divided by its largest magnitude, and that magnitude; on `computing_device`, in the wider
    of its dtype and `least`.

    With `copied` False the result may be the weight itself with a scale of 1, if its device, dtype and magnitudes
    allow.

    Args:
        weight: `[T, S, KH, KW]` or `[T, S]`.
        dimensions: 4 or 2.
        name: the layer, for error messages.

    Raises:
        TypeError: a weight that is not floating point.
        ValueError: another number of dimensions, an empty weight, one on the meta device, values that are not finite.
    """
    if not weight.is_floating_point():
        raise TypeError(f"{name}: a weight to decompose must be floating point, got {weight.dtype}")
    if weight.dim() != dimensions or weight.numel() == 0:
        axes = "[T, S, KH, KW]" if dimensions == 4 else "[T, S]"
        raise ValueError(f"{name}: the weight must be {axes} and not empty, got shape {list(weight.shape)}")
    if weight.is_meta:
        raise ValueError(f"{name}: a weight on the meta device has no values to decompose; materialize it first")
    require_finite(weight, name)
    dtype = torch.promote_types(weight.dtype, least)
    device = computing_device(weight)
    scale = max(map(abs, map(float, weight.detach().aminmax())))
    if not copied and (weight.device, weight.dtype) == (device, dtype) and _ORDINARY[0] < scale < _ORDINARY[1]:
        return weight.detach(), 1.0
    tensor = weight.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    if scale:
        # A reciprocal would overflow for the smallest magnitudes.
        tensor /= scale
    return tensor, scale


def store(factor: Tensor, weight: Tensor) -> Tensor:
    """A factor in the weight's dtype and on its device. Denormals become zero: they make operations 100 times slower
    (pytorch#67797)."""
    stored = factor.to(weight.dtype).contiguous()
    stored[stored.abs() < torch.finfo(weight.dtype).tiny] = 0
    return stored.to(weight.device)


def relative_error(weight: Tensor, out_factor: Tensor, expand: Callable[[Tensor], Tensor], in_factor: Tensor) -> float:
    """`|W - W'|_F / |W|_F`, computed in fp64 for 64 input channels at a time, on the weight's device.

    `expand` maps columns of `in_factor`, `[R1, 64]`, to the matrix or tensor that `out_factor` is multiplied by,
    `[R2, 64, KH, KW]`.
    """
    device = computing_device(weight)
    left = out_factor.to(device).double()
    lost = total = 0.0
    for dense, columns in zip(weight.detach().split(64, dim=1), in_factor.split(64, dim=1), strict=True):
        dense = dense.to(device).double().flatten(1)
        total += float(dense.square().sum())
        lost += float((dense - left @ expand(columns.to(device).double()).flatten(1)).square().sum())
    return (lost / total) ** 0.5 if total else 0.0
