"""The results of one cell on a CPU, as a row of the table, as JSON and back, and the summary over all cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.core.bench import Column, Table, Timing, geometric_mean
from benchmarks.core.layers import cell_from_json
from benchmarks.core.limits import Limits
from benchmarks.core.outcome import DTYPES, SHORT_OPS, Result, number

COLUMNS = [
    Column("op", 6, left=True),
    Column("layer", 17, left=True),
    Column("shape", 26, left=True),
    Column("ranks", 7, left=True),
    Column("plan", 14, left=True),
    Column("us", 8),
    Column("GFLOP/s", 7),
    Column("% gemm", 6),
    Column("GB/s", 6),
    Column("% copy", 6),
    Column("x fastest peer", 14),
    Column("prepared", 8),
    Column("that peer", 29, left=True),
    Column("x dense", 7),
    Column("saving", 6),
    Column("KiB", 6),
    Column("chain's", 7),
]
LEGEND = (
    "x fastest peer: time of the fastest other way to run the same block / time of the fused op\n"
    "(above 1: fused is faster). prepared: the same for the op with weights packed before the calls, as engines pack\n"
    "theirs (with --peers ... prepared). x dense: the same for the dense layer, run in the fastest way.\n"
    "saving: share of the FLOP saving realised, x dense / (dense FLOPs / factorized FLOPs).\n"
    "% gemm: of the FLOP/s of a large matrix product; % copy: of the bytes/s of a copy that moves as much (so that it\n"
    "is in the same cache); both measured in this run. KiB: memory of a call besides input, output and weights, tiles\n"
    "x threads; chain's: the intermediates of the chain. 'ran f32': an inference engine multiplied in another\n"
    "precision than its setting."
)
LARGE = 28  # the target for the FLOP saving holds from so many output pixels per side on
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class CpuResult(Result):
    """A cell's medians and the machine's limits. `precisions` and `kernels` are those that the engines report."""

    limits: Limits
    precisions: dict[str, str]
    kernels: dict[str, tuple[str, ...]]
    scratch_bytes: int
    """Memory that a call of the fused op takes besides input, output and weights."""
    chain_bytes: int
    """Bytes of the chain's intermediates."""

    @property
    def moved(self) -> int:
        """Bytes of input, factors and output."""
        return self.cell.bytes(DTYPES[self.dtype].itemsize)

    @property
    def share_of_gemm(self) -> float:
        return self.cell.flops / self.seconds / self.limits.gemm

    @property
    def share_of_copy(self) -> float:
        return self.moved / self.seconds / self.limits.copy_of(self.moved)

    @property
    def bound(self) -> float:
        """The least possible seconds by the limits of this run."""
        return self.limits.bound(self.cell, DTYPES[self.dtype].itemsize)

    def families(self) -> list[str]:
        return list(dict.fromkeys(family(name, self.kinds[name]) for name in self.timings if name != "fused"))

    def over(self, of: str) -> float | None:
        """Time of the fastest contender of a family / time of the fused op."""
        medians = [t.median for name, t in self.timings.items() if family(name, self.kinds[name]) == of]
        return min(medians) / self.seconds if medians else None

    @property
    def prepared(self) -> float | None:
        """Time of the fastest peer / time of the op with prepared weights."""
        own, peer = self.over("prepared"), self.ratio("peer")
        return None if own is None or peer is None else peer / own

    def named(self, name: str | None) -> str:
        """A contender's name for the table, with the precision that it ran in where that is not the cell's dtype."""
        ran = self.precisions.get(name or "", "")
        return (name or "-") + (f" (ran {ran})" if ran not in ("", PRECISIONS.get(self.dtype)) else "")

    def row(self) -> list[str]:
        cell, seconds = self.cell, self.seconds
        return [
            SHORT_OPS[cell.op], cell.layer, cell.shape, cell.ranks, self.plan, f"{seconds * 1e6:.1f}",
            f"{cell.flops / seconds / 1e9:.1f}", f"{100 * self.share_of_gemm:.0f}",
            f"{self.moved / seconds / 1e9:.1f}", f"{100 * self.share_of_copy:.0f}", number(self.ratio("peer")),
            number(self.prepared), self.named(self.fastest("peer")), number(self.ratio("dense")), number(self.saving),
            f"{self.scratch_bytes / 1024:.0f}", f"{self.chain_bytes / 1024:.0f}",
        ]  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        content = super().as_json()
        for name, told in self.precisions.items():
            content["contenders"][name].update(precision=told, kernels=list(self.kernels[name]))
        return {
            **content,
            "fastest_dense": self.fastest("dense"),
            "over": {of: self.over(of) for of in self.families()},
            "prepared_over_fastest_peer": self.prepared,
            "flops_per_second": self.cell.flops / self.seconds,
            "bytes_per_second": self.moved / self.seconds,
            "share_of_gemm": self.share_of_gemm,
            "share_of_copy": self.share_of_copy,
            "bound_us": self.bound * 1e6,
            "share_of_bound": self.bound / self.seconds,
            "extra_bytes": {"fused": self.scratch_bytes, "chain": self.chain_bytes},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], limits: Limits) -> CpuResult:
        """The inverse of `as_json`. Ratios are computed again."""
        contenders = content["contenders"]
        told = {name: made for name, made in contenders.items() if "precision" in made}
        return cls(
            cell=cell_from_json(content),
            dtype=content["dtype"],
            plan=content["plan"],
            timings={name: Timing.from_json(contender) for name, contender in contenders.items()},
            kinds={name: contender["kind"] for name, contender in contenders.items()},
            wrong=dict(content["wrong"]),
            features=dict(content["features"]),
            limits=limits,
            precisions={name: made["precision"] for name, made in told.items()},
            kernels={name: tuple(made["kernels"]) for name, made in told.items()},
            scratch_bytes=content["extra_bytes"]["fused"],
            chain_bytes=content["extra_bytes"]["chain"],
        )


def family(name: str, kind: str) -> str:
    """The family that a contender belongs to: chain (with merged), compile, an engine, dense, ..."""
    if kind != "peer":
        return kind
    first = name.split()[0]
    return "chain" if first == "merged" else first


def summary(results: Sequence[CpuResult]) -> list[dict[str, Any]]:
    """Geometric means and losing cells, one line per dtype and op and one over all ops.

    `over` compares with each family of contenders, over the cells that it ran; `flop_saving_realised_large` is over the
    convolutions whose output is at least 28x28, 1-D ones left out.
    """
    lines = []
    for dtype in dict.fromkeys(result.dtype for result in results):
        of_dtype = [result for result in results if result.dtype == dtype]
        for op in [*dict.fromkeys(result.cell.op for result in of_dtype), "all"]:
            chosen = [result for result in of_dtype if op in (result.cell.op, "all")]
            over_peer = [ratio for result in chosen if (ratio := result.ratio("peer")) is not None]
            large = [result for result in chosen if min(result.cell.output_size) >= LARGE]
            families = dict.fromkeys(of for result in chosen for of in result.families())
            lines.append({
                "dtype": dtype,
                "op": op,
                "cells": len(chosen),
                "over_fastest_peer": _mean(over_peer),
                "prepared_over_fastest_peer": _mean(result.prepared for result in chosen),
                "over_dense": _mean(result.ratio("dense") for result in chosen),
                "flop_saving_realised": _mean(result.saving for result in chosen),
                "flop_saving_realised_large": _mean(result.saving for result in large),
                "share_of_bound": _mean(result.bound / result.seconds for result in chosen),
                "worst": min(over_peer, default=None),
                **{f"below_{limit}": sum(ratio < limit for ratio in over_peer) for limit in (1.0, 0.95, 0.9, 0.85)},
                "over": {
                    of: {
                        "cells": sum(result.over(of) is not None for result in chosen),
                        "mean": _mean(result.over(of) for result in chosen),
                    }
                    for of in families
                },
            })  # fmt: skip
    return lines


def _mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of those there are."""
    found = [value for value in values if value is not None]
    return geometric_mean(found) if found else None


_SUMMARY = {
    "dtype": "dtype", "op": "op", "cells": "cells", "over_fastest_peer": "x fastest peer",
    "prepared_over_fastest_peer": "prepared", "over_dense": "x dense",
    "flop_saving_realised": "saving", "flop_saving_realised_large": "saving >= 28x28", "share_of_bound": "of bound",
    "worst": "worst", "below_1.0": "below 1.0", "below_0.95": "below 0.95", "below_0.85": "below 0.85",
}  # fmt: skip


def print_summary(results: Sequence[CpuResult]) -> None:
    lines = summary(results)
    table = Table([Column(title, max(9, len(title)), left=title in ("dtype", "op")) for title in _SUMMARY.values()])
    print("\nGeometric means, and cells where the fused op is slower than the fastest peer:")
    table.header()
    for line in lines:
        table.row([str(line[key]) if isinstance(line[key], (str, int)) else number(line[key]) for key in _SUMMARY])
    print("\nGeometric means against each of them (in brackets: on so many cells):")
    for line in lines:
        means = ", ".join(f"{of} {number(mean['mean'])} ({mean['cells']})" for of, mean in line["over"].items())
        print(f"{line['dtype']} {line['op']}: {means}")
    for result in results:
        for name, told in result.precisions.items():
            if told != PRECISIONS.get(result.dtype):
                print(f"ran in {told}: {name} of {result.cell} {result.dtype}")
        for name, complaint in result.wrong.items():
            print(f"left out, output wrong: {name} of {result.cell} {result.dtype}: {complaint}")


def cells_of(content: Mapping[str, Any]) -> list[CpuResult]:
    """The cells of a results file that `benchmarks.run` wrote with limits.

    Raises:
        ValueError: a file of a GPU, or one written before the limits were measured.
    """
    if "limits" not in content:
        raise ValueError("no results of a CPU with the machine's limits: measure again with benchmarks.run --json")
    limits = {dtype: Limits.from_json(told) for dtype, told in content["limits"].items()}
    return [CpuResult.from_json(entry, limits[entry["dtype"]]) for entry in content["cells"]]
