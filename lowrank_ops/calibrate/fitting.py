"""Factors that keep a layer's output rather than its weight: least squares on calibration rows.

The weight was decomposed in the metric of the layer's moments (`calibrate.whitening`). Then the last factors and the
bias get the values that bring the block's output closest to the dense layer's, for the inputs that the already
factorized layers before it give: least squares (Zhang et al., arXiv:1505.06798, section 3.3, "asymmetric
reconstruction"), for Tucker of a given rank (reduced-rank regression, section 3.1), also through a following ReLU
(section 3.2). How strongly the fit is pulled to the decomposition, or whether there is no fit at all, is decided on
rows that the fit does not see (`refit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_ops.linalg.roots import Root, cholesky_
from lowrank_ops.linalg.singular import (
    energy,
    gram,
    leading_eigenvectors_,
    leading_svd,
    orthonormal_,
    worth_randomizing,
)
from lowrank_ops.ops.memory import trim
from lowrank_ops.runtime.autocast import no_autocast

# The ridge of the least squares, relative to the mean square of a feature: it pulls towards the factors of the
# decomposition, which is what directions that the calibration data do not reach then keep. Where rows are few, a
# stronger one is better; held-out rows decide.
RIDGE = 1e-3
STRENGTHS = (1.0, 1e2, 1e4)

# Rows that are computed with at a time, at most; and entries of all rows' features and targets.
CHUNK, CHUNK_ENTRIES = 1024, 2**20

# Held-out rows are judged in so many blocks of neighbours, which may depend on each other (pixels of an image).
BLOCKS = 8

# The weights of the constraint in the alternation through a ReLU, one a round: Zhang et al. raise it step by step.
RELU_ROUNDS = (0.01, 0.01, 0.1, 0.1, 1.0, 1.0)

# See `Regression.solve`. Matrices have the features' dtype, the bias fp64.
Solution = tuple[Tensor, Tensor, Tensor]
_Tried = tuple[float | None, Tensor, float]  # a strength, losses and error of its fit


@dataclass(frozen=True)
class Regression:
    """Sums over calibration rows for the best linear map from features to targets.

    Attributes:
        features: `[N, F]`, what the last factors are multiplied with; targets: `[N, T]`, the dense layer's outputs.
        prior: `[T, R]` and `[R, F]`, the factors of the map that the ridge pulls to.
        gradient: the root of the output's metric, or None for the plain one; it matters where the rank is limited.
    """

    features: Tensor
    targets: Tensor
    prior: tuple[Tensor, Tensor]
    gradient: Root | None = None

    @no_autocast()
    def solve(self, rank: int | None = None, relu: bool = False, strength: float = 1.0) -> Solution:
        """`out [T, R]`, `map [R, F]` and `bias [T]`: targets are about `features map^T out^T + bias`.

        Args:
            rank: of the map; None: not limited, `map` is the identity, `[F, F]`.
            relu: the error counts behind a ReLU: between rounds of least squares, each target is replaced by the best
                compromise between what the ReLU lets through and the present output (Zhang et al., section 3.2).
            strength: of the ridge, in units of `RIDGE`.
        """
        return _solve([self], _Normal([self]), rank, relu, strength)

    @no_autocast()
    def error(self, solution: Solution) -> float:
        """Relative error of the output on these rows."""
        lost = float(self.losses(solution).sum())
        total = energy(self.targets)
        return (lost / total) ** 0.5 if total else 0.0

    @no_autocast()
    def losses(self, solution: Solution, relu: bool = False) -> Tensor:
        """`[N]`, fp64: each row's squared error; with `relu` behind it."""
        found = [torch.empty(0, dtype=torch.float64)]
        for features, targets in self.chunks():
            present = _predict(solution, features)
            if relu:
                targets, present = targets.clamp(min=0), present.clamp(min=0)
            found.append((targets - present).double().square().sum(1))
        return torch.cat(found)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and targets of some rows at a time: what is computed with them takes little memory."""
        rows = chunk_rows(self.features.shape[1] + self.targets.shape[1])
        return zip(self.features.split(rows), self.targets.split(rows), strict=True)


def chunk_rows(width: int) -> int:
    """How many rows of so many entries are computed with at a time."""
    return max(min(CHUNK, CHUNK_ENTRIES // width), 64)


def _predict(solution: Solution, features: Tensor) -> Tensor:
    out, inner, bias = (part.to(features.dtype) for part in solution)
    return features @ inner.T @ out.T + bias


def _solve(parts: Sequence[Regression], normal: _Normal, rank: int | None, relu: bool, strength: float) -> Solution:
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
    """The best solution for rows that a fit does not see, fitted once more to all rows; and a relative error.

    Of the fits of all `STRENGTHS`, and `present` as the strongest, the strongest whose held-out loss is within one
    standard error of the least (Breiman, Friedman, Olshen & Stone, Classification and Regression Trees, 1984, section
    3.4.3): the fewer rows are held out, the more a fit has to gain. Without rows to fit or held-out ones it is
    `present`; without the latter no error is known. The error is the one on the held-out rows, of the fit that has not
    seen them; the fit of that strength to all rows, which is returned, has no rows left to measure it on.

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
    return _solve(both, _Normal(both), rank, relu, chosen), error


def _tried(fitted: Regression, held: Regression, rank: int | None, relu: bool) -> list[_Tried]:
    """The strengths, the strongest one first, with the losses and the error of their fits on the held-out rows."""
    tried: list[_Tried] = []
    normal, least = _Normal([fitted]), float("inf")
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
    """Of the mean of values of which neighbours may depend on each other, by the means of blocks; infinite for one."""
    means = torch.stack([block.mean() for block in values.chunk(min(BLOCKS, len(values)))])
    return float(means.std()) / len(means) ** 0.5 if len(means) > 1 else float("inf")


class _Normal:
    """The normal equations of the centred features of some rows, for any ridge.

    Of fewer rows than features it is the smaller system, of the rows: with the residual E of the prior P, the map
    `(Y^T X / n + ridge P) (X^T X / n + ridge)^-1` is `P + E^T (X X^T + n ridge)^-1 X`.

    Attributes:
        square: `[F, F]`, X^T X, or `[N, N]`, X X^T.
    """

    def __init__(self, parts: Sequence[Regression]) -> None:
        self.parts = parts
        self.prior = [factor.to(parts[0].features) for factor in parts[0].prior]
        self.count = sum(len(part.features) for part in parts)
        self.mean = torch.stack([part.features.sum(0) for part in parts]).sum(0) / self.count
        side = self.count if self.by_rows else len(self.mean)
        self.square = self.mean.new_zeros(side, side)
        if not self.by_rows:
            for features, _ in self.chunks():
                self.square.addmm_(features.T, features)
            return
        for top, rows in self.blocks():
            for left, columns in self.blocks():
                self.square[top, left] = rows @ columns.T

    @property
    def by_rows(self) -> bool:
        return self.count < len(self.mean)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Centred features and targets of some rows at a time: no centred copy of all is made."""
        for part in self.parts:
            for features, targets in part.chunks():
                yield features - self.mean, targets

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Where they are among all rows, and centred features."""
        start = 0
        for features, _ in self.chunks():
            yield slice(start, start + len(features)), features
            start += len(features)

    def factored(self, ridge: float, gradient: Root | None) -> _Factored:
        """With a ridge relative to the mean square of a feature."""
        ridge = ridge * float(self.square.diagonal().sum(dtype=torch.float64)) / (self.count * len(self.mean)) or 1.0
        square = self.square.to(torch.float64, copy=True)
        if self.by_rows:
            square.diagonal().add_(ridge * self.count)
        else:
            square.div_(self.count).diagonal().add_(ridge)
        factor = cholesky_(square)
        assert factor is not None  # the ridge is far above rounding
        return _Factored(self, factor, ridge, gradient)


@dataclass(frozen=True)
class _Factored:
    """Normal equations and their Cholesky factor, lower triangular: of the features' covariance plus the ridge,
    `[F, F]`, or of the rows, `[N, N]`. With the metric of the outputs, see `Regression`."""

    normal: _Normal
    factor: Tensor
    ridge: float
    gradient: Root | None

    def solve(
        self, change: Callable[[Tensor, Tensor], Tensor], rank: int | None, near: Solution | None = None
    ) -> Solution:
        """For the targets `change(features, targets)` of each chunk; `near`: a solution for targets like these, from
        which a limited rank is reached by one step of orthogonal iteration instead of a decomposition."""
        trim(self.normal.parts[0].targets)
        mean, best = self._best(change)
        trim(best)
        if rank is None:
            out, inner = best, torch.eye(best.shape[1]).to(best)
        elif rank >= len(best):
            out, inner = torch.eye(len(best)).to(best), best
        elif rank > best.shape[1]:
            out, inner = F.pad(best, (0, rank - best.shape[1])), torch.eye(rank, best.shape[1]).to(best)
        else:
            out, inner = self._reduce(best, rank, near)
        return out, inner, mean - out.double() @ (inner @ self.normal.mean).double()

    def _best(self, change: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The mean of the targets, fp64, and the map `[T, F]` of any rank, in the features' dtype."""
        normal, (out, inner) = self.normal, self.normal.prior
        changed = ((centred, change(centred + normal.mean, targets)) for centred, targets in normal.chunks())
        if normal.by_rows:
            mean, weights = self._weights(changed)
            trim(weights)
            best = out @ inner
            for rows, centred in normal.blocks():
                best.addmm_(weights[rows].T, centred)
            return mean, best
        products = normal.square.new_zeros(len(out), inner.shape[1])
        sums = torch.zeros(len(products), dtype=torch.float64)
        for centred, targets in changed:
            sums += targets.sum(0)
            products.addmm_(targets.T, centred)
        right = products.div_(normal.count).addmm_(out, inner, alpha=self.ridge)
        for part in right.split(chunk_rows(right.shape[1])):
            part.copy_(torch.cholesky_solve(part.double().T, self.factor).T)
        return sums / normal.count, right

    def _weights(self, changed: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The mean of the targets that the prior leaves, `[T]`, fp64, and of each row its weight in the map, `[N, T]`,
        in the features' dtype."""
        normal, (out, inner) = self.normal, self.normal.prior
        weights, start = out.new_empty(normal.count, len(out)), 0
        for centred, targets in changed:
            weights[start : start + len(targets)] = targets - centred @ inner.T @ out.T
            start += len(targets)
        means = []
        for part in weights.split(chunk_rows(normal.count), dim=1):
            left = part.double()
            means.append(left.mean(0))
            part.copy_(torch.cholesky_solve(left - means[-1], self.factor))
        return torch.cat(means), weights

    def _reduce(self, best: Tensor, rank: int, near: Solution | None) -> tuple[Tensor, Tensor]:
        """The map of a rank that is closest to the best one, in the metric of the features and the gradient: `[T, R]`,
        with orthonormal columns, and `[R, F]`. Without a near one the best map's memory is used up."""
        if near is None:
            measured = best if self.gradient is None else self.gradient.apply_(best)
            trim(measured)
            leading = self._decomposed(measured, rank)
        else:
            leading = self._iterated(best, near[1])
        trim(best)
        leading, _ = orthonormal_(leading)
        if self.gradient is None:
            return leading.to(best), leading.T.to(best) @ best
        basis, triangle = orthonormal_(self.gradient.undo_(leading.clone()))
        out = basis.to(best)
        del basis
        if near is not None:
            leading = self.gradient.times_(leading)
        inner = best.new_zeros(rank, best.shape[1])
        for part, rows in zip(leading.split(CHUNK), best.split(CHUNK), strict=True):
            inner.addmm_((triangle @ part.T).to(best), rows)
        return out, inner

    def _decomposed(self, measured: Tensor, rank: int) -> Tensor:
        """The leading left singular vectors of a map `[T, F]` in the metric of the features, `[T, R]`, in its dtype."""
        normal, (outputs, width) = self.normal, measured.shape
        columns = width + normal.count if normal.by_rows else width
        if measured.dtype == torch.float64 or worth_randomizing(min(outputs, columns), rank):
            return leading_svd(torch.cat(list(self._images(measured)), dim=1), rank, seed=0)[0]
        if outputs > width:
            values, vectors = leading_eigenvectors_(self._feature_gram(measured), rank)
            trim(measured)
            vectors = self._feature_root() @ vectors  # made again: it would lie beside LAPACK's work
            return measured @ vectors.mul_(torch.where(values > 0, values.rsqrt(), 0)).to(measured)
        square = torch.zeros(outputs, outputs, dtype=torch.float64)
        for image in map(Tensor.double, self._images(measured)):
            square.addmm_(image, image.T)
        trim(measured)
        return leading_eigenvectors_(square, rank)[1].to(measured)

    def _images(self, measured: Tensor) -> Iterator[Tensor]:
        """The map times a root of the features' covariance plus the ridge, some columns at a time."""
        normal, columns = self.normal, chunk_rows(len(measured))
        if not normal.by_rows:
            for start in range(0, len(self.factor), columns):
                yield measured[:, start:] @ self.factor[start:, start : start + columns].to(measured)
            return
        for _, centred in normal.blocks():
            yield (measured @ centred.T).div_(normal.count**0.5)
        for part in measured.split(columns, dim=1):
            yield part * self.ridge**0.5

    def _feature_gram(self, measured: Tensor) -> Tensor:
        """`B^T B` of B, the map `[T, F]` times the root of the features, `[F, F]`, fp64."""
        root = self._feature_root()
        square = root.T @ (gram(measured.T) @ root)
        trim(measured)
        return square

    def _feature_root(self) -> Tensor:
        """The Cholesky factor of the features' covariance plus the ridge, `[F, F]`, fp64."""
        normal = self.normal
        if not normal.by_rows:
            return self.factor
        square = torch.zeros(len(normal.mean), len(normal.mean), dtype=torch.float64)
        for features in (rows.double() for rows, _ in normal.chunks()):
            square.addmm_(features.T, features, alpha=1 / normal.count)
        square.diagonal().add_(self.ridge)
        factor = cholesky_(square)
        assert factor is not None  # the ridge is far above rounding
        return factor

    def _iterated(self, best: Tensor, inner: Tensor) -> Tensor:
        """Those vectors from the map `[R, F]` of a solution that is near: the span of the best map's outputs for the
        directions of features that it reads."""
        normal = self.normal
        read = self.ridge * inner
        if normal.by_rows:
            for centred, _ in normal.chunks():
                read.addmm_(inner @ centred.T, centred, alpha=1 / normal.count)
        else:
            read.addmm_(inner, normal.square, alpha=1 / normal.count)
        image = best @ read.T
        return image if self.gradient is None else self.gradient.apply_(image)


def _through_relu(targets: Tensor, present: Tensor, weight: float) -> Tensor:
    """For each value the u that minimizes `(relu(target) - relu(u))^2 + weight (u - present)^2`."""
    wanted = targets.clamp(min=0)
    positive = ((weight * present + wanted) / (weight + 1)).clamp(min=0)
    negative = present.clamp(max=0)
    cost_positive = (wanted - positive).square() + weight * (positive - present).square()
    cost_negative = wanted.square() + weight * (negative - present).square()
    return torch.where(cost_positive <= cost_negative, positive, negative)
