"""Factorized models as plain layers, for everything that does not know the ops: ONNX, other runtimes."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from torch import nn

from lowrank_ops.model.sites import find_sites, keep_attributes, move_hooks
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.runtime.compiled import takes_compiled


@takes_compiled()
def to_chain(model: nn.Module) -> nn.Module:
    """A copy of `model` in which plain layers stand for each factorized module (its `to_sequential()`).

    The chain of pointwise, core or depthwise convolutions, or of two linear layers, has as few multiplications as the
    block, one layer a stage. Its parameters are copies; a block that stands in several places is one chain there as
    well, with the block's attributes. `fuse_` is the way back, but for 1x1 blocks whose rank saves nothing. A model
    that reads the `weight` of a block (its dtype, say) cannot run on a chain, which has none.

    Raises TypeError if `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_chain: model must be an nn.Module, got {type(model).__name__}")
    duplicate = copy.deepcopy(model)
    if isinstance(duplicate, FactorizedModule):
        return _chain(duplicate)
    for site in find_sites(duplicate, lambda layer: isinstance(layer, FactorizedModule)):
        site.put(_chain(site.layer))
    return duplicate


def export_onnx(model: nn.Module, path: str | os.PathLike[str], example_input: Any, **options: Any) -> None:
    """Writes `model` as an ONNX file of plain layers: `torch.onnx.export` of `to_chain(model)` in eval mode.

    Args:
        model: with or without factorized modules; it is not changed.
        path: of the file.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments for the model.
        options: of `torch.onnx.export`, such as `input_names`, `dynamic_axes` or `opset_version`. `dynamo` is False
            unless given: True needs the package onnxscript and takes `dynamic_shapes` instead of `dynamic_axes`.

    Raises:
        TypeError: `model` is no nn.Module, `example_input` of another kind.
        Whatever torch.onnx.export raises for a model that it cannot export.
    """
    if not isinstance(example_input, (torch.Tensor, tuple, dict)):
        raise TypeError(
            "export_onnx: example_input must be a tensor, a tuple of arguments or a dict of keyword arguments, got "
            f"{type(example_input).__name__}"
        )
    chain = to_chain(model).eval()
    keywords = example_input if isinstance(example_input, dict) else None
    arguments = () if keywords is not None else example_input if isinstance(example_input, tuple) else (example_input,)
    with warnings.catch_warnings():  # of dynamo=False: it is deprecated, but needs no other package
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(chain, arguments, os.fspath(path), kwargs=keywords, **{"dynamo": False, **options})


def _chain(block: nn.Module) -> nn.Sequential:
    chain = block.to_sequential()  # type: ignore[operator]
    assert isinstance(chain, nn.Sequential)
    keep_attributes(block, chain)
    move_hooks(block, chain)
    return chain
