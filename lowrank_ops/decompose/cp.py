"""CP decomposition: alternating least squares on TensorLy, corrected until its terms no longer cancel.

Arithmetic runs on the weight's device (CPU or CUDA; otherwise on the CPU), in fp64, because the normal equations square
the condition number, and outside of autocast and autograd. Random numbers depend on the seed only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor
from tqdm import tqdm

from lowrank_ops.decompose.arithmetic import arithmetic, prepare, store
from lowrank_ops.decompose.cp_correction import approximation_error, balanced, correct, expected_change, strengths
from lowrank_ops.decompose.ranks import Rank, cp_rank, unfolding
from lowrank_ops.linalg.singular import leading_vectors
from lowrank_ops.text.warn import warn

# Largest accepted sqrt(sum |term|^2) / |W|. Orthogonal terms have a ratio of 1; terms that cancel each other have a
# larger one. Above 10 the cancellation loses a digit, and rounding the factors to bf16 (2^-9) alone would change the
# weight by 2 %.
MAX_TERM_RATIO = 10.0

# Tikhonov weights of the runs, on the squared norms of the factors of a tensor of norm 1. The first (eps of fp64) only
# keeps the normal equations solvable; the last bounds the terms even where no best approximation exists (de Silva &
# Lim, SIAM J. Matrix Anal. Appl. 30 (2008)).
RIDGES = (2.0**-52, 1e-5, 1e-4, 1e-3)


@dataclass(frozen=True, eq=False)
class CPFactors:
    """Factors of a CP convolution: `W[t,s,i,j] = sum_r out[t,r] in[r,s] height[r,i] width[r,j]`.

    Attributes:
        in_factor: `[R, S]`.
        height_factor: `[R, KH]`.
        width_factor: `[R, KW]`.
        out_factor: `[T, R]`. Within a term the columns of all four factors have the same root mean square: the scaling
            of least sensitivity.
        relative_error: `|W - W'|_F / |W|_F` of these factors as they are stored; 0 for a zero weight.
        sensitivity: the result of the function `sensitivity` for these factors as they are stored.
        restarts: number of runs of ALS that were discarded (not finite, diverging, or with cancelling terms).
    """

    in_factor: Tensor
    height_factor: Tensor
    width_factor: Tensor
    out_factor: Tensor
    relative_error: float
    sensitivity: float
    restarts: int


def cp_decompose(
    weight: Tensor,
    rank: Rank,
    *,
    multiple: int = 8,
    iterations: int = 100,
    tolerance: float = 1e-5,
    corrections: int = 50,
    seed: int = 0,
    name: str = "weight",
    progress: bool = True,
) -> CPFactors:
    """CP decomposition of a convolution weight by alternating least squares, then corrected.

    `tensorly.decomposition.parafac` on the four-way weight (Kolda & Bader, SIAM Review 51 (2009), section
    3.4; Lebedev et al., arXiv:1412.6553, section 3), started from the HOSVD with random extra columns. ALS may end
    with terms that grow and cancel each other ("degeneracy": Krijnen et al., Psychometrika 73 (2008)). Therefore the
    factors are then replaced by the least sensitive ones of no larger error (`decompose.cp_correction`: the
    error-preserving correction of Phan et al., arXiv:2008.05441).

    A run is discarded if its factors are not finite, if its error exceeds that of a zero weight, or if the corrected
    terms still cancel (`MAX_TERM_RATIO`). ALS is then started again, from random factors and with a stronger
    regularization (`RIDGES`). If the last run is discarded too, the best one is returned with a warning.

    Args:
        weight: `[T, S, KH, KW]`, any floating dtype and device; a 1-D convolution's as `[T, S, 1, K]`.
        rank: int, fraction, `Energy` or `VBMF`: see `lowrank_ops.decompose.ranks`. May exceed S and T.
        multiple: ranks that are not ints are rounded up to a multiple of it.
        iterations: largest number of ALS sweeps per run.
        tolerance: a run stops once a sweep changes the relative error by less.
        corrections: largest number of sweeps of the correction after a run; 0 skips the correction.
        seed: of the random starts.
        name: the layer, for messages.
        progress: shows a bar of the sweeps on stderr once they take more than two seconds.

    Returns:
        `CPFactors` in the weight's dtype and device, denormals flushed to zero.

    Raises:
        ValueError: another number of dimensions, an empty or non-finite weight, a rank that the weight does
            not allow.
        TypeError: a weight that is not floating point, a rank of an unknown type.
        RuntimeError: no run gave finite factors.
    """
    with arithmetic():
        tensor, scale = prepare(weight, 4, name, torch.float64)
        count = cp_rank(rank, weight, multiple=multiple, name=name)
        norm = float(tensor.norm())
        if norm:
            tensor /= norm
        factors, restarts = _alternate(tensor, count, iterations, tolerance, corrections, seed, name, progress)
        out, *others = (factor * (scale * norm) ** (1 / 4) for factor in factors)
        out_factor = store(out, weight)
        in_factor, height_factor, width_factor = (store(factor.T, weight) for factor in others)
        stored = [out_factor, *(factor.T for factor in (in_factor, height_factor, width_factor))]
        error = approximation_error(weight, [factor.to(tensor.device).double() for factor in stored])
    ours = (in_factor, height_factor, width_factor, out_factor)
    return CPFactors(*ours, error, sensitivity(ours), restarts)


def sensitivity(factors: Sequence[Tensor]) -> float:
    """How much noise in CP factors changes their product: `E |W' - W|_F^2 / sigma^2`.

    The noise is independent, with mean 0 and a small variance sigma^2, in every element of every factor (Phan et al.,
    arXiv:2008.05441, section 3). Terms that cancel each other have large norms and a high sensitivity: steps of
    training and rounding then do more damage. The sensitivity scales as `|W|^1.5`, so only decompositions of one weight
    can be compared.

    Args:
        factors: in the order of `cp_conv2d`: `[R, S]`, `[R, KH]`, `[R, KW]`, `[T, R]`; in one dimension without
            `[R, KH]`.
    """
    *inner, out_factor = (factor.detach().double().cpu() for factor in factors)
    return expected_change([out_factor, *(factor.T for factor in inner)])


def _alternate(
    tensor: Tensor,
    count: int,
    iterations: int,
    tolerance: float,
    corrections: int,
    seed: int,
    name: str,
    progress: bool,
) -> tuple[list[Tensor], int]:
    """Factors of a tensor of norm 1 or 0, and the number of discarded runs."""
    if not tensor.any():
        return [tensor.new_zeros(length, count) for length in tensor.shape], 0
    generator = torch.Generator().manual_seed(seed)
    best: list[Tensor] | None = None
    best_ratio, best_error = float("inf"), float("inf")
    for attempt, ridge in enumerate(RIDGES):
        start = _start(tensor, count, generator, from_hosvd=attempt == 0)
        try:
            with _bar(f"{name}: CP, run {attempt + 1}", iterations + corrections, progress) as count_sweep:
                terms, errors = parafac(
                    tensor,
                    count,
                    init=start,
                    n_iter_max=iterations,
                    tol=tolerance,
                    l2_reg=ridge,
                    return_errors=True,
                    callback=count_sweep,
                )
                if not all(bool(torch.isfinite(part).all()) for part in (terms.weights, *terms.factors)):
                    continue
                error = float(errors[-1])
                factors = balanced([terms.factors[0] * terms.weights, *terms.factors[1:]])
                if error < 1:
                    factors = correct(tensor, factors, corrections, count_sweep)
        except torch.linalg.LinAlgError:  # singular normal equations: no better than factors that are not finite
            continue
        ratio = float(strengths(factors).norm())
        if ratio <= MAX_TERM_RATIO and error <= 1:
            return factors, attempt
        if ratio < best_ratio:
            best, best_ratio, best_error = factors, ratio, error
    if best is None:
        raise RuntimeError(
            f"{name}: none of {len(RIDGES)} runs of CP-ALS at rank {count} gave finite factors; "
            "use a lower rank or Tucker"
        )
    warn(
        f"{name}: after {len(RIDGES)} runs of CP-ALS at rank {count} the terms still cancel (norms "
        f"{best_ratio:.3g} times the weight's, relative error {best_error:.3g}): rounding will be amplified; "
        "use another rank or Tucker",
        RuntimeWarning,
    )
    return best, len(RIDGES) - 1


@contextmanager
def _bar(description: str, sweeps: int, shown: bool) -> Iterator[Callable[..., None]]:
    """A progress bar; gives a function that counts a sweep and takes the arguments of parafac's callback."""
    total = sweeps + 1  # parafac calls back before its first sweep too
    with tqdm(
        desc=description, total=total, unit="sweep", file=sys.stderr, disable=not shown, leave=False, delay=2
    ) as bar:

        def count_sweep(*_: object) -> None:  # returns None: parafac stops if its callback returns True
            bar.update()

        yield count_sweep


def _start(tensor: Tensor, count: int, generator: torch.Generator, from_hosvd: bool) -> CPTensor:
    """Starting factors for ALS, columns of norm 1: the HOSVD's as far as it has columns, the others random."""
    factors = []
    for mode, length in enumerate(tensor.shape):
        factor = torch.randn(length, count, generator=generator, dtype=torch.float64, device="cpu").to(tensor)
        factor /= factor.norm(dim=0)
        if from_hosvd:
            vectors = leading_vectors(unfolding(tensor, mode), min(length, count, tensor.numel() // length))
            factor[:, : vectors.shape[1]] = vectors
        factors.append(factor)
    return CPTensor((torch.ones(count, dtype=tensor.dtype), factors))
