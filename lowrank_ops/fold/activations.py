"""`fold_activations_`: activations after factorized modules become part of the block."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lowrank_ops.fold.pairs import Fold, FoldReport, Pair, example_batches, find_pairs, require_same, run_on
from lowrank_ops.model.sites import Owners, find_sites, identity_for
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.plain import activation_name
from lowrank_ops.runtime.compiled import takes_compiled

_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.silu: "silu",
    F.gelu: "gelu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}


@takes_compiled()
def fold_activations_(model: nn.Module, example_input: Any = None) -> FoldReport:
    """Folds activation modules into the factorized modules before them, as those modules' `activation`, in place.

    The activations are those that the ops have: nn.ReLU, ReLU6, Hardswish, SiLU and GELU in its exact form. nn.Identity
    takes the place of the activation. The model's output is the same; one pass over the block's output is saved. Fold
    BatchNorms first (`fold_batchnorm_`): the nn.Identity in their places is no obstacle.

    An activation is folded if the block has none yet, the block's output is used nowhere else (an in-place ReLU on a
    tensor that a skip connection uses too is not folded), the block and the activation are called once each, and
    neither has hooks.

    torch.fx finds the pairs without running the model, in train and in eval mode. Where it cannot trace a module, it
    traces the module's children one by one (`report.untraced`). A forward may then use the block's output in a way that
    torch.fx does not see, as may code that calls the parts of an nn.Sequential one by one: only `example_input` reveals
    that. Methods of the model other than `forward` are not examined.

    An activation that a forward calls as a function or a tensor's method (`F.relu(x)`, `x.relu()`) cannot be removed
    from the source code: it is left, and its entry in the report says where it is.

    Args:
        model: the network, with factorized modules.
        example_input: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of such batches. With it
            the model runs before and after, in eval mode; the outputs must agree up to sqrt(eps) times their norm.

    Returns:
        A `FoldReport` with one entry per activation of these kinds after a factorized module.

    Raises:
        TypeError: `model` is no nn.Module; `example_input` is none of the above.
        ValueError: values in `example_input` that are not finite.
        RuntimeError: the model fails on `example_input`, or its output changes. The model is then left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold_activations_: model must be an nn.Module, got {type(model).__name__}")
    batches = example_batches(model, example_input, "fold_activations_")
    before = [] if batches is None else run_on(model, batches, "fold_activations_")
    pairs, untraced = find_pairs(model, lambda layer: isinstance(layer, FactorizedModule), _activation_of)
    sites = {id(site.layer): site for site in find_sites(model, lambda layer: activation_name(layer) is not None)}
    folds, owners = [], Owners(model)
    with ExitStack() as undo:
        for pair in pairs:
            reason = _obstacle(pair, owners)
            folds.append(Fold(pair.layer_name, pair.follower_name, pair.step, reason))
            if reason is None:
                assert pair.follower is not None
                undo.callback(setattr, pair.layer, "activation", "none")
                undo.callback(sites[id(pair.follower)].put, pair.follower)
                pair.layer.activation = pair.step  # type: ignore[assignment]
                sites[id(pair.follower)].put(identity_for(pair.follower))
        if batches is not None:
            require_same(before, run_on(model, batches, "fold_activations_"), "fold_activations_")
        undo.pop_all()  # nothing to undo
    return FoldReport(type(model).__name__, folds, untraced)


def _activation_of(node: fx.Node, module: nn.Module | None) -> str | None:
    """The ops' name of the activation that a node computes; None for any other node."""
    if module is not None:
        return activation_name(module)
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.op != "call_function" or node.kwargs.get("approximate", "none") != "none":
        return None
    return _FUNCTIONS.get(node.target)  # type: ignore[arg-type]


def rectified(model: nn.Module, layers: Collection[nn.Module]) -> set[int]:
    """The ids of those `layers` whose output goes only into a ReLU, as far as torch.fx can see."""
    wanted = set(map(id, layers))
    pairs, _ = find_pairs(model, lambda layer: id(layer) in wanted, _activation_of)
    return {id(pair.layer) for pair in pairs if pair.step == "relu" and pair.reason is None}


def _obstacle(pair: Pair, owners: Owners) -> str | None:
    """Why the activation cannot be folded; None if it can."""
    if pair.reason is not None:
        return pair.reason
    if pair.follower is None:
        return (
            f"it is called in the source of a forward, which stays as it is: make it an nn.Module there, or {_BY_HAND}"
        )
    if pair.layer.activation != "none":
        return f"the block has an activation already ({pair.layer.activation})"
    return owners.held(pair.follower)


_BY_HAND = "take it out and set the block's activation"
