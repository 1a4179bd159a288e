"""Whole models: `factorize_` replaces convolution and linear layers by factorized modules, in place."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from lowrank_ops.budget.knapsack import Budget
from lowrank_ops.budget.menu import Choice, empty_module, macs_in
from lowrank_ops.budget.spending import met_already, spend
from lowrank_ops.calibrate.fit_in_order import STAGES, Fit, fit_in_order_
from lowrank_ops.calibrate.moment_groups import moment_groups, room
from lowrank_ops.calibrate.moments import finite, gather_moments
from lowrank_ops.calibrate.whitening import Whitening
from lowrank_ops.compress.fuse import fuse_
from lowrank_ops.compress.replacement import Task, layer_rank, run_tasks, weight_error, weight_of
from lowrank_ops.compress.report import LayerReport, Report, other_modules
from lowrank_ops.compress.selection import Selectors, named, select, too_narrow
from lowrank_ops.decompose import ranks
from lowrank_ops.decompose.cp import sensitivity
from lowrank_ops.decompose.ranks import Rank
from lowrank_ops.fold.activations import rectified
from lowrank_ops.linalg.roots import Root
from lowrank_ops.linalg.singular import exactly
from lowrank_ops.model.batches import Batches, device_of
from lowrank_ops.model.calls import CalledLayers, Calls, compare_times, model_errors, recorded_calls
from lowrank_ops.model.sites import Owners, Site, clash, find_sites, keep_attributes, move_hooks, not_kept
from lowrank_ops.model.state import leaves_model_state
from lowrank_ops.model.timing import compare_models
from lowrank_ops.model.weight_reads import WeightReads
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.checks import refusal
from lowrank_ops.nn.counts import count_macs, count_parameters
from lowrank_ops.nn.modules import CPConv1d, CPConv2d
from lowrank_ops.nn.plain import is_matrix
from lowrank_ops.ops.memory import trim
from lowrank_ops.runtime.compiled import takes_compiled
from lowrank_ops.text.notes import listed
from lowrank_ops.text.warn import warn

__all__ = ["factorize_", "fuse_"]

_CP = (CPConv1d, CPConv2d)

# Layers whose parent reads their weight itself instead of calling them.
_READ_BY_PARENT: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.MultiheadAttention, ("out_proj",)),
    (nn.TransformerEncoderLayer, ("linear1", "linear2")),
)


@takes_compiled()
@leaves_model_state
def factorize_(
    model: nn.Module,
    method: Literal["tucker", "cp", "auto"] = "tucker",
    rank: Rank | Budget = 0.5,
    *,
    linear: Rank | Literal[False] | None = None,
    include: Selectors = None,
    exclude: Selectors = None,
    calibration: Any = None,
    example_input: Any = None,
    multiple: int = 8,
    seed: int = 0,
    exact: bool = False,
    n_jobs: int | None = None,
    progress: bool = True,
) -> Report:
    """Replaces the convolution and linear layers of `model`, in place, by factorized modules.

    nn.Conv2d and nn.Conv1d become Tucker-2 or CP blocks, nn.Linear becomes `LowRankLinear`. A 1x1 convolution
    is a matrix: with either method it becomes a `CPConv2d` (`CPConv1d`) holding the SVD of its weight and
    spatial factors of ones. Train/eval mode, requires_grad, forward and backward hooks (their handles too)
    are kept; a layer that stands in several places is replaced once, everywhere. Parameters are new ones:
    build the optimizer afterwards.

    Everything is decomposed before anything is replaced: after an error the model is as it was.

    Args:
        model: the network. A model that is itself one layer has no place to put the replacement:
            `from_conv2d`, `from_linear`.
        method: "tucker" (Tucker-2), "cp", or "auto": for each layer what gives the least error at the cost; it
            needs a `Budget`.
        rank: as in `tucker_decompose` / `cp_decompose`. For 1x1 convolutions it is the rank of the matrix; of
            a pair `(R1, R2)` the smaller one. Or a `Budget` for the whole network: then each layer gets its own
            ranks, or stays dense.
        linear: the rank of linear layers as in `svd_decompose`; None takes `rank` (of a pair the smaller
            one), False leaves them.
        include: only these layers; None means all. A glob pattern of qualified names ("features.*"), a module
            type, a callable `(name, layer) -> bool`, or several of them. A pattern or type also stands for
            everything inside a module that it matches. A layer's qualified name itself also takes layers of at most 8
            channels or features on a side: `["*", "stem"]`.
        exclude: not these, in the same terms.
        calibration: real inputs, without labels: a tensor, a list or DataLoader of batches (`model.batches`).
            Factors then keep the layers' outputs on these inputs rather than their weights, and each layer is fitted
            to the inputs that the already factorized layers before it give it (`calibrate.fit_in_order`). A layer
            that is fitted gets a bias if it has none. Some hundred images and a few thousand pixels per layer are
            enough; where rows are fewer than a layer's inputs, its factors lean on its weight (with a warning), and
            where there are none, they keep the weight alone; both are noted in the report. A quarter of the rows is
            held out; the report's output errors are those on them of a fit without them, and the layer is then
            fitted once more to all rows. The model runs in eval mode, twice per
            layer and batch up to the layer; of more than 16 layers some share their runs. Besides the model and its
            factorized modules, memory holds the lower triangles of the second moments of as many layers as would take,
            whole, a seventh of the model, 64 MiB or one layer's (`calibrate.moment_groups`; otherwise the data are
            run over once for each such group, twice with a `Budget`), that much of rows to which layers are fitted
            together, one layer's matrices in fp64, and what a backward pass of a batch keeps. With 1,024 fp32 rows on a
            CPU, a process grew by 2.7 GiB at most
            for a model of 1.55 GiB in 198 layers (transformer blocks, 1024 wide), by 0.53 GiB for one of 0.13 GiB in
            two layers, from 2048 features to 8192 and back: there the moments of one layer take as much as the model.
            Fold BatchNorm before (`fold_batchnorm_`), or re-estimate its statistics afterwards
            (`reestimate_batchnorm_`).
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments for the model. With it
            the report has output sizes, MACs of a forward pass and milliseconds before and after, of layers and
            of the whole model, and it is seen that the factorized model runs. The model is in eval mode for these runs.
        multiple: ranks that are no ints are rounded up to a multiple of it (see `decompose.ranks`), and those for a
            budget are multiples of it.
        seed: of the decompositions.
        exact: no randomized SVD, which low ranks of large linear layers and 1x1 convolutions get otherwise, where its
            error is at most 1 % above the least possible (`svd_decompose`).
        n_jobs: decompose in so many processes of one thread each (joblib; -1: one a core); the same bits for every
            number. None: one layer after the other, with torch's threads.
        progress: a progress bar on stderr.

    Layers are left as they are, with the reason in the report, where a block would have no fewer parameters
    or multiplications, where they have at most 8 channels or features on a side (unless `include` names them, or a
    `Budget` chooses the ranks), where an integer rank is above the layer's limit, where a budget is better spent on the
    dense layer, and where a replacement would not be safe: groups, transposed and 3-D convolutions, subclasses with a
    forward of their own, computed (parametrized) weights, weights shared with another module, layers that a module
    also holds in a list or another plain attribute, weights that the parent module reads itself
    (nn.MultiheadAttention.out_proj, the linear layers of nn.TransformerEncoderLayer; with `example_input` or
    `calibration` whatever a run of the model computes with instead of calling it). Without such data nothing tells that
    a model computes with a weight: the factorized layer then multiplies its factors each time (its `weight`, which
    warns of it once).

    A model that torch.compile has compiled, as a whole or in parts, runs uncompiled here (milliseconds and a budget of
    latency are those of the uncompiled model), and names are those of what it wraps, without `_orig_mod`. Afterwards it
    is compiled anew at its next call. A layer on which `compile()` was called itself is left, with the reason.

    Replacements keep what a model reads of a dense layer: `weight`, `bias`, the arguments of nn.Linear and nn.Conv2d,
    and the attributes that were set on it. Layers with more than that are left: parameters, buffers, submodules,
    methods or an instance's forward of their own, state_dict hooks, gradient hooks on weight or bias.

    Returns:
        A `Report` with an entry for each convolution, linear and factorized layer, and a line for each kind of module
        that holds the other parameters. Where no layer is replaced, a warning says why.

    Raises:
        ValueError: non-finite weights (naming the layer), a model on the meta device that would have to run (with
            calibration data, an example input or a budget), a rank out of range or above the limit of every layer that
            could be replaced, an `include` or `exclude` that matches nothing, a model that is one layer or already
            factorized itself, an unknown method, a budget that cannot be met (saying the closest, or that nothing can
            be replaced), calibration data that are empty, not finite, or reach none of the layers.
        TypeError: arguments of the wrong kind.
        RuntimeError: the model fails on `example_input`, before or after (then it is as it was), or on the calibration
            data; the message names the layer in which it does.

    Buffers and other state that the model keeps between calls, and the global random generators, are as they were
    afterwards; data are not changed.
    """
    rank = (rank[0], rank[1]) if isinstance(rank, list) and len(rank) == 2 else rank
    _check_arguments(model, method, rank, linear, multiple)
    work = _Work(model, method, rank, linear, multiple, seed, exact, n_jobs, progress)
    if work.sites and all(isinstance(site.layer, FactorizedModule) for site in work.sites):
        raise ValueError(
            f"factorize_: model is already factorized, all {len(work.sites)} of its layers; "
            "to_dense() of a layer undoes it"
        )
    if calibration is not None or example_input is not None or isinstance(rank, Budget):
        _require_values(model)
    chosen = select(model, work.sites, include, exclude)
    before = count_parameters(model)
    batches = None if calibration is None else Batches(calibration, "factorize_: calibration", device_of(model))
    if example_input is None and isinstance(rank, Budget):
        example_input = _example_for(rank, batches)
    layers = [site.layer for site in work.sites]
    others = other_modules(model, layers)
    calls = None if example_input is None else recorded_calls(model, example_input, layers)

    work.refuse(chosen, named(work.sites, include))
    if calls is not None:
        work.note_reads(calls.reads, "example_input")
        work.note_uncounted(calls)
    if isinstance(rank, Budget) and met_already(rank, model, work.open_sites(), calls, example_input):
        work.reasons.update({id(site.layer): "the budget is met without it" for site in work.open_sites()})
    work.arrange(batches)
    if isinstance(rank, Budget) and work.open_sites():
        work.spend(rank, calls, example_input)
    for group in work.groups:
        work.decompose(group)
        work.fit(group)
    work.check_ranks()
    work.note_rows()

    times = {} if calls is None else work.measure(calls)
    replaced = [site for site in work.sites if id(site.layer) in work.replacements]
    whole = _swap(work, replaced, example_input)
    entries = [_entry(site, work, calls, times.get(id(site.layer))) for site in work.sites]
    after = count_parameters(model)
    elsewhere = None if calls is None else calls.macs_elsewhere
    report = Report(
        type(model).__name__, entries, calls is not None, before, after, others, whole[0], whole[1], elsewhere
    )
    if not replaced and not isinstance(rank, Budget):  # a budget was met or an error before
        notes = "; ".join(report.notes[:3]) or "it has no parameters"
        warn(f"factorize_: no layer of {report.model} was replaced: {notes}")
    return report


@dataclass
class _Work:
    """The state of one `factorize_`: what is known of each layer, by id."""

    model: nn.Module
    method: str
    rank: Rank | Budget
    linear: Rank | Literal[False] | None
    multiple: int
    seed: int
    exact: bool
    n_jobs: int | None
    progress: bool
    sites: list[Site] = field(init=False)
    reasons: dict[int, str] = field(default_factory=dict)
    batches: Batches | None = None
    batch_count: int = 0
    groups: list[list[Site]] = field(default_factory=list)  # of layers whose moments are gathered together
    at_hand: int = -1  # the group whose moments' roots are held
    whitenings: dict[int, Whitening] = field(default_factory=dict)
    seen: dict[int, tuple[int, int]] = field(default_factory=dict)  # calibration rows and inputs of each layer reached
    calls: dict[int, int] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)  # of the whitened weights
    fits: list[Fit] = field(default_factory=list)
    choices: dict[int, Choice] = field(default_factory=dict)
    replacements: dict[int, FactorizedModule] = field(default_factory=dict)
    output_errors: dict[int, float | None] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)  # of layers that are replaced
    also_read: set[int] = field(default_factory=set)  # layers that the model calls and computes with their weights

    def __post_init__(self) -> None:
        self.sites = find_sites(self.model, lambda layer: isinstance(layer, (_ConvNd, nn.Linear, FactorizedModule)))

    def open_sites(self) -> list[Site]:
        """Those that no reason keeps from being replaced."""
        return [site for site in self.sites if id(site.layer) not in self.reasons]

    def refuse(self, chosen: Sequence[str | None], by_name: Sequence[bool]) -> None:
        """Notes why layers are left whatever their rank."""
        owners = Owners(self.model)
        for site, reason, asked in zip(self.sites, chosen, by_name, strict=True):
            reason = reason or _unsafe(site, owners) or refusal(site.layer) or not_kept(site.layer)
            reason = reason or self._clash(site.layer)
            if not asked and not isinstance(self.rank, Budget):  # a budget weighs what the layer's error costs
                reason = reason or too_narrow(site)
            if self.linear is False and isinstance(site.layer, nn.Linear):
                reason = reason or "linear=False leaves linear layers"
            if reason is not None:
                self.reasons[id(site.layer)] = reason
            else:
                ranks.require_finite(weight_of(site.layer), site.names[0])

    def _clash(self, layer: Any) -> str | None:
        """Why no block can have the layer's attributes; known before a budget counts on the layer."""
        matrix = is_matrix(layer)
        choices = [Choice("tucker", (1, 1))] if self.method != "cp" and not matrix else []
        if self.method != "tucker" or matrix:
            choices.append(Choice("svd" if matrix else "cp", 1))
        return next(filter(None, (clash(layer, empty_module(layer, choice)) for choice in choices)), None)

    def _note(self, site: Site, text: str) -> None:
        """One more line on a layer that is replaced."""
        before = self.notes.get(id(site.layer))
        self.notes[id(site.layer)] = text if before in (None, text) else f"{before}; {text}"

    def note_reads(self, reads: WeightReads, data: str) -> None:
        """Leaves layers that a run of the model computed with instead of calling them; notes those that it also
        called."""
        for site in self.open_sites():
            key = id(site.layer)
            if key in reads.read and key in reads.called:
                self.also_read.add(key)
                self._note(site, "the model also computes with its weight: the factors are multiplied each time")
            elif key in reads.read:
                self.reasons[key] = (
                    f"on {data} the model computes with its weight instead of calling it: the factors would be "
                    "multiplied each time, and nothing gained"
                )

    def note_uncounted(self, calls: Calls) -> None:
        """Says of which layers the model's multiplications are not known; a budget of them warns."""
        uncounted = [site for site in self.sites if calls.of(site.layer).unknown_reads]
        for site in uncounted:
            self.reasons[id(site.layer)] += "; its MACs are not known: torch counts no operation with it"
        if uncounted and isinstance(self.rank, Budget) and self.rank.kind == "macs":
            warn(
                f"factorize_: the budget of macs is one without those by the weights of "
                f"{listed([site.names[0] for site in uncounted])}, which the model computes with in a way that "
                "torch.utils.flop_counter does not count"
            )

    def note_kept(self, called: Collection[int]) -> None:
        """Notes of layers that were replaced, and that the model calls all the same."""
        sites = [site for site in self.sites if id(site.layer) in called]
        for site in sites:
            self._note(site, "the model goes on calling the dense layer, which it holds elsewhere than in its modules")
        if sites:
            warn(
                f"factorize_: the model goes on calling the dense layers {listed([site.names[0] for site in sites])}, "
                "which it holds elsewhere than in its modules; nothing is gained there: have it call its modules"
            )

    def arrange(self, batches: Batches | None) -> None:
        """Groups the layers that may be replaced; without calibration in one group."""
        sites = self.open_sites()
        self.batches, self.groups = batches, [sites]
        if batches is None or not sites:
            return
        lazy = [name for name, value in self.model.named_parameters() if is_lazy(value)]
        if lazy:
            raise ValueError(f"factorize_: {lazy[0]} is not initialized yet; run the model once, then calibrate it")
        with batches.same_order():
            self.batch_count = sum(1 for _ in batches)  # what is wrong with the data shows here, before the model runs
        with WeightReads(self.model, [site.layer for site in sites]) as reads:
            with _bar(None, "order of the layers", self.progress, self.batch_count) as bar, self.failing():
                self.groups = moment_groups(self.model, sites, batches, seen=bar.update)
            self._gather(0)
        self.note_reads(reads, "the calibration data")
        self.groups = [[site for site in group if id(site.layer) not in self.reasons] for group in self.groups]
        if self.open_sites() and not self.whitenings:
            raise ValueError(
                f"factorize_: the calibration data reach none of the {len(self.open_sites())} layers to replace: the "
                "model does not call them on these inputs; give other data"
            )

    def _gather(self, index: int) -> None:
        """The roots of the moments of a group; those of the group before are dropped. The sites of the group are then
        in the order in which the model calls them."""
        assert self.batches is not None
        self.at_hand = index
        self.whitenings.clear()
        group = self.groups[index]
        what = "calibrate" if len(self.groups) == 1 else f"calibrate, part {index + 1} of {len(self.groups)}"
        with _bar(None, what, self.progress, self.batch_count) as bar, self.failing():
            moments, calls = gather_moments(
                self.model,
                [site.layer for site in group],  # type: ignore[misc]
                self.batches,
                seen=bar.update,
            )
        self.calls.update(calls)
        order = list(moments)
        group.sort(key=lambda site: order.index(id(site.layer)) if id(site.layer) in moments else len(order))
        for site in group[: len(order)]:
            of_layer = moments.pop(id(site.layer))
            if not finite(of_layer.input):
                raise ValueError(
                    f"factorize_: {site.names[0]} sees values that are not finite on the calibration data; leave out "
                    "the samples that cause them, or exclude the layer"
                )
            self.seen[id(site.layer)] = of_layer.rows, len(of_layer.input)
            self.whitenings[id(site.layer)] = Whitening.of_(of_layer)
            trim(weight_of(site.layer))

    def whitening(self, site: Site) -> Whitening | None:
        """The roots of a layer's moments, gathered now if another group's are at hand; None if no data reach it."""
        if self.batches is None:
            return None
        index = next(index for index, group in enumerate(self.groups) if any(other is site for other in group))
        if index != self.at_hand:
            self._gather(index)
        return self.whitenings.get(id(site.layer))

    def _gradient(self, site: Site) -> Root:
        """The root of the gradient's moment of a layer that the data reach."""
        whitening = self.whitening(site)
        assert whitening is not None
        return whitening.gradient

    def spend(self, budget: Budget, calls: Calls | None, example_input: Any) -> None:
        """Chooses the ranks of each layer, or to leave it."""
        sites = [site for group in self.groups for site in group]
        self.choices, left = spend(
            budget,
            self.model,
            sites,
            self.weighed,
            self.method,
            self.multiple,
            self.seed,
            calls,
            example_input,
            self.batches is not None,
            self.progress,
        )
        self.reasons.update(left)

    def note_rows(self) -> None:
        """Notes which layers the data reach too seldom, and warns of those that they reach."""
        if self.batches is None:
            return
        few = []
        sites = [site for group in self.groups for site in group if id(site.layer) in self.replacements]
        for site in sites:
            rows, width = self.seen.get(id(site.layer), (0, 0))
            if not rows:
                self._note(site, "the calibration data do not reach it: its factors keep its weight alone")
            elif rows < width:
                shown = f"{rows} calibration rows for {width} inputs"
                self._note(site, f"{shown}: its factors lean on its weight")
                few.append(f"{site.names[0]} ({shown})")
        if few:
            listed = ", ".join(few[:3]) + (f" and {len(few) - 3} more" if len(few) > 3 else "")
            warn(
                f"factorize_: few calibration data for {len(few)} of {len(sites)} layers: {listed}. Their factors lean "
                "on their weights; give more data, at least a few rows for each input of a layer",
            )

    def weighed(self, site: Site) -> torch.Tensor:
        """What a `Budget` weighs: the whitened weight; without calibration, the weight divided by its norm. A layer
        that the calibration data do not reach, which comes last, counts like the median of those that they reach."""
        whitening, weight = self.whitening(site), weight_of(site.layer)
        if whitening is not None:
            weight = whitening.apply(weight)
            self.norms.append(float(weight.norm()))
            return weight
        weight = weight.double()
        return weight * ((statistics.median(self.norms) if self.norms else 1.0) / (float(weight.norm()) or 1.0))

    def decompose(self, group: Sequence[Site]) -> None:
        """Makes the modules of a group, or notes why a layer is left."""
        tasks: list[tuple[Site, Task]] = []
        for site in list(group):  # gathering its moments sorts the group
            if id(site.layer) in self.reasons:
                continue
            task = self._task(site)
            if isinstance(task, str):
                self.reasons[id(site.layer)] = task
            else:
                tasks.append((site, task))
        modules = run_tasks([task for _, task in tasks], self.n_jobs)
        with _bar([site for site, _ in tasks], "decompose", self.progress) as bar:
            for site, module in zip(bar, modules, strict=True):
                bar.set_postfix_str(site.names[0])
                reason = _too_large(site.layer, module)
                if reason is None:
                    keep_attributes(site.layer, module)
                    module._read_is_known = True  # until its entry in the report is made
                    self.replacements[id(site.layer)] = module
                else:
                    self.reasons[id(site.layer)] = reason
                trim(weight_of(site.layer))

    def check_ranks(self) -> None:
        """Raises ValueError if the rank is above the limit of every layer."""
        tried = sum(map(len, self.groups))
        above = [reason for reason in self.reasons.values() if isinstance(reason, _AboveLimit)]
        if above and len(above) == tried:
            shown = self.rank if self.linear in (None, False) else (self.rank, self.linear)
            raise ValueError(
                f"factorize_: rank {shown} is above the limit of every layer that could be replaced "
                f"({above[0]}{'; ...' if tried > 1 else ''}); give a lower rank or a fraction"
            )

    def fit(self, group: Sequence[Site]) -> None:
        """Fits a group's modules to the dense layers' outputs, in the order in which the model calls them."""
        if self.batches is None:
            return
        sites = [site for site in group if id(site.layer) in self.replacements and id(site.layer) in self.seen]
        relu = rectified(self.model, [site.layer for site in sites])
        limit = room(self.model)
        stage = max(1, -(-sum(map(len, self.groups)) // STAGES))
        fits = []
        for site in sites:
            key, positions = id(site.layer), self.seen[id(site.layer)][0]
            root = self._gradient(site)
            fits.append(Fit(site, self.replacements[key], root, self.calls[key], positions, key in relu))
        self.whitenings, self.at_hand = {}, -1  # of them only those of the gradients are needed from here on
        progress = _bar(None, "fit", self.progress, len(fits) * self.batch_count)
        with progress as bar, self.failing(), exactly(self.exact):

            def step(name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update()

            errors = fit_in_order_(self.model, fits, self.batches, self.batch_count, step, self.fits, stage, limit)
        self.output_errors.update(errors)
        for site in sites:
            module = self.replacements[id(site.layer)]
            module.relative_error = weight_error(site.layer, module)
        self.fits += [replace(fit, gradient=None) for fit in fits]

    def rows_of(self, layer: nn.Module) -> int | None:
        """Calibration rows of a layer that was replaced; None without calibration."""
        if self.batches is None or id(layer) not in self.replacements:
            return None
        return self.seen.get(id(layer), (0, 0))[0]

    def failing(self) -> AbstractContextManager[None]:
        """Names the layer in which a run on the calibration data fails."""
        return model_errors("factorize_: the model", self.model, "the calibration data")

    def measure(self, calls: Calls) -> dict[int, tuple[float, float]]:
        """Milliseconds before and after of the layers that are replaced."""
        found: dict[int, tuple[float, float]] = {}
        sites = [site for site in self.sites if id(site.layer) in self.replacements]
        with _bar(sites, "measure", self.progress) as bar:
            for site in bar:
                bar.set_postfix_str(site.names[0])
                pair = compare_times(site.layer, self.replacements[id(site.layer)], calls.of(site.layer))
                if pair is not None:
                    found[id(site.layer)] = pair
        return found

    def _task(self, site: Site) -> Task | str:
        """How to decompose a layer, or the reason why it is left."""
        layer: Any = site.layer
        choice = self.choices.get(id(layer))
        method = self.method if choice is None else choice.kind
        tucker = method == "tucker" and not is_matrix(layer)
        options: dict[str, Any] = {"multiple": self.multiple, "name": site.names[0]}
        if choice is not None:
            own_rank = choice.rank
        else:
            rank = self.linear if isinstance(layer, nn.Linear) and self.linear is not None else self.rank
            try:  # arguments and values were checked: what is left is a rank above this layer's limit
                own_rank = layer_rank(layer, rank, tucker, options)  # type: ignore[arg-type]
            except ValueError as error:
                return _AboveLimit(error)
        return Task(layer, own_rank, tucker, self.whitening(site), {**options, "seed": self.seed}, self.exact)


def _too_large(layer: Any, module: FactorizedModule) -> str | None:
    """Why a module is no gain over its layer."""
    for what, count in (("parameters", count_parameters), ("multiplications per output pixel", count_macs)):
        dense, factorized = count(layer), count(module)
        assert dense is not None and factorized is not None
        if factorized >= dense:
            return f"would not shrink: rank {module.rank} has {factorized} {what}, the dense layer {dense}"
    return None


def _check_arguments(
    model: nn.Module, method: str, rank: Rank | Budget, linear: Rank | Literal[False] | None, multiple: int
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"factorize_: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, FactorizedModule):
        raise ValueError(f"factorize_: model is already factorized, a {type(model).__name__}; to_dense() undoes it")
    if isinstance(model, (_ConvNd, nn.Linear)):
        raise ValueError(
            f"factorize_: model is a single {type(model).__name__}, which has no parent to hold the "
            "replacement; use TuckerConv2d.from_conv2d, CPConv2d.from_conv2d or LowRankLinear.from_linear, "
            "or wrap it in nn.Sequential"
        )
    if method not in ("tucker", "cp", "auto"):
        raise ValueError(f"factorize_: method must be 'tucker', 'cp' or 'auto', got {method!r}")
    ranks.check_multiple(multiple, "factorize_")
    if isinstance(linear, (tuple, list)):
        raise ValueError(f"factorize_: linear must be a single rank, got {linear}")
    if linear is not None and linear is not False:
        ranks.check_rank(linear, "factorize_: linear")
    if isinstance(rank, Budget):
        if linear not in (None, False):
            raise ValueError(
                f"factorize_: linear must be None or False with a Budget, which chooses all ranks, got {linear}"
            )
        return
    if method == "auto":
        raise ValueError(f"factorize_: method 'auto' spends a budget; give rank=Budget(...), got {rank!r}")
    if method == "cp" and isinstance(rank, (tuple, list)):
        raise ValueError(f"factorize_: rank must be a single number for method 'cp', got {rank}")
    if isinstance(rank, (tuple, list)) and len(rank) != 2:
        raise ValueError(f"factorize_: rank must be a single rank or a pair (R1, R2), got {rank}")
    for entry in rank if isinstance(rank, (tuple, list)) else (rank,):
        ranks.check_rank(entry, "factorize_: rank")


def _require_values(model: nn.Module) -> None:
    """Raises where the model cannot run."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise ValueError(
                f"factorize_: the model cannot run, {name} is on the meta device, which has no values; load the "
                "weights first"
            )


def _example_for(budget: Budget, batches: Batches | None) -> Any:
    """The input that a budget of multiplications or latency is for."""
    if budget.example_input is not None:
        return budget.example_input
    if budget.kind == "params":
        return None
    if batches is None:
        raise ValueError(
            f"factorize_: a budget of {budget.kind} needs an input: give example_input=, or calibration data"
        )
    with batches.same_order():
        batch = next(iter(batches))
    return dict(batch.keywords) if batch.keywords else batch.arguments


def _unsafe(site: Site, owners: Owners) -> str | None:
    """Why this layer cannot be taken out of this model, whatever its own kind allows."""
    for parent, key in site.places:
        for kind, keys in _READ_BY_PARENT:
            if isinstance(parent, kind) and key in keys:
                return f"nn.{kind.__name__} reads {key}.weight itself instead of calling {key}"
    shared = owners.sharing(site.layer)
    held = owners.held(site.layer)
    return held if shared is None else f"it shares a parameter with {shared}; untie them first"


class _AboveLimit(str):
    """The reason to leave a layer: the integer rank is above its limit."""


def _swap(work: _Work, sites: list[Site], example_input: Any) -> tuple[float, float] | tuple[None, None]:
    """Puts the replacements in; leaves the model as it was if it then fails on the example input.

    Returns the whole model's milliseconds on the example input, before and after.
    """
    times: tuple[float, float] | tuple[None, None] = (None, None)
    if example_input is not None:
        hint = "It was left as it was. It may ask more of a layer than a factorized one answers: exclude that layer"
        try:
            errors = model_errors("factorize_: the factorized model", work.model, "example_input", hint)
            with errors, CalledLayers([site.layer for site in sites]) as dense:
                times = compare_models(work.model, sites, work.replacements, example_input)
            work.note_kept(dense.called)
        except BaseException:
            for site in sites:
                site.put(site.layer)
            raise
    for site in sites:
        site.put(work.replacements[id(site.layer)])
        move_hooks(site.layer, work.replacements[id(site.layer)])
    return times


def _entry(site: Site, work: _Work, calls: Calls | None, times: tuple[float, float] | None) -> LayerReport:
    layer = site.layer
    module = work.replacements.get(id(layer))
    if module is not None:
        module._read_is_known = id(layer) in work.also_read
    kernel = getattr(layer, "kernel_size", None)
    size = count_parameters(layer)
    made_of = layer if module is None else module
    rank = getattr(made_of, "rank", None)
    seen = None if calls is None else calls.of(layer)

    def macs(which: nn.Module) -> int | None:
        return count_macs(which) if seen is None else macs_in(seen, which)

    return LayerReport(
        name=site.names[0],
        type=type(layer).__name__,
        replaced_by=None if module is None else type(module).__name__,
        kernel=None if kernel is None else tuple(kernel),
        ranks=None if rank is None else rank if isinstance(rank, tuple) else (rank,),
        parameters_before=size,
        parameters_after=size if module is None else count_parameters(module),
        macs_before=macs(layer),
        macs_after=macs(made_of),
        weight_error=getattr(made_of, "relative_error", None),
        output_error=work.output_errors.get(id(layer)),
        calibration_rows=work.rows_of(layer),
        sensitivity=sensitivity(list(made_of.factors().values())) if isinstance(made_of, _CP) else None,
        reason=work.reasons.get(id(layer)),
        note=None if module is None else work.notes.get(id(layer)),
        output_size=None if seen is None else seen.output_size,
        milliseconds_before=None if times is None else times[0],
        milliseconds_after=None if times is None else times[1],
        aliases=tuple(site.names[1:]),
    )


def _bar(sites: Sequence[Site] | None, what: str, shown: bool, total: int | None = None) -> tqdm:
    unit = "layer" if sites is not None else "batch"
    return tqdm(sites, desc=what, unit=unit, total=total, file=sys.stderr, disable=not shown, leave=False)
