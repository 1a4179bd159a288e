"""Loads the extension `lowrank_ops._C`, and says where its ops are to be called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

_REBUILD = (
    "rebuild it in this environment with `pip install --no-build-isolation --force-reinstall --no-deps .` from "
    "the source folder of lowrank_ops"
)

try:
    from lowrank_ops import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        f"lowrank_ops: the compiled extension lowrank_ops._C could not be loaded under torch "
        f"{torch.__version__} ({error}). It is missing, or it was built for another torch or "
        f"Python: {_REBUILD}."
    ) from error

build_info = _C.build_info

_built_for = build_info()["torch"]
if _built_for.split("+")[0].split(".")[:2] != torch.__version__.split("+")[0].split(".")[:2]:
    raise ImportError(
        f"lowrank_ops: the compiled extension was built for torch {_built_for}, but torch "
        f"{torch.__version__} is installed: {_REBUILD}."
    )


def ops_for(*tensors: Tensor | None) -> Any:
    """Where the ops of these arguments are to be called: functions of the extension, or ``torch.ops.lowrank_ops``.

    Both go through torch's dispatcher. torch.ops parses arguments against the schema first, 2 to 5 us a call; but it
    is what torch.compile, torch.export and torch.jit.trace record, and what hands a call to arguments and modes
    that override torch's functions (``__torch_function__``).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or has_torch_function(tensors):
        return torch.ops.lowrank_ops
    return _C


ACTIVATIONS: tuple[str, ...] = tuple(_C.activations())
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
