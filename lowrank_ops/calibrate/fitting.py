"""Factors that keep a layer's output rather than its weight: least squares on calibration rows.

The weight is first decomposed in the metric of the layer's moments (`calibrate.whitening`). Then the last factors and
the bias get the values that bring the block's output closest to the dense layer's, for the inputs that come from the
factorized layers before it. This is least squares (Zhang et al., arXiv:1505.06798, section 3.3, "asymmetric
reconstruction"); for Tucker, of a given rank (reduced-rank regression, section 3.1); where a ReLU follows, through it
(section 3.2). Held-out rows, which the fit does not see, decide how strongly it is pulled to the decomposition, or
whether the decomposition stays as it is (`refit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ops.calibrate.normal_equations import LinearProblem, NormalEquations, Solution
from lowrank_ops.linalg.singular import energy
from lowrank_ops.runtime.autocast import no_autocast

# The ridge of the least squares, relative to the mean square of a feature. It pulls the fit towards the factors of the
# decomposition, which stay as they are in directions that the calibration data do not reach. Fewer rows need a stronger
# ridge: held-out rows decide between these multiples of it.
RIDGE = 1e-3
STRENGTHS = (1.0, 1e2, 1e4)

# The error of a mean over held-out rows is estimated from the means of this many blocks of rows, since neighbours
# (pixels of an image) may depend on each other.
BLOCKS = 8

# Weights of the constraint in the alternation through a ReLU, one per round: Zhang et al. raise it step by step.
RELU_ROUNDS = (0.01, 0.01, 0.1, 0.1, 1.0, 1.0)

# A strength (None: no fit), and the losses and the error of its fit on the held-out rows.
_Tried = tuple[float | None, Tensor, float]


@dataclass(frozen=True)
class Regression(LinearProblem):
    """The search for the best linear map from features to targets."""

    @no_autocast()
    def solve(self, rank: int | None = None, relu: bool = False, strength: float = 1.0) -> Solution:
        """`out [T, R]`, `map [R, F]` and `bias [T]`, so that `features map^T out^T + bias` is near the targets.

        Args:
            rank: of the map; None: not limited, `map` is the identity, `[F, F]`.
            relu: whether errors are measured behind a ReLU. Then there are several rounds of least squares; between
                them, each target is replaced by the best compromise between the original target, behind the ReLU, and
                the present output (Zhang et al., section 3.2).
            strength: of the ridge, in units of `RIDGE`.
        """
        return _solve([self], NormalEquations([self]), rank, relu, strength)

    @no_autocast()
    def error(self, solution: Solution) -> float:
        """Relative error of the output on these rows."""
        lost = float(self.losses(solution).sum())
        total = energy(self.targets)
        return (lost / total) ** 0.5 if total else 0.0

    @no_autocast()
    def losses(self, solution: Solution, relu: bool = False) -> Tensor:
        """`[N]`, fp64: each row's squared error, behind a ReLU with `relu`."""
        found = [torch.empty(0, dtype=torch.float64)]
        for features, targets in self.chunks():
            present = _predict(solution, features)
            if relu:
                targets, present = targets.clamp(min=0), present.clamp(min=0)
            found.append((targets - present).double().square().sum(1))
        return torch.cat(found)


def _predict(solution: Solution, features: Tensor) -> Tensor:
    out, inner, bias = (part.to(features.dtype) for part in solution)
    return features @ inner.T @ out.T + bias


def _solve(
    parts: Sequence[Regression], normal: NormalEquations, rank: int | None, relu: bool, strength: float
) -> Solution:
    """`Regression.solve` for the rows of all parts, whose normal equations are given."""
    factored = normal.factored(RIDGE * strength, parts[0].gradient)
    solution = factored.solve(lambda _, targets: targets, rank)
    if not relu:
        return solution
    best, least = solution, _rectified_error(parts, solution)
    for weight in RELU_ROUNDS:

        def compromise(
            features: Tensor, targets: Tensor, present: Solution = solution, weight: float = weight
        ) -> Tensor:
            return _through_relu(targets, _predict(present, features), weight)

        solution = factored.solve(compromise, rank, solution)
        error = _rectified_error(parts, solution)
        if error < least:
            best, least = solution, error
    return best


def _rectified_error(parts: Sequence[Regression], solution: Solution) -> float:
    return sum(float(part.losses(solution, relu=True).sum()) for part in parts)


@no_autocast()
def refit(
    fitted: Regression, held: Regression, present: Solution, rank: int | None, relu: bool
) -> tuple[Solution, float | None]:
    """Chooses the strength of the ridge on held-out rows, and fits all rows with it.

    There is a fit per strength; `present` counts as the strongest one. The strongest whose held-out loss is within one
    standard error of the least is chosen (Breiman, Friedman, Olshen & Stone, Classification and Regression Trees, 1984,
    section 3.4.3): the fewer rows are held out, the more a weak ridge has to gain. If there are no rows to fit, or no
    held-out ones, `present` stays.

    Args:
        fitted: the rows to fit.
        held: the held-out ones.
        present: the map and bias of the decomposition, in the form that `Regression.solve` gives them.
        rank, relu: as in `Regression.solve`.

    Returns:
        The solution, fitted to all rows; and the relative error on the held-out rows of the fit of the same strength to
        the other rows, None without held-out rows.
    """
    if not len(held.features):
        return present, None
    if not len(fitted.features):
        return present, held.error(present)
    tried: list[_Tried] = [(None, held.losses(present, relu), held.error(present))]
    tried += _tried(fitted, held, rank, relu)
    best = min((losses for _, losses, _ in tried), key=lambda losses: float(losses.mean()))
    chosen, error = next(
        (strength, error)
        for strength, losses, error in tried
        if losses is best or float((losses - best).mean()) <= _standard_error(losses - best)
    )
    if chosen is None:
        return present, error
    both = [fitted, held]
    return _solve(both, NormalEquations(both), rank, relu, chosen), error


def _tried(fitted: Regression, held: Regression, rank: int | None, relu: bool) -> list[_Tried]:
    """The fits of all strengths, the strongest first, judged on the held-out rows."""
    tried: list[_Tried] = []
    normal, least = NormalEquations([fitted]), float("inf")
    for strength in STRENGTHS:
        solution = _solve([fitted], normal, rank, relu, strength)
        losses = held.losses(solution, relu)
        tried.insert(0, (strength, losses, held.error(solution)))
        del solution
        if not float(losses.mean()) < least:
            break  # it only rises from here on
        least = float(losses.mean())
    return tried


def _standard_error(values: Tensor) -> float:
    """The standard error of the mean of values whose neighbours may depend on each other, from the means of blocks;
    infinite for a single value."""
    means = torch.stack([block.mean() for block in values.chunk(min(BLOCKS, len(values)))])
    return float(means.std()) / len(means) ** 0.5 if len(means) > 1 else float("inf")


def _through_relu(targets: Tensor, present: Tensor, weight: float) -> Tensor:
    """For each value the `u` that minimizes `(relu(target) - relu(u))^2 + weight (u - present)^2`."""
    wanted = targets.clamp(min=0)
    positive = ((weight * present + wanted) / (weight + 1)).clamp(min=0)
    negative = present.clamp(max=0)
    cost_positive = (wanted - positive).square() + weight * (positive - present).square()
    cost_negative = wanted.square() + weight * (negative - present).square()
    return torch.where(cost_positive <= cost_negative, positive, negative)
