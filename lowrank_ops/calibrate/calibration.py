"""One model and its calibration data: runs with a progress bar, and the roots of its layers' second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from lowrank_ops.calibrate.moment_groups import moment_groups
from lowrank_ops.calibrate.moments import finite, gather_moments
from lowrank_ops.calibrate.whitening import Whitening
from lowrank_ops.model.batches import Batches
from lowrank_ops.model.calls import model_errors
from lowrank_ops.model.sites import Site
from lowrank_ops.model.weight_reads import WeightReads
from lowrank_ops.ops.memory import trim
from lowrank_ops.text.progress import progress_bar


class Calibration:
    """A model and the data that it is calibrated with.

    Attributes:
        count: how many batches there are.

    Raises:
        ValueError: a parameter is not initialized yet; or an error in the data, see `Batches`.
    """

    def __init__(self, model: nn.Module, batches: Batches, progress: bool) -> None:
        lazy = [name for name, value in model.named_parameters() if is_lazy(value)]
        if lazy:
            raise ValueError(f"factorize_: {lazy[0]} is not initialized yet; run the model once, then calibrate it")
        self.model, self.batches = model, batches
        with batches.same_order():
            self.count = sum(1 for _ in batches)
        self._progress = progress

    @contextmanager
    def runs(self, what: str, passes: int = 1) -> Iterator[tqdm]:
        """A context for a number of passes over the data: it shows a progress bar, which the caller advances with each
        batch, and an error in a run of the model names the layer that fails."""
        bar = progress_bar(what, self._progress, total=passes * self.count)
        with bar, model_errors("factorize_: the model", self.model, "the calibration data"):
            yield bar


@dataclass(frozen=True)
class Reached:
    """How far the calibration data reach a layer.

    Attributes:
        rows: output positions that it computed on all data, held-out ones included.
        inputs: its input channels or features.
        calls: how often one run of the model calls it.
    """

    rows: int
    inputs: int
    calls: int


class GroupedMoments:
    """The roots of layers' moments, for one group of layers at a time: together they may take too much memory.

    Attributes:
        groups: the sites, in groups whose moments are gathered together. Once a group's are, it is in the order in
            which the model calls its layers.
        reads: which layers the model called, and whose weights it read itself, in all runs so far.
        reached: how far the data reach each layer, by the layer's id; only those that they reach.
    """

    def __init__(self, calibration: Calibration, sites: Sequence[Site]) -> None:
        self._calibration = calibration
        self._whitenings: dict[int, Whitening] = {}
        self._held: int | None = None  # the index of the group whose roots are in `_whitenings`
        self.reached: dict[int, Reached] = {}
        with WeightReads(calibration.model, [site.layer for site in sites]) as self.reads:
            with calibration.runs("order of the layers") as bar:
                self.groups = moment_groups(calibration.model, sites, calibration.batches, seen=bar.update)
            self._gather(0)

    def keep(self, wanted: Callable[[Site], bool]) -> None:
        """Leaves out the sites that are not wanted."""
        self.groups = [[site for site in group if wanted(site)] for group in self.groups]

    def whitening(self, site: Site) -> Whitening | None:
        """The roots of a layer's moments; None if no data reach it. Roots of another group are dropped for them."""
        index = next(index for index, group in enumerate(self.groups) if any(other is site for other in group))
        if index != self._held:
            self._gather(index)
        return self._whitenings.get(id(site.layer))

    def drop(self) -> None:
        """Drops the roots that are held; `whitening` would gather them again."""
        self._whitenings, self._held = {}, None

    def _gather(self, index: int) -> None:
        """Gathers the roots of a group, and sorts it by its calls. Layers that no data reach come last."""
        self._whitenings.clear()
        self._held = index
        group, count = self.groups[index], len(self.groups)
        what = "calibrate" if count == 1 else f"calibrate, part {index + 1} of {count}"
        with self._calibration.runs(what) as bar:
            moments, calls = gather_moments(
                self._calibration.model,
                [site.layer for site in group],  # type: ignore[misc]
                self._calibration.batches,
                seen=bar.update,
            )
        order = list(moments)
        group.sort(key=lambda site: order.index(id(site.layer)) if id(site.layer) in moments else len(order))
        for site in group[: len(order)]:
            key = id(site.layer)
            of_layer = moments.pop(key)
            if not finite(of_layer.input):
                raise ValueError(
                    f"factorize_: {site.names[0]} sees values that are not finite on the calibration data; leave out "
                    "the samples that cause them, or exclude the layer"
                )
            self.reached[key] = Reached(of_layer.rows, len(of_layer.input), calls[key])
            self._whitenings[key] = Whitening.of_(of_layer)
            trim(site.layer.weight.detach())  # type: ignore[operator, union-attr, arg-type]
