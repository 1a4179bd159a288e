"""Factorized models as plain layers, for ONNX and for runtimes that do not have the ops: `to_chain`, `export_onnx`."""

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
    """A copy of `model` in which each factorized module is replaced by a chain of plain layers, its `to_sequential()`.

    The chain has one layer per stage (pointwise, core or depthwise convolutions, or two linear layers) and as few
    multiplications as the block. Its parameters are copies. A block that stands in several places becomes one chain
    that stands in all of them, with the block's attributes. `fuse_` turns chains back into blocks, except for 1x1
    blocks whose rank saves nothing. A model that reads the `weight` of a block (its dtype, for instance) cannot run on
    a chain, which has no `weight`.

    Args:
        model: with or without factorized modules; it is not changed.

    Raises:
        TypeError: `model` is no nn.Module.
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
        path: the file to write.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments for the model.
        options: passed to `torch.onnx.export`, for example `input_names`, `dynamic_axes` or `opset_version`. `dynamo`
            is False by default; True needs the package onnxscript, and `dynamic_shapes` instead of `dynamic_axes`.

    Raises:
        TypeError: `model` is no nn.Module, or `example_input` is none of the above. `torch.onnx.export` raises its own
            errors for a model that it cannot export.
    """
    if not isinstance(example_input, (torch.Tensor, tuple, dict)):
        raise TypeError(
            "export_onnx: example_input must be a tensor, a tuple of arguments or a dict of keyword arguments, got "
            f"{type(example_input).__name__}"
        )
    chain = to_chain(model).eval()
    keywords = example_input if isinstance(example_input, dict) else None
    arguments = () if keywords is not None else example_input if isinstance(example_input, tuple) else (example_input,)
    with warnings.catch_warnings():  # dynamo=False is deprecated, but needs no other package
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(chain, arguments, os.fspath(path), kwargs=keywords, **{"dynamo": False, **options})


def _chain(block: nn.Module) -> nn.Sequential:
    chain = block.to_sequential()  # type: ignore[operator]
    assert isinstance(chain, nn.Sequential)
    keep_attributes(block, chain)
    move_hooks(block, chain)
    return chain
