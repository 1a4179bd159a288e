"""`tucker_decompose`: the Tucker-2 factors of a convolution's weight, by HOSVD and HOOI.

Arithmetic runs on the weight's device (CPU or CUDA; otherwise on the CPU), outside of autocast and autograd: in fp32,
or fp64 for fp64 weights; Gram matrices, which square the condition number, and errors always in fp64. Random numbers
depend on the seed only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ops.decompose.arithmetic import arithmetic, prepare, relative_error, store
from lowrank_ops.decompose.ranks import Rank, tucker_ranks, unfolding
from lowrank_ops.linalg.singular import leading_vectors


@dataclass(frozen=True, eq=False)
class TuckerFactors:
    """Factors of a Tucker-2 convolution: `W[t,s,i,j] = sum_{b,a} out[t,b] core[b,a,i,j] in[a,s]`.

    Attributes:
        in_factor: `[R1, S]`, orthonormal rows (up to the rounding of its dtype).
        core: `[R2, R1, KH, KW]`, in the channels_last memory format.
        out_factor: `[T, R2]`, orthonormal columns.
        relative_error: `|W - W'|_F / |W|_F` of these factors as they are stored; 0 for a zero weight.
    """

    in_factor: Tensor
    core: Tensor
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

    It starts from the truncated HOSVD (De Lathauwer et al., SIAM J. Matrix Anal. Appl. 21 (2000) 1253, section 4), and
    improves it by higher-order orthogonal iteration, HOOI (same authors, same volume, 1324, algorithm 4.2; Kim et al.,
    arXiv:1511.06530, section 3).

    Args:
        weight: `[T, S, KH, KW]`, any floating dtype and device; a 1-D convolution's as `[T, S, 1, K]`.
        rank: int, pair `(R1, R2)`, fraction, `Energy` or `VBMF`: see `lowrank_ops.decompose.ranks`.
        multiple: ranks that are not ints are rounded up to a multiple of it.
        iterations: largest number of HOOI sweeps; 0 gives the HOSVD.
        tolerance: HOOI stops once a sweep lowers the relative error by less.
        seed: of the random columns that complete a basis where a rank exceeds what the other mode's rank supports.
        name: the layer, for error messages.

    Returns:
        `TuckerFactors` in the weight's dtype and on its device, denormals flushed to zero.

    Raises:
        ValueError: another number of dimensions, an empty or non-finite weight, a rank that the weight does
            not allow.
        TypeError: a weight that is not floating point, a rank of an unknown type.
    """
    with arithmetic():
        tensor, scale = prepare(weight, 4, name)
        in_rank, out_rank = tucker_ranks(rank, weight, multiple=multiple, name=name)
        out_basis = leading_vectors(unfolding(tensor, 0), out_rank)
        in_basis = leading_vectors(unfolding(tensor, 1), in_rank)
        if scale:
            out_basis, in_basis = _iterate(tensor, out_basis, in_basis, iterations, tolerance, seed)
        core = _project(_project(tensor, out_basis, 0), in_basis, 1)
        in_factor, out_factor = (store(factor, weight) for factor in (in_basis.T, out_basis))
        core = store(core * scale, weight).contiguous(memory_format=torch.channels_last)
        core64 = core.to(tensor.device).double()
        error = relative_error(
            weight, out_factor, lambda columns: torch.einsum("baij,as->bsij", core64, columns), in_factor
        )
    return TuckerFactors(in_factor, core, out_factor, error)


def _iterate(
    tensor: Tensor, out_basis: Tensor, in_basis: Tensor, iterations: int, tolerance: float, seed: int
) -> tuple[Tensor, Tensor]:
    """HOOI: each basis in turn becomes the best one for the other, until a sweep lowers the error by less than
    `tolerance`.

    Explicit ranks may have R1 > R2 KH KW, or R2 > R1 KH KW: `leading_vectors` then completes the basis.
    """
    norm = float(tensor.norm())
    last = None
    for _ in range(iterations):
        out_basis = leading_vectors(unfolding(_project(tensor, in_basis, 1), 0), out_basis.shape[1], seed)
        projected = _project(tensor, out_basis, 0)
        in_basis = leading_vectors(unfolding(projected, 1), in_basis.shape[1], seed)
        kept = float(_project(projected, in_basis, 1).norm())
        error = (max(norm**2 - kept**2, 0.0)) ** 0.5 / norm
        if last is not None and last - error < tolerance:
            break
        last = error
    return out_basis, in_basis


def _project(tensor: Tensor, basis: Tensor, mode: int) -> Tensor:
    """The tensor with axis `mode` in the coordinates of an orthonormal basis, `[dim(mode), R]`."""
    return (basis.T @ unfolding(tensor, mode)).unflatten(1, tensor.transpose(0, mode).shape[1:]).transpose(0, mode)
