"""The results of one cell on a GPU, as a row of the table, as JSON and back, and the summary over all cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.core.bench import Column, Table, Timing, geometric_mean
from benchmarks.core.layers import cell_from_json
from benchmarks.core.outcome import DTYPES, SHORT_OPS, Result, number
from benchmarks.gpu.timing import GpuTiming, Peaks

RIDGE = 160  # FLOP per byte; from here on the target is a smaller share of the bound
BOUND_TARGETS = {"below": 0.75, "above": 0.45}  # target: share of the bound (`Peaks.bound`), on either side of RIDGE
SPEED_TARGETS = {
    "tucker_conv2d": (1.3, 1.5),
    "cp_conv2d": (1.8, 2.5),
}  # x fastest peer: the target, and the aim beyond it
LOSING = 0.95
TILE_PIXELS = 128  # a problem with one such tile per multiprocessor fills the GPU

COLUMNS = [
    Column("op", 6, left=True),
    Column("layer", 17, left=True),
    Column("shape", 26, left=True),
    Column("ranks", 7, left=True),
    Column("plan", 25, left=True),
    Column("us", 8),
    Column("TFLOP/s", 7),
    Column("GB/s", 6),
    Column("FLOP/B", 6),
    Column("x fastest peer", 14),
    Column("that peer", 20, left=True),
    Column("x dense", 7),
    Column("% bound", 7),
    Column("saving", 6),
    Column("call us", 8),
    Column("x call", 6),
    Column("x graph", 7),
]
LEGEND = (
    'us: GPU time of the fused op under "auto", queued, cold L2; TFLOP/s, GB/s, x and % bound follow from it.\n'
    "x fastest peer: GPU time of the fastest other way to run the same block / that of the fused op (above 1: fused\n"
    "is faster). x dense: the same for the dense layer in its faster layout. saving: share of the FLOP saving\n"
    "realised. % bound: max(bytes / rate of a copy, FLOPs / rate of a matrix product), both measured in this run, of\n"
    "the time; * marks problems too small to fill the GPU.\n"
    "call us: one call on an idle GPU, launches included. x call: that of the quickest peer, CUDA graphs included, /\n"
    "that of our op called from Python; x graph: / that of our op in a CUDA graph."
)  # fmt: skip


@dataclass(frozen=True)
class GpuResult(Result):
    """`timings`: GPU times; `calls`: times of the same contenders on an idle GPU. In seconds."""

    calls: dict[str, Timing]
    launches: dict[str, float]
    """Seconds until a call returns to Python."""
    peaks: Peaks
    multiprocessors: int
    predicted: dict[str, float]
    """The planner's predictions for the best fused kernel and for the chain, where it has any, in seconds."""

    @classmethod
    def of(cls, timings: Mapping[str, GpuTiming], **rest: Any) -> GpuResult:
        return cls(
            timings={name: timing.gpu for name, timing in timings.items()},
            calls={name: timing.call for name, timing in timings.items()},
            launches={name: timing.launch for name, timing in timings.items()},
            **rest,
        )

    @property
    def intensity(self) -> float:
        """FLOPs per byte that must move."""
        return self.cell.flops / self.cell.bytes(DTYPES[self.dtype].itemsize)

    @property
    def fills(self) -> bool:
        """Whether there is at least one tile per multiprocessor."""
        height, width = self.cell.output_size
        return self.cell.batch * height * width >= TILE_PIXELS * self.multiprocessors

    @property
    def bound(self) -> float:
        """The least possible seconds, by the rates measured in this run."""
        return self.peaks.bound(self.cell, DTYPES[self.dtype].itemsize)

    @property
    def share_of_bound(self) -> float:
        return self.bound / self.seconds

    def call_ratio(self, ours: str) -> float | None:
        """Time of the quickest peer's call / time of a call of `ours`; None where one of them is missing."""
        peers = [timing.median for name, timing in self.calls.items() if self.kinds[name] == "peer"]
        return min(peers) / self.calls[ours].median if peers and ours in self.calls else None

    def row(self) -> list[str]:
        cell, seconds = self.cell, self.seconds
        moved = cell.bytes(DTYPES[self.dtype].itemsize)
        return [
            SHORT_OPS[cell.op], cell.layer, cell.shape, cell.ranks, self.plan, f"{seconds * 1e6:.1f}",
            f"{cell.flops / seconds / 1e12:.2f}", f"{moved / seconds / 1e9:.0f}", f"{self.intensity:.0f}",
            number(self.ratio("peer")), self.fastest("peer") or "-", number(self.ratio("dense")),
            f"{100 * self.share_of_bound:.0f}{'' if self.fills else '*'}", number(self.saving),
            f"{self.calls['fused'].median * 1e6:.1f}", number(self.call_ratio("fused")),
            number(self.call_ratio("fused graph")),
        ]  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        content = super().as_json()
        for name, contender in content["contenders"].items():
            contender["call"] = self.calls[name].as_json()
            contender["launch_us"] = self.launches[name] * 1e6
        return {
            **content,
            "flop_per_byte": self.intensity,
            "fills": self.fills,
            "bound_us": self.bound * 1e6,
            "share_of_bound": self.share_of_bound,
            "over_fastest_peer_call": self.call_ratio("fused"),
            "graph_over_fastest_peer_call": self.call_ratio("fused graph"),
            "copy_bytes_per_second": self.peaks.copy,
            "matmul_flops_per_second": self.peaks.matmul,
            "multiprocessors": self.multiprocessors,
            "predicted_us": {path: seconds * 1e6 for path, seconds in self.predicted.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> GpuResult:
        """The inverse of `as_json`. Ratios are computed again."""
        contenders = content["contenders"]
        return cls(
            cell=cell_from_json(content),
            dtype=content["dtype"],
            plan=content["plan"],
            timings={name: Timing.from_json(contender) for name, contender in contenders.items()},
            calls={name: Timing.from_json(contender["call"]) for name, contender in contenders.items()},
            launches={name: contender["launch_us"] * 1e-6 for name, contender in contenders.items()},
            kinds={name: contender["kind"] for name, contender in contenders.items()},
            wrong=dict(content["wrong"]),
            features=dict(content["features"]),
            peaks=Peaks(content["copy_bytes_per_second"], content["matmul_flops_per_second"]),
            multiprocessors=content["multiprocessors"],
            predicted={path: us * 1e-6 for path, us in content["predicted_us"].items()},
        )


def summary(results: Sequence[GpuResult]) -> dict[str, Any]:
    """The summary of one dtype: geometric means per op, shares of the bound, losing cells."""
    ops = [*dict.fromkeys(result.cell.op for result in results), "all"]
    below = [result for result in results if result.fills and result.intensity < RIDGE]
    above = [result for result in results if result.fills and result.intensity >= RIDGE]
    return {
        "ops": [_summary_of(op, [result for result in results if op in (result.cell.op, "all")]) for op in ops],
        "bound": {
            side: {
                "cells": len(cells),
                "wanted_share": BOUND_TARGETS[side],
                "reached": sum(cell.share_of_bound >= BOUND_TARGETS[side] for cell in cells),
                "geometric_mean": geometric_mean(cell.share_of_bound for cell in cells) if cells else None,
            }
            for side, cells in (("below", below), ("above", above))
        },
        "too_small_to_fill": sum(not result.fills for result in results),
        "losing": _losing(results, lambda result: result.ratio("peer")),
        "losing_by_call": _losing(results, lambda result: result.call_ratio("fused")),
        "left_out": _left_out(results),
    }  # fmt: skip


def _summary_of(op: str, results: Sequence[GpuResult]) -> dict[str, Any]:
    def mean(figure: Callable[[GpuResult], float | None]) -> float | None:
        values = [value for result in results if (value := figure(result)) is not None]
        return geometric_mean(values) if values else None

    over_peer = [ratio for result in results if (ratio := result.ratio("peer")) is not None]
    return {
        "op": op,
        "cells": len(results),
        "over_fastest_peer": mean(lambda result: result.ratio("peer")),
        "over_dense": mean(lambda result: result.ratio("dense")),
        "flop_saving_realised": mean(lambda result: result.saving),
        "share_of_bound": mean(lambda result: result.share_of_bound),
        "worst": min(over_peer, default=None),
        "over_fastest_peer_call": mean(lambda result: result.call_ratio("fused")),
        "graph_over_fastest_peer_call": mean(lambda result: result.call_ratio("fused graph")),
    }


def _losing(results: Sequence[GpuResult], figure: Callable[[GpuResult], float | None]) -> dict[str, float]:
    """The cells whose ratio is below LOSING, the worst first."""
    found = {str(result.cell): ratio for result in results if (ratio := figure(result)) is not None and ratio < LOSING}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _left_out(results: Sequence[GpuResult]) -> dict[str, int]:
    """In how many cells each contender was left out (wrong, or unable to run): a missing peer flatters the fused op."""
    counts: dict[str, int] = {}
    for result in results:
        for name in result.wrong:
            counts[name] = counts.get(name, 0) + 1
    return counts


def print_summary(results: Sequence[GpuResult]) -> None:
    found = summary(results)
    titles = ["op", "cells", "x fastest peer", "x dense", "saving", "of bound", "worst", "x call", "x graph"]
    print("\nGeometric means:")
    table = Table([Column(title, 14, left=title == "op") for title in titles])
    table.header()
    for line in found["ops"]:
        table.row([number(value) if isinstance(value, float | None) else str(value) for value in line.values()])
    for line in found["ops"]:
        wanted, aim = SPEED_TARGETS.get(line["op"], (None, None))
        if wanted is not None and line["over_fastest_peer"] is not None:
            verdict = "reached" if line["over_fastest_peer"] >= wanted else "NOT reached"
            print(
                f"{line['op']}: {line['over_fastest_peer']:.2f}x the fastest peer, wanted {wanted} ({aim}): {verdict}"
            )
    for side, words in (("below", f"less than {RIDGE}"), ("above", f"{RIDGE} or more")):
        line = found["bound"][side]
        print(
            f"of the cells that fill the GPU at {words} FLOP/B, {line['reached']} of {line['cells']} reach "
            f"{line['wanted_share']:.0%} of their bound"
        )
    print(f"{found['too_small_to_fill']} cells are too small to fill the GPU")
    for key, words in (("losing", "by GPU time"), ("losing_by_call", "by call, against CUDA graphs too")):
        print(f"below {LOSING} {words}: {len(found[key])} of {len(results)} cells")
        for cell, ratio in found[key].items():
            print(f"    {ratio:.2f}  {cell}")
    for result in results:
        for name, complaint in result.wrong.items():
            print(f"left out: {name} of {result.cell} {result.dtype}: {complaint}")
