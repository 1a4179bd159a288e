"""Which layers' second moments are held at the same time: groups in the order in which the model calls the layers.

The moments of a transformer's layers take several times the memory of its parameters. So one pass over the data gathers
the moments of as many layers as fit; these layers are decomposed, and their moments are dropped before the next pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lowrank_ops.calibrate.moments import add_calls
from lowrank_ops.calibrate.shrinkage import WIDEST
from lowrank_ops.model.batches import Batches
from lowrank_ops.model.sites import Site
from lowrank_ops.model.state import ModelState, in_inference_mode, own_random_numbers
from lowrank_ops.nn.plain import Layer
from lowrank_ops.runtime.modes import eval_mode

# Limits of a group's moments, as `moment_bytes` counts them, and of the rows to which layers are fitted together: a
# share of the bytes of the model's parameters, or a number of bytes, whichever is more. A single layer may take more.
SHARE, LEAST = 1 / 7, 2**26


def room(model: nn.Module) -> float:
    """Bytes for the moments of a group of layers, and as many for the rows of layers that are fitted together."""
    return max(SHARE * sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()), LEAST)


def moment_bytes(layer: Layer) -> int:
    """Bytes of the moments of a layer's input and gradient as whole squares, `[S, S]` and `[T, T]`; as their diagonals
    where they are wide."""
    # Only lower triangles are kept, so a layer takes about half of this, and a group about half of `room`. It is left
    # so: counted as triangles, the moments of a group would take twice the memory that they take now, and fits would
    # get other numbers of rows (`fit_in_order._Rows`). The docstring of `factorize_` states the limit in whole squares.
    weight = layer.weight
    entries = sum(size if size > WIDEST else size**2 for size in weight.shape[:2])
    return entries * max(weight.element_size(), 4)


def moment_groups(
    model: nn.Module, sites: Sequence[Site], batches: Batches, seen: Callable[[], Any] = int
) -> list[list[Site]]:
    """The sites in groups whose moments fit into `room`, in the order in which the model calls the layers. If the
    moments of all layers fit, there is one group, in the given order, and the model does not run.

    Args:
        model: runs once on each batch if there are several groups.
        sites: the layers whose moments are wanted.
        batches: calibration data.
        seen: called after each batch (progress).

    Layers that the model never calls are in the last group.
    """
    most = room(model)
    sizes = {id(site.layer): moment_bytes(site.layer) for site in sites}  # type: ignore[arg-type]
    if sum(sizes.values()) <= most:
        return [list(sites)]
    order = _order_of_calls(model, [site.layer for site in sites], batches, seen)
    groups: list[list[Site]] = []
    taken = most
    for site in sorted(sites, key=lambda site: order.get(id(site.layer), len(order))):
        size = sizes[id(site.layer)]
        if not groups or (taken + size > most and id(site.layer) in order):
            groups.append([])
            taken = 0.0
        groups[-1].append(site)
        taken += size
    return groups


def _order_of_calls(
    model: nn.Module, layers: Sequence[nn.Module], batches: Batches, seen: Callable[[], Any]
) -> dict[int, int]:
    """The place of each layer in the order of calls, by id; the model is as before afterwards."""
    order: list[int] = []
    called: dict[int, None] = {}

    def record(layer: nn.Module, *_: Any) -> None:
        called.setdefault(id(layer))

    state = ModelState(model)
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        with (
            eval_mode(model),
            torch.inference_mode(in_inference_mode(model)),
            torch.no_grad(),
            batches.same_order(),
        ):
            for index, batch in enumerate(batches):
                with own_random_numbers(index):
                    batch.run(model)
                state.restore()
                add_calls(order, list(called))
                called.clear()
                seen()
    finally:
        state.restore()
        for handle in handles:
            handle.remove()
    return {key: place for place, key in enumerate(order)}
