"""What the files that test the benchmarks share."""

from __future__ import annotations

import time

import pytest

from benchmarks.core.bench import Timing
from benchmarks.core.cpu_result import CpuResult
from benchmarks.core.layers import Cell
from benchmarks.core.limits import Limits

SMALL = [
    Cell("tucker_conv2d", "small", 6, 10, (3, 5), (9, 7), batch=3, kernel=(3, 2), stride=2, padding=1),
    Cell("cp_conv2d", "small", 6, 10, 7, (9, 8), batch=2, kernel=(2, 3), padding=2, dilation=2),
    Cell("lowrank_linear", "small", 12, 9, 4, batch=5, kernel=(1, 1), padding=0),
]


class HostDevice:
    """The CPU as a device whose queue is always empty."""

    flushed_bytes = 0

    def __init__(self) -> None:
        self.events: dict[int, float] = {}

    def now(self) -> float:
        return time.perf_counter()

    def flush(self, times: int) -> None:
        pass

    def record(self, slot: int) -> None:
        self.events[slot] = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def seconds(self, first: int, last: int) -> float:
        return self.events[last] - self.events[first]


def same(a: object, b: object) -> bool:
    """Equal, numbers but for rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == pytest.approx(b) if isinstance(a, float) else a == b


SMALL_ON_CPU = [
    Cell("tucker_conv2d", "small", 6, 10, (3, 5), (9, 7), batch=3, kernel=(3, 2), stride=2, padding=1),
    Cell("cp_conv2d", "small", 6, 10, 7, (9, 8), batch=2, kernel=(2, 3), padding=2, dilation=2),
    Cell("cp_conv2d", "strided", 6, 10, 7, (9, 8), batch=1, kernel=(3, 2), stride=2, padding=0),
    Cell("lowrank_linear", "small", 12, 9, 4, batch=5, kernel=(1, 1), padding=0),
]


LIMITS = Limits(gemm=1e11, copies={1000: 4e10, 100_000: 2e10, 10_000_000: 1e10})


def result(cell: Cell, dtype: str = "bfloat16", **microseconds: float) -> CpuResult:
    """A result with contenders of these medians; an underscore stands for a space."""
    timings = {name.replace("_", " "): Timing(us * 1e-6, 0.0, 0.0, 1) for name, us in microseconds.items()}
    own = {"fused": "fused", "prepared": "prepared"}
    kinds = {name: own.get(name, "dense" if "dense" in name else "peer") for name in timings}
    told = {name: "f32" for name in timings if name.startswith("o")}
    kernels = {name: ("brgconv_f32",) for name in told}
    return CpuResult(cell, dtype, "fused 1x8", timings, kinds, {}, {}, LIMITS, told, kernels, 1024, 4096)
