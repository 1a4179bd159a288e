"""The normal equations of least squares with a ridge, solved for a map of any rank or of a limited one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_ops.linalg.roots import Root, cholesky_
from lowrank_ops.linalg.singular import gram, leading_eigenvectors_, leading_svd, orthonormal_, worth_randomizing
from lowrank_ops.ops.memory import trim

# Limits of what is computed with at a time: rows, and entries of these rows' features and targets.
CHUNK, CHUNK_ENTRIES = 1024, 2**20

# The result of `Factored.solve`: two matrices in the features' dtype, and a bias in fp64.
Solution = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LinearProblem:
    """Rows for which a linear map from features to targets is wanted.

    Attributes:
        features: `[N, F]`, the rows that the last factors are multiplied with.
        targets: `[N, T]`, the dense layer's outputs.
        prior: `[T, R]` and `[R, F]`, the factors of the map that the ridge pulls to.
        gradient: the root of the output's metric, or None for the plain one; it matters where the rank is limited.
    """

    features: Tensor
    targets: Tensor
    prior: tuple[Tensor, Tensor]
    gradient: Root | None = None

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and targets of some rows at a time, so that what is computed from them takes little memory."""
        rows = chunk_rows(self.features.shape[1] + self.targets.shape[1])
        return zip(self.features.split(rows), self.targets.split(rows), strict=True)


def chunk_rows(width: int) -> int:
    """How many rows of `width` entries are computed with at a time."""
    return max(min(CHUNK, CHUNK_ENTRIES // width), 64)


class NormalEquations:
    """The normal equations of the centred features of some rows, for any ridge.

    If there are fewer rows than features, the equations are those of the rows, which are fewer: with the residual E of
    the prior P, the map `(Y^T X / n + ridge P) (X^T X / n + ridge)^-1` is `P + E^T (X X^T + n ridge)^-1 X`.

    Attributes:
        square: `[F, F]`, X^T X, or `[N, N]`, X X^T.
    """

    def __init__(self, parts: Sequence[LinearProblem]) -> None:
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
        """Whether the equations are those of the rows."""
        return self.count < len(self.mean)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Centred features and targets of some rows at a time, so that there is no centred copy of all."""
        for part in self.parts:
            for features, targets in part.chunks():
                yield features - self.mean, targets

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Centred features of some rows at a time, each with its place among all rows."""
        start = 0
        for features, _ in self.chunks():
            yield slice(start, start + len(features)), features
            start += len(features)

    def factored(self, ridge: float, gradient: Root | None) -> Factored:
        """The equations with a ridge, relative to the mean square of a feature, ready to be solved."""
        ridge = ridge * float(self.square.diagonal().sum(dtype=torch.float64)) / (self.count * len(self.mean)) or 1.0
        square = self.square.to(torch.float64, copy=True)
        if self.by_rows:
            square.diagonal().add_(ridge * self.count)
        else:
            square.div_(self.count).diagonal().add_(ridge)
        return Factored(self, _factor_(square), ridge, gradient)


def _factor_(square: Tensor) -> Tensor:
    """The lower Cholesky factor of a matrix to which a ridge was added, in its memory."""
    factor = cholesky_(square)
    assert factor is not None  # the ridge is far above rounding
    return factor


@dataclass(frozen=True)
class Factored:
    """Normal equations with a ridge.

    Attributes:
        factor: the lower Cholesky factor of the features' covariance plus the ridge, `[F, F]`, or of the system of the
            rows, `[N, N]`.
        ridge: absolute.
        gradient: see `LinearProblem`.
    """

    normal: NormalEquations
    factor: Tensor
    ridge: float
    gradient: Root | None

    def solve(
        self, change: Callable[[Tensor, Tensor], Tensor], rank: int | None, near: Solution | None = None
    ) -> Solution:
        """The solution for the targets `change(features, targets)` of each chunk. `near` is a solution for similar
        targets: from it, a limited rank takes one step of orthogonal iteration instead of a decomposition."""
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
        """The mean of the targets, fp64, and the best map `[T, F]` of any rank, in the features' dtype."""
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
        """The mean of the residual of the prior, `[T]`, fp64, and the weight of each row in the map, `[N, T]`, in the
        features' dtype."""
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
        """The map of this rank that is closest to the best one, in the metric of the features and the gradient:
        `[T, R]`, with orthonormal columns, and `[R, F]`. Without `near`, the best map is overwritten."""
        if near is None:
            measured = self._measured_(best)
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
        """`[T, R]`: the leading left singular vectors of a map `[T, F]` in the metric of the features, in its dtype."""
        normal, (outputs, width) = self.normal, measured.shape
        columns = width + normal.count if normal.by_rows else width
        if measured.dtype == torch.float64 or worth_randomizing(min(outputs, columns), rank):
            return leading_svd(torch.cat(list(self._images(measured)), dim=1), rank, seed=0)[0]
        if outputs > width:
            values, vectors = leading_eigenvectors_(self._feature_gram(measured), rank)
            trim(measured)
            vectors = self._feature_root() @ vectors  # computed again: kept, it would lie beside LAPACK's workspace
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
        """`B^T B`, `[F, F]`, fp64, where B is the map `[T, F]` times the root of the features' covariance."""
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
        return _factor_(square)

    def _iterated(self, best: Tensor, inner: Tensor) -> Tensor:
        """`[T, R]` near these vectors, from the map `[R, F]` of a similar solution: the outputs of the best map for the
        directions of features that this map reads."""
        normal = self.normal
        read = self.ridge * inner
        if normal.by_rows:
            for centred, _ in normal.chunks():
                read.addmm_(inner @ centred.T, centred, alpha=1 / normal.count)
        else:
            read.addmm_(inner, normal.square, alpha=1 / normal.count)
        return self._measured_(best @ read.T)

    def _measured_(self, outputs: Tensor) -> Tensor:
        """`[T, ...]` in the metric of the gradient, in its memory; as it is without one."""
        return outputs if self.gradient is None else self.gradient.apply_(outputs)
