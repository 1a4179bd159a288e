"""Factors that keep a layer's output rather than its weight: whitening, and least squares on calibration rows.

`whitened` decomposition. With the moments C of the input and G of the output's gradient, the error that a change D of
the weight makes in the model's output is about `tr(G D C D^T)`, the squared Frobenius norm of `G^(1/2) D C^(1/2)`
(the Kronecker-factored curvature of Martens & Grosse, arXiv:1503.05671, section 3, with the output's own metric for
the loss; taps of a window share C). So the weight is multiplied by both roots, decomposed by any method, and the roots
are divided out of the outer factors, which costs nothing.

`refit`. Then the last factors and the bias get the values that bring the block's output closest to the dense layer's,
for the inputs that the already factorized layers before it give: least squares (Zhang et al., arXiv:1505.06798, section
3.3, "asymmetric reconstruction"), for Tucker of a given rank (reduced-rank regression, section 3.1), also through a
following ReLU (section 3.2). How strongly the fit is pulled to the decomposition, or whether there is no fit at all,
is decided on rows that the fit does not see (`refit`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ops.autocast import no_autocast
from lowrank_ops.moments import Moments
from lowrank_ops.roots import Root
from lowrank_ops.singular import leading_svd

# The ridge of the least squares, relative to the mean square of a feature: it pulls towards the factors of the
# decomposition, which is what directions that the calibration data do not reach then keep. Where rows are few, a
# stronger one is better; held-out rows decide.
RIDGE = 1e-3
STRENGTHS = (1.0, 1e2, 1e4)

# Held-out rows are judged in so many blocks of neighbours, which may depend on each other (pixels of an image).
BLOCKS = 8

# The weights of the constraint in the alternation through a ReLU, one a round: Zhang et al. raise it step by step.
RELU_ROUNDS = (0.01, 0.01, 0.1, 0.1, 1.0, 1.0)


@dataclass(frozen=True)
class Whitening:
    """Roots of a layer's moments, of `[S, S]` and `[T, T]`."""

    input: Root
    gradient: Root

    @classmethod
    def of(cls, moments: Moments) -> Whitening:
        return cls(Root.of(moments.input), Root.of(moments.gradient))

    @no_autocast()
    def apply(self, weight: Tensor) -> Tensor:
        """`G^(1/2) W C^(1/2)` of a weight `[T, S, ...]`, in its shape, fp64."""
        columns = self.gradient.apply(weight.detach().flatten(1)).unflatten(1, weight.shape[1:])
        rows = self.input.apply(columns.transpose(0, 1).flatten(1))  # [S, T ...]
        return rows.unflatten(1, (weight.shape[0], *weight.shape[2:])).transpose(0, 1).contiguous()

    @no_autocast()
    def undo(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors of the weight from factors of the whitened weight, fp64."""
        result = {name: factor.detach().double() for name, factor in factors.items()}
        result["in_factor"] = self.input.undo(result["in_factor"].T).T
        result["out_factor"] = self.gradient.undo(result["out_factor"])
        return result


@dataclass(frozen=True)
class Regression:
    """Sums over calibration rows for the best linear map from features to targets.

    Attributes:
        features: `[N, F]`, what the last factors are multiplied with; targets: `[N, T]`, the dense layer's outputs.
        prior: `[T, F]`, the map that the ridge pulls to.
        gradient: the root of the output's metric, or None for the plain one; it matters where the rank is limited.
    """

    features: Tensor
    targets: Tensor
    prior: Tensor
    gradient: Root | None = None

    @no_autocast()
    def solve(
        self, rank: int | None = None, relu: bool = False, strength: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`out [T, R]`, `map [R, F]` and `bias [T]`, fp64: targets are about `features map^T out^T + bias`.

        Args:
            rank: of the map; None: not limited, `out` is the identity.
            relu: the error counts behind a ReLU: between rounds of least squares, each target is replaced by the best
                compromise between what the ReLU lets through and the present output (Zhang et al., section 3.2).
            strength: of the ridge, in units of `RIDGE`.
        """
        normal = _Normal.of(self.features, self.prior, RIDGE * strength)
        solution = normal.solve(self.targets, rank, self.gradient)
        if not relu:
            return solution
        best, least = solution, self._rectified_error(solution)
        for weight in RELU_ROUNDS:
            present = self._predict(solution)
            solution = normal.solve(_through_relu(self.targets, present, weight), rank, self.gradient)
            error = self._rectified_error(solution)
            if error < least:
                best, least = solution, error
        return best

    @no_autocast()
    def error(self, solution: tuple[Tensor, Tensor, Tensor]) -> float:
        """Relative error of the output on these rows."""
        lost = float((self.targets - self._predict(solution)).double().square().sum())
        total = float(self.targets.double().square().sum())
        return (lost / total) ** 0.5 if total else 0.0

    @no_autocast()
    def losses(self, solution: tuple[Tensor, Tensor, Tensor], relu: bool = False) -> Tensor:
        """`[N]`, fp64: each row's squared error; with `relu` behind it."""
        targets, present = self.targets, self._predict(solution)
        if relu:
            targets, present = targets.clamp(min=0), present.clamp(min=0)
        return (targets - present).double().square().sum(1)

    def _predict(self, solution: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        out, inner, bias = (part.to(self.features.dtype) for part in solution)
        return self.features @ inner.T @ out.T + bias

    def _rectified_error(self, solution: tuple[Tensor, Tensor, Tensor]) -> float:
        return float(self.losses(solution, relu=True).sum())


def refit(
    fitted: Regression, held: Regression, present: tuple[Tensor, Tensor, Tensor], rank: int | None, relu: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], float | None]:
    """The best solution for rows that the fit does not see, and its relative error on them.

    Of the fits of all `STRENGTHS`, and `present` as the strongest, the strongest whose held-out loss is within one
    standard error of the least (Breiman, Friedman, Olshen & Stone, Classification and Regression Trees, 1984, section
    3.4.3): the fewer rows are held out, the more a fit has to gain. Without rows to fit or held-out ones it is
    `present`; without the latter no error is known.

    Args:
        fitted: the rows to fit.
        held: the held-out ones.
        present: the map and bias that there are, as `Regression.solve` gives them.
        rank, relu: as in `Regression.solve`.
    """
    if not len(held.features):
        return present, None
    if not len(fitted.features):
        return present, held.error(present)
    tried = [(present, held.losses(present, relu))]
    least = float("inf")
    for strength in STRENGTHS:
        solution = fitted.solve(rank, relu, strength)
        losses = held.losses(solution, relu)
        tried.insert(1, (solution, losses))
        if not float(losses.mean()) < least:
            break  # it only rises from here on
        least = float(losses.mean())
    best = min((losses for _, losses in tried), key=lambda losses: float(losses.mean()))
    for solution, losses in tried:
        excess = losses - best
        if losses is best or float(excess.mean()) <= _standard_error(excess):
            return solution, held.error(solution)
    raise AssertionError("the best one is among them")


def _standard_error(values: Tensor) -> float:
    """Of the mean of values of which neighbours may depend on each other, by the means of blocks; infinite for one."""
    means = torch.stack([block.mean() for block in values.chunk(min(BLOCKS, len(values)))])
    return float(means.std()) / len(means) ** 0.5 if len(means) > 1 else float("inf")


@dataclass(frozen=True)
class _Normal:
    """The normal equations of the centred features, factored once for any targets.

    Of fewer rows than features it is the smaller system, of the rows: with the residual E of the prior P, the map
    `(Y^T X / n + ridge P) (X^T X / n + ridge)^-1` is `P + E^T (X X^T + n ridge)^-1 X`.
    """

    features: Tensor
    mean: Tensor
    factor: Tensor  # lower triangular: `[F, F]`, of the features' covariance plus the ridge, or of the rows, `[N, N]`
    prior: Tensor
    ridge: float

    @classmethod
    def of(cls, features: Tensor, prior: Tensor, ridge: float) -> _Normal:
        mean = features.mean(0)
        centred = features - mean
        count, width = centred.shape
        ridge = ridge * float(torch.linalg.vector_norm(centred, dtype=torch.float64)) ** 2 / (count * width) or 1.0
        by_rows = count < width
        square = (centred @ centred.T).double() if by_rows else (centred.T @ centred).double() / count
        square.diagonal().add_(ridge * count if by_rows else ridge)
        return cls(centred, mean, torch.linalg.cholesky(square), prior.double(), ridge)

    def solve(self, targets: Tensor, rank: int | None, gradient: Root | None) -> tuple[Tensor, Tensor, Tensor]:
        mean = targets.mean(0)
        best = self._best(targets - mean)
        if rank is None or rank >= len(best):
            out, inner = torch.eye(len(best), dtype=torch.float64), best
        else:
            out, inner = self._reduce(best, rank, gradient)
        return out, inner, mean.double() - out @ (inner @ self.mean.double())

    def _by_rows(self) -> bool:
        return self.features.shape[0] < self.features.shape[1]

    def _best(self, targets: Tensor) -> Tensor:
        """The map `[T, F]` of any rank for centred targets."""
        if self._by_rows():
            features = self.features.double()
            residual = targets.double() - features @ self.prior.T
            return self.prior + torch.cholesky_solve(residual, self.factor).T @ features
        products = (targets.T @ self.features).double() / len(targets)
        return torch.cholesky_solve((products + self.ridge * self.prior).T, self.factor).T

    def _weighed(self, map: Tensor) -> Tensor:
        """A map times a root of the features' covariance plus the ridge."""
        if not self._by_rows():
            return map @ self.factor
        outputs = map @ self.features.double().T / len(self.features) ** 0.5
        return torch.cat([outputs, self.ridge**0.5 * map], dim=1)

    def _reduce(self, best: Tensor, rank: int, gradient: Root | None) -> tuple[Tensor, Tensor]:
        """The map of a rank that is closest to the best one, in the metric of the features and the gradient: `[T, R]`
        with orthonormal columns, `[R, F]`."""
        image = best if gradient is None else gradient.apply(best)
        leading, _, _ = leading_svd(self._weighed(image).to(self.features.dtype), rank, seed=0)
        leading = torch.linalg.qr(leading.double()).Q
        if gradient is None:
            return leading, leading.T @ best
        out, triangle = torch.linalg.qr(gradient.undo(leading))
        return out, triangle @ (leading.T @ image)


def _through_relu(targets: Tensor, present: Tensor, weight: float) -> Tensor:
    """For each value the u that minimizes `(relu(target) - relu(u))^2 + weight (u - present)^2`."""
    wanted = targets.clamp(min=0)
    positive = ((weight * present + wanted) / (weight + 1)).clamp(min=0)
    negative = present.clamp(max=0)
    cost_positive = (wanted - positive).square() + weight * (positive - present).square()
    cost_negative = wanted.square() + weight * (negative - present).square()
    return torch.where(cost_positive <= cost_negative, positive, negative)
