"""Memory that is kept without need: by the CPU kernels between calls (`kept_memory`, `release_memory`), and by the C
library after work with large tensors (`trim`)."""

from __future__ import annotations

from torch import Tensor

from lowrank_ops.ops.extension import _C

# The entries of a matrix after work with which `trim` looks for freed memory.
_LARGE = 2**21


def kept_memory() -> int:
    """Bytes of scratch memory that the CPU kernels keep at the moment for their next calls, over all threads.

    A thread keeps what its calls worked in, 16 MiB at most, until it ends or `release_memory` is called: fresh memory
    would cost each call more than most of its writes. torch's allocator knows nothing of it. Besides it, the planners
    remember at most 4,096 problems for the CPU (about 3 MB) and as many for GPUs (about 20 MB), the policy "measure" as
    many (`forget_measurements`).
    """
    kept: int = _C.kept_memory()
    return kept


def release_memory() -> int:
    """Frees the scratch memory that the CPU kernels keep (`kept_memory`), and returns how many bytes it was.

    For long-lived processes that have run their last large call, or call rarely. Safe while ops run in other threads:
    what these work in is not touched, and kept when they end. The next calls allocate anew. With glibc the memory goes
    back to the system (``malloc_trim``), elsewhere to the C library's allocator.
    """
    released: int = _C.release_memory()
    return released


def trim(matrix: Tensor) -> None:
    """Gives freed memory back to the system, if it was worked with matrices as large as this one, of `[4096, 512]` and
    more. glibc keeps freed blocks of up to 32 MiB for itself, and they need not fit what comes next: hundreds of MiB
    after work with panels and rows of several sizes."""
    if matrix.numel() >= _LARGE:
        release_memory()
