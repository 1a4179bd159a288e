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
from lowrank_ops.singular import energy

# Of more features only the squares are summed: [8192, 8192] in fp32 is a quarter of a gigabyte, and a root takes a
# second. A layer's weight is then scaled by its inputs' root mean squares, as in ASVD (Yuan et al., arXiv:2312.05821).
WIDEST = 8192
BLOCK = 1024  # columns of the moment whose new part is held


class SecondMoment:
    """Sums over rows `[n, p]`, added in groups that may depend on each other inside, less so between groups.

    Attributes:
        total: `[p, p]`, the sum of `x x^T`; its diagonal `[p]` for more than `WIDEST` features. On the CPU, in the
            rows' dtype, fp32 at least.
        rows: how many.
    """

    def __init__(self, width: int) -> None:
        with torch.inference_mode(False):
            self.total = torch.zeros(width if width > WIDEST else (width, width))
            self._sum = torch.zeros(width, dtype=torch.float64)
        self.rows = 0
        self._fourth = 0.0  # sum over rows of |x|^4
        self._groups = 0.0  # sum over groups of |sum x x^T|^2
        self._sizes = 0  # sum over groups of n^2

    @no_autocast()
    def add(self, rows: Tensor) -> None:
        """One group of rows, of any floating dtype and device."""
        if not len(rows):
            return
        with torch.inference_mode(False):
            rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
            if rows.dtype != self.total.dtype:
                self.total = self.total.to(torch.promote_types(rows.dtype, self.total.dtype))
            self._groups += self._add_products(rows)
            self._sum += rows.sum(0).double().cpu()
            squares = rows.square()
            self._fourth += energy(squares.sum(1) if self.total.dim() == 2 else squares)
            self._sizes += len(rows) ** 2
            self.rows += len(rows)

    def _add_products(self, rows: Tensor) -> float:
        """Adds to `total`, and returns the energy of what was added, from the shorter side's products."""
        if self.total.dim() == 1:
            squares = rows.square().sum(0)
            self.total += squares.to("cpu", self.total.dtype)
            return energy(squares)
        count, width = rows.shape
        if count < width and rows.device.type == "cpu":
            self.total.addmm_(rows.T.to(self.total.dtype), rows.to(self.total.dtype))
            return energy(rows @ rows.T)
        added = 0.0
        for start in range(0, width, BLOCK):
            products = rows.T @ rows[:, start : start + BLOCK]
            self.total[:, start : start + BLOCK] += products.to("cpu", self.total.dtype)
            added += energy(products)
        return added

    def independent_rows(self) -> float:
        """How many independent rows would tell as much; 1 to `rows`."""
        shares = self._sizes / self.rows**2
        if self.rows < 2 or shares >= 1:  # a single group: nothing shows how much its rows depend on each other
            return float(self.rows)
        square = energy(self.total) / self.rows**2
        variance = (self._groups / self.rows**2 - square * shares) / (1 - shares)
        independent = (self._fourth / self.rows**2 - square / self.rows) / (1 - 1 / self.rows)
        effect = variance / independent if independent > 0 else 1.0
        return self.rows / min(max(effect, 1.0), float(self.rows))

    def shrunk_(self) -> Tensor:
        """The mean of `x x^T`, in the place of `total`, its part around the mean shrunk; positive but for zero rows."""
        count = self.independent_rows() - 1  # one for the mean
        covariance = self.total.div_(self.rows)
        diagonal = covariance if covariance.dim() == 1 else covariance.diagonal()
        if count < 1:
            level = float(diagonal.mean())
            covariance.zero_()
            diagonal.fill_(level)
            return covariance
        mean = (self._sum / self.rows).to(covariance.dtype)
        _add_outer(covariance, mean, -1)
        level, part = float(diagonal.mean()), _shrinkage(covariance, count)
        covariance *= 1 - part
        diagonal += part * level
        return _add_outer(covariance, mean, 1)


def _add_outer(moment: Tensor, mean: Tensor, sign: int) -> Tensor:
    """Adds `sign mean mean^T`, or its diagonal, in place."""
    return moment.addcmul_(mean, mean, value=sign) if moment.dim() == 1 else moment.addr_(mean, mean, alpha=sign)


def _shrinkage(covariance: Tensor, count: float) -> float:
    """`a` for the covariance of so many independent rows: 0 to 1."""
    width, square = len(covariance), energy(covariance)
    if covariance.dim() == 1:  # a variance of normal numbers is known to two parts in the count of its own square
        spread = count * (square - float(covariance.sum(dtype=torch.float64)) ** 2 / width)
        return min(2 * square / spread, 1.0) if spread > 0 else 1.0
    trace = float(covariance.diagonal().sum(dtype=torch.float64))
    spread = (count + 1 - 2 / width) * (square - trace**2 / width)  # 0 for a multiple of the identity
    return min(((1 - 2 / width) * square + trace**2) / spread, 1.0) if spread > 0 else 1.0
