"""Leading singular vectors of matrices: through the Gram matrix of the shorter side, or, where few are wanted of many,
by a randomized method whose error is checked.

Randomized: the range finder with power iterations of Halko, Martinsson and Tropp, SIAM Review 53 (2011), algorithm 4.4,
with a singular value decomposition of the small matrix between the iterations. Let Q be its orthonormal columns,
B = Q^T A and H = A A^T. The check bounds what the best matrix of the rank could capture beyond what was found. In the
basis of Q and its complement,

    H  =  [ Theta  K ]  <=  [ Theta   K  ]      Theta = B B^T,   K K^T = E^T E,   E = (I - Q Q^T) A B^T,
          [ K^T    C ]      [ K^T   h I  ]      h >= |C|,   C = (I - Q Q^T) H (I - Q Q^T),

in the order of symmetric matrices, so the largest eigenvalues of the right side are above those of H. h is the largest
Ritz value of a Krylov space that begins with random columns of its own (`_MARGIN` on top for what it misses).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# Exact below that shorter side, and for ranks above that part of it: there it takes less time.
SMALLEST, LARGEST_SHARE = 1024, 1 / 16
# The error of a randomized decomposition is at most that part above the best one's, or it is not used.
TOLERANCE = 0.01
# Columns beyond the rank: at least so many, and that part of it. Iterations before the first check, and at most.
_SPARE, _SPARE_SHARE = 16, 0.25
_FIRST_CHECK, _ITERATIONS = 3, 8
# The Krylov space of h: random columns, powers, and what is added to its largest Ritz value.
_PROBES, _POWERS, _MARGIN = 4, 8, 0.1

ROWS, COLUMNS = 512, 1024  # of a matrix that are copied in fp64 at a time

_EXACT = ContextVar("exact", default=False)


@contextmanager
def exactly(exact: bool = True) -> Iterator[None]:
    """Within it no decomposition is randomized; `exact` False: as outside of it."""
    token = _EXACT.set(exact or _EXACT.get())
    try:
        yield
    finally:
        _EXACT.reset(token)


def leading_svd(matrix: Tensor, count: int, seed: int, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values: `[M, count]`, `[count]` descending and `[count, N]`, in its dtype.

    Args:
        matrix: `[M, N]`, fp32 or fp64.
        count: at most min(M, N).
        seed: of the randomized method.
        exact: not the randomized method, which `exactly` excludes too. Singular values of an fp32 matrix then come from
            the eigenvalues of its Gram matrix in fp64, which resolve them to 1e-8 of the largest.
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
    """The leading left singular vectors, `[M, count]`, exactly and orthonormal; random ones beyond its rank's limit."""
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
    """Of a symmetric matrix `[n, n]`, whose memory is used up: the largest eigenvalues, `[count]` descending, and their
    eigenvectors, `[n, count]`. LAPACK works in twice the matrix' memory; a copy of it would come on top."""
    vectors = matrix.mT  # columns lie together, as LAPACK has them
    values = matrix.new_empty(len(matrix))
    torch.linalg.eigh(vectors, out=(values, vectors))
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


def orthonormal_(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns `[M, K]` and the triangle `[K, K]` whose product is the matrix, `[M, K]`, M >= K, in fp64; in
    the memory of an fp64 one whose columns lie together."""
    basis = matrix.mT.to(torch.float64, memory_format=torch.contiguous_format).contiguous().mT
    triangle = basis.new_empty(basis.shape[1], basis.shape[1])
    torch.linalg.qr(basis, out=(basis, triangle))
    return basis, triangle


def computing_device(tensor: Tensor) -> torch.device:
    """Where to decompose a tensor: where it is, if that is a CPU or a CUDA GPU (others may lack fp64), else the CPU."""
    return tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")


def gram(matrix: Tensor) -> Tensor:
    """`matrix @ matrix^T` in fp64, `[M, M]` from `[M, K]`, without an fp64 copy of the whole matrix."""
    product = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64, device=matrix.device)
    for columns in matrix.split(COLUMNS, dim=1):
        columns = columns.double()
        product.addmm_(columns, columns.T)
    return product


def energies(matrix: Tensor) -> Tensor:
    """All squared singular values, `[min(M, N)]` ascending, fp64, from the Gram matrix of the shorter side."""
    return torch.linalg.eigvalsh(gram(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)).clamp(min=0)


def normal(rows: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """Normal random numbers of a seed, the same ones whatever the device and the global random state."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu").to(like)


def worth_randomizing(shorter: int, count: int) -> bool:
    """Whether so few singular vectors of a matrix of that shorter side are wanted that the randomized method is tried
    first; not within `exactly`."""
    return not _EXACT.get() and shorter >= SMALLEST and count <= LARGEST_SHARE * shorter


def _randomized(matrix: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `leading_svd`; None where the check of the error fails after `_ITERATIONS`."""
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
            # what rounding leaves of an exact factorization
            if (
                lost <= (32 * torch.finfo(matrix.dtype).eps) ** 2 * total
                or _excess(matrix, basis, values, image, count, seed + 1) <= lost - lost / (1 + TOLERANCE) ** 2
            ):
                return left, best, across
        basis = torch.linalg.qr(image).Q
    return None


def _excess(matrix: Tensor, basis: Tensor, values: Tensor, image: Tensor, count: int, seed: int) -> float:
    """A bound of the energy that the best matrix of rank `count` captures beyond the first columns of the basis.

    Args:
        basis: Q, `[M, width]`, such that the rows of Q^T A are orthogonal; values: their norms, descending.
        image: A times those rows, of norm 1, `[M, width]`.
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
    """The largest eigenvalue of A A^T on the complement of the basis, from below: the largest of a Krylov space."""
    block = normal(matrix.shape[0], _PROBES, seed, matrix)
    blocks: list[Tensor] = []
    for _ in range(_POWERS):
        for known in 2 * [basis, *blocks]:  # once more for what rounding left
            block = block - known @ (known.T @ block)
        block = torch.linalg.qr(block).Q
        blocks.append(block)
        block = matrix @ (block.T @ matrix).T  # twelve times as fast as matrix.T @ block
    space = torch.cat(blocks, dim=1)
    return float(torch.linalg.matrix_norm((space.T @ matrix).double(), 2)) ** 2


def energy(matrix: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> float:
    """`|matrix - left right|_F^2`, or of a vector, summed in fp64, `ROWS` at a time: no fp64 copy is made of it."""
    total = 0.0
    for start in range(0, matrix.shape[0], ROWS):
        part = matrix[start : start + ROWS]
        if left is not None and right is not None:
            part = part - left[start : start + ROWS] @ right
        total += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
    return total
