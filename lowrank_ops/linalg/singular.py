"""Leading singular vectors of matrices, from the Gram matrix of the shorter side, or, where few of many are wanted, by
a randomized method whose error is checked.

The randomized method is the range finder with power iterations of Halko, Martinsson and Tropp, SIAM Review 53 (2011),
algorithm 4.4, with a singular value decomposition of the small matrix between the iterations. Let Q be the orthonormal
columns that it finds for a matrix A, B = Q^T A and H = A A^T. The check bounds how much more energy the best matrix of
the same rank captures. In the basis of Q and its complement,

    H  =  [ Theta  K ]  <=  [ Theta   K  ]      Theta = B B^T,   K K^T = E^T E,   E = (I - Q Q^T) A B^T,
          [ K^T    C ]      [ K^T   h I  ]      h >= |C|,   C = (I - Q Q^T) H (I - Q Q^T),

in the order of symmetric matrices, so the largest eigenvalues of the right side are at least those of H. h is estimated
as the largest Ritz value of a Krylov space that starts from other random columns, plus `_MARGIN` for what that misses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# For a shorter side below `SMALLEST`, or a rank above this share of it, the exact method is faster.
SMALLEST, LARGEST_SHARE = 1024, 1 / 16
# A randomized decomposition is used only if its error is at most this fraction above the least possible one.
TOLERANCE = 0.01
# Columns beyond the rank: the larger of a number and a share of the rank. Iterations before the first check; at most.
_SPARE, _SPARE_SHARE = 16, 0.25
_FIRST_CHECK, _ITERATIONS = 3, 8
# The Krylov space of h: its random columns, its powers, and the fraction added to its largest Ritz value.
_PROBES, _POWERS, _MARGIN = 4, 8, 0.1

ROWS, COLUMNS = 512, 1024  # number of a matrix' rows or columns that are copied to fp64 at a time

_EXACT = ContextVar("exact", default=False)


@contextmanager
def exactly(exact: bool = True) -> Iterator[None]:
    """Inside the block no decomposition is randomized; with `exact` False the block changes nothing."""
    token = _EXACT.set(exact or _EXACT.get())
    try:
        yield
    finally:
        _EXACT.reset(token)


def leading_svd(matrix: Tensor, count: int, seed: int, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The leading left singular vectors `[M, count]`, singular values `[count]`, descending, and right singular vectors
    `[count, N]`, in the matrix' dtype.

    Args:
        matrix: `[M, N]`, fp32 or fp64.
        count: at most min(M, N).
        seed: of the randomized method.
        exact: the randomized method is not used (nor inside `exactly`). The singular values of an fp32 matrix are then
            roots of the eigenvalues of its fp64 Gram matrix, which resolve them to 1e-8 of the largest.
    """
    if not exact and worth_randomizing(min(matrix.shape), count):
        found = _randomized(matrix, count, seed)
        if found is not None:
            return found
    if matrix.dtype == torch.float64:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :count], values[:count], right[:count]
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = leading_svd(matrix.T, count, seed, exact=True)
        return right.T, values, left.T
    energies, vectors = leading_eigenvectors_(gram(matrix), count)
    values, left = energies.clamp(min=0).sqrt(), vectors.to(matrix.dtype)
    inverse = torch.where(values > 0, 1 / values, 0).to(matrix.dtype)
    return left, values.to(matrix.dtype), (left.T @ matrix).mul_(inverse[:, None])


def leading_vectors(matrix: Tensor, count: int, seed: int = 0) -> Tensor:
    """The leading left singular vectors `[M, count]` of a matrix `[M, N]`, orthonormal, by an exact method. Columns
    beyond min(M, N) are random."""
    rows, columns = matrix.shape
    if rows <= columns:
        # The Gram matrix squares the condition: in fp64 an fp32 weight loses nothing by that.
        return leading_eigenvectors_(gram(matrix), count)[1].to(matrix.dtype)
    left, _, _ = torch.linalg.svd(matrix, full_matrices=False)
    if count > columns:
        more = normal(rows, count - columns, seed, matrix)
        left = torch.cat([left, torch.linalg.qr(more - left @ (left.T @ more)).Q], dim=1)
        left = torch.linalg.qr(left).Q
    return left[:, :count]


def leading_eigenvectors_(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues `[count]`, descending, and their eigenvectors `[n, count]` of a symmetric matrix.

    The matrix, `[n, n]`, is overwritten: LAPACK needs twice its memory already, and a copy would come on top."""
    vectors = matrix.mT  # stored column by column, as LAPACK expects
    values = matrix.new_empty(len(matrix))
    torch.linalg.eigh(vectors, out=(values, vectors))
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


def orthonormal_(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The QR decomposition of a matrix `[M, K]`, M >= K, in fp64: orthonormal columns `[M, K]` and a triangle `[K, K]`.

    The columns overwrite the matrix if it is fp64 and stored column by column."""
    basis = matrix.mT.to(torch.float64, memory_format=torch.contiguous_format).contiguous().mT
    triangle = basis.new_empty(basis.shape[1], basis.shape[1])
    torch.linalg.qr(basis, out=(basis, triangle))
    return basis, triangle


def computing_device(tensor: Tensor) -> torch.device:
    """The device on which a tensor is decomposed: its own if that is a CPU or a CUDA GPU, otherwise the CPU, because
    other accelerators may lack fp64."""
    return tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")


def gram(matrix: Tensor) -> Tensor:
    """`matrix @ matrix^T` in fp64, `[M, M]` for a matrix `[M, K]`, without an fp64 copy of the whole matrix."""
    product = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64, device=matrix.device)
    for columns in matrix.split(COLUMNS, dim=1):
        columns = columns.double()
        product.addmm_(columns, columns.T)
    return product


def energies(matrix: Tensor) -> Tensor:
    """All squared singular values, `[min(M, N)]` ascending, fp64, from the Gram matrix of the shorter side."""
    return torch.linalg.eigvalsh(gram(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)).clamp(min=0)


def normal(rows: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """Normal random numbers `[rows, columns]` in the dtype and on the device of `like`. They depend on the seed only:
    not on the device or the global random state."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu").to(like)


def worth_randomizing(shorter: int, count: int) -> bool:
    """Whether the randomized method is tried first for `count` singular vectors of a matrix with this shorter side;
    never inside `exactly`."""
    return not _EXACT.get() and shorter >= SMALLEST and count <= LARGEST_SHARE * shorter


def _randomized(matrix: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The result of `leading_svd` by the randomized method; None if the check still fails after `_ITERATIONS`."""
    width = count + max(_SPARE, int(_SPARE_SHARE * count))
    basis = torch.linalg.qr(matrix @ normal(matrix.shape[1], width, seed, matrix)).Q
    total = energy(matrix)
    for iteration in range(1, _ITERATIONS + 1):
        inner, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        basis = basis @ inner
        image = matrix @ right.T  # [M, width]
        if iteration >= _FIRST_CHECK:
            left, best, across = basis[:, :count], values[:count], right[:count]
            lost = energy(matrix, left, best[:, None] * across)
            # The first bound: rounding errors of an exact factorization.
            if (
                lost <= (32 * torch.finfo(matrix.dtype).eps) ** 2 * total
                or _excess(matrix, basis, values, image, count, seed + 1) <= lost - lost / (1 + TOLERANCE) ** 2
            ):
                return left, best, across
        basis = torch.linalg.qr(image).Q
    return None


def _excess(matrix: Tensor, basis: Tensor, values: Tensor, image: Tensor, count: int, seed: int) -> float:
    """An upper bound of the energy that the best matrix of rank `count` captures beyond the first `count` columns of
    the basis.

    Args:
        matrix: A, `[M, N]`.
        basis: Q, `[M, width]`, such that the rows of Q^T A are orthogonal.
        values: the norms of those rows, descending.
        image: A times those rows scaled to norm 1, `[M, width]`.
        count: the rank.
        seed: of the random columns.
    """
    outside = image - basis @ (basis.T @ image)
    coupling = outside.double() * values.double()
    squares, vectors = torch.linalg.eigh(coupling.T @ coupling)
    root = (vectors * squares.clamp(min=0).sqrt()) @ vectors.T
    highest = (1 + _MARGIN) * _largest_outside(matrix, basis, seed)
    theta = values.double().square()
    bound = torch.cat(
        [
            torch.cat([torch.diag(theta), root], dim=1),
            torch.cat([root, highest * torch.eye(len(root), dtype=root.dtype, device=root.device)], dim=1),
        ]
    )
    return float(torch.linalg.eigvalsh(bound).flip(0)[:count].sum() - theta[:count].sum())


def _largest_outside(matrix: Tensor, basis: Tensor, seed: int) -> float:
    """A lower estimate of the largest eigenvalue of A A^T on the complement of the basis: the largest Ritz value of a
    Krylov space."""
    block = normal(matrix.shape[0], _PROBES, seed, matrix)
    blocks: list[Tensor] = []
    for _ in range(_POWERS):
        for known in 2 * [basis, *blocks]:  # twice, because rounding leaves a part the first time
            block = block - known @ (known.T @ block)
        block = torch.linalg.qr(block).Q
        blocks.append(block)
        block = matrix @ (block.T @ matrix).T  # twelve times as fast as matrix.T @ block
    space = torch.cat(blocks, dim=1)
    return float(torch.linalg.matrix_norm((space.T @ matrix).double(), 2)) ** 2


def energy(matrix: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> float:
    """`|matrix|_F^2`, or `|matrix - left right|_F^2`, for a matrix or vector. It is summed in fp64, `ROWS` rows at a
    time, without an fp64 copy of the matrix."""
    total = 0.0
    for start in range(0, matrix.shape[0], ROWS):
        part = matrix[start : start + ROWS]
        if left is not None and right is not None:
            part = part - left[start : start + ROWS] @ right
        total += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
    return total
