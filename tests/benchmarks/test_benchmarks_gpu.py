"""The GPU benchmark's parts without a GPU: the timer on a simulated device, the figures, the contenders, the check."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.core import layers, peers
from benchmarks.core.bench import Timing
from benchmarks.core.graphs import Captured
from benchmarks.core.layers import Cell
from benchmarks.gpu import result as gpu_result
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import timing as gpu
from benchmarks.gpu.result import GpuResult
from benchmarks.gpu.timing import GpuTiming, Peaks
from tests.support.benchmark_cells import SMALL, HostDevice, same

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
MICRO = 2.0**-20  # about a microsecond; powers of two keep the simulated clocks exact


class SimulatedGpu:
    """A CPU that launches and a GPU that works through its queue, each with a clock of its own."""

    FLUSH = 64 * MICRO
    FLUSH_LAUNCH = 8 * MICRO
    flushed_bytes = 0

    def __init__(self) -> None:
        self.cpu = self.gpu = 0.0
        self.events: dict[int, float] = {}
        self.log: list[str] = []
        self.cold = False

    def now(self) -> float:
        return self.cpu

    def launch(self, launch: float, kernel: float) -> None:
        self.cpu += launch
        self.gpu = max(self.gpu, self.cpu) + kernel
        self.cold = False

    def flush(self, times: int) -> None:
        for _ in range(times):
            self.launch(self.FLUSH_LAUNCH, self.FLUSH)
        self.cold = True

    def record(self, slot: int) -> None:
        self.events[slot] = max(self.gpu, self.cpu)

    def synchronize(self) -> None:
        self.cpu = max(self.cpu, self.gpu)

    def seconds(self, first: int, last: int) -> float:
        return self.events[last] - self.events[first]

    def function(self, name: str, *kernels: tuple[float, float]) -> Callable[[], None]:
        """Kernels as (seconds to launch, seconds to run)."""

        def call() -> None:
            self.log.append(f"{name} {'cold' if self.cold else 'warm'}")
            for launch, kernel in kernels:
                self.launch(launch, kernel)

        return call


def test_gpu_time_leaves_launches_out_and_a_call_counts_them() -> None:
    device = SimulatedGpu()
    functions = {
        "one": device.function("one", (32 * MICRO, 16 * MICRO)),
        "chain": device.function("chain", *[(32 * MICRO, 4 * MICRO)] * 3),
        "slow launch": device.function("slow launch", (512 * MICRO, 2 * MICRO)),
        "long": device.function("long", (8 * MICRO, 4096 * MICRO)),
    }
    timings = gpu.time_on(device, functions, seconds=0.05, warmup=0.0)
    assert {name: timing.gpu.median / MICRO for name, timing in timings.items()} == {
        "one": 16, "chain": 12, "slow launch": 2, "long": 4096,
    }  # fmt: skip
    assert {name: timing.call.median / MICRO for name, timing in timings.items()} == {
        "one": 32 + 16, "chain": 3 * 32 + 4, "slow launch": 512 + 2, "long": 8 + 4096,
    }  # fmt: skip
    assert {name: timing.launch / MICRO for name, timing in timings.items()} == {
        "one": 32, "chain": 96, "slow launch": 512, "long": 8,
    }  # fmt: skip
    assert timings["one"].gpu.p10 == timings["one"].gpu.p90, "every sample was queued"


def test_turns_rotate_are_cold_and_prepared() -> None:
    device = SimulatedGpu()
    functions = {name: device.function(name, (MICRO, MICRO)) for name in "ab"}

    def before(name: str) -> None:
        device.log.append(f"before {name}")

    timings = gpu.time_on(device, functions, seconds=MICRO, warmup=0.0, min_rounds=2, before=before)
    warmup, turn = 5, gpu.QUEUED + 1
    a, b = ([f"before {name}", *[f"{name} cold"] * turn] for name in "ab")
    first = ["before a", *["a warm"] * warmup, "before b", *["b warm"] * warmup]
    assert device.log == [*first, *a, *b, *b, *a]
    assert timings["a"].gpu.calls == 2 * gpu.QUEUED and timings["a"].call.calls == 2


def test_a_cell_takes_the_time_it_was_given() -> None:
    device = SimulatedGpu()
    functions = {name: device.function(name, (4 * MICRO, 256 * MICRO)) for name in "abc"}
    start = device.now()
    timings = gpu.time_on(device, functions, seconds=0.25, warmup=0.125)
    taken = device.now() - start
    assert 0.25 + 3 * 0.125 <= taken < 0.25 + 3 * 0.125 + 0.02
    assert timings["a"].gpu.calls > 100


@pytest.mark.parametrize("options", [{"seconds": 0.0}, {"warmup": -1.0}, {"min_rounds": 0}])
def test_timing_refuses_bad_arguments(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        gpu.time_on(SimulatedGpu(), {"a": lambda: None}, **options)
    with pytest.raises(ValueError, match="0 functions"):
        gpu.time_on(SimulatedGpu(), {})


def test_bound_is_the_slower_of_bytes_and_flops() -> None:
    cell = SMALL[2]
    assert cell.flops == 2 * 5 * 4 * (12 + 9) and cell.bytes(2) == 2 * (5 * 12 + 5 * 9 + 4 * (12 + 9) + 9)
    assert Peaks(copy=cell.bytes(2) * 8.0, matmul=cell.flops * 100.0).bound(cell, 2) == 1 / 8
    assert Peaks(copy=cell.bytes(2) * 100.0, matmul=cell.flops * 4.0).bound(cell, 2) == 1 / 4


def test_peaks_are_rates_of_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(device: object, functions: dict[str, Callable[[], object]], **options: float) -> dict[str, GpuTiming]:
        for function in functions.values():
            function()
        taken = {"copy": 0.5, "matmul": 0.25}
        return {name: GpuTiming(*[Timing(taken[name], 0.0, 1.0, 1)] * 2, launch=0.0) for name in functions}

    monkeypatch.setattr(gpu, "time_on", timed)
    peaks = gpu.measure_peaks(HostDevice(), "cpu", torch.bfloat16, copy_bytes=1024, size=16)
    assert peaks == Peaks(copy=2 * 1024 / 0.5, matmul=2 * 16**3 / 0.25)


def test_quick_list_of_gpus_is_spread_over_the_grid() -> None:
    quick, full = layers.quick_gpu(), layers.full_gpu()
    assert 38 <= len(quick) <= 45
    assert len(set(quick)) == len(quick) and len(set(full)) == len(full)
    assert set(quick) <= set(full) and set(layers.full()) < set(full)
    for op, divisors in (("tucker_conv2d", {8, 4, 2}), ("cp_conv2d", {4, 2, 1})):
        cells = [cell for cell in quick if cell.op == op]
        ranks = [cell.rank if isinstance(cell.rank, tuple) else (cell.rank,) for cell in cells]
        assert {cell.S // rank[0] for cell, rank in zip(cells, ranks, strict=True)} == divisors
        assert {cell.batch for cell in cells} == {1, 8, 32}
        assert {cell.layer.split()[0] for cell in cells} >= {"vgg16", "resnet", "resnet50", "english_g2", "craft"}
    assert sum(cell.is_linear for cell in quick) >= 4
    assert {cell.stride for cell in quick} == {1, 2} and {cell.dilation for cell in quick} == {1, 6}
    # Both sides of the ridge, among the cells that fill an H100.
    peaks = Peaks(3e12, 6e14)
    filling = [made for cell in quick if (made := result(cell, peaks=peaks, multiprocessors=132)).fills]
    assert sum(made.intensity < gpu_result.RIDGE for made in filling) >= 8
    assert sum(made.intensity >= gpu_result.RIDGE for made in filling) >= 3
    assert len(filling) <= len(quick) - 15, "small problems are what is hard"


def timing(seconds: float) -> GpuTiming:
    return GpuTiming(Timing(seconds, seconds / 2, seconds * 2, 8), Timing(seconds + 1, seconds, seconds + 2, 2), 0.5)


def result(cell: Cell, seconds: dict[str, float] | None = None, dtype: str = "bfloat16", **rest: object) -> GpuResult:
    seconds = seconds or {"fused": 2.0, "fused graph": 1.5, "chain nchw": 8.0, "chain graph": 3.0, "dense nchw": 16.0}
    kinds = {name: {"fused": "fused", "fused graph": "ours", "dense nchw": "dense"}.get(name, "peer")
             for name in seconds}  # fmt: skip
    given = {
        "plan": "sm80_128x32 1x16x8", "wrong": {"compile": "no Triton"}, "features": {}, "multiprocessors": 1,
        "predicted": {"fused": 0.5, "chain": 1.0}, "peaks": Peaks(1e3, 1e6), **rest,
    }  # fmt: skip
    timings = {name: timing(value) for name, value in seconds.items()}
    return GpuResult.of(timings, cell=cell, dtype=dtype, kinds={**kinds, "compile": "peer"}, **given)


def test_ratios_of_a_cell() -> None:
    made = result(SMALL[0])
    assert made.ratio("peer") == 3.0 / 2.0 and made.fastest("peer") == "chain graph"
    assert made.ratio("dense") == 16.0 / 2.0
    assert made.call_ratio("fused") == (3.0 + 1) / (2.0 + 1)
    assert made.call_ratio("fused graph") == (3.0 + 1) / (1.5 + 1)
    assert made.call_ratio("absent") is None
    assert made.share_of_bound == max(SMALL[0].bytes(2) / 1e3, SMALL[0].flops / 1e6) / 2.0
    assert made.intensity == SMALL[0].flops / SMALL[0].bytes(2)
    assert result(SMALL[0], dtype="tf32").intensity == made.intensity / 2, "tf32 moves four bytes a value"
    pixels = SMALL[0].batch * math.prod(SMALL[0].output_size)
    assert pixels < 128 and not made.fills
    assert result(dataclasses.replace(SMALL[0], batch=128)).fills
    row = dict(zip((column.title for column in gpu_result.COLUMNS), made.row(), strict=True))
    assert row["% bound"] == f"{100 * made.share_of_bound:.0f}*" and row["x fastest peer"] == "1.50"
    assert row["x call"] == "1.33" and row["x graph"] == "1.60" and row["us"] == "2000000.0"


@pytest.mark.parametrize("cell", SMALL, ids=str)
def test_a_result_survives_json(cell: Cell) -> None:
    made = result(cell)
    content = json.loads(json.dumps(made.as_json(), allow_nan=False))
    again = GpuResult.from_json(content)
    assert again.cell == cell and same(again.as_json(), made.as_json())
    assert again.row() == made.row()


def test_summary_counts_what_loses_and_what_reaches_its_bound() -> None:
    large = dataclasses.replace(SMALL[0], batch=1000)
    rate = Peaks(copy=large.bytes(2) / 0.8, matmul=1e30)  # the bound is 0.8 s
    cells = [
        result(large, {"fused": 1.0, "chain nchw": 2.0}, peaks=rate),
        result(dataclasses.replace(large, layer="b"), {"fused": 2.0, "chain nchw": 1.0}, peaks=rate),
        result(SMALL[1], {"fused": 1.0, "chain nchw": 0.96}, multiprocessors=4),
        result(SMALL[2], {"fused": 1.0}),
    ]
    found = gpu_result.summary(cells)
    assert found["losing"] == {str(cells[1].cell): 0.5}
    assert found["losing_by_call"] == {str(cells[1].cell): pytest.approx(2 / 3)}
    assert found["too_small_to_fill"] == 2 and found["left_out"] == {"compile": 4}
    assert found["bound"]["below"]["cells"] == 2 and found["bound"]["below"]["reached"] == 1
    assert found["bound"]["above"] == {"cells": 0, "wanted_share": 0.45, "reached": 0, "geometric_mean": None}
    ops = {line["op"]: line for line in found["ops"]}
    assert ops["tucker_conv2d"]["over_fastest_peer"] == pytest.approx(1.0)
    assert ops["cp_conv2d"]["worst"] == 0.96
    assert ops["lowrank_linear"]["over_fastest_peer"] is None and ops["all"]["cells"] == 4
    json.dumps(found, allow_nan=False)


def test_targets_are_judged_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_result.print_summary([result(SMALL[0]), result(SMALL[1])])
    printed = capsys.readouterr().out
    assert "tucker_conv2d: 1.50x the fastest peer, wanted 1.3 (1.5): reached" in printed
    assert "cp_conv2d: 1.50x the fastest peer, wanted 1.8 (2.5): NOT reached" in printed
    assert printed.count("left out: compile of") == 2


@pytest.mark.parametrize("cell", SMALL, ids=str)
def test_contenders_of_a_gpu(cell: Cell) -> None:
    found = peers.contenders(peers.make_problem(cell, torch.float32), ["chain", "merged", "dense", "forced", "graph"])
    ways = peers.ways(cell, ["chain", "merged", "dense", "forced", "graph"])
    assert [(c.name, c.kind, c.policy) for c in found] == [(way.name, way.kind, way.policy) for way in ways]
    kinds = {contender.name: contender.kind for contender in found}
    assert kinds["fused"] == "fused" and kinds["fused graph"] == "ours" and kinds["chain graph"] == "peer"
    assert ("merged graph" in kinds) == (cell.op == "cp_conv2d")
    graphs = [contender for contender in found if contender.name.endswith("graph")]
    assert all(isinstance(contender.run, Captured) for contender in graphs)


def test_tf32_rounds_to_ten_bits() -> None:
    one = 2.0**-10  # the last bit of 1.xxx
    values = torch.tensor([1.0, 1 + one, 1 + 0.49 * one, 1 + 0.5 * one, -(1 + 0.5 * one), 1 + 1.51 * one, 0.0])
    assert peers.round_to_tf32(values).tolist() == [1.0, 1 + one, 1.0, 1 + one, -(1 + one), 1 + 2 * one, 0.0]


@pytest.mark.parametrize("cell", SMALL, ids=str)
def test_check_of_tf32_lets_tf32_pass_and_nothing_coarser(cell: Cell) -> None:
    """The budget in figures: a tf32 chain passes, one of bf16 does not, and float32's own error is far below it."""
    cell = dataclasses.replace(cell, S=64, rank=(24, 24) if isinstance(cell.rank, tuple) else 24)
    problem = peers.make_problem(cell, torch.float32, tf32=True)
    before = [factor.clone() for factor in problem.factors]
    exact = peers.contenders(problem, [])[0].run()
    assert peers.check(problem, exact) == ""

    def chain(change: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = problem.input
        for layer in peers.stages(problem):
            layer.weight = torch.nn.Parameter(change(layer.weight), requires_grad=False)
            hidden = layer(change(hidden))
        return hidden

    def cut_off(values: Tensor) -> Tensor:
        return (values.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    with torch.no_grad():
        assert peers.check(problem, chain(peers.round_to_tf32)) == ""
        assert peers.check(problem, chain(cut_off), lenient=True) == ""
        coarse = chain(lambda values: values.bfloat16().float())
    assert "relative error" in peers.check(problem, coarse)
    assert "relative error" in peers.check(problem, coarse, lenient=True)
    plain = dataclasses.replace(problem, tf32=False)
    assert "relative error" in peers.check(plain, chain(peers.round_to_tf32)), "float32 is held to float32"
    assert all(torch.equal(*pair) for pair in zip(before, problem.factors, strict=True))


def test_settings_are_put_back() -> None:
    backends = torch.backends

    def state() -> tuple[object, ...]:
        cudnn, matmul = backends.cudnn, backends.cuda.matmul
        return cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, cudnn.fp32_precision == "tf32"

    former = state()
    for dtype, tf32 in (("tf32", True), ("float32", False), ("bfloat16", False)):
        with gpu_run.settings(dtype):
            assert state() == (True, tf32, tf32, tf32)
        assert state() == former
