"""Weights to factors: Tucker-2 (HOSVD start, HOOI) and SVD, on TensorLy; CP lies in `lowrank_ops.cp`.

Arithmetic runs on the CPU in fp32 (Tucker and SVD of weights below fp64) or fp64 (Gram matrices, which square the
condition; errors), outside of autocast and autograd. It depends on the seed only.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import tensorly as tl
import torch
from tensorly.decomposition import partial_tucker
from tensorly.tenalg.svd import truncated_svd
from torch import Tensor

from lowrank_ops.arithmetic import arithmetic, leading_vectors, prepare, relative_error, store
from lowrank_ops.cp import CPFactors, cp_decompose
from lowrank_ops.ranks import Rank, linear_rank, tucker_ranks

__all__ = [
    "CPFactors",
    "LinearFactors",
    "TuckerFactors",
    "cp_decompose",
    "svd_decompose",
    "tucker_decompose",
]


@dataclass(frozen=True, eq=False)
class TuckerFactors:
    """Factors of a Tucker-2 convolution: ``W[t,s,i,j] = sum_{b,a} out[t,b] core[b,a,i,j] in[a,s]``.

    Attributes:
        in_factor: ``[R1, S]``, orthonormal rows (up to the rounding of its dtype).
        core: ``[R2, R1, KH, KW]``, in the channels_last memory format.
        out_factor: ``[T, R2]``, orthonormal columns.
        relative_error: ``|W - W'|_F / |W|_F`` of these factors as they are stored; 0 for a zero weight.
    """

    in_factor: Tensor
    core: Tensor
    out_factor: Tensor
    relative_error: float


@dataclass(frozen=True, eq=False)
class LinearFactors:
    """Factors of a linear layer: ``W = out_factor @ in_factor``.

    Attributes:
        in_factor: ``[R, S]``.
        out_factor: ``[T, R]``. Each singular value is split evenly (as its square root) over both.
        relative_error: ``|W - W'|_F / |W|_F`` of these factors as they are stored; 0 for a zero weight.
    """

    in_factor: Tensor
    out_factor: Tensor
    relative_error: float


def tucker_decompose(
    weight: Tensor,
    rank: Rank,
    *,
    multiple: int = 8,
    iterations: int = 10,
    tolerance: float = 1e-3,
    seed: int = 0,
    name: str = "weight",
) -> TuckerFactors:
    """Tucker-2 decomposition of a convolution weight along its two channel modes.

    Start: truncated HOSVD (De Lathauwer et al., SIAM J. Matrix Anal. Appl. 21 (2000) 1253, section 4), then
    higher-order orthogonal iteration (same authors, same volume, 1324, algorithm 4.2; Kim et al.,
    arXiv:1511.06530, section 3) by `tensorly.decomposition.partial_tucker`.

    Args:
        weight: ``[T, S, KH, KW]``, any floating dtype and device; a 1-D convolution's as ``[T, S, 1, K]``.
        rank: int, pair ``(R1, R2)``, fraction, `Energy` or `VBMF`: see `lowrank_ops.ranks`.
        multiple: what ranks that are no ints are rounded up to.
        iterations: sweeps of HOOI at most; 0 gives the HOSVD.
        tolerance: HOOI stops once a sweep improves the relative error by less.
        seed: of the columns that fill a basis up where a rank exceeds what the other mode's rank supports.
        name: the layer, for error messages.

    Returns:
        `TuckerFactors` in the weight's dtype and device, denormals flushed to zero.

    Raises:
        ValueError: another number of dimensions, an empty or non-finite weight, a rank that the weight does
            not allow.
        TypeError: a weight that is not floating point, a rank of an unknown type.
    """
    with arithmetic():
        tensor, scale = prepare(weight, 4, name)
        in_rank, out_rank = tucker_ranks(rank, weight, multiple=multiple, name=name)
        bases = [leading_vectors(tensor, 0, out_rank), leading_vectors(tensor, 1, in_rank)]
        core = tl.tenalg.multi_mode_dot(tensor, bases, modes=[0, 1], transpose=True)
        if iterations and scale:
            with warnings.catch_warnings():
                # R1 > R2 KH KW or the reverse, by explicit ranks: TensorLy fills the basis up, as it should.
                warnings.filterwarnings("ignore", message="Trying to compute SVD with n_eigenvecs")
                (core, bases), _ = partial_tucker(
                    tensor,
                    rank=[out_rank, in_rank],
                    modes=[0, 1],
                    init=(core, bases),
                    n_iter_max=iterations,
                    tol=tolerance,
                    random_state=seed,
                )
        out_basis, in_basis = bases
        in_factor, out_factor = (store(factor, weight) for factor in (in_basis.T, out_basis))
        core = store(core * scale, weight).contiguous(memory_format=torch.channels_last)
        core64 = core.double().cpu()
        error = relative_error(
            weight, out_factor, lambda columns: torch.einsum("baij,as->bsij", core64, columns), in_factor
        )
    return TuckerFactors(in_factor, core, out_factor, error)


def svd_decompose(
    weight: Tensor, rank: Rank, *, multiple: int = 8, seed: int = 0, name: str = "weight"
) -> LinearFactors:
    """Truncated SVD of a linear layer's weight or a 1x1 convolution's: the best matrix of its rank.

    Args:
        weight: ``[T, S]``, any floating dtype and device.
        rank: int, fraction, `Energy` or `VBMF`: see `lowrank_ops.ranks`.
        multiple: what ranks that are no ints are rounded up to.
        seed: for the same signature as the others; the SVD draws nothing.
        name: the layer, for error messages.

    Returns:
        `LinearFactors` in the weight's dtype and device, denormals flushed to zero.

    Raises:
        ValueError: another number of dimensions, an empty or non-finite weight, a rank that the weight does
            not allow.
        TypeError: a weight that is not floating point, a rank of an unknown type.
    """
    with arithmetic():
        matrix, scale = prepare(weight, 2, name)
        count = linear_rank(rank, weight, multiple=multiple, name=name)
        left, values, right = truncated_svd(matrix, n_eigenvecs=count)
        roots = (values * scale).sqrt()
        out_factor = store(left * roots, weight)
        in_factor = store(right * roots[:, None], weight)
        error = relative_error(weight, out_factor, lambda columns: columns, in_factor)
    return LinearFactors(in_factor, out_factor, error)
