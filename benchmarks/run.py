"""`python -m benchmarks.run`: the fused ops against every other way to run the same block, on the CPU.

Every cell runs the fused op under policy "auto", the chain of library layers in NCHW and in channels_last, for CP
the chain with the two depthwise stages merged into one, the chain under torch.compile (max-autotune, frozen), and
the dense layer in both formats; `--peers` leaves some out, or adds the fused kernel forced. Outputs are checked
before anything is timed (`peers.check`): a contender that is wrong is reported and left out; with a wrong fused op
the run goes on and ends with exit status 1.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch

import lowrank_ops
from benchmarks import bench, layers, peers
from benchmarks.bench import Column, Table, Timing, geometric_mean
from benchmarks.layers import Cell
from lowrank_ops import functional

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_OPS = {"tucker_conv2d": "tucker", "cp_conv2d": "cp", "lowrank_linear": "linear"}
COLUMNS = [
    Column("op", 6, left=True),
    Column("layer", 17, left=True),
    Column("shape", 26, left=True),
    Column("ranks", 7, left=True),
    Column("plan", 14, left=True),
    Column("us", 8),
    Column("GFLOP/s", 7),
    Column("GB/s", 6),
    Column("x fastest peer", 14),
    Column("that peer", 21, left=True),
    Column("x dense", 7),
    Column("saving", 6),
]
LEGEND = (
    "x fastest peer: time of the fastest other way to run the same block / time of the fused op\n"
    "(above 1: fused is faster). x dense: the same for the dense layer in its faster layout.\n"
    "saving: share of the FLOP saving realised, x dense / (dense FLOPs / factorized FLOPs)."
)


@dataclass(frozen=True)
class Result:
    """A cell's medians and what follows from them; a ratio is None where there is nothing to compare with."""

    cell: Cell
    dtype: str
    plan: str
    timings: dict[str, Timing]
    kinds: dict[str, str]
    wrong: dict[str, str]
    """Contenders left out, with what was wrong."""
    features: dict[str, list[float]]
    """What the planner's cost model counts, for the fused kernel and for the chain (see fit_cost.py)."""

    @property
    def seconds(self) -> float:
        return self.timings["fused"].median

    def fastest(self, kind: str) -> str | None:
        """The name of the fastest contender of a kind."""
        names = [name for name in self.timings if self.kinds[name] == kind]
        return min(names, key=lambda name: self.timings[name].median, default=None)

    def ratio(self, kind: str) -> float | None:
        name = self.fastest(kind)
        return None if name is None else self.timings[name].median / self.seconds

    @property
    def saving(self) -> float | None:
        """Share of the FLOP saving that became time."""
        over_dense = self.ratio("dense")
        return None if over_dense is None else over_dense * self.cell.flops / self.cell.dense_flops

    def row(self) -> list[str]:
        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.2f}"

        cell, seconds = self.cell, self.seconds
        moved = cell.bytes(DTYPES[self.dtype].itemsize)
        return [
            SHORT_OPS[cell.op], cell.layer, cell.shape, cell.ranks, self.plan, f"{seconds * 1e6:.1f}",
            f"{cell.flops / seconds / 1e9:.1f}", f"{moved / seconds / 1e9:.1f}", number(self.ratio("peer")),
            self.fastest("peer") or "-", number(self.ratio("dense")), number(self.saving),
        ]  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self.cell),
            "shape": self.cell.shape,
            "dtype": self.dtype,
            "plan": self.plan,
            "flops": self.cell.flops,
            "dense_flops": self.cell.dense_flops,
            "bytes": self.cell.bytes(DTYPES[self.dtype].itemsize),
            "over_fastest_peer": self.ratio("peer"),
            "fastest_peer": self.fastest("peer"),
            "over_dense": self.ratio("dense"),
            "flop_saving_realised": self.saving,
            "contenders": {
                name: {"kind": self.kinds[name], "median_us": timing.median * 1e6, "p10_us": timing.p10 * 1e6,
                       "p90_us": timing.p90 * 1e6, "calls": timing.calls}
                for name, timing in self.timings.items()
            },
            "wrong": self.wrong,
            "features": self.features,
        }  # fmt: skip


def measure(cell: Cell, dtype: str, layout: str, chosen_peers: Sequence[str], seconds: float) -> Result:
    """Check and time all contenders of a cell; the fused op's output must be right.

    Raises:
        RuntimeError: the fused op's output is outside the error budget.
    """
    problem = peers.make_problem(cell, DTYPES[dtype], layout)
    contenders = {contender.name: contender for contender in peers.contenders(problem, chosen_peers)}
    with torch.inference_mode():
        wrong = {}
        for name, contender in contenders.items():
            complaint = _complaint(problem, contender)
            if complaint and contender.kind in ("fused", "forced"):
                raise RuntimeError(f"{cell} {dtype}: the output of {name} is wrong: {complaint}")
            if complaint:
                wrong[name] = complaint
        functions = {name: contender.run for name, contender in contenders.items() if name not in wrong}
        timings = bench.time_interleaved(
            functions, seconds=seconds, before=lambda name: _set_policy(contenders[name].policy)
        )
    _set_policy("auto")
    kinds = {name: contender.kind for name, contender in contenders.items()}
    explanation = explain(problem)
    features = {plan["path"]: plan["features"] for plan in (explanation.chosen, *explanation.others)}
    return Result(cell, dtype, plan(explanation), timings, kinds, wrong, features)


def _complaint(problem: peers.Problem, contender: peers.Contender) -> str:
    """What is wrong with a contender's output, empty where it is right; it may also be unable to run."""
    _set_policy(contender.policy)
    try:
        return peers.check(problem, contender.run())
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def explain(problem: peers.Problem) -> lowrank_ops.Explanation:
    """What the planner decides for a problem under the policy in force."""
    op = getattr(functional, problem.cell.op)
    tensors = [problem.input, *problem.factors, problem.bias]
    (explanation,) = lowrank_ops.explain(op, tensors, verbose=False, **problem.options)
    return explanation


def plan(explanation: lowrank_ops.Explanation) -> str:
    """The path that is taken, and the tile of a fused one."""
    sizes = [str(explanation.chosen[key]) for key in ("tile_rows", "tile_columns") if key in explanation.chosen]
    return " ".join([explanation.path, "x".join(sizes)]).strip()


def _set_policy(policy: str) -> None:
    lowrank_ops.set_policy(policy)


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Geometric means and losing cells, one line per dtype and op and one over all ops."""
    lines = []
    for dtype in dict.fromkeys(result.dtype for result in results):
        of_dtype = [result for result in results if result.dtype == dtype]
        for op in [*dict.fromkeys(result.cell.op for result in of_dtype), "all"]:
            chosen = [result for result in of_dtype if op in (result.cell.op, "all")]
            over_peer = [ratio for result in chosen if (ratio := result.ratio("peer")) is not None]
            over_dense = [ratio for result in chosen if (ratio := result.ratio("dense")) is not None]
            savings = [saving for result in chosen if (saving := result.saving) is not None]
            lines.append({
                "dtype": dtype,
                "op": op,
                "cells": len(chosen),
                "over_fastest_peer": geometric_mean(over_peer),
                "over_dense": geometric_mean(over_dense),
                "flop_saving_realised": geometric_mean(savings),
                "worst": min(over_peer, default=float("nan")),
                "below_1.0": sum(ratio < 1.0 for ratio in over_peer),
                "below_0.9": sum(ratio < 0.9 for ratio in over_peer),
            })  # fmt: skip
    return lines


def print_summary(results: Sequence[Result]) -> None:
    titles = [
        "dtype",
        "op",
        "cells",
        "x fastest peer",
        "x dense",
        "saving",
        "worst",
        "below 1.0",
        "below 0.9",
    ]
    table = Table([Column(title, 14, left=title in ("dtype", "op")) for title in titles])
    print("\nGeometric means, and cells where the fused op is slower than the fastest peer:")
    table.header()
    for line in summary(results):
        table.row([f"{value:.2f}" if isinstance(value, float) else str(value) for value in line.values()])
    for result in results:
        for name, complaint in result.wrong.items():
            print(f"left out, output wrong: {name} of {result.cell} {result.dtype}: {complaint}")


def select(use_full: bool, pattern: str | None, sample: int | None = None) -> list[Cell]:
    """The quick or the full list, `sample` cells drawn from the full one, or the cells whose text matches a pattern.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    if sample is not None:
        return random.Random(0).sample(layers.full(), sample)
    if pattern is None:
        return layers.full() if use_full else layers.quick()
    cells = dict.fromkeys(layers.quick() + layers.full())
    found = [cell for cell in cells if re.search(pattern, str(cell))]
    if not found:
        raise ValueError(f"--layer: must match a cell (as {str(layers.quick()[0])!r}), got {pattern!r}")
    return found


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="the fixed list of some 40 cells (the default)")
    which.add_argument("--full", action="store_true", help="the whole grid, with every peer; takes hours")
    which.add_argument("--layer", metavar="PATTERN", help="cells that match a regular expression")
    which.add_argument(
        "--sample", type=int, metavar="N", help="N cells drawn from the whole grid, always the same ones"
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    layout = "of the fused op's input (default: channels_last); peers run in both"
    parser.add_argument("--layout", choices=list(peers.FORMATS), default="channels_last", help=layout)
    which_peers = "default: chain merged dense compile; with --full: all"
    parser.add_argument("--peers", nargs="+", choices=[*peers.PEERS, "all", "none"], help=which_peers)
    parser.add_argument("--seconds", type=float, default=0.25, help="measured per contender (default: 0.25)")
    parser.add_argument("--json", metavar="FILE", help="write every contender's figures there")
    options = parser.parse_args(arguments)
    asked = options.peers or (["all"] if options.full else [*peers.DEFAULT_PEERS, "compile"])
    options.peers = [name for name in peers.PEERS if "all" in asked or name in asked]
    try:
        options.cells = select(options.full, options.layer, options.sample)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    machine, versions = bench.machine(), bench.versions()
    print(", ".join(f"{key} {machine[key]}" for key in ("cpu", "cores", "torch_cpu_capability", "caches")))
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(
        f"threads: {torch.get_num_threads()}; peers: {', '.join(options.peers)}\n"
        f"the fused op's input is {options.layout}; the others run in both layouts, the faster counts\n"
        f"{len(options.cells)} cells, medians over {options.seconds} s a contender, interleaved\n{LEGEND}"
    )
    results: list[Result] = []
    failed = False
    for dtype in options.dtype:
        print(f"\n{dtype}")
        table = Table(COLUMNS, lambda line: print(line, flush=True))
        table.header()
        for cell in options.cells:
            try:
                results.append(measure(cell, dtype, options.layout, options.peers, options.seconds))
            except RuntimeError as error:
                failed = True
                print(f"FAILED: {error}", file=sys.stderr)
                continue
            table.row(results[-1].row())
    print_summary(results)
    if options.json:
        bench.write_json(options.json, {
            "machine": machine,
            "versions": versions,
            "threads": torch.get_num_threads(),
            "layout": options.layout,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "summary": summary(results),
            "cells": [result.as_json() for result in results],
        })  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    bench.keep_memory()
    sys.exit(main())
