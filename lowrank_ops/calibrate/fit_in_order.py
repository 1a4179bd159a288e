"""Calibrated factorization: modules that are fitted, one after the other, to what the dense layers compute.

No copy of the model is made: its dense layers are put in for a run of the dense network, and the modules for a run of
the factorized one. Layers are fitted in the order in which the model calls them. For each layer and batch, both
networks run up to that layer. If there are more than `STAGES` layers, several layers (a stage) take their rows from the
same runs, so that the time grows with the depth and not with its square; the layers of the same stage before a layer
are then factorized but not fitted yet. Rows of input and output are copied at random positions
(`lowrank_ops.calibrate.moments`), never whole activations.

A quarter of the rows is held out. The held-out rows decide how strongly a layer is fitted, and give the reported error;
then the layer is fitted once more, to all rows. The rows of the layers of a stage take a limited part of memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ops.calibrate.calibration import Calibration
from lowrank_ops.calibrate.fitting import Regression, refit
from lowrank_ops.calibrate.moment_groups import moment_bytes
from lowrank_ops.calibrate.moments import (
    HeldOut,
    Watched,
    count_positions,
    draw_positions,
    input_rows,
    output_rows,
    watch,
)
from lowrank_ops.calibrate.normal_equations import chunk_rows
from lowrank_ops.linalg.roots import Root
from lowrank_ops.model.batches import Batch
from lowrank_ops.model.sites import Site
from lowrank_ops.model.state import ModelState
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.ops.memory import trim

# Normal equations are solved for at most this many features: [8192, 8192] in fp64 is half a gigabyte.
WIDEST = 8192

# The layers of a model are fitted in about this many stages.
STAGES = 16


def positions_for(width: int) -> int:
    """How many rows to fit a map of `width` features to: so many that the noise of the fit adds about an eighth to the
    error."""
    return min(8 * width + 2048, 32768)


@dataclass
class Fit:
    """One layer to fit.

    Attributes:
        site: the layer, and where it stands in the model.
        module: the factorized module for it.
        gradient: the root of the moment of its output's gradient; None once it is fitted.
        calls: how often one run of the model calls it.
        positions: how many output positions it computes on all batches.
        relu: whether a ReLU follows it.
    """

    site: Site
    module: FactorizedModule
    gradient: Root | None
    calls: int
    positions: int
    relu: bool = False


def fit_in_order_(
    calibration: Calibration,
    fits: Sequence[Fit],
    fitted: Sequence[Fit] = (),
    stage: int = 1,
    room: float = math.inf,
) -> dict[int, float | None]:
    """Fits the last factors and the bias of modules, in place; the model itself is as before afterwards.

    Args:
        calibration: the model, with the dense layers in place, and the data.
        fits: in the order in which the model calls them.
        fitted: earlier ones, whose modules stand for their layers in the factorized model.
        stage: how many layers may take their rows from the same runs of the model.
        room: bytes that the rows of these layers may take. The rows of a single layer may take as much as its moments.

    Returns:
        Relative errors of the outputs on the held-out rows, by id of the dense layer; None where there are none.

    Raises:
        ValueError: a layer or module gives values that are not finite.
    """
    errors: dict[int, float | None] = {}
    done = list(fitted)
    state = ModelState(calibration.model)
    try:
        with calibration.runs("fit", passes=len(fits)) as bar:
            for rows in _stages(fits, calibration.count, stage, room):
                runs = _Runs(calibration.model, state, rows, done)
                with calibration.batches.same_order():
                    for index, batch in enumerate(calibration.batches):
                        for of_layer in rows:
                            bar.set_postfix_str(of_layer.fit.site.names[0], refresh=False)
                            bar.update()
                        runs.add(batch, index)
                while rows:
                    of_layer = rows.pop(0)
                    errors[id(of_layer.fit.site.layer)] = _fit(of_layer)
                    done.append(of_layer.fit)
    finally:
        _put_dense([*fitted, *fits])
        state.restore()
    return errors


def _stages(fits: Sequence[Fit], count: int, stage: int, room: float) -> Iterator[list[_Rows]]:
    """The layers of each stage: at most `stage` of them, whose rows fit into the room; or a single layer."""
    rows: list[_Rows] = []
    for fit in fits:
        of_layer = _Rows(fit, count, room)
        if len(rows) == stage or (rows and sum(each.bytes for each in rows) + of_layer.bytes > room):
            yield rows
            rows = []
        rows.append(of_layer)
    if rows:
        yield rows


def _fit(rows: _Rows) -> float | None:
    fit = rows.fit
    factors = _LastFactors(fit.module)
    parts = rows.parts()
    trim(parts[0][1])
    out, inner = (factor.to(parts[0][0].dtype) for factor in factors.present())
    fitted, judged = (Regression(features, targets, (out, inner), fit.gradient) for features, targets in parts)
    for regression in (fitted, judged):
        if not all(map(_finite, (regression.features, regression.targets))):
            raise ValueError(
                f"factorize_: {fit.site.names[0]} sees or gives values that are not finite on the calibration data; "
                "exclude it, or leave out the samples that cause them"
            )
    bias = fit.module.bias
    offset = torch.zeros(len(out)) if bias is None else bias.detach()
    present = out, inner, offset.double().cpu()
    solution, error = refit(fitted, judged, present, factors.rank, fit.relu)
    if solution is not present:
        _write(fit.module, *solution, whole=factors.rank is not None)
    return error


def _finite(rows: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in rows.split(chunk_rows(rows.shape[1])))


class _Rows:
    """Rows of a layer: features that its module sees, and targets that the dense layer gives.

    The rows to fit fill a piece of memory from its start, the held-out ones fill it from its end: together they can be
    used without a copy.

    Attributes:
        bytes: the most that all rows take. Their limit is the room, or the bytes of the layer's moments if these are
            more.
    """

    def __init__(self, fit: Fit, count: int, room: float) -> None:
        self.fit = fit
        factors = _LastFactors(fit.module)
        self._features_of = factors.features
        weight: Any = fit.site.layer.weight
        self._widths = factors.width, weight.shape[0]
        entry = sum(self._widths) * max(weight.element_size(), 4)
        drawn = int(min(positions_for(factors.width) * 4 // 3, max(room, moment_bytes(fit.site.layer)) / entry))  # type: ignore[arg-type]
        self._positions = max(drawn // (count * fit.calls), 1)  # drawn per call, held-out ones included
        self._limit = min(self._positions * count * fit.calls, fit.positions)
        self.bytes = self._limit * entry
        self._held_out = HeldOut()
        self._memory: tuple[Tensor, Tensor] | None = None  # features and targets
        self._filled = [0, 0]  # rows to fit, and held-out ones
        self.begin(0)

    def begin(self, index: int) -> None:
        """Begins the batch number `index`."""
        self._index = index
        # For each call: how many positions it has, which were drawn, and which of these are held out.
        self._drawn: list[tuple[int, Tensor, Tensor]] = []
        self._targets: list[Tensor] = []
        self._features: dict[int, Tensor] = {}

    def see_dense(self, call: int, input: Tensor, output: Tensor) -> None:
        """Records a call in a run of the dense model."""
        layer: Any = self.fit.site.layer
        total = count_positions(layer, output)
        held = self._held_out.next_call(total)
        positions = draw_positions(layer, output, self._positions, f"{self._index} {call}")
        self._drawn.append((total, positions, held(positions)))
        self._targets.append(output_rows(layer, output, positions))

    def see(self, call: int, input: Tensor, output: Tensor) -> None:
        """Records a call in a run of the factorized model."""
        layer: Any = self.fit.site.layer
        known = call < len(self._drawn) and call not in self._features
        if known and self._drawn[call][0] == count_positions(layer, output):
            parts = self._drawn[call][1].split(chunk_rows(layer.weight[0].numel()))
            self._features[call] = torch.cat([self._features_of(input_rows(layer, input, part)) for part in parts])

    def see_both(self, call: int, input: Tensor, output: Tensor) -> None:
        """Records a call in a run that is one of either model, as no layer before this one is factorized."""
        self.see_dense(call, input, output)
        self.see(call, input, output)

    def missing(self) -> bool:
        """Whether some calls of the dense model have no features yet: the factorized model made fewer calls, or calls
        with other numbers of positions."""
        return len(self._features) < len(self._drawn)

    def end(self) -> None:
        """Keeps the rows of the batch."""
        for call, (_, _, held) in enumerate(self._drawn):
            pair = self._features.pop(call), self._targets[call]
            for part in (0, 1):
                self._keep([rows[held == bool(part)] for rows in pair], part)
        self.begin(self._index)

    def _keep(self, pair: Sequence[Tensor], part: int) -> None:
        if self._memory is None:
            dtype = torch.promote_types(torch.promote_types(pair[0].dtype, pair[1].dtype), torch.float32)
            features, targets = (torch.empty(self._limit, width, dtype=dtype) for width in self._widths)
            self._memory = features, targets
        number = min(len(pair[0]), self._limit - sum(self._filled))
        start = self._limit - self._filled[1] - number if part else self._filled[0]
        for memory, rows in zip(self._memory, pair, strict=True):
            memory[start : start + number] = rows[:number]
        self._filled[part] += number

    def parts(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Features and targets of the rows to fit, and of the held-out ones in the order in which they came."""
        features, targets = self._memory or (torch.empty(0, self._widths[0]), torch.empty(0, self._widths[1]))
        end, start = self._filled[0], len(features) - self._filled[1]
        return (features[:end], targets[:end]), (features[start:], targets[start:])


class _Runs:
    """Runs of the dense and of the factorized model for the rows of the layers of a stage. The factorized model holds
    the modules that are fitted, and those of the stage's layers as they were decomposed."""

    def __init__(self, model: nn.Module, state: ModelState, rows: Sequence[_Rows], done: Sequence[Fit]) -> None:
        self._model, self._state, self._rows = model, state, rows
        self._before = [*done, *(of_layer.fit for of_layer in rows[:-1])]

    def add(self, batch: Batch, index: int) -> None:
        """Collects the rows of the batch number `index`."""
        for of_layer in self._rows:
            of_layer.begin(index)
        if not self._before:
            self._watch(batch, index, (), [(rows, rows.see_both) for rows in self._rows])
        else:
            self._watch(batch, index, (), [(rows, rows.see_dense) for rows in self._rows])
            self._watch(batch, index, self._before, [(rows, rows.see) for rows in self._rows if rows.missing()])
            # Factorized layers may send other rows to the layers after them (experts, data-dependent loops). Calls that
            # the factorized model did not make are fitted to the inputs that the dense layers give.
            self._watch(batch, index, (), [(rows, rows.see) for rows in self._rows if rows.missing()])
        for of_layer in self._rows:
            of_layer.end()

    def _watch(
        self, batch: Batch, index: int, modules: Collection[Fit], seen: Sequence[tuple[_Rows, Callable[..., None]]]
    ) -> None:
        """Runs the model, with the modules of these fits in place of their layers, if there is anything to see."""
        if not seen:
            return
        _put_dense(self._before)
        for earlier in modules:
            earlier.site.put(earlier.module)
        inside = {id(earlier) for earlier in modules}
        watched = [
            Watched(rows.fit.module if id(rows.fit) in inside else rows.fit.site.layer, rows.fit.calls, record)
            for rows, record in seen
        ]
        try:
            watch(self._model, watched, batch, seed=index)
        finally:
            self._state.restore()


def _put_dense(fits: Collection[Fit]) -> None:
    for fit in fits:
        fit.site.put(fit.site.layer)


class _LastFactors:
    """The last factors of a module. They are a linear map of features of its input rows, and this map is fitted.

    Tucker: the features are windows of hidden pixels (after in_factor), the map is core and out_factor. A matrix: the
    features are the input, the map is both factors. CP, and whatever has more than `WIDEST` features: the features are
    those that out_factor is multiplied with, and out_factor alone is the map.

    Attributes:
        width: number of features.
        rank: of the map; None: the map is out_factor alone.
    """

    def __init__(self, module: FactorizedModule) -> None:
        factors = {name: factor.detach().cpu() for name, factor in module.factors().items()}
        self._first, self._last = factors["in_factor"], factors["out_factor"]
        core = factors.get("core")
        self._core = None if core is None else core.flatten(1)  # [R2, R1 K]
        self._taps = _taps(factors)
        if self._core is not None:
            whole, self._is_matrix = self._core.shape[1], False
        else:
            whole, self._is_matrix = self._first.shape[1], self._taps.shape[1] == 1
        fits = whole <= WIDEST and (self._is_matrix or self._core is not None)
        self.rank = (len(self._first) if self._core is None else len(self._core)) if fits else None
        self.width = whole if fits else self._last.shape[1]

    def features(self, rows: Tensor) -> Tensor:
        """The features `[N, width]` of input rows `[N, S, K]`: in the rows' dtype for a matrix, otherwise in fp32 at
        least."""
        if self._is_matrix and self.rank is not None:
            return rows.flatten(1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        hidden = torch.einsum("psk,rs->prk", rows, self._first.to(rows))
        if self._core is None:
            return torch.einsum("prk,rk->pr", hidden, self._taps.to(hidden))
        windows = hidden.flatten(1)
        return windows if self.rank is not None else windows @ self._core.T.to(windows)

    def present(self) -> tuple[Tensor, Tensor]:
        """The factors `[T, R]` and `[R, width]` of the present map; out_factor and the identity where `rank` is None.
        They may share memory with the module."""
        if self.rank is None:
            return self._last, torch.eye(self.width)
        if self._core is not None:
            return self._last, self._core
        return self._last if bool((self._taps == 1).all()) else self._last * self._taps.T, self._first


def _taps(factors: dict[str, Tensor]) -> Tensor:
    """`[R, K]`, fp64: the product of CP's spatial factors; ones for a linear layer."""
    taps = torch.ones(len(factors["in_factor"]), 1, dtype=torch.float64)
    for name in ("height_factor", "width_factor"):
        if name in factors:
            taps = (taps.unsqueeze(2) * factors[name].double().unsqueeze(1)).flatten(1)
    return taps


@torch.no_grad()
def _write(module: FactorizedModule, out: Tensor, inner: Tensor, bias: Tensor, whole: bool) -> None:
    """Writes a solution into the module's last factors: out_factor and the bias, and if `whole` the inner ones too."""
    factors = module.factors()
    factors["out_factor"].copy_(out)
    if whole:
        if "core" in factors:
            factors["core"].copy_(inner.reshape(factors["core"].shape))
        else:
            factors["in_factor"].copy_(inner)
            for name in ("height_factor", "width_factor"):
                if name in factors:
                    factors[name].fill_(1)
    if module.bias is None:
        module.bias = nn.Parameter(torch.empty_like(module.out_factor[:, 0]), module.out_factor.requires_grad)
    module.bias.copy_(bias)
