"""Loads the compiled extension `lowrank_ops._C`, and chooses the entry point by which its ops are called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.jit import is_tracing
from torch.overrides import has_torch_function

_REBUILD = (
    "rebuild it in this environment with `pip install --no-build-isolation --force-reinstall --no-deps .` from "
    "the source folder of lowrank_ops"
)

try:
    from lowrank_ops import _C
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
    """The object whose attributes are the ops to call with these tensors: the extension, or `torch.ops.lowrank_ops`.

    Both go through torch's dispatcher. `torch.ops` first parses the arguments against the schema, which takes 2 to 5 us
    per call, so eager calls use the extension. `torch.ops` is needed where a call must be seen: torch.compile,
    torch.export and torch.jit.trace record its ops, and it passes calls on to tensor subclasses and modes that
    implement `__torch_function__`.
    """
    if is_compiling() or is_tracing() or has_torch_function(tensors):
        return torch.ops.lowrank_ops
    return _C


ACTIVATIONS: tuple[str, ...] = tuple(_C.activations())
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
