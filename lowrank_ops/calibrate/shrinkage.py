"""Second moments of few rows, shrunk towards a multiple of the identity.

The moments of n rows of p features have at most n directions. Factors that are fitted to them alone are useless for a
new row unless n is far above p. So the covariance S is mixed with the multiple of the identity that has the same trace,

    (1 - a) S + a (tr S / p) I.

For a = 1 the factors are those of the weight alone. `a` is the oracle approximating shrinkage of Chen, Wiesel, Eldar &
Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE Trans. Signal Processing 58 (2010), eq. 23; unlike the
shrinkage of Ledoit & Wolf (J. Multivariate Analysis 88 (2004)) it tends to 1 for very few rows, even for a single one.
The formula assumes independent rows, but pixels of an image depend on each other. So n is divided by the "design
effect" (Kish, Survey Sampling, 1965, section 5.4): the variance of the moments between groups of rows (a layer's
calls), over the variance that independent rows would give. The mean is not shrunk: it is one direction, known well from
a few rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_ops.linalg.singular import energy
from lowrank_ops.linalg.triangle import Triangle, panel_energy
from lowrank_ops.runtime.autocast import no_autocast

# For more features than this only the squares are summed: half of [8192, 8192] in fp32 is an eighth of a gigabyte, and
# a root of it takes a second. A layer's weight is then scaled by its inputs' root mean squares, as in ASVD (Yuan et
# al., arXiv:2312.05821).
WIDEST = 8192


class SecondMoment:
    """Sums over rows `[n, p]`. They are added in groups: rows of a group may depend on each other, rows of different
    groups depend less on each other.

    Attributes:
        total: the lower triangle of the sum of `x x^T`, `[p, p]`; its diagonal `[p]` for more than `WIDEST` features.
            On the CPU, in the rows' dtype, fp32 at least.
        rows: how many rows were added.
    """

    def __init__(self, width: int) -> None:
        with torch.inference_mode(False):
            self.total: Triangle | Tensor = torch.zeros(width) if width > WIDEST else Triangle(width)
            self._sum = torch.zeros(width, dtype=torch.float64)
        self.rows = 0
        self._fourth = 0.0  # sum over rows of |x|^4
        self._groups = 0.0  # sum over groups of |sum x x^T|^2
        self._sizes = 0  # sum over groups of n^2

    @no_autocast()
    def add(self, rows: Tensor) -> None:
        """Adds one group of rows, of any floating dtype and device."""
        if not len(rows):
            return
        with torch.inference_mode(False):
            rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
            self._widen(torch.promote_types(rows.dtype, self.total.dtype))
            self._groups += self._add_products(rows)
            self._sum += rows.sum(0).double().cpu()
            squares = rows.square()
            self._fourth += energy(squares if isinstance(self.total, Tensor) else squares.sum(1))
            self._sizes += len(rows) ** 2
            self.rows += len(rows)

    def _add_products(self, rows: Tensor) -> float:
        """Adds `rows^T rows` to `total`, and returns the sum of squares of that product. Where there are fewer rows
        than features, this sum comes from `rows rows^T`, which is smaller."""
        if isinstance(self.total, Tensor):
            squares = rows.square().sum(0)
            self.total += squares.to("cpu", self.total.dtype)
            return energy(squares)
        if len(rows) < len(self.total) and rows.device.type == "cpu":
            widened = rows.to(self.total.dtype)
            for start, end, panel in self.total.blocks():
                panel.addmm_(widened[:, start:].T, widened[:, start:end])
            return energy(rows @ rows.T)
        added = 0.0
        for start, end, panel in self.total.blocks():
            products = rows[:, start:].T @ rows[:, start:end]
            panel += products.to("cpu", panel.dtype)
            added += panel_energy(products)
        return added

    def _widen(self, dtype: torch.dtype) -> None:
        if isinstance(self.total, Tensor):
            self.total = self.total.to(dtype)
        else:
            self.total.widen_(dtype)

    def independent_rows(self) -> float:
        """How many independent rows would give moments of the same accuracy: 1 to `rows`."""
        shares = self._sizes / self.rows**2
        if self.rows < 2 or shares >= 1:  # a single group: nothing shows how much its rows depend on each other
            return float(self.rows)
        square = _energy(self.total) / self.rows**2
        variance = (self._groups / self.rows**2 - square * shares) / (1 - shares)
        independent = (self._fourth / self.rows**2 - square / self.rows) / (1 - 1 / self.rows)
        effect = variance / independent if independent > 0 else 1.0
        return self.rows / min(max(effect, 1.0), float(self.rows))

    def shrunk_(self) -> Triangle | Tensor:
        """The mean of `x x^T` with its covariance shrunk, in the memory of `total`: positive definite unless all rows
        are zeros."""
        count = self.independent_rows() - 1  # the mean takes one
        covariance = self.total.mul_(1 / self.rows)
        if count < 1:
            level = float(diagonal(covariance).mean())
            return _add_to_diagonal_(covariance.mul_(0), level)
        mean = (self._sum / self.rows).to(covariance.dtype)
        _add_outer_(covariance, mean, -1)
        level, part = float(diagonal(covariance).mean()), _shrinkage(covariance, count)
        _add_to_diagonal_(covariance.mul_(1 - part), part * level)
        return _add_outer_(covariance, mean, 1)


def diagonal(moment: Triangle | Tensor) -> Tensor:
    """`[n]`: the diagonal of a moment; a moment that is kept as its diagonal is that itself."""
    return moment if isinstance(moment, Tensor) else moment.diagonal()


def _energy(moment: Triangle | Tensor) -> float:
    return energy(moment) if isinstance(moment, Tensor) else moment.energy()


def _add_to_diagonal_(moment: Triangle | Tensor, value: float) -> Triangle | Tensor:
    return moment.add_(value) if isinstance(moment, Tensor) else moment.add_to_diagonal_(value)


def _add_outer_(moment: Triangle | Tensor, mean: Tensor, sign: int) -> Triangle | Tensor:
    """Adds `sign mean mean^T`, or its diagonal, in place."""
    if isinstance(moment, Tensor):
        return moment.addcmul_(mean, mean, value=sign)
    return moment.add_outer_(mean, sign)


def _shrinkage(covariance: Triangle | Tensor, count: float) -> float:
    """`a` for the covariance of `count` independent rows: 0 to 1."""
    width, square = len(covariance), _energy(covariance)
    trace = float(diagonal(covariance).sum(dtype=torch.float64))
    if isinstance(covariance, Tensor):  # the variance v of normal numbers is estimated with variance 2 v^2 / count
        spread = count * (square - trace**2 / width)
        return min(2 * square / spread, 1.0) if spread > 0 else 1.0
    spread = (count + 1 - 2 / width) * (square - trace**2 / width)  # 0 for a multiple of the identity
    return min(((1 - 2 / width) * square + trace**2) / spread, 1.0) if spread > 0 else 1.0
