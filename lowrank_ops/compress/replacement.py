"""The factorized module for one layer: its rank, its decomposition, whitened or not; here or in other processes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lowrank_ops.calibrate.whitening import Whitening
from lowrank_ops.decompose import ranks
from lowrank_ops.decompose.ranks import Rank
from lowrank_ops.linalg.singular import energy, exactly
from lowrank_ops.model.sites import HOOKS, own_attributes
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.modules import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.nn.plain import is_matrix
from lowrank_ops.ops.memory import trim

_ROWS = 64  # of a weight that are compared in fp64 at a time


@dataclass(frozen=True)
class Task:
    """What to decompose: a layer, its ranks, the roots of its moments if there are any, options of `from_conv2d`."""

    layer: Any
    rank: int | tuple[int, int]
    tucker: bool
    whitening: Whitening | None
    options: Mapping[str, Any]
    exact: bool = False  # no randomized SVD

    def run(self) -> FactorizedModule:
        with exactly(self.exact):
            return factorized(self.layer, self.rank, self.tucker, self.whitening, self.options)


def run_tasks(tasks: list[Task], n_jobs: int | None) -> Iterator[FactorizedModule]:
    """The modules in the tasks' order.

    Args:
        n_jobs: None decomposes here, with torch's present number of threads. A number: in so many processes (joblib),
            one thread each, -1 for one a core; the modules are the same bit for bit whatever the number.
    """
    if n_jobs is None:
        for task in tasks:
            yield task.run()
        return
    try:
        import joblib
    except ImportError as error:
        raise ImportError("factorize_: n_jobs needs joblib; `pip install joblib`, or leave n_jobs out") from error
    alone = [replace(task, layer=_bare(task.layer)) for task in tasks]
    results: Iterable[Mapping[str, Any]] = joblib.Parallel(n_jobs=n_jobs, return_as="generator")(
        joblib.delayed(_run_with_one_thread)(task) for task in alone
    )
    yield from results  # type: ignore[misc]


def _run_with_one_thread(task: Task) -> FactorizedModule:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return task.run()
    finally:
        torch.set_num_threads(threads)


def _bare(layer: nn.Module) -> nn.Module:
    """The layer without its hooks and attributes of its own, which may not be sent to another process."""
    bare = copy.copy(layer)
    for name in own_attributes(layer):
        del bare.__dict__[name]
    for hooks in HOOKS:
        object.__setattr__(bare, hooks, OrderedDict())
    return bare


def factorized(
    layer: Any, rank: int | tuple[int, int], tucker: bool, whitening: Whitening | None, options: Mapping[str, Any]
) -> FactorizedModule:
    """The module of a layer; with a whitening, of the layer whose weight is whitened, which is then undone."""
    if whitening is None:
        return _decomposed(layer, rank, tucker, options)
    module = _decomposed(_whitened(layer, whitening), rank, tucker, options)
    trim(layer.weight)
    factors = whitening.undo(module.factors())
    module = module.to(layer.weight.device, layer.weight.dtype)
    with torch.no_grad():
        for name, factor in module.factors().items():
            factor.copy_(factors[name])
    del factors
    trim(layer.weight)
    module.relative_error = weight_error(layer, module)
    return module


def _whitened(layer: Any, whitening: Whitening) -> Any:
    """The layer with a whitened weight, of its dtype, fp32 at least."""
    source = copy.copy(layer)  # shares everything but the weight
    weight = whitening.apply(layer.weight, torch.promote_types(layer.weight.dtype, torch.float32))
    trim(weight)
    source._parameters = {**layer._parameters, "weight": nn.Parameter(weight, layer.weight.requires_grad)}
    return source


def _decomposed(layer: Any, rank: int | tuple[int, int], tucker: bool, options: Mapping[str, Any]) -> FactorizedModule:
    if isinstance(layer, nn.Linear):
        return LowRankLinear.from_linear(layer, rank, **options)  # type: ignore[arg-type]
    if isinstance(layer, nn.Conv2d):
        return (TuckerConv2d if tucker else CPConv2d).from_conv2d(layer, rank, **options)  # type: ignore[arg-type]
    return (TuckerConv1d if tucker else CPConv1d).from_conv1d(layer, rank, **options)  # type: ignore[arg-type]


def weight_of(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight
    return weight.detach()


@torch.no_grad()
def weight_error(layer: Any, module: FactorizedModule) -> float:
    pairs = zip(weight_of(layer).split(_ROWS), module._dense_weight().split(_ROWS), strict=True)
    lost = sum(energy(before.double() - after) for before, after in pairs)
    norm = energy(weight_of(layer))
    return (lost / norm) ** 0.5 if norm else 0.0


def layer_rank(
    layer: nn.Conv1d | nn.Conv2d | nn.Linear, rank: Rank, tucker: bool, options: Mapping[str, Any]
) -> int | tuple[int, int]:
    weight = layer.weight.detach()
    if is_matrix(layer):
        pair = rank if isinstance(rank, tuple) else (rank,)
        return min(ranks.linear_rank(entry, weight.flatten(1), **options) for entry in pair)
    image = weight if weight.dim() == 4 else weight.unsqueeze(2)
    return (ranks.tucker_ranks if tucker else ranks.cp_rank)(rank, image, **options)
