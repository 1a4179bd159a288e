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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ops.autocast import no_autocast
from lowrank_ops.moments import Moments
from lowrank_ops.roots import Root, cholesky_
from lowrank_ops.singular import leading_svd

# The ridge of the least squares, relative to the mean square of a feature: it pulls towards the factors of the
# decomposition, which is what directions that the calibration data do not reach then keep. Where rows are few, a
# stronger one is better; held-out rows decide.
RIDGE = 1e-3
STRENGTHS = (1.0, 1e2, 1e4)

# Rows that are computed with at a time.
CHUNK = 1024

# Held-out rows are judged in so many blocks of neighbours, which may depend on each other (pixels of an image).
BLOCKS = 8

# The weights of the constraint in the alternation through a ReLU, one a round: Zhang et al. raise it step by step.
RELU_ROUNDS = (0.01, 0.01, 0.1, 0.1, 1.0, 1.0)

Solution = tuple[Tensor, Tensor, Tensor]  # see `Regression.solve`


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
    def solve(self, rank: int | None = None, relu: bool = False, strength: float = 1.0) -> Solution:
        """`out [T, R]`, `map [R, F]` and `bias [T]`, fp64: targets are about `features map^T out^T + bias`.

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
        total = float(torch.linalg.vector_norm(self.targets, dtype=torch.float64)) ** 2
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
        """Features and targets of `CHUNK` rows at a time: what is computed with them takes no memory worth a word."""
        return zip(self.features.split(CHUNK), self.targets.split(CHUNK), strict=True)


def _predict(solution: Solution, features: Tensor) -> Tensor:
    out, inner, bias = (part.to(features.dtype) for part in solution)
    return features @ inner.T @ out.T + bias


def _solve(parts: Sequence[Regression], normal: _Normal, rank: int | None, relu: bool, strength: float) -> Solution:
    """`Regression.solve` for the rows of all parts, whose normal equations are given."""
    gradient = parts[0].gradient
    factored = normal.factored(RIDGE * strength)
    solution = factored.solve(lambda _, targets: targets, rank, gradient)
    if not relu:
        return solution
    best, least = solution, _rectified_error(parts, solution)
    for weight in RELU_ROUNDS:

        def compromise(
            features: Tensor, targets: Tensor, present: Solution = solution, weight: float = weight
        ) -> Tensor:
            return _through_relu(targets, _predict(present, features), weight)

        solution = factored.solve(compromise, rank, gradient)
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
    tried: list[tuple[float | None, Tensor, float]] = [(None, held.losses(present, relu), held.error(present))]
    least = float("inf")
    normal = _Normal([fitted])
    for strength in STRENGTHS:
        solution = _solve([fitted], normal, rank, relu, strength)
        losses = held.losses(solution, relu)
        tried.insert(1, (strength, losses, held.error(solution)))
        if not float(losses.mean()) < least:
            break  # it only rises from here on
        least = float(losses.mean())
    del normal
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
        rows: X, `[N, F]`, if that is the smaller system.
    """

    def __init__(self, parts: Sequence[Regression]) -> None:
        self.parts, self.prior = parts, parts[0].prior.double()
        self.count = sum(len(part.features) for part in parts)
        self.mean = torch.stack([part.features.sum(0) for part in parts]).sum(0) / self.count
        self.rows: Tensor | None = None
        if self.by_rows():
            self.rows = torch.cat([part.features for part in parts]).sub_(self.mean)
            self.square = self.rows @ self.rows.T
        else:
            self.square = self.mean.new_zeros(len(self.mean), len(self.mean))
            for features, _ in self.chunks():
                self.square.addmm_(features.T, features)

    def by_rows(self) -> bool:
        return self.count < len(self.mean)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Centred features and targets."""
        for part in self.parts:
            for features, targets in part.chunks():
                yield features - self.mean, targets

    def factored(self, ridge: float) -> _Factored:
        """With a ridge relative to the mean square of a feature."""
        ridge = ridge * float(self.square.diagonal().sum(dtype=torch.float64)) / (self.count * len(self.mean)) or 1.0
        square = self.square.to(torch.float64, copy=True)
        if self.by_rows():
            square.diagonal().add_(ridge * self.count)
        else:
            square.div_(self.count).diagonal().add_(ridge)
        factor = cholesky_(square)
        assert factor is not None  # the ridge is far above rounding
        return _Factored(self, factor, ridge)


@dataclass(frozen=True)
class _Factored:
    """Normal equations and their Cholesky factor, lower triangular: of the features' covariance plus the ridge,
    `[F, F]`, or of the rows, `[N, N]`."""

    normal: _Normal
    factor: Tensor
    ridge: float

    def solve(self, change: Callable[[Tensor, Tensor], Tensor], rank: int | None, gradient: Root | None) -> Solution:
        """For the targets `change(features, targets)` of each chunk."""
        normal = self.normal
        mean, best = self._best(change)
        if rank is None:
            out, inner = best, torch.eye(best.shape[1], dtype=torch.float64)
        elif rank >= len(best):
            out, inner = torch.eye(len(best), dtype=torch.float64), best
        else:
            out, inner = self._reduce(best, rank, gradient)
        return out, inner, mean - out @ (inner @ normal.mean.double())

    def _best(self, change: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The mean of the targets and the map `[T, F]` of any rank."""
        normal = self.normal
        changed = ((centred, change(centred + normal.mean, targets)) for centred, targets in normal.chunks())
        if normal.rows is not None:
            targets = torch.cat([targets - centred @ normal.prior.T.to(centred) for centred, targets in changed])
            mean = targets.double().mean(0)
            weights = torch.cholesky_solve(targets.double() - mean, self.factor)
            return mean, normal.prior + _product(weights.T, normal.rows)
        products = normal.square.new_zeros(normal.prior.shape)
        sums = torch.zeros(len(products), dtype=torch.float64)
        for centred, targets in changed:
            sums += targets.sum(0)
            products.addmm_(targets.T, centred)
        right = products.double().div_(normal.count).add_(normal.prior, alpha=self.ridge)
        return sums / normal.count, torch.cholesky_solve(right.T, self.factor).T

    def _weighed(self, map: Tensor) -> Tensor:
        """A map times a root of the features' covariance plus the ridge."""
        if self.normal.rows is None:
            return map @ self.factor
        outputs = torch.cat([map @ rows.double().T for rows in self.normal.rows.split(CHUNK)], dim=1)
        return torch.cat([outputs.div_(self.normal.count**0.5), self.ridge**0.5 * map], dim=1)

    def _reduce(self, best: Tensor, rank: int, gradient: Root | None) -> tuple[Tensor, Tensor]:
        """The map of a rank that is closest to the best one, in the metric of the features and the gradient: `[T, R]`
        with orthonormal columns, `[R, F]`."""
        image = best if gradient is None else gradient.apply(best)
        leading, _, _ = leading_svd(self._weighed(image).to(self.normal.mean.dtype), rank, seed=0)
        leading = torch.linalg.qr(leading.double()).Q
        if gradient is None:
            return leading, leading.T @ best
        out, triangle = torch.linalg.qr(gradient.undo(leading))
        return out, triangle @ (leading.T @ image)


def _product(left: Tensor, rows: Tensor) -> Tensor:
    """`left @ rows` in fp64, without an fp64 copy of all rows."""
    parts = zip(left.split(CHUNK, dim=1), rows.split(CHUNK), strict=True)
    return sum((columns @ part.double() for columns, part in parts), torch.zeros((), dtype=torch.float64))


def _through_relu(targets: Tensor, present: Tensor, weight: float) -> Tensor:
    """For each value the u that minimizes `(relu(target) - relu(u))^2 + weight (u - present)^2`."""
    wanted = targets.clamp(min=0)
    positive = ((weight * present + wanted) / (weight + 1)).clamp(min=0)
    negative = present.clamp(max=0)
    cost_positive = (wanted - positive).square() + weight * (positive - present).square()
    cost_negative = wanted.square() + weight * (negative - present).square()
    return torch.where(cost_positive <= cost_negative, positive, negative)
