"""Factors that keep a layer's output rather than its weight: whitening, and least squares on calibration rows.

`whitened` decomposition. With the moments C of the input and G of the output's gradient, the error that a change D of
the weight makes in the model's output is about `tr(G D C D^T)`, the squared Frobenius norm of `G^(1/2) D C^(1/2)`
(the Kronecker-factored curvature of Martens & Grosse, arXiv:1503.05671, section 3, with the output's own metric for
the loss; taps of a window share C). So the weight is multiplied by both roots, decomposed by any method, and the roots
are divided out of the outer factors, which costs nothing.

`refit`. Then the last factors and the bias get the values that bring the block's output closest to the dense layer's,
for the inputs that the already factorized layers before it give: least squares (Zhang et al., arXiv:1505.06798, section
3.3, "asymmetric reconstruction"), for Tucker of a given rank (reduced-rank regression, section 3.1), also through a
following ReLU (section 3.2).
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
# decomposition, which is what directions that the calibration data do not reach then keep.
RIDGE = 1e-3

# The weights of the constraint in the alternation through a ReLU, one a round: Zhang et al. raise it step by step.
RELU_ROUNDS = (0.01, 0.01, 0.1, 0.1, 1.0, 1.0)


@dataclass(frozen=True)
class Whitening:
    """Roots of a layer's moments, of `[S, S]` and `[T, T]`."""

    input: Root
    gradient: Root

    @classmethod
    def of(cls, moments: Moments) -> Whitening:
        """The roots, computed once for each `Moments`."""
        return cls(moments.input_root, moments.gradient_root)

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
    def solve(self, rank: int | None = None, relu: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """`out [T, R]`, `map [R, F]` and `bias [T]`, fp64: targets are about `features map^T out^T + bias`.

        Args:
            rank: of the map; None: not limited, `out` is the identity.
            relu: the error counts behind a ReLU: between rounds of least squares, each target is replaced by the best
                compromise between what the ReLU lets through and the present output (Zhang et al., section 3.2).
        """
        normal = _Normal.of(self.features, self.prior)
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

    def _predict(self, solution: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        out, inner, bias = (part.to(self.features.dtype) for part in solution)
        return self.features @ inner.T @ out.T + bias

    def _rectified_error(self, solution: tuple[Tensor, Tensor, Tensor]) -> float:
        return float((self.targets.clamp(min=0) - self._predict(solution).clamp(min=0)).double().square().sum())


@dataclass(frozen=True)
class _Normal:
    """The normal equations of the centred features, factored once for any targets."""

    features: Tensor
    mean: Tensor
    factor: Tensor  # lower triangular, of the features' covariance plus the ridge
    pull: Tensor  # ridge times prior

    @classmethod
    def of(cls, features: Tensor, prior: Tensor) -> _Normal:
        mean = features.mean(0)
        centred = features - mean
        covariance = (centred.T @ centred).double() / len(features)
        ridge = RIDGE * float(covariance.diagonal().mean()) or 1.0
        covariance.diagonal().add_(ridge)
        return cls(centred, mean, torch.linalg.cholesky(covariance), ridge * prior.double())

    def solve(self, targets: Tensor, rank: int | None, gradient: Root | None) -> tuple[Tensor, Tensor, Tensor]:
        mean = targets.mean(0)
        products = ((targets - mean).T @ self.features).double() / len(targets)
        best = torch.cholesky_solve((products + self.pull).T, self.factor).T
        if rank is None or rank >= len(best):
            out, inner = torch.eye(len(best), dtype=torch.float64), best
        else:
            out, inner = _reduce(best, self.factor, rank, gradient, self.features.dtype)
        return out, inner, mean.double() - out @ (inner @ self.mean.double())


def _reduce(
    best: Tensor, factor: Tensor, rank: int, gradient: Root | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The map of a rank that is closest to the best one, in the metric of the features and the gradient: `[T, R]` with
    orthonormal columns, `[R, F]`. `dtype`: of the features, for the singular vectors."""
    image = best if gradient is None else gradient.apply(best)
    leading, _, _ = leading_svd((image @ factor).to(dtype), rank, seed=0)
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
