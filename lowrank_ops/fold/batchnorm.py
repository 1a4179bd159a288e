"""BatchNorm: `fold_batchnorm_` folds it into the layer before it, `reestimate_batchnorm_` estimates its statistics
again."""

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
    `bias - s running_mean`. The rows of the layer's weight (of a factorized module: of `out_factor`) are multiplied by
    s, and its bias becomes `s bias` plus the rest, computed in float64. nn.Identity takes the BatchNorm's place, so
    that the other names in the state_dict do not change; a layer without a bias gets one. Changed parameters are new
    parameters: create the optimizer afterwards.

    A model in train mode is accepted too, but its folded statistics no longer change, and a BatchNorm that normalized
    by each batch's statistics no longer does so.

    Layers are nn.Conv1d, Conv2d, Conv3d (with any number of groups), nn.Linear and the factorized modules. torch.fx
    finds the pairs without running the model. Where it cannot trace a module, it traces the module's children one by
    one (`report.untraced`). A forward may then use the layer's output in a way that torch.fx does not see, as may code
    that calls the parts of an nn.Sequential one by one: only `example_input` reveals that. Methods of the model other
    than `forward` are not examined.

    Args:
        model: the network.
        example_input: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of such batches. With it
            the model runs before and after, in eval mode; the outputs must agree up to sqrt(eps) times their norm. It
            is needed to fold into linear layers: a BatchNorm normalizes their features only if their output is
            `[N, T]`, which a graph does not show.

    Returns:
        A `FoldReport` with one entry per BatchNorm. A BatchNorm is left, with the reason, where the layer's output is
        used elsewhere too; where the layer is called more than once, shares a parameter, has an activation or a
        computed weight; where either has hooks or is a subclass with its own forward; where the BatchNorm has no
        running statistics; after a transposed convolution.

    Raises:
        TypeError: `model` is no nn.Module; `example_input` is none of the above.
        ValueError: values in `example_input` that are not finite.
        RuntimeError: the model fails on `example_input`, or its output changes. The model is then left as it was.
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
            pair = found[0]  # several pairs all carry the reason that it is called more than once
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
    """Estimates the running statistics of every BatchNorm again from data, in place, without labels or gradients.

    After a factorization, the outputs of layers have other means and variances than the running statistics. Each
    BatchNorm runs in train mode over the batches and keeps the cumulative average (momentum None) of their means and
    unbiased variances; all other modules are in eval mode (no dropout). `torch.optim.swa_utils.update_bn` does the
    same, but with dropout. Two consequences: every batch has the same weight, whatever its size, and the variance
    between batch means is not included, so that few large batches are better than many small ones; and the inputs of a
    BatchNorm were normalized by this batch's statistics, not by the final averages, in the BatchNorms before it.

    Afterwards train/eval flags and momenta are as before; `num_batches_tracked` is the number of batches of this data.

    Args:
        model: the network.
        calibration: a tensor `[rows, ...]` (batches of at most 32 rows), a tuple or dict of arguments, or a list or
            DataLoader of such batches.
        progress: a progress bar on stderr.

    Returns:
        The model.

    Raises:
        ValueError: no BatchNorm has running statistics; no batch reaches one of them; the data has no batch; values in
            the data, or statistics of it, are not finite.
        TypeError: `model` is no nn.Module; `calibration` is none of the above.
        RuntimeError: the model fails on a batch (one with a single value per channel, for instance).

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
    """The model's outputs on the example input, and by a linear layer's id the numbers of axes that its outputs had."""
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
    """Why this BatchNorm cannot be folded into the layer before it; None if it can. Reasons that lie in the classes of
    the two come before reasons that lie in the calls."""
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
    """Folds the BatchNorm at `site` into `layer`, and makes `undo` take it back; or returns why it cannot."""
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
    """The parameter whose rows give the layer's output channels."""
    return "out_factor" if isinstance(layer, FactorizedModule) else "weight"


def _exact(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU, because not every device has float64."""
    return tensor.detach().to("cpu", torch.float64)


def _restore(norm: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, value in buffers.items():
        getattr(norm, name).copy_(value)


def _check_statistics(norms: dict[str, Any]) -> None:
    """Raises ValueError for a BatchNorm that saw no batch or whose new statistics are not finite."""
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
