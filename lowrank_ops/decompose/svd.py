"""`svd_decompose`: a matrix as the product of two factors, by its truncated singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowrank_ops.decompose.arithmetic import arithmetic, prepare, relative_error, store
from lowrank_ops.decompose.ranks import Rank, linear_rank
from lowrank_ops.linalg.singular import leading_svd


@dataclass(frozen=True, eq=False)
class LinearFactors:
    """Factors of a linear layer: `W = out_factor @ in_factor`.

    Attributes:
        in_factor: `[R, S]`.
        out_factor: `[T, R]`. Each factor is multiplied by the square roots of the singular values.
        relative_error: `|W - W'|_F / |W|_F` of these factors as they are stored; 0 for a zero weight.
    """

    in_factor: Tensor
    out_factor: Tensor
    relative_error: float


def svd_decompose(
    weight: Tensor, rank: Rank, *, multiple: int = 8, seed: int = 0, name: str = "weight", exact: bool = False
) -> LinearFactors:
    """Truncated SVD of the weight of a linear layer or 1x1 convolution: the best approximation of its rank.

    If the shorter side is at least 1024 and the rank at most a sixteenth of it, a randomized SVD is tried first (Halko,
    Martinsson and Tropp, SIAM Review 53 (2011)). It is used only if a check shows that its error is at most 1 % above
    the least possible one (see `lowrank_ops.linalg.singular`).

    Args:
        weight: `[T, S]`, any floating dtype and device.
        rank: int, fraction, `Energy` or `VBMF`: see `lowrank_ops.decompose.ranks`.
        multiple: ranks that are not ints are rounded up to a multiple of it.
        seed: of the randomized SVD.
        name: the layer, for error messages.
        exact: no randomized SVD.

    Returns:
        `LinearFactors` in the weight's dtype and on its device, denormals flushed to zero.

    Raises:
        ValueError: another number of dimensions, an empty or non-finite weight, a rank that the weight does
            not allow.
        TypeError: a weight that is not floating point, a rank of an unknown type.
    """
    with arithmetic():
        matrix, scale = prepare(weight, 2, name, copied=False)
        count = linear_rank(rank, weight, multiple=multiple, name=name)
        left, values, right = leading_svd(matrix, count, seed, exact)
        roots = (values * scale).sqrt()
        out_factor = store(left * roots, weight)
        in_factor = store(right * roots[:, None], weight)
        error = relative_error(weight, out_factor, lambda columns: columns, in_factor)
    return LinearFactors(in_factor, out_factor, error)
