"""Second moments of few rows, shrunk towards a multiple of the identity.

The moments of n rows of p features have at most n directions: factors that are fitted to them alone are useless for the
next row while n is not far above p. So the covariance S is mixed with the multiple of the identity that has its trace,

    (1 - a) S + a (tr S / p) I,

and a multiple of the identity leads to the factors that the weight alone has. `a` is the oracle approximating shrinkage
of Chen, Wiesel, Eldar & Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE Trans. Signal Processing 58
(2010), eq. 23: unlike that of Ledoit & Wolf (J. Multivariate Analysis 88 (2004)) it tends to 1 for the fewest rows,
down to a single one. It supposes independent rows, and pixels of an image are not: n is divided by how much more the
moments of groups of rows (a layer's calls) differ than those of independent rows would ("design effect", Kish, Survey
Sampling, 1965, section 5.4). The mean is not shrunk: it is one direction, known well from a few rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_ops.autocast import no_autocast


class SecondMoment:
    """Sums over rows `[n, p]`, added in groups that may depend on each other inside, less so between groups."""

    def __init__(self, width: int) -> None:
        with torch.inference_mode(False):
            self.total = torch.zeros(width, width, dtype=torch.float64)
            self._sum = torch.zeros(width, dtype=torch.float64)
        self.rows = 0
        self._fourth = 0.0  # sum over rows of |x|^4
        self._groups = 0.0  # sum over groups of |sum x x^T|^2
        self._sizes = 0  # sum over groups of n^2

    def add(self, rows: Tensor) -> None:
        """One group of rows, of any floating dtype and device."""
        if not len(rows):
            return
        with torch.inference_mode(False):
            moment = product(rows)
            self.total += moment
            rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
            self._sum += rows.sum(0).double().cpu()
            self._fourth += float(rows.square().sum(1).double().square().sum())
            self._groups += float(moment.square().sum())
            self._sizes += len(rows) ** 2
            self.rows += len(rows)

    def independent_rows(self) -> float:
        """How many independent rows would tell as much; 1 to `rows`."""
        shares = self._sizes / self.rows**2
        if self.rows < 2 or shares >= 1:  # a single group: nothing shows how much its rows depend on each other
            return float(self.rows)
        square = float(self.total.square().sum()) / self.rows**2
        variance = (self._groups / self.rows**2 - square * shares) / (1 - shares)
        independent = (self._fourth / self.rows**2 - square / self.rows) / (1 - 1 / self.rows)
        effect = variance / independent if independent > 0 else 1.0
        return self.rows / min(max(effect, 1.0), float(self.rows))

    def shrunk(self) -> Tensor:
        """`[p, p]`, fp64: the mean of `x x^T`, its part around the mean shrunk; positive definite but for zero rows."""
        width, count = len(self.total), self.independent_rows() - 1  # one for the mean
        if count < 1:
            return torch.eye(width, dtype=torch.float64) * (float(self.total.diagonal().mean()) / self.rows)
        mean = self._sum / self.rows
        outer = torch.outer(mean, mean)
        covariance = self.total / self.rows - outer
        level, part = float(covariance.diagonal().mean()), _shrinkage(covariance, count)
        covariance *= 1 - part
        covariance.diagonal().add_(part * level)
        return covariance.add_(outer)


@no_autocast()
def product(rows: Tensor) -> Tensor:
    """`rows^T rows` in fp64 on the CPU; the products of 4096 rows at a time in fp32 at least."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.detach().split(4096):
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        total += (part.T @ part).double().cpu()
    return total


def _shrinkage(covariance: Tensor, count: float) -> float:
    """`a` for the covariance of so many independent rows: 0 to 1."""
    width = len(covariance)
    trace, square = float(covariance.diagonal().sum()), float(covariance.square().sum())
    spread = (count + 1 - 2 / width) * (square - trace**2 / width)  # 0 for a multiple of the identity
    return min(((1 - 2 / width) * square + trace**2) / spread, 1.0) if spread > 0 else 1.0
