"""Timing on a GPU: one small class that knows CUDA, and the timer, which works with any class of the same methods.

How a time is measured. All contenders of a cell take turns, in rotating order, until the cell's time is spent. Before
every timed call the L2 cache is flushed, outside of the timed part: a buffer of twice its size is written, then read
(after writing alone the timed kernel would have to write the buffer's lines back to memory). Two events around a call
time it, in two situations:

- GPU time: the call is queued behind flushes that last longer than the CPU needs to launch it, so that the GPU goes
  straight from the flush to the call's kernels, as in the middle of a large network. Launches cost nothing here.
- call: the GPU is idle when the CPU starts the call, so that the time in Python, dispatcher and driver counts, as in a
  network whose kernels are shorter than their launches. Here CUDA graphs are at their best.
"""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.core import bench
from benchmarks.core.bench import Timing
from benchmarks.core.layers import Cell

QUEUED = 4  # timed calls that a turn queues before it waits for them
MOST_FLUSHES = 50  # at most, before one call: the launch queue holds about a thousand kernels
SPARE_SECONDS = 60e-6  # flushes last three times the launch and this much longer, as other work may delay the host


class Device(Protocol):
    """The methods of a GPU that the timer needs. `slot` is an event, 0 to QUEUED * 2 - 1, used again in every turn."""

    def now(self) -> float:
        """The CPU's clock, seconds."""

    def flush(self, times: int) -> None:
        """Queues `times` flushes of the L2 cache."""

    def record(self, slot: int) -> None:
        """Queues an event."""

    def synchronize(self) -> None:
        """Waits for all queued work."""

    def seconds(self, first: int, last: int) -> float:
        """Seconds between two events that have happened, on the GPU's clock."""


class CudaDevice:
    """The current CUDA device and stream."""

    def __init__(self) -> None:
        l2_bytes = int(torch.cuda.get_device_properties().L2_cache_size)
        self.flushed_bytes = 2 * max(l2_bytes, 1 << 20)
        self._buffer = torch.zeros(self.flushed_bytes // 4, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * QUEUED)]
        for event in self._events:
            event.record()  # the driver creates an event when it is first recorded
        self.synchronize()

    def now(self) -> float:
        return time.perf_counter()

    def flush(self, times: int) -> None:
        for _ in range(times):
            self._buffer.zero_()
            torch.sum(self._buffer, dim=0, out=self._sum)

    def record(self, slot: int) -> None:
        self._events[slot].record()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, first: int, last: int) -> float:
        return self._events[first].elapsed_time(self._events[last]) * 1e-3


@dataclass(frozen=True)
class GpuTiming:
    """Both times of a contender (top of this file), and the seconds that the CPU needs to launch a call."""

    gpu: Timing
    call: Timing
    launch: float


def time_on(
    device: Device,
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    warmup: float = 0.1,
    min_rounds: int = 5,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, GpuTiming]:
    """Times functions that launch work on a device, in turns.

    Args:
        device: where they run.
        functions: what to call, by name.
        seconds: time by the CPU's clock for all functions together, without the warm-up (more where `min_rounds` take
            longer).
        warmup: each function is called for this long first, and at least five times.
        min_rounds: the least number of turns per function; a turn gives `QUEUED` samples of GPU time and one of a call.
        before: called with the function's name before each turn, outside of the timed part.

    Raises:
        ValueError: `functions` is empty, or `seconds`, `warmup` or `min_rounds` is below its range.
    """
    if not functions or seconds <= 0 or warmup < 0 or min_rounds < 1:
        raise ValueError(
            "time_on: needs functions, seconds > 0, warmup >= 0 and min_rounds >= 1, got "
            f"{len(functions)} functions, seconds={seconds}, warmup={warmup}, min_rounds={min_rounds}"
        )
    launch = {}
    for name, function in functions.items():
        before(name)
        launch[name] = _warm(device, function, warmup)
    flush = _flush_seconds(device)
    flushes = {name: max(1, math.ceil((3 * taken + SPARE_SECONDS) / flush)) for name, taken in launch.items()}
    on_gpu: dict[str, list[float]] = {name: [] for name in functions}
    calls: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    rounds, start = 0, device.now()
    while rounds < min_rounds or device.now() - start < seconds:
        for name in order:
            before(name)
            on_gpu[name] += _queued(device, functions[name], min(flushes[name], MOST_FLUSHES))
            calls[name].append(_idle(device, functions[name]))
        order = order[1:] + order[:1]
        rounds += 1
    return {name: GpuTiming(bench.summarize(on_gpu[name]), bench.summarize(calls[name]), launch[name])
            for name in functions}  # fmt: skip


def _warm(device: Device, function: Callable[[], object], seconds: float) -> float:
    """Calls a function for `seconds`. Returns the median of the seconds until a call returns."""
    taken: list[float] = []
    start = device.now()
    while len(taken) < 5 or device.now() - start < seconds:
        device.synchronize()
        before_call = device.now()
        function()
        taken.append(device.now() - before_call)
    device.synchronize()
    return bench.summarize(taken).median


def _flush_seconds(device: Device) -> float:
    """Seconds of one flush on the GPU. The first two are not timed: they cover the launch of the others."""
    device.flush(2)
    device.record(0)
    device.flush(4)
    device.record(1)
    device.synchronize()
    return max(device.seconds(0, 1) / 4, 1e-6)


def _queued(device: Device, function: Callable[[], object], flushes: int) -> list[float]:
    device.synchronize()
    for call in range(QUEUED):
        device.flush(flushes)
        device.record(2 * call)
        function()
        device.record(2 * call + 1)
    device.synchronize()
    return [device.seconds(2 * call, 2 * call + 1) for call in range(QUEUED)]


def _idle(device: Device, function: Callable[[], object]) -> float:
    device.flush(1)
    device.synchronize()
    device.record(0)
    function()
    device.record(1)
    device.synchronize()
    return device.seconds(0, 1)


@dataclass(frozen=True)
class Peaks:
    """The rates that the device reaches in this run: the roofline."""

    copy: float
    """Bytes per second of a large copy, read plus written."""
    matmul: float
    """Floating-point operations per second of a large torch.matmul in the dtype."""

    def bound(self, cell: Cell, element_size: int) -> float:
        """The least seconds that the block needs: its bytes at the copy's rate or its FLOPs at the product's rate."""
        return max(cell.bytes(element_size) / self.copy, cell.flops / self.matmul)


def measure_peaks(
    device: Device, where: str, dtype: torch.dtype, copy_bytes: int = 1 << 30, size: int = 8192, seconds: float = 1.0
) -> Peaks:
    """Times a copy of `copy_bytes` and a product of two `size` x `size` matrices on the torch device `where`."""
    source = torch.randn(copy_bytes // dtype.itemsize, device=where, dtype=dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    functions = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.matmul(a, b, out=product)}
    timings = time_on(device, functions, seconds=seconds, warmup=seconds / 4)
    moved = 2 * source.numel() * dtype.itemsize
    return Peaks(moved / timings["copy"].gpu.median, 2 * size**3 / timings["matmul"].gpu.median)


def empty_call(device: Device) -> float:
    """Seconds between two events with nothing in between. Every time contains them; they are not subtracted."""
    return time_on(device, {"": lambda: None}, seconds=0.05, warmup=0.0)[""].gpu.median


def describe_device() -> dict[str, Any]:
    """The current CUDA device and, where nvidia-smi answers, its driver, clocks, power and temperature."""
    properties = torch.cuda.get_device_properties()
    uuid = str(properties.uuid)
    return {
        "name": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "uuid": uuid,
        **query_driver(uuid),
    }


QUERIES = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu",
)  # fmt: skip


def query_driver(uuid: str | None = None) -> dict[str, str]:
    """nvidia-smi's report of a GPU (clocks in MHz, power in W, temperature in C); empty where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader,nounits"]
    command += [] if uuid is None else [f"--id=GPU-{uuid}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = answer.splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return dict(zip(QUERIES, values, strict=True)) if len(values) == len(QUERIES) else {}


def versions() -> dict[str, str]:
    """`bench.versions`, and the versions of CUDA and cuDNN."""
    return {
        **bench.versions(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }
