"""Rank rules: what a user may give as a rank, and which ranks that means for a weight.

A rank is written as

* an int: the rank itself, never changed;
* a float in (0, 1]: that fraction of the channels (Tucker: R1 of S, R2 of T; CP: of max(S, T), as neither
  bounds a CP rank; linear: of min(S, T)), rounded to the nearest integer, halves up;
* `Energy(kept)`: the smallest rank whose singular values keep that share of the unfolding's energy;
* `VBMF()`: the number of singular values of the unfolding that rise above its noise;
* for Tucker also a pair `(R1, R2)`, input side first, of any of these.

Every rank lies between 1 and a limit beyond which more columns add nothing: Tucker R1 <= min(S, T KH KW) and
R2 <= min(T, S KH KW), linear R <= min(S, T), CP R <= T S KH KW / max(T, S, KH, KW) (each weight has a CP decomposition
of that rank, with one term per column of the longest mode's unfolding). An int outside is an error. Other ranks are
reduced to the limit; those of Tucker also to what the other rank supports, R1 <= R2 KH KW and R2 <= R1 KH KW.

Ranks that are not ints are also rounded up to a multiple (8 by default: the kernels process ranks in blocks of 8, so
the added columns cost no time and lower the error). Two kinds are not rounded: ranks below the multiple, because that
could double the layer, and ranks whose next multiple reaches the limit, where the layer would save nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from lowrank_ops.decompose.vbmf import components_above_noise
from lowrank_ops.linalg.singular import computing_device, energies


@dataclass(frozen=True)
class Energy:
    """Rank by kept energy: the smallest R for which the R largest sigma^2 sum to at least `kept` of all sigma^2.

    The sigma are singular values of the weight's unfolding along a channel mode:

    * Tucker: R1 and R2 come from the two modes separately, so that the squared relative error of the whole is at most
      `2 (1 - kept)` (De Lathauwer et al., SIAM J. Matrix Anal. Appl. 21 (2000), property 10);
    * linear: singular values of the weight itself, for a squared relative error of at most `1 - kept`;
    * CP: the larger of the two Tucker ranks. A CP decomposition of the same error needs at least that rank, and may
      need more.

    Energy below the rounding error of the weight's dtype counts as kept: `Energy(1.0)` is the numerical rank.

    Args:
        kept: fraction of the energy, 0 < kept <= 1.

    Raises:
        ValueError: `kept` outside (0, 1].
        TypeError: `kept` is not a number.
    """

    kept: float

    def __post_init__(self) -> None:
        if isinstance(self.kept, bool) or not isinstance(self.kept, Real):
            raise TypeError(f"Energy: kept must be a number in (0, 1], got {self.kept!r}")
        if not 0 < self.kept <= 1:
            raise ValueError(f"Energy: kept must lie in (0, 1], got {self.kept}")


@dataclass(frozen=True)
class VBMF:
    """Rank by variational Bayes: the components of the weight that can be told from white noise.

    It is the rank of the global analytic solution of empirical variational Bayesian matrix factorization with an
    estimated noise variance (Nakajima et al., JMLR 14 (2013); for the ranks of convolutions: Kim et al.,
    arXiv:1511.06530, section 3). The matrix is the weight's unfolding along a channel mode: for Tucker, R1 and R2 come
    from the two modes separately; for CP, R is the larger of these; for a linear layer, the matrix is the weight. The
    rank is at least 1. There are no parameters, and the error has no bound: a trained weight whose singular values
    decrease without a gap can lose much. `Energy` does bound the error.
    """


ScalarRank = int | float | Energy | VBMF
Rank = ScalarRank | tuple[ScalarRank, ScalarRank]


def tucker_ranks(rank: Rank, weight: Tensor, *, multiple: int = 8, name: str = "weight") -> tuple[int, int]:
    """The Tucker-2 ranks `(R1, R2)` that `rank` means for a convolution weight `[T, S, KH, KW]`.

    Args:
        rank: int, fraction, `Energy` or `VBMF` for both modes, or a pair of these, input side first.
        weight: `[T, S, KH, KW]`; its values are read for `Energy` and `VBMF` only.
        multiple: ranks that are not ints are rounded up to a multiple of it (exceptions: see above); 1 does not round.
        name: the layer, for error messages.

    Raises:
        ValueError: a rank below 1 or above its limit, a fraction outside (0, 1], a multiple below 1, values
            that are not finite (`Energy` and `VBMF` only).
        TypeError: a rank of another type.
    """
    outputs, inputs, height, width = weight.shape
    if isinstance(rank, (tuple, list)):
        if len(rank) != 2:
            raise ValueError(f"{name}: a pair of Tucker ranks must be (R1, R2), input side first, got {rank!r}")
        in_rank, out_rank = rank
    else:
        in_rank = out_rank = rank
    in_limit = min(inputs, outputs * height * width)
    out_limit = min(outputs, inputs * height * width)
    in_resolved = _resolve(in_rank, inputs, in_limit, weight, (1,), multiple, f"{name}: Tucker rank R1")
    out_resolved = _resolve(out_rank, outputs, out_limit, weight, (0,), multiple, f"{name}: Tucker rank R2")
    # By the core's unfoldings: columns beyond what the other rank supports would be multiplied by zeros.
    taps = height * width
    if not isinstance(in_rank, Integral):
        in_resolved = min(in_resolved, out_resolved * taps)
    if not isinstance(out_rank, Integral):
        out_resolved = min(out_resolved, in_resolved * taps)
    return in_resolved, out_resolved


def cp_rank(rank: Rank, weight: Tensor, *, multiple: int = 8, name: str = "weight") -> int:
    """The CP rank R that `rank` means for a weight `[T, S, KH, KW]`; arguments as `tucker_ranks`."""
    limit = weight.numel() // max(weight.shape)
    return _resolve(rank, max(weight.shape[:2]), limit, weight, (0, 1), multiple, f"{name}: CP rank")


def linear_rank(rank: Rank, weight: Tensor, *, multiple: int = 8, name: str = "weight") -> int:
    """The rank R that `rank` means for a matrix `[T, S]`; arguments as `tucker_ranks`."""
    limit = min(weight.shape)
    return _resolve(rank, limit, limit, weight, (0,), multiple, f"{name}: rank")


def check_rank(rank: Rank, what: str, limit: int | None = None) -> ScalarRank:
    """A rank as an int, a float, an `Energy` or a `VBMF`; NumPy's numbers are converted. `what` names it in errors.

    Raises:
        ValueError: an int below 1 or above `limit`, a fraction outside (0, 1].
        TypeError: a rank of another type.
    """
    if isinstance(rank, (Energy, VBMF)):
        return rank
    if isinstance(rank, bool) or not isinstance(rank, Real):
        pair = "; a pair of ranks is for Tucker only" if isinstance(rank, (tuple, list)) else ""
        raise TypeError(f"{what} must be an int, a fraction, Energy(kept) or VBMF(), got {rank!r}{pair}")
    if isinstance(rank, Integral):
        if limit is None and rank < 1:
            raise ValueError(f"{what} must be at least 1, got {rank}")
        if limit is not None and not 1 <= rank <= limit:
            raise ValueError(f"{what} must lie between 1 and {limit} (the limit for this weight), got {rank}")
        return int(rank)
    if not 0 < rank <= 1:
        raise ValueError(f"{what} as a fraction must lie in (0, 1] (an int is a rank itself), got {rank}")
    return float(rank)


def check_multiple(multiple: int, what: str) -> None:
    """Raises ValueError unless `multiple` is an int of at least 1."""
    if isinstance(multiple, bool) or not isinstance(multiple, Integral) or multiple < 1:
        raise ValueError(f"{what}: multiple must be an int of at least 1, got {multiple!r}")


def require_finite(weight: Tensor, name: str) -> None:
    """Raises ValueError, naming the layer, where `weight` holds a NaN or an infinity."""
    if weight.numel() and not bool(torch.isfinite(torch.stack(weight.aminmax())).all()):
        bad = weight.numel() - int(torch.isfinite(weight).sum())
        raise ValueError(
            f"{name}: a weight to decompose must be finite, got {bad} NaN or infinite of "
            f"{weight.numel()} values; repair the layer or exclude it"
        )


def unfolding(weight: Tensor, mode: int) -> Tensor:
    """The weight as a matrix whose rows are axis `mode` (0: T, 1: S, ...); a copy unless the mode is 0."""
    return weight.detach().transpose(0, mode).flatten(1)


def _resolve(
    rank: Rank, channels: int, limit: int, weight: Tensor, modes: tuple[int, ...], multiple: int, what: str
) -> int:
    """One rank as an int; `modes` are those whose unfoldings decide an `Energy` or `VBMF`."""
    check_multiple(multiple, what)
    scalar = check_rank(rank, what, limit)
    if isinstance(scalar, int):
        return scalar
    if isinstance(scalar, float):
        wanted = int(scalar * channels + 0.5)
    else:
        wanted = max(_measured_rank(unfolding(weight, mode), scalar, what) for mode in modes)
    wanted = min(max(wanted, 1), limit)
    rounded = -(-wanted // multiple) * multiple
    return rounded if wanted >= multiple and rounded < limit else wanted


def _measured_rank(matrix: Tensor, rule: Energy | VBMF, what: str) -> int:
    """The rank that the rule gives for the singular values of a matrix, at least 1."""
    if matrix.is_meta:
        kind = type(rule).__name__
        raise ValueError(f"{what}: {kind} needs the values of a weight, got none; give an int or a fraction")
    require_finite(matrix, what)
    rounding = torch.finfo(matrix.dtype).eps / 2
    matrix = matrix.to(computing_device(matrix), torch.promote_types(matrix.dtype, torch.float32))
    matrix = matrix / matrix.abs().max().clamp(min=torch.finfo(matrix.dtype).tiny)
    rows, columns = sorted(matrix.shape)
    squares = energies(matrix).cpu()
    # Relative size of squared singular values below which the fp64 Gram matrix does not resolve them.
    unresolved = rows * torch.finfo(torch.float64).eps
    if isinstance(rule, Energy):
        return _energy_rank(squares, rule.kept, max(rounding**2, unresolved))
    if not squares.any():
        return 1
    return max(components_above_noise(squares.clamp(min=unresolved * float(squares.sum())), columns), 1)


def _energy_rank(squares: Tensor, kept: float, noise: float) -> int:
    """The smallest rank that keeps the fraction `kept - noise` of the energies, which are ascending; at least 1."""
    # tails[i] is the energy lost by dropping the i + 1 smallest.
    tails = squares.cumsum(0)
    dropped = int((tails <= (1 - kept + noise) * tails[-1]).sum())
    return max(len(squares) - dropped, 1)
