"""The factorized module of one layer: its rank and its decomposition, in this process or in others."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lowrank_ops.calibrate.whitening import Whitening
from lowrank_ops.decompose import ranks
from lowrank_ops.decompose.ranks import Rank
from lowrank_ops.linalg.singular import energy, exactly
from lowrank_ops.model.sites import own_attributes, without_hooks
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.modules import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.nn.plain import is_matrix
from lowrank_ops.ops.memory import trim

_ROWS = 64  # rows of a weight that are compared in fp64 at a time


@dataclass(frozen=True)
class Task:
    """One layer to decompose.

    Attributes:
        layer: a convolution or linear layer.
        rank: `(R1, R2)` for Tucker.
        tucker: whether a convolution that is no matrix becomes a Tucker-2 block; otherwise it becomes a CP block.
        whitening: the roots of its moments; None: the weight is decomposed as it is.
        options: keyword arguments of `from_conv2d`, `from_conv1d` or `from_linear`.
        exact: use no randomized SVD.
    """

    layer: Any
    rank: int | tuple[int, int]
    tucker: bool
    whitening: Whitening | None
    options: Mapping[str, Any]
    exact: bool = False

    def run(self) -> FactorizedModule:
        with exactly(self.exact):
            return _factorized(self)


def run_tasks(tasks: list[Task], n_jobs: int | None) -> Iterator[FactorizedModule]:
    """The modules in the tasks' order.

    Args:
        n_jobs: None decomposes here, with torch's present number of threads. A number decomposes in that many processes
            (joblib) of one thread each, -1 in one process per core; the modules are the same bit for bit whatever the
            number.
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
    bare = without_hooks(layer)
    for name in own_attributes(layer):
        del bare.__dict__[name]
    return bare


def _factorized(task: Task) -> FactorizedModule:
    """The module for a task. With a whitening, the whitened weight is decomposed, and the whitening is taken out of the
    factors again."""
    layer, whitening = task.layer, task.whitening
    if whitening is None:
        return _decomposed(layer, task)
    module = _decomposed(_whitened(layer, whitening), task)
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
    """A layer like this one with the whitened weight, in the weight's dtype, but fp32 at least."""
    source = copy.copy(layer)  # shares everything but the weight
    weight = whitening.apply(layer.weight, torch.promote_types(layer.weight.dtype, torch.float32))
    trim(weight)
    source._parameters = {**layer._parameters, "weight": nn.Parameter(weight, layer.weight.requires_grad)}
    return source


def _decomposed(layer: Any, task: Task) -> FactorizedModule:
    if isinstance(layer, nn.Linear):
        return LowRankLinear.from_linear(layer, task.rank, **task.options)  # type: ignore[arg-type]
    if isinstance(layer, nn.Conv2d):
        return (TuckerConv2d if task.tucker else CPConv2d).from_conv2d(layer, task.rank, **task.options)  # type: ignore[arg-type]
    return (TuckerConv1d if task.tucker else CPConv1d).from_conv1d(layer, task.rank, **task.options)  # type: ignore[arg-type]


def weight_of(layer: Any) -> torch.Tensor:
    """The layer's weight without its graph."""
    weight: torch.Tensor = layer.weight
    return weight.detach()


@torch.no_grad()
def weight_error(layer: Any, module: FactorizedModule) -> float:
    """`||W - W_dense|| / ||W_dense||`; 0 for a weight of zeros."""
    pairs = zip(weight_of(layer).split(_ROWS), module._dense_weight().split(_ROWS), strict=True)
    lost = sum(energy(before.double() - after) for before, after in pairs)
    norm = energy(weight_of(layer))
    return (lost / norm) ** 0.5 if norm else 0.0


def layer_rank(
    layer: nn.Conv1d | nn.Conv2d | nn.Linear, rank: Rank, tucker: bool, options: Mapping[str, Any]
) -> int | tuple[int, int]:
    """The number or the pair of numbers that a rank means for a layer; of a pair a matrix takes the smaller one.

    Args:
        layer: to be decomposed.
        rank: as the user gave it.
        tucker: whether a convolution that is no matrix becomes a Tucker-2 block.
        options: of the functions in `decompose.ranks`: `multiple` and `name`.

    Raises:
        ValueError: a rank above the layer's limit.
    """
    weight = layer.weight.detach()
    if is_matrix(layer):
        pair = rank if isinstance(rank, tuple) else (rank,)
        return min(ranks.linear_rank(entry, weight.flatten(1), **options) for entry in pair)
    image = weight if weight.dim() == 4 else weight.unsqueeze(2)
    return (ranks.tucker_ranks if tucker else ranks.cp_rank)(rank, image, **options)
