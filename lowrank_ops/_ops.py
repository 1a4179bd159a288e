"""Loads the extension `lowrank_ops._C` and gives its ops their fake (meta) kernels."""

from __future__ import annotations

import torch

_REBUILD = "rebuild it in this environment with `pip install --no-build-isolation --force-reinstall --no-deps lowrank_ops` (from its source folder: `.`)"

try:
    from lowrank_ops import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        f"lowrank_ops: the compiled extension lowrank_ops._C could not be loaded under torch {torch.__version__} "
        f"({error}). It is missing, or it was built for another torch or Python: {_REBUILD}."
    ) from error

build_info = _C.build_info

_built_for = build_info()["torch"]
if _built_for.split("+")[0].split(".")[:2] != torch.__version__.split("+")[0].split(".")[:2]:
    raise ImportError(
        f"lowrank_ops: the compiled extension was built for torch {_built_for}, but torch {torch.__version__} is "
        f"installed: {_REBUILD}."
    )
