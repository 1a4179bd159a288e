"""Sets of torch functions that need no values of a tensor: `DEVICE` tells where it is, `METADATA` adds its shape, dtype
and the like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _getters(*names: str) -> frozenset[Any]:
    return frozenset(getattr(Tensor, name).__get__ for name in names)


DEVICE = _getters("device", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu") | {Tensor.get_device}
METADATA: frozenset[Any] = (
    DEVICE
    | _getters("dtype", "itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape")
    | {Tensor.dim, Tensor.ndimension, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.element_size}
    | {Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__, Tensor.__hash__}
    | {torch.numel, torch.is_floating_point, torch.is_complex}
)
