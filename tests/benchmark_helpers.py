"""What the files that test the benchmarks share."""

from __future__ import annotations

import time

import pytest

from benchmarks.core.layers import Cell

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
