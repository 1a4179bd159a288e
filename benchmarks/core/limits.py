"""The machine's own limits in this run, which the results are compared with, and the memory that a call takes.

Arithmetic: the best rate of some square matrix products through torch, in the dtype and on the number of threads of the
run, by torch.mm and, as in a frozen model, by oneDNN with one factor packed before (Zen 4: 10 % faster in fp32).
Memory: copies through torch of several sizes, since a block whose tensors stay in a cache is not bound by DRAM. A cell
is compared with the smallest copy that moves at least as many bytes (like the copies, the calls of a turn find their
tensors in the caches if those are large enough). The largest copy is the stream copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import lowrank_ops
from benchmarks.core import bench
from benchmarks.core.layers import Cell

MATRIX_SIZES = (768, 1536, 2304)
COPY_BYTES = (1 << 19, 1 << 22, 1 << 25, 1 << 28)  # bytes read plus bytes written


@dataclass(frozen=True)
class Limits:
    """Rates measured at the start of a run, for one dtype and number of threads."""

    gemm: float
    """Floating-point operations per second of the best large matrix product."""
    copies: Mapping[int, float]
    """Bytes that a copy moves, read plus written -> bytes per second. In ascending order."""

    @property
    def stream(self) -> float:
        """Bytes per second of the largest copy."""
        return self.copies[max(self.copies)]

    def copy_of(self, moved: int) -> float:
        """Bytes per second of the smallest copy of at least `moved` bytes, or else of the largest."""
        return self.copies[min((size for size in self.copies if size >= moved), default=max(self.copies))]

    def bound(self, cell: Cell, element_size: int) -> float:
        """The least seconds that the block needs: its FLOPs at the product's rate or its bytes at the copy's rate."""
        moved = cell.bytes(element_size)
        return max(cell.flops / self.gemm, moved / self.copy_of(moved))

    def as_json(self) -> dict[str, Any]:
        return {
            "gemm_flops_per_second": self.gemm,
            "copy_bytes_per_second": {str(size): rate for size, rate in self.copies.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Limits:
        copies = {int(size): rate for size, rate in content["copy_bytes_per_second"].items()}
        return cls(content["gemm_flops_per_second"], copies)


def measure_limits(
    dtype: torch.dtype,
    seconds: float = 0.5,
    matrix_sizes: Sequence[int] = MATRIX_SIZES,
    copy_bytes: Sequence[int] = COPY_BYTES,
) -> Limits:
    """Times products and copies on torch's threads, each for `seconds`, interleaved."""
    functions = {}
    for size in matrix_sizes:
        a, b, product = (torch.randn(size, size).to(dtype) for _ in range(3))
        functions[f"gemm {size}"] = _call(torch.mm, a, b, out=product)
        packed = _packed(b)
        if packed is not None:
            functions[f"packed {size}"] = _call(torch.ops.mkldnn._linear_pointwise, a, packed, None, "none", [], "")
    for moved in copy_bytes:
        source = torch.randn(moved // 2 // dtype.itemsize).to(dtype)
        functions[f"copy {moved}"] = _call(torch.empty_like(source).copy_, source)
    with torch.inference_mode():
        timings = bench.time_interleaved(functions, seconds=seconds)
    products = {name: int(name.split()[1]) for name in functions if not name.startswith("copy")}
    return Limits(
        max(2 * size**3 / timings[name].median for name, size in products.items()),
        {moved: moved / timings[f"copy {moved}"].median for moved in sorted(copy_bytes)},
    )


def _packed(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight in oneDNN's own layout, by a private op of torch; None where it does not support the dtype here."""
    if not torch.backends.mkldnn.is_available():
        return None
    ops = torch.ops.mkldnn
    supported = weight.dtype == torch.float32
    if weight.dtype == torch.bfloat16:  # AVX-512 or AVX-NE-CONVERT
        supported = ops._is_mkldnn_bf16_supported()
    elif weight.dtype == torch.float16:
        supported = ops._is_mkldnn_fp16_supported()
    return ops._reorder_linear_weight(weight, weight.shape[1]) if supported else None


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return lambda: function(*args, **kwargs)


def intermediate_bytes(cell: Cell, element_size: int, merged: bool = False) -> int:
    """Bytes that a chain of layers needs besides input and output: the intermediates that live at the same time.

    `merged`: CP as three layers. Memory that the layers take inside (other layouts, workspace) is not counted.
    """
    (H, W), (OH, OW) = cell.size, cell.output_size
    if cell.is_linear:
        assert isinstance(cell.rank, int)
        return element_size * cell.batch * cell.rank
    if isinstance(cell.rank, tuple):
        R1, R2 = cell.rank
        values = H * W * R1 + OH * OW * R2
    elif merged:
        values = cell.rank * (H * W + OH * OW)
    else:
        values = cell.rank * (OH * W + max(H * W, OH * OW))
    return element_size * cell.batch * values


def scratch_bytes(explanation: lowrank_ops.Explanation, cell: Cell, element_size: int, threads: int) -> int:
    """The same of our op: one set of tiles per thread, or the chain's intermediates where the planner takes the chain.

    Packed weights, which are at most as large as the factors, are not counted; nor are those of the engines.
    """
    if explanation.path != "fused":
        return intermediate_bytes(cell, element_size)
    return threads * int(explanation.chosen["scratch_bytes"])
