"""The work of `factorize_` on the layers of one model: what is known of each layer, and the steps that find it out."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from lowrank_ops.budget.knapsack import Budget
from lowrank_ops.budget.menu import Block, Offer, empty_module
from lowrank_ops.budget.spending import NOUNS, Spending
from lowrank_ops.calibrate.calibration import Calibration, GroupedMoments, Reached
from lowrank_ops.calibrate.fit_in_order import STAGES, Fit, fit_in_order_
from lowrank_ops.calibrate.moment_groups import room
from lowrank_ops.calibrate.whitening import Whitening
from lowrank_ops.compress.reasons import Left, Note, Reason
from lowrank_ops.compress.replacement import Task, layer_rank, run_tasks, weight_error, weight_of
from lowrank_ops.compress.selection import Selectors, named, select, too_narrow
from lowrank_ops.decompose import ranks
from lowrank_ops.decompose.ranks import Rank
from lowrank_ops.fold.activations import rectified
from lowrank_ops.linalg.singular import exactly
from lowrank_ops.model.batches import Batches
from lowrank_ops.model.calls import Calls
from lowrank_ops.model.sites import Owners, Site, clash, find_sites, keep_attributes, not_kept
from lowrank_ops.model.timing import compare_layers
from lowrank_ops.model.weight_reads import WeightReads
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.checks import refusal
from lowrank_ops.nn.counts import count_macs, count_parameters
from lowrank_ops.nn.plain import is_matrix
from lowrank_ops.ops.memory import trim
from lowrank_ops.runtime.torch_internals import ConvBase
from lowrank_ops.text.notes import listed
from lowrank_ops.text.progress import progress_bar
from lowrank_ops.text.warn import warn

# Layers whose parent reads their weight itself instead of calling them.
_READ_BY_PARENT: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.MultiheadAttention, ("out_proj",)),
    (nn.TransformerEncoderLayer, ("linear1", "linear2")),
)


@dataclass(frozen=True)
class Settings:
    """The arguments of `factorize_` that say how layers are decomposed."""

    method: str
    rank: Rank | Budget
    linear: Rank | Literal[False] | None
    multiple: int
    seed: int
    exact: bool
    n_jobs: int | None
    progress: bool

    @property
    def budget(self) -> Budget | None:
        """The rank, if it is a budget."""
        return self.rank if isinstance(self.rank, Budget) else None


@dataclass
class LayerWork:
    """One layer, and what is known of it so far.

    Attributes:
        site: the layer, and where it stands in the model.
        selected: why the user's selectors leave it out; None if they do not.
        by_name: whether `include` lists its qualified name itself.
        left: why it stays dense; None: it may be replaced.
        block: what was chosen for it within a budget.
        module: what replaces it.
        notes: for the report, if it is replaced.
        output_error: of its fit to calibration data, on held-out rows.
        milliseconds: of its calls, before and after.
    """

    site: Site
    selected: Reason | None = None
    by_name: bool = False
    left: Reason | None = None
    block: Block | None = None
    module: FactorizedModule | None = None
    notes: dict[Note, str] = field(default_factory=dict)
    output_error: float | None = None
    milliseconds: tuple[float, float] | None = None

    @property
    def layer(self) -> Any:
        """The dense layer."""
        return self.site.layer

    @property
    def name(self) -> str:
        """Its first qualified name."""
        return self.site.names[0]

    def note(self, note: Note, **words: object) -> None:
        """Adds a note, unless it is there already."""
        self.notes.setdefault(note, note.value.format(**words))


class Work:
    """All convolution, linear and factorized layers of a model.

    Attributes:
        layers: in the model's order.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        sites = find_sites(model, lambda layer: isinstance(layer, (ConvBase, nn.Linear, FactorizedModule)))
        self.layers = [LayerWork(site) for site in sites]
        self._by_id = {id(work.layer): work for work in self.layers}
        self._groups: list[list[Site]] = []  # layers that are decomposed and fitted together
        self._calibration: Calibration | None = None
        self._moments: GroupedMoments | None = None
        self._whitened_norms: list[float] = []
        self._fits: list[Fit] = []  # those that are done

    def open(self) -> list[LayerWork]:
        """The layers that may be replaced, as far as is known."""
        return [work for work in self.layers if work.left is None]

    def replaced(self) -> list[LayerWork]:
        """The layers that have a module to replace them."""
        return [work for work in self.layers if work.module is not None]

    def select(self, include: Selectors, exclude: Selectors) -> None:
        """Reads the user's selectors. Raises ValueError for one that matches nothing."""
        sites = [work.site for work in self.layers]
        selected = select(self.model, sites, include, exclude)
        for work, reason, by_name in zip(self.layers, selected, named(sites, include), strict=True):
            work.selected, work.by_name = reason, by_name

    def refuse(self) -> None:
        """Leaves layers for reasons that have nothing to do with their rank. Raises ValueError for weights that are not
        finite, of the others."""
        owners = Owners(self.model)
        for work in self.layers:
            work.left = work.selected or self._refusal(work, owners)
            if work.left is None:
                ranks.require_finite(weight_of(work.layer), work.name)

    def _refusal(self, work: LayerWork, owners: Owners) -> Reason | None:
        layer = work.layer
        obstacle = _unsafe(work.site, owners) or refusal(layer) or not_kept(layer) or self._clash(layer)
        if obstacle is not None:
            return Left.NOT_REPLACEABLE.because(obstacle=obstacle)
        if not work.by_name and self.settings.budget is None:  # a budget weighs the error of narrow layers, too
            narrow = too_narrow(work.site)
            if narrow is not None:
                return narrow
        if self.settings.linear is False and isinstance(layer, nn.Linear):
            return Left.LINEAR_IS_FALSE.because()
        return None

    def _clash(self, layer: Any) -> str | None:
        """Why no block can have the layer's attributes: known here, before a budget counts on replacing the layer."""
        matrix, method = is_matrix(layer), self.settings.method
        blocks = [Block("tucker", (1, 1))] if method != "cp" and not matrix else []
        if method != "tucker" or matrix:
            blocks.append(Block("svd" if matrix else "cp", 1))
        return next(filter(None, (clash(layer, empty_module(layer, block)) for block in blocks)), None)

    def note_reads(self, reads: WeightReads, data: str) -> None:
        """Leaves layers whose weights a run of the model on `data` read instead of calling them; notes it of those that
        it also called."""
        for work in self.open():
            key = id(work.layer)
            if key in reads.read and key in reads.called:
                work.note(Note.ALSO_READ_BY_MODEL)
            elif key in reads.read:
                work.left = Left.READ_BY_MODEL.because(data=data)

    def note_uncounted(self, calls: Calls) -> None:
        """Says for which layers the model's multiplications are not known; a budget of multiplications warns."""
        uncounted = [work for work in self.layers if calls.of(work.layer).unknown_reads]
        for work in uncounted:
            assert work.left is not None  # the model reads its weight and does not call it
            work.left = work.left.add("its MACs are not known: torch counts no operation with it")
        budget = self.settings.budget
        if uncounted and budget is not None and budget.kind == "macs":
            warn(
                "factorize_: the budget of macs leaves out those with the weights of "
                f"{listed([work.name for work in uncounted])}, which the model computes with in a way that "
                "torch.utils.flop_counter does not count"
            )

    def note_still_called(self, called: Collection[int]) -> None:
        """Notes which layers the model calls although they were replaced (`called`: their ids), and warns."""
        found = [work for work in self.layers if id(work.layer) in called]
        for work in found:
            work.note(Note.STILL_CALLED)
        if found:
            warn(
                f"factorize_: the model goes on calling the dense layers {listed([work.name for work in found])}, "
                "which it holds elsewhere than in its modules; nothing is gained there: have it call its modules"
            )

    def leave_all(self, case: Left) -> None:
        """Leaves all layers that may still be replaced."""
        for work in self.open():
            work.left = case.because()

    def calibrate(self, batches: Batches | None) -> None:
        """Groups the layers, and gathers the moments of the first group; without data there is one group."""
        sites = [work.site for work in self.open()]
        self._groups = [sites]
        if batches is None or not sites:
            return
        self._calibration = Calibration(self.model, batches, self.settings.progress)
        self._moments = GroupedMoments(self._calibration, sites)
        self.note_reads(self._moments.reads, "the calibration data")
        self._moments.keep(lambda site: self._of(site).left is None)
        self._groups = self._moments.groups
        if self.open() and not self._moments.reached:
            raise ValueError(
                f"factorize_: the calibration data reach none of the {len(self.open())} layers to replace: the "
                "model does not call them on these inputs; give other data"
            )

    def spend(self, spending: Spending) -> None:
        """Chooses a block for each layer within a budget, or to leave it."""
        if not self.open():
            return
        settings = self.settings
        sites = [site for group in self._groups for site in group]
        offer = Offer(settings.method, settings.multiple, settings.seed)
        choices = spending.choose(sites, self._weighed, offer)
        for site, choice in zip(sites, choices, strict=True):
            work = self._of(site)
            work.block = choice.block
            if choice.offered == 1:
                work.left = Left.NO_CHEAPER_BLOCK.because(noun=NOUNS[spending.budget.kind])
            elif choice.block is None:
                work.left = Left.DENSE_IS_BETTER.because()

    def _weighed(self, site: Site) -> torch.Tensor:
        """The weight that a budget weighs: whitened, or without calibration divided by its norm. A layer that the
        calibration data do not reach counts like the median of those that they reach, all of which come before it."""
        whitening, weight = self._whitening(site), weight_of(site.layer)
        if whitening is not None:
            weight = whitening.apply(weight)
            self._whitened_norms.append(float(weight.norm()))
            return weight
        norm = statistics.median(self._whitened_norms) if self._whitened_norms else 1.0
        weight = weight.double()
        return weight * (norm / (float(weight.norm()) or 1.0))

    def decompose_and_fit(self) -> None:
        """Makes the modules, group by group, so that only one group's moments are held. Raises ValueError if the rank
        is above the limit of every layer."""
        for group in self._groups:
            self._decompose(group)
            if self._calibration is not None and self._moments is not None:
                self._fit(group, self._calibration, self._moments)
        self._check_ranks()

    def _decompose(self, group: Sequence[Site]) -> None:
        """Makes the modules of a group, or notes why a layer is left."""
        tasks: list[tuple[LayerWork, Task]] = []
        for work in map(self._of, list(group)):  # a copy: gathering its moments sorts the group
            if work.left is None:
                task = self._task(work)
                if isinstance(task, Reason):
                    work.left = task
                else:
                    tasks.append((work, task))
        modules = run_tasks([task for _, task in tasks], self.settings.n_jobs)
        with progress_bar("decompose", self.settings.progress, [work for work, _ in tasks], "layer") as bar:
            for work, module in zip(bar, modules, strict=True):
                bar.set_postfix_str(work.name)
                work.left = _too_large(work.layer, module)
                if work.left is None:
                    keep_attributes(work.layer, module)
                    module._read_is_known = True  # until it is in its layer's place
                    work.module = module
                trim(weight_of(work.layer))

    def _task(self, work: LayerWork) -> Task | Reason:
        """How to decompose a layer, or why it is left."""
        settings, layer, block = self.settings, work.layer, work.block
        tucker = (settings.method if block is None else block.kind) == "tucker" and not is_matrix(layer)
        options: dict[str, Any] = {"multiple": settings.multiple, "name": work.name}
        if block is not None:
            rank = block.rank
        else:
            asked = settings.linear if isinstance(layer, nn.Linear) and settings.linear is not None else settings.rank
            try:
                rank = layer_rank(layer, asked, tucker, options)  # type: ignore[arg-type]
            except ValueError as error:  # arguments and values were checked: the rank is above this layer's limit
                return Left.RANK_ABOVE_LIMIT.because(error=error)
        return Task(layer, rank, tucker, self._whitening(work.site), {**options, "seed": settings.seed}, settings.exact)

    def _fit(self, group: Sequence[Site], calibration: Calibration, moments: GroupedMoments) -> None:
        """Fits a group's modules to the dense layers' outputs, in the order in which the model calls them."""
        layers = [
            work for work in map(self._of, group) if work.module is not None and id(work.layer) in moments.reached
        ]
        relu = rectified(self.model, [work.layer for work in layers])
        limit = room(self.model)
        stage = max(1, -(-sum(map(len, self._groups)) // STAGES))
        fits = []
        for work in layers:
            key, whitening = id(work.layer), moments.whitening(work.site)
            assert work.module is not None and whitening is not None
            reached = moments.reached[key]
            fits.append(Fit(work.site, work.module, whitening.gradient, reached.calls, reached.rows, key in relu))
        moments.drop()  # the fits hold the roots of the gradients, the only ones that are needed from here on
        with exactly(self.settings.exact):
            errors = fit_in_order_(calibration, fits, self._fits, stage, limit)
        for work in layers:
            assert work.module is not None
            work.output_error = errors[id(work.layer)]
            work.module.relative_error = weight_error(work.layer, work.module)
        self._fits += [replace(fit, gradient=None) for fit in fits]

    def _check_ranks(self) -> None:
        tried = sum(map(len, self._groups))
        above = [work.left for work in self.layers if work.left is not None and work.left.case is Left.RANK_ABOVE_LIMIT]
        if above and len(above) == tried:
            rank, linear = self.settings.rank, self.settings.linear
            shown = rank if linear in (None, False) else (rank, linear)
            raise ValueError(
                f"factorize_: rank {shown} is above the limit of every layer that could be replaced "
                f"({above[0].text}{'; ...' if tried > 1 else ''}); give a lower rank or a fraction"
            )

    def note_data(self) -> None:
        """Notes which layers the calibration data reach not at all or too seldom; warns of the latter."""
        if self._calibration is None:
            return
        few = []
        layers = [work for group in self._groups for work in map(self._of, group) if work.module is not None]
        for work in layers:
            reached = self._reached(work)
            if not reached.rows:
                work.note(Note.NO_DATA)
            elif reached.rows < reached.inputs:
                work.note(Note.FEW_DATA, rows=reached.rows, inputs=reached.inputs)
                few.append(f"{work.name} ({reached.rows} calibration rows for {reached.inputs} inputs)")
        if few:
            shown = ", ".join(few[:3]) + (f" and {len(few) - 3} more" if len(few) > 3 else "")
            warn(
                f"factorize_: few calibration data for {len(few)} of {len(layers)} layers: {shown}. Their factors lean "
                "on their weights; give more data, at least a few rows for each input of a layer",
            )

    def time_layers(self, calls: Calls) -> None:
        """Times the layers that are replaced, and their modules, on the recorded calls."""
        with progress_bar("measure", self.settings.progress, self.replaced(), "layer") as bar:
            for work in bar:
                bar.set_postfix_str(work.name)
                work.milliseconds = compare_layers(work.layer, work.module, calls.of(work.layer))

    def rows_of(self, work: LayerWork) -> int | None:
        """Calibration rows of a layer that is replaced; None without calibration."""
        if self._calibration is None or work.module is None:
            return None
        return self._reached(work).rows

    def _reached(self, work: LayerWork) -> Reached:
        assert self._moments is not None
        return self._moments.reached.get(id(work.layer), Reached(0, 0, 0))

    def _whitening(self, site: Site) -> Whitening | None:
        return None if self._moments is None else self._moments.whitening(site)

    def _of(self, site: Site) -> LayerWork:
        return self._by_id[id(site.layer)]


def _unsafe(site: Site, owners: Owners) -> str | None:
    """Why this layer cannot be taken out of this model, whatever kind of layer it is."""
    for parent, key in site.places:
        for kind, keys in _READ_BY_PARENT:
            if isinstance(parent, kind) and key in keys:
                return f"nn.{kind.__name__} reads {key}.weight itself instead of calling {key}"
    shared = owners.sharing(site.layer)
    held = owners.held(site.layer)
    return held if shared is None else f"it shares a parameter with {shared}; untie them first"


def _too_large(layer: Any, module: FactorizedModule) -> Reason | None:
    """Why a module is no gain over its layer; None if it is one."""
    for noun, count in (("parameters", count_parameters), ("multiplications per output pixel", count_macs)):
        dense, factorized = count(layer), count(module)
        assert dense is not None and factorized is not None
        if factorized >= dense:
            return Left.NOT_SMALLER.because(rank=module.rank, factorized=factorized, noun=noun, dense=dense)
    return None
