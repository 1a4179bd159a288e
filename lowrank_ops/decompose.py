"""Weights to factors: Tucker-2 (HOSVD start, HOOI), CP (alternating least squares), SVD; on TensorLy.

Nothing here forms a full set of singular vectors of an unfolding, which for ``[T, S KH KW]`` means terabytes
(tensorly/torch#32): starting bases come from the eigenvectors of the small Gram matrix, everything else from
economy-size decompositions. TensorLy's products of an unfolded tensor with a Khatri-Rao matrix are replaced,
see `_ShortProducts`. Arithmetic runs on the CPU in fp32 (Tucker and SVD of weights below fp64) or fp64 (CP,
whose normal equations square the condition; Gram matrices for the same reason; errors), outside of autocast
and autograd. It depends on the seed only; the global random state and TensorLy's backend stay as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import tensorly as tl
import torch
from tensorly.cp_tensor import CPTensor, cp_normalize
from tensorly.decomposition import parafac, partial_tucker
from tensorly.tenalg.core_tenalg import CoreTenalgBackend
from tensorly.tenalg.svd import truncated_svd
from torch import Tensor

from lowrank_ops.ranks import Rank, cp_rank, gram, linear_rank, require_finite, tucker_ranks, unfolding

# Terms of a sound CP decomposition share the tensor's energy: orthogonal terms have norms with
# sqrt(sum |term|^2) = |W|. Terms that cancel each other exceed that; above this ratio the cancellation loses
# a digit and rounding the factors to bf16 (2^-9) alone would cost 2 % of the weight.
MAX_TERM_RATIO = 10.0

# Tikhonov weights on the squared norms of the factors, for a tensor of norm 1, by run. The first only keeps
# the normal equations solvable (eps of fp64); the last bounds the terms even where no best approximation
# exists (de Silva & Lim, SIAM J. Matrix Anal. Appl. 30 (2008)).
RIDGES = (2.0**-52, 1e-5, 1e-4, 1e-3)


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
class CPFactors:
    """Factors of a CP convolution: ``W[t,s,i,j] = sum_r out[t,r] in[r,s] height[r,i] width[r,j]``.

    Attributes:
        in_factor: ``[R, S]``.
        height_factor: ``[R, KH]``.
        width_factor: ``[R, KW]``.
        out_factor: ``[T, R]``. Each term's norm is spread evenly over its four factors.
        relative_error: ``|W - W'|_F / |W|_F`` of these factors as they are stored; 0 for a zero weight.
        restarts: how many runs of ALS were thrown away (not finite, diverging, or of cancelling terms).
    """

    in_factor: Tensor
    height_factor: Tensor
    width_factor: Tensor
    out_factor: Tensor
    relative_error: float
    restarts: int


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
        rank: int, pair ``(R1, R2)``, fraction or `Energy`: see `lowrank_ops.ranks`.
        multiple: what fractions and energies are rounded up to.
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
    with _arithmetic():
        tensor, scale = _prepare(weight, 4, name)
        in_rank, out_rank = tucker_ranks(rank, weight, multiple=multiple, name=name)
        bases = [_leading_vectors(tensor, 0, out_rank), _leading_vectors(tensor, 1, in_rank)]
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
        in_factor, out_factor = (_store(factor, weight) for factor in (in_basis.T, out_basis))
        core = _store(core * scale, weight).contiguous(memory_format=torch.channels_last)
        core64 = core.double().cpu()
        error = _relative_error(
            weight, out_factor, lambda columns: torch.einsum("baij,as->bsij", core64, columns), in_factor
        )
    return TuckerFactors(in_factor, core, out_factor, error)


def cp_decompose(
    weight: Tensor,
    rank: Rank,
    *,
    multiple: int = 8,
    iterations: int = 100,
    tolerance: float = 1e-5,
    seed: int = 0,
    name: str = "weight",
) -> CPFactors:
    """CP decomposition of a convolution weight by alternating least squares.

    `tensorly.decomposition.parafac` on the four-way weight (Kolda & Bader, SIAM Review 51 (2009), section
    3.4; Lebedev et al., arXiv:1412.6553, section 3), started from the HOSVD, extra columns random. A run that
    ends with factors that are not finite, an error above that of a zero weight, or terms that cancel each
    other (`MAX_TERM_RATIO`; "degeneracy": Krijnen et al., Psychometrika 73 (2008)) is thrown away and ALS
    restarted from a random start with a stronger regularization (`RIDGES`). Where the last run is still bad,
    the best one is returned with a warning.

    Args:
        weight: ``[T, S, KH, KW]``, any floating dtype and device; a 1-D convolution's as ``[T, S, 1, K]``.
        rank: int, fraction or `Energy`: see `lowrank_ops.ranks`. May exceed S and T.
        multiple: what fractions and energies are rounded up to.
        iterations: sweeps of ALS in a run at most.
        tolerance: a run stops once a sweep changes the relative error by less.
        seed: of the random starts.
        name: the layer, for messages.

    Returns:
        `CPFactors` in the weight's dtype and device, denormals flushed to zero.

    Raises:
        ValueError: another number of dimensions, an empty or non-finite weight, a rank that the weight does
            not allow.
        TypeError: a weight that is not floating point, a rank of an unknown type.
        RuntimeError: no run gave finite factors.
    """
    with _arithmetic():
        tensor, scale = _prepare(weight, 4, name, torch.float64)
        count = cp_rank(rank, weight, multiple=multiple, name=name)
        norm = float(tensor.norm())
        if norm:
            tensor /= norm
        (strengths, directions), restarts = _alternate(tensor, count, iterations, tolerance, seed, name)
        strengths = (strengths * (scale * norm)) ** (1 / 4)
        out, *others = (unit * strengths for unit in directions)
        out_factor = _store(out, weight)
        in_factor, height_factor, width_factor = (_store(factor.T, weight) for factor in others)
        height, width = height_factor.double().cpu(), width_factor.double().cpu()
        error = _relative_error(
            weight,
            out_factor,
            lambda columns: torch.einsum("rs,ri,rj->rsij", columns, height, width),
            in_factor,
        )
    return CPFactors(in_factor, height_factor, width_factor, out_factor, error, restarts)


def svd_decompose(
    weight: Tensor, rank: Rank, *, multiple: int = 8, seed: int = 0, name: str = "weight"
) -> LinearFactors:
    """Truncated SVD of a linear layer's weight or a 1x1 convolution's: the best matrix of its rank.

    Args:
        weight: ``[T, S]``, any floating dtype and device.
        rank: int, fraction or `Energy`: see `lowrank_ops.ranks`.
        multiple: what fractions and energies are rounded up to.
        seed: for the same signature as the others; the SVD draws nothing.
        name: the layer, for error messages.

    Returns:
        `LinearFactors` in the weight's dtype and device, denormals flushed to zero.

    Raises:
        ValueError: another number of dimensions, an empty or non-finite weight, a rank that the weight does
            not allow.
        TypeError: a weight that is not floating point, a rank of an unknown type.
    """
    with _arithmetic():
        matrix, scale = _prepare(weight, 2, name)
        count = linear_rank(rank, weight, multiple=multiple, name=name)
        left, values, right = truncated_svd(matrix, n_eigenvecs=count)
        roots = (values * scale).sqrt()
        out_factor = _store(left * roots, weight)
        in_factor = _store(right * roots[:, None], weight)
        error = _relative_error(weight, out_factor, lambda columns: columns, in_factor)
    return LinearFactors(in_factor, out_factor, error)


class _ShortProducts(CoreTenalgBackend, backend_name="lowrank_ops"):  # type: ignore[misc, call-arg]
    """TensorLy's tensor algebra, with products that never form the Khatri-Rao matrix of the factors.

    That matrix has T S KW R elements in the update of the height factor: 0.8 GB and 4.5 s a sweep for
    512x512x3x3 at R 256, 51 GB for 2048x2048x3x3 at R 1024 (TensorLy 0.10, one thread). Its "einsum" algebra
    starts from the outer product of tensor and weights, [T, S, KH, KW, R], and is slower still.
    """


def _unfolding_dot_khatri_rao(tensor: Tensor, cp_tensor: CPTensor, mode: int) -> Tensor:
    """``[dim(mode), R]``: the tensor contracted with all factors but that of ``mode``, longest mode first.

    Phan et al., IEEE Trans. Signal Processing 61 (2013), section III: one GEMM that leaves little for the
    rest. Rank columns are taken in blocks, so that the intermediate is never larger than the tensor.
    """
    weights, factors = cp_tensor
    axes = "abcdefgh"[: tensor.ndim]
    longest, *others = sorted((m for m in range(tensor.ndim) if m != mode), key=lambda m: -tensor.shape[m])
    lengths = [length for m, length in enumerate(tensor.shape) if m != longest]
    matrix = tensor.movedim(longest, 0).flatten(1)
    parts = []
    for start in range(0, factors[0].shape[1], tensor.shape[longest]):
        columns = slice(start, start + tensor.shape[longest])
        block = (factors[longest][:, columns].T @ matrix).unflatten(1, lengths)
        left = axes.replace(axes[longest], "")
        for m in others:
            kept = left.replace(axes[m], "")
            block = torch.einsum(f"z{left},{axes[m]}z->z{kept}", block, factors[m][:, columns])
            left = kept
        parts.append(block.T)
    return torch.cat(parts, dim=1) * weights


_ShortProducts.register_method("unfolding_dot_khatri_rao", _unfolding_dot_khatri_rao)
tl.tenalg.available_backend_names.append("lowrank_ops")  # selectable by name: TensorLy 0.9 takes no instance


@contextmanager
def _arithmetic() -> Iterator[None]:
    """TensorLy on torch with `_ShortProducts`, here and in this thread only; no autograd, no autocast.

    Not `tensorly.backend_context`, which on leaving sets the backend for all threads.
    """
    previous = tl.get_backend(), tl.tenalg.get_backend()
    try:
        tl.set_backend("pytorch", local_threadsafe=True)
        tl.tenalg.set_backend("lowrank_ops", local_threadsafe=True)
        no_autocast = torch.autocast("cpu", enabled=False)
        with torch.inference_mode(False), torch.no_grad(), no_autocast, torch.device("cpu"):
            yield
    finally:
        tl.set_backend(previous[0], local_threadsafe=True)
        tl.tenalg.set_backend(previous[1], local_threadsafe=True)


def _prepare(weight: Tensor, dimensions: int, name: str, least: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """A copy of the weight to compute with, scaled to a largest magnitude of 1, and that scale."""
    if not weight.is_floating_point():
        raise TypeError(f"{name}: a weight to decompose must be floating point, got {weight.dtype}")
    if weight.dim() != dimensions or weight.numel() == 0:
        axes = "[T, S, KH, KW]" if dimensions == 4 else "[T, S]"
        raise ValueError(f"{name}: the weight must be {axes} and not empty, got shape {list(weight.shape)}")
    if weight.is_meta:
        raise ValueError(f"{name}: a weight on the meta device has no values to decompose; materialize it first")
    require_finite(weight, name)
    dtype = torch.promote_types(weight.dtype, least)
    tensor = weight.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    scale = float(tensor.abs().max())
    if scale:
        # A reciprocal would overflow for the smallest magnitudes.
        tensor /= scale
    return tensor, scale


def _leading_vectors(tensor: Tensor, mode: int, count: int) -> Tensor:
    """The leading left singular vectors of an unfolding, ``[dim(mode), count]``, from its shorter side."""
    matrix = unfolding(tensor, mode)
    if matrix.shape[0] > matrix.shape[1]:
        return truncated_svd(matrix, n_eigenvecs=count)[0]
    # The Gram matrix squares the condition: in fp64 an fp32 weight loses nothing by that.
    vectors = torch.linalg.eigh(gram(matrix)).eigenvectors
    return vectors.flip(1)[:, :count].to(tensor.dtype)


def _alternate(
    tensor: Tensor, count: int, iterations: int, tolerance: float, seed: int, name: str
) -> tuple[CPTensor, int]:
    """Terms (strengths, unit directions) of a tensor of norm 1 or 0, and how many runs were thrown away."""
    if not tensor.any():
        return cp_normalize(CPTensor((None, [tensor.new_zeros(length, count) for length in tensor.shape]))), 0
    generator = torch.Generator().manual_seed(seed)
    best: CPTensor | None = None
    best_ratio, best_error = float("inf"), float("inf")
    for attempt, ridge in enumerate(RIDGES):
        start = _start(tensor, count, generator, from_hosvd=attempt == 0)
        try:
            terms, errors = parafac(
                tensor,
                count,
                init=start,
                n_iter_max=iterations,
                tol=tolerance,
                l2_reg=ridge,
                return_errors=True,
            )
        except torch.linalg.LinAlgError:  # normal equations singular: as bad as factors that are not finite
            continue
        terms = cp_normalize(terms)
        ratio, error = float(terms.weights.norm()), float(errors[-1])
        if not all(bool(torch.isfinite(part).all()) for part in (terms.weights, *terms.factors)):
            continue
        if ratio <= MAX_TERM_RATIO and error <= 1:
            return terms, attempt
        if ratio < best_ratio:
            best, best_ratio, best_error = terms, ratio, error
    if best is None:
        raise RuntimeError(
            f"{name}: none of {len(RIDGES)} runs of CP-ALS at rank {count} gave finite factors; "
            "use a lower rank or Tucker"
        )
    warnings.warn(
        f"{name}: after {len(RIDGES)} runs of CP-ALS at rank {count} the terms still cancel (norms "
        f"{best_ratio:.3g} times the weight's, relative error {best_error:.3g}): rounding will be amplified; "
        "use another rank or Tucker",
        RuntimeWarning,
        stacklevel=3,
    )
    return best, len(RIDGES) - 1


def _start(tensor: Tensor, count: int, generator: torch.Generator, from_hosvd: bool) -> CPTensor:
    """Starting factors for ALS: unit vectors, those of the HOSVD as far as there are any, else random."""
    factors = []
    for mode, length in enumerate(tensor.shape):
        factor = torch.randn(length, count, generator=generator, dtype=torch.float64).to(tensor.dtype)
        factor /= factor.norm(dim=0)
        if from_hosvd:
            vectors = _leading_vectors(tensor, mode, min(length, count, tensor.numel() // length))
            factor[:, : vectors.shape[1]] = vectors
        factors.append(factor)
    return CPTensor((torch.ones(count, dtype=tensor.dtype), factors))


def _store(factor: Tensor, weight: Tensor) -> Tensor:
    """A factor in the weight's dtype and device, denormals (100 times slower, pytorch#67797) set to zero."""
    stored = factor.to(weight.dtype).contiguous()
    stored[stored.abs() < torch.finfo(weight.dtype).tiny] = 0
    return stored.to(weight.device)


def _relative_error(weight: Tensor, out_factor: Tensor, expand: Callable[[Tensor], Tensor], in_factor: Tensor) -> float:
    """``|W - W'|_F / |W|_F`` in fp64, 64 input channels at a time.

    ``expand`` maps those columns of in_factor, ``[., 64]``, to out_factor's operand ``[., 64, KH, KW]``.
    """
    left = out_factor.double().cpu()
    lost = total = 0.0
    for dense, columns in zip(weight.detach().split(64, dim=1), in_factor.split(64, dim=1), strict=True):
        dense = dense.double().cpu().flatten(1)
        total += float(dense.square().sum())
        lost += float((dense - left @ expand(columns.double().cpu()).flatten(1)).square().sum())
    return (lost / total) ** 0.5 if total else 0.0
