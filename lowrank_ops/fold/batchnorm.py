"""BatchNorm: folded into the layer before it, or its statistics estimated anew."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from lowrank_ops.fold.pairs import Fold, FoldReport, Pair, example_batches, find_pairs, require_same, run_on
from lowrank_ops.model.batches import Batches, device_of
from lowrank_ops.model.calls import model_errors
from lowrank_ops.model.sites import Owners, Site, find_sites, identity_for
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.conv import FactorizedConv
from lowrank_ops.nn.modules import LowRankLinear
from lowrank_ops.runtime.compiled import takes_compiled
from lowrank_ops.runtime.computed import remedy
from lowrank_ops.runtime.modes import eval_mode
from lowrank_ops.runtime.torch_internals import BatchNormBase, ConvBase, ConvTransposeBase

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, FactorizedConv, LowRankLinear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@takes_compiled()
def fold_batchnorm_(model: nn.Module, example_input: Any = None) -> FoldReport:
    """Folds every BatchNorm that directly follows a layer into that layer, in place, before or after `factorize_`.

    In eval mode a BatchNorm multiplies channel t by `s = weight / sqrt(running_var + eps)` and adds
    `bias - s running_mean`. The layer's rows take over the factor (of a factorized module those of `out_factor`),
    its bias the rest; products are formed in float64. nn.Identity takes the BatchNorm's place, so that other names in
    the state_dict stay; a layer without a bias gets one. Parameters that change are new ones: build the optimizer
    afterwards.

    A model in train mode is taken too, but what was folded are the running statistics: they no longer move, and a
    BatchNorm that used each batch's own statistics no longer does.

    Layers are nn.Conv1d, Conv2d, Conv3d (of any groups), nn.Linear and the factorized modules. The pairs are found by
    torch.fx without running the model. Where it cannot trace a module, its children are traced one by one
    (`report.untraced`); then, as in any nn.Sequential whose parts are also called one by one, nothing but
    `example_input` can show that a forward uses what is between a layer and its BatchNorm. Other methods of the model
    than `forward` are not looked at.

    Args:
        model: the network.
        example_input: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of such batches. With it
            the model runs before and after, in eval mode, and must give the same up to sqrt(eps) of the output's norm.
            Linear layers need it: a BatchNorm after them normalizes their features only where their output is
            `[N, T]`, which no graph shows.

    Returns:
        A `FoldReport` with an entry for each BatchNorm. Left, with the reason: a layer whose output is used elsewhere
        too, that is called more than once, shares a parameter, has an activation or a computed weight; hooks on
        either; a BatchNorm without running statistics; subclasses with a forward of their own; transposed
        convolutions.

    Raises:
        TypeError: `model` is no nn.Module; `example_input` is of another kind.
        ValueError: values in `example_input` that are not finite.
        RuntimeError: the model fails on `example_input`, or then gives something else (it is left as it was).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold_batchnorm_: model must be an nn.Module, got {type(model).__name__}")
    matrices = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, LowRankLinear))]
    batches = example_batches(model, example_input, "fold_batchnorm_")
    before, axes = _run_and_watch(model, batches, matrices)
    pairs, untraced = find_pairs(model, _is_layer, lambda _, module: "batchnorm" if _is_norm(module) else None)
    sites = find_sites(model, _is_norm)
    owners = Owners(model)
    reasons: dict[int, str | None] = {}
    layers: dict[int, str] = {}
    with ExitStack() as undo:
        for site in sites:
            norm = site.layer
            found = [pair for pair in pairs if pair.follower is norm]
            if not found:
                reasons[id(norm)] = "no convolution, linear or factorized layer was found directly before it"
                continue
            pair = found[0]  # more than one has the reason that it is called more than once
            layers[id(norm)] = pair.layer_name
            reason = _obstacle(pair, norm, owners, axes)
            reasons[id(norm)] = reason or _fold(pair.layer, site, undo)
        if batches is not None:
            require_same(before, run_on(model, batches, "fold_batchnorm_"), "fold_batchnorm_")
        undo.pop_all()  # nothing to undo
    folds = [Fold(layers.get(id(site.layer)), site.names[0], "batchnorm", reasons[id(site.layer)]) for site in sites]
    return FoldReport(type(model).__name__, folds, untraced)


@takes_compiled()
@torch.no_grad()
def reestimate_batchnorm_(model: nn.Module, calibration: Any, progress: bool = True) -> nn.Module:
    """Estimates the running statistics of every BatchNorm anew, in place, from data; no labels, no gradients.

    After a factorization the layers give other means and variances than the statistics say. Each BatchNorm runs in
    train mode over the batches and keeps the cumulative average (momentum None) of their means and unbiased
    variances; everything else is in eval mode (no dropout). This is what `torch.optim.swa_utils.update_bn` does, but
    for the dropout. Two things follow: every batch counts the same, however large, and the variance between batch
    means is not part of the variance, so that few large batches are better than many small ones; and a BatchNorm
    sees inputs that those before it normalized by the same batch's statistics, not by the averages that they end with.

    Train/eval flags and momenta are as before afterwards; `num_batches_tracked` counts the batches of this data.

    Args:
        model: the network.
        calibration: a tensor `[rows, ...]` (batches of at most 32 rows), a tuple or dict of arguments, or a list or
            DataLoader of such batches.
        progress: a progress bar on stderr.

    Returns:
        The model.

    Raises:
        ValueError: no BatchNorm with running statistics, one that no batch reaches, data without a batch, values in
            the data or statistics from it that are not finite.
        TypeError: `model` or `calibration` of another kind.
        RuntimeError: the model fails on a batch (one of a single value per channel, say).

    After an error the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"reestimate_batchnorm_: model must be an nn.Module, got {type(model).__name__}")
    batches = Batches(calibration, "reestimate_batchnorm_: calibration", device_of(model))
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNormBase) and module.track_running_stats and module.running_mean is not None
    }
    if not norms:
        raise ValueError(
            f"reestimate_batchnorm_: {type(model).__name__} has no BatchNorm with running statistics. One that "
            "fold_batchnorm_ folded is gone: estimate first, then fold"
        )
    momenta = [norm.momentum for norm in norms.values()]
    with ExitStack() as undo, eval_mode(model):
        for norm in norms.values():
            undo.callback(_restore, norm, {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)})
        try:
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True
            for index, batch in enumerate(
                tqdm(batches, desc="BatchNorm", unit="batch", file=sys.stderr, disable=not progress, leave=False)
            ):
                with model_errors("reestimate_batchnorm_: the model", model, f"batch {index} of calibration"):
                    batch.run(model)
        finally:
            for norm, momentum in zip(norms.values(), momenta, strict=True):
                norm.momentum = momentum
        _check_statistics(norms)
        undo.pop_all()
    return model


def _is_norm(module: nn.Module | None) -> bool:
    return isinstance(module, BatchNormBase)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (FactorizedModule, ConvBase, nn.Linear))


def _run_and_watch(
    model: nn.Module, batches: Batches | None, matrices: Sequence[nn.Module]
) -> tuple[list[Tensor], dict[int, set[int]]]:
    """What the model gives on the example input, and how many axes the outputs of the linear layers have."""
    axes: dict[int, set[int]] = {}
    if batches is None:
        return [], axes

    def watch(layer: nn.Module, _: Any, output: Any) -> None:
        axes.setdefault(id(layer), set()).add(output.dim())

    handles = [layer.register_forward_hook(watch) for layer in matrices]
    try:
        return run_on(model, batches, "fold_batchnorm_"), axes
    finally:
        for handle in handles:
            handle.remove()


def _obstacle(pair: Pair, norm: nn.Module, owners: Owners, axes: dict[int, set[int]]) -> str | None:
    """Why this BatchNorm cannot be folded into the layer before it; None if it can. What they are comes first."""
    assert isinstance(norm, BatchNormBase)
    layer = pair.layer
    if isinstance(layer, ConvTransposeBase):
        return "after a transposed convolution, which is not supported"
    plain = next((kind for kind in _PLAIN if isinstance(layer, kind)), None)
    if plain is None or any(
        getattr(type(layer), method, None) is not getattr(plain, method, None)
        for method in ("forward", "_conv_forward")
    ):
        return f"{type(layer).__name__} has a forward of its own, which may change the layer"
    if type(norm) not in _NORMS:
        return f"{type(norm).__name__} is a subclass of BatchNorm, or lazy, and may compute something else"
    if isinstance(layer, FactorizedModule) and layer.activation != "none":
        return f"the block's activation ({layer.activation}) comes between"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics: it normalizes by each batch's own"
    name = _rows_name(layer)
    if name not in layer._parameters or "bias" not in layer._parameters:
        return f"the layer's weight or bias is computed at each call: {remedy(layer)}"
    rows = getattr(layer, name)
    if any(is_lazy(parameter) or parameter.is_meta for parameter in (*layer.parameters(), *norm.parameters())):
        return "the layer's parameters have no values yet"
    if rows.shape[0] != norm.num_features:
        return f"it has {norm.num_features} features, the layer {rows.shape[0]} outputs: it normalizes another axis"
    if pair.reason is not None or owners.held(norm) is not None:
        return pair.reason or owners.held(norm)
    shared = owners.sharing(layer)
    if shared is not None:
        return f"the layer shares a parameter with {shared}"
    if isinstance(layer, (nn.Linear, LowRankLinear)) and axes.get(id(layer)) != {2}:
        if not axes:
            return "whether the linear layer's output is [N, T] shows only when it runs: give example_input"
        return "the linear layer's output on example_input is not [N, T], so that it may normalize another axis"
    return None


def _fold(layer: nn.Module, site: Site, undo: ExitStack) -> str | None:
    """Folds, and notes how to undo it; or returns why that cannot be."""
    norm = site.layer
    assert isinstance(norm, BatchNormBase) and norm.running_mean is not None and norm.running_var is not None
    name = _rows_name(layer)
    rows, bias = getattr(layer, name), layer.bias
    scale = (_exact(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale *= _exact(norm.weight)
    shift = -_exact(norm.running_mean) if bias is None else _exact(bias) - _exact(norm.running_mean)  # type: ignore[arg-type]
    shift = shift * scale if norm.bias is None else shift * scale + _exact(norm.bias)
    new_rows = (_exact(rows) * scale.reshape(-1, *(1,) * (rows.dim() - 1))).to(rows)
    new_bias = shift.to(rows)
    if not (new_rows.isfinite().all() and new_bias.isfinite().all()):
        return f"the folded weight or bias is not finite in {rows.dtype}"
    trained = rows.requires_grad if bias is None else bias.requires_grad  # type: ignore[union-attr]
    for key, old, new, grad in ((name, rows, new_rows, rows.requires_grad), ("bias", bias, new_bias, trained)):
        undo.callback(setattr, layer, key, old)
        with torch.inference_mode(False):  # inference tensors cannot be trained
            setattr(layer, key, nn.Parameter(new.clone(), requires_grad=bool(grad)))
    undo.callback(site.put, norm)
    site.put(identity_for(norm))
    return None


def _rows_name(layer: nn.Module) -> str:
    return "out_factor" if isinstance(layer, FactorizedModule) else "weight"


def _exact(tensor: Tensor) -> Tensor:
    """In float64, on the CPU: not every device has it."""
    return tensor.detach().to("cpu", torch.float64)


def _restore(norm: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, value in buffers.items():
        getattr(norm, name).copy_(value)


def _check_statistics(norms: dict[str, Any]) -> None:
    unreached = [name for name, norm in norms.items() if not norm.num_batches_tracked]
    if unreached:
        raise ValueError(
            f"reestimate_batchnorm_: no batch of calibration reaches BatchNorm {', '.join(map(repr, unreached))}: give "
            "data that does, or take the part that is not used out of the model"
        )
    for name, norm in norms.items():
        if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            raise ValueError(
                f"reestimate_batchnorm_: the inputs of BatchNorm {name!r} on calibration are not finite in their mean "
                "or variance"
            )
