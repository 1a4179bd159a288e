"""Memory that is kept for later: by the CPU kernels between calls (`kept_memory`, `release_memory`), and by the C
library after work with large tensors (`trim`)."""

from __future__ import annotations

from torch import Tensor

from lowrank_ops.ops.extension import _C

# `trim` frees memory after work with a matrix of at least this many elements.
_LARGE = 2**21


def kept_memory() -> int:
    """Bytes of scratch memory that the CPU kernels keep at the moment for their next calls, over all threads.

    Each thread keeps the scratch memory of its calls, 16 MiB at most, until it ends or `release_memory` is called:
    allocating it at each call would take longer than most of the writes to it. torch's allocator does not count it. Not
    included: the plans of the last 4,096 problems for the CPU (about 3 MB) and of as many for GPUs (about 20 MB), and
    the measurements of the policy "measure" (see `forget_measurements`).
    """
    kept: int = _C.kept_memory()
    return kept


def release_memory() -> int:
    """Frees the scratch memory that the CPU kernels keep (`kept_memory`), and returns how many bytes it was.

    For long-lived processes that have made their last large call, or rarely call. Safe while ops run in other threads:
    memory in use is not touched, and those threads keep it when their calls end. Later calls allocate memory again.
    With glibc the memory goes back to the system (`malloc_trim`), elsewhere to the C library's allocator.
    """
    released: int = _C.release_memory()
    return released


def trim(matrix: Tensor) -> None:
    """Gives freed memory back to the system after work with matrices of this one's size, if it has at least as many
    elements as `[4096, 512]`.

    glibc keeps freed blocks of at most 32 MiB for later allocations, which they may not fit: work with panels and rows
    of several sizes leaves hundreds of MiB unused.
    """
    if matrix.numel() >= _LARGE:
        release_memory()
