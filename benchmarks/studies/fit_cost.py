"""`python -m benchmarks.studies.fit_cost`: the CPU cost model's constants from benchmark results.

Reads benchmarks/results/planner_fitted.csv, or the files that are named: CSV files like it (`cpu_times.py`), or JSON
files of `benchmarks.run --peers chain forced --json`. `--add RESULTS.json` puts the cells of such a file into the CSV
file first, as a set with the file's name.

The planner gives the features of each cell. The fit finds the nanoseconds per item of each feature, fused and as a
chain, for each op, dtype, layout and class of instruction sets, and writes csrc/plan/cpu/cost_constants.inc. It is
non-negative least squares on relative errors, reweighted in some rounds so that a few cells which the model cannot
explain do not bend it. Cells where both paths take about the same time count more, because errors decide there. A fit
is judged by its regret: how much longer the paths that the model picks take than the faster path of every cell. Each
path is fitted on its own, so at the end the chain's constants are scaled by the factor of least loss. The loss is the
regret, with cells that run fused and slower counted six times: a user who never chose a path must not lose to the plain
chain.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls  # type: ignore[import-untyped]

from benchmarks.core.bench import geometric_mean
from benchmarks.core.layers import Cell
from benchmarks.studies import cpu_times
from benchmarks.studies.cpu_times import CpuTimes, isa_class
from lowrank_ops.ops.extension import _C

CONSTANTS = Path(__file__).parents[2] / "csrc/plan/cpu/cost_constants.inc"
Vector = NDArray[np.float64]
Group = tuple[str, str, str, str, int]
"""Class of instruction sets, op, dtype, layout and how many of a Tucker block's ranks are one, 0 to 2: what has
constants of its own."""
FUSED_COUNTS = 6.0  # in the loss, of a cell that runs fused and would be faster as a chain
NEAR = 0.3  # logarithm of the paths' ratio from which on cells count less in the fit
OPS = {"tucker_conv2d": "kTucker", "cp_conv2d": "kCP", "lowrank_linear": "kLinear"}
DTYPES = {"float32": "kFloat", "bfloat16": "kBFloat16"}
LAYOUTS = {"nchw": "kContiguous", "channels_last": "kChannelsLast"}


@dataclass(frozen=True)
class Observation:
    """A cell: what the planner counts and picks, and the measured nanoseconds of both paths."""

    name: str
    group: Group
    fused_features: Vector
    chain_features: Vector
    takes_chain: bool
    """Whether the planner, with the constants that are compiled in, takes the chain."""
    fused: float
    chain: float
    """Time of the op's own chain; where that was not timed, of the library's chain in the fused op's layout."""
    library: float
    """Time of the library's chain in the fused op's layout,"""
    peer: float
    """and of the fastest one in either layout."""

    @property
    def picked(self) -> float:
        return self.chain if self.takes_chain else self.fused


@dataclass(frozen=True)
class Constants:
    """Nanoseconds for each feature (csrc/plan/cpu/cost.h), on either path."""

    fused: Vector
    chain: Vector


def prediction(cell: Cell, dtype: str, layout: str, machine: dict[str, Any]) -> dict[str, Any]:
    """The planner's counts, seconds and choice for a cell on a machine."""
    r1, r2 = cell.rank if isinstance(cell.rank, tuple) else (cell.rank, cell.rank)
    sizes = [cell.batch, cell.S, *cell.size, cell.T, r1, r2, *((1, 1) if cell.is_linear else cell.kernel)]
    paddings = (0, 0) if cell.is_linear else cell.paddings
    window = [cell.stride, cell.stride, *paddings, cell.dilation, cell.dilation]
    caches = [_bytes(machine["caches"].get(level, default)) for level, default in (("L2", "1024K"), ("L3", "0K"))]
    isa = isa_class(machine, dtype)
    found: dict[str, Any] = _C.cpu_prediction(cell.op, dtype, layout == "channels_last", sizes, window, isa, *caches)
    return found


def _ranks_of_one(cell: Cell) -> int:
    return cell.rank.count(1) if isinstance(cell.rank, tuple) else 0


def _bytes(text: str) -> int:
    return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]


def read(path: str | Path) -> list[Observation]:
    """The cells of a CSV file of times or of a CPU's results file, as the planner sees them.

    Raises:
        ValueError: a GPU's file.
    """
    return observations(cpu_times.read(path))


def observations(times: Iterable[CpuTimes]) -> list[Observation]:
    """Without the cells that can run on one path only."""
    planned = ((one, prediction(one.cell, one.dtype, one.layout, one.machine)) for one in times)
    return [
        Observation(
            name=f"{one.cell} {one.layout} {one.dtype}",
            group=(
                one.isa,
                one.cell.op,
                one.dtype,
                "nchw" if one.cell.is_linear else one.layout,
                _ranks_of_one(one.cell),
            ),
            fused_features=np.array(found["fused_features"]),
            chain_features=np.array(found["chain_features"]),
            takes_chain=found["chain"],
            fused=one.fused * 1e3,
            chain=one.chain * 1e3,
            library=one.library * 1e3,
            peer=one.peer * 1e3,
        )
        for one, found in planned
        if found["other_possible"]
    ]


def _group(one: CpuTimes) -> Group:
    layout = "nchw" if one.cell.is_linear else one.layout
    return one.isa, one.cell.op, one.dtype, layout, _ranks_of_one(one.cell)


def solve(features: Iterable[Vector], times: Iterable[float], counts: Vector | float = 1.0, rounds: int = 20) -> Vector:
    """Non-negative constants with a small relative error: squared for small errors, less for large ones.

    `counts` says how much each row counts; with one round all errors are squared.
    """
    times = np.array(list(times))
    rows = np.array(list(features)) / times[:, None]
    scale = np.maximum(rows.max(axis=0), 1e-30)
    rows /= scale
    weight = np.sqrt(counts) * np.ones(len(times))
    for _ in range(rounds):
        found, _ = nnls(rows * weight[:, None], weight)
        share = rows @ found  # predicted of measured
        weight = np.sqrt(counts / ((np.abs(share - 1) + 0.05) * np.maximum(share, 1)))
    return np.asarray(found / scale)


def fit(observations: Sequence[Observation]) -> Constants:
    """Constants for both paths' times, each for itself, then the chain's scaled to the least loss."""
    counts = np.array([1 / (abs(np.log(o.fused / o.chain)) + NEAR) for o in observations])
    fused = solve((o.fused_features for o in observations), (o.fused for o in observations), counts)
    chain = solve((o.chain_features for o in observations), (o.chain for o in observations), counts)
    scales = np.arange(0.5, 1.6001, 0.02)
    losses = np.array([loss(picks(observations, Constants(fused, chain * scale))) for scale in scales])
    # In the middle of the scales that are as good as the best: nothing was measured that decides between them.
    best = scales[losses <= losses.min() + 1e-4]
    return Constants(fused, chain * float(np.median(best)))


def loss(observations: Sequence[Observation]) -> float:
    """Mean logarithm of (time of the path picked / time of the faster path), fused ones counted FUSED_COUNTS times."""
    lost = [np.log(o.picked / min(o.chain, o.fused)) * (1.0 if o.takes_chain else FUSED_COUNTS) for o in observations]
    return float(np.mean(lost))


def picks(observations: Sequence[Observation], constants: Constants) -> list[Observation]:
    """The same observations, as a planner with these constants would decide them."""
    return [
        replace(o, takes_chain=float(o.chain_features @ constants.chain) < float(o.fused_features @ constants.fused))
        for o in observations
    ]


def regret(observations: Sequence[Observation]) -> float:
    """Geometric mean over the cells of (time of the path picked / time of the faster path), minus 1."""
    return geometric_mean(o.picked / min(o.chain, o.fused) for o in observations) - 1


def share_below(observations: Sequence[Observation], limit: float) -> float:
    """The share of the cells where the library's chain takes less than `limit` of the time of the path picked."""
    return sum(o.library / o.picked < limit for o in observations) / len(observations)


def lines(groups: dict[Group, Constants], cpus: Sequence[str]) -> list[str]:
    """The text of cost_constants.inc."""
    found = [
        "// Nanoseconds for each feature of cost.h: {fused}, {chain}. Written by benchmarks/studies/fit_cost.py; "
        "measured on",
        f"// {', '.join(cpus)}, its instruction sets capped. Do not edit.",
    ]
    for (isa, op, dtype, layout, ones), constants in sorted(groups.items()):
        numbers = (
            "{" + ", ".join(f"{value:.4g}" for value in vector) + "}" for vector in (constants.fused, constants.chain)
        )
        names = f'"{isa}", Op::{OPS[op]}, DType::{DTYPES[dtype]}, Layout::{LAYOUTS[layout]}, {ones}'
        found.append(f"{{{names}, {', '.join(numbers)}}},")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.fit_cost", description=__doc__)
    what = f"CSV files of times, or JSON files of benchmarks.run (default: {cpu_times.FITTED.name})"
    parser.add_argument("results", nargs="*", type=Path, default=[cpu_times.FITTED], help=what)
    added = f"JSON files of benchmarks.run whose cells are first put into {cpu_times.FITTED.name}"
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="RESULTS.json", help=added)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args(arguments)
    if options.add and options.dry_run:
        parser.error("--add: writes, and --dry-run must not")
    if options.add:
        cpu_times.add(cpu_times.FITTED, options.add)
    times = [one for path in options.results for one in cpu_times.read(path)]
    observed, cpus = observations(times), sorted({one.cpu for one in times})
    groups = {}
    for name in sorted({o.group for o in observed}):
        group = [o for o in observed if o.group == name]
        groups[name] = fit(group)
        decided = picks(group, groups[name])
        print(
            f"{' '.join(map(str, name))}: {len(group)} cells, regret {regret(decided):.2%} (today's constants "
            f"{regret(group):.2%}), below 0.9 of the library's chain {share_below(decided, 0.9):.1%}, "
            f"below 0.8 {share_below(decided, 0.8):.1%}"
        )
        wrong = sorted(decided, key=lambda o: min(o.chain, o.fused) / o.picked)
        for o in [o for o in wrong if min(o.chain, o.fused) / o.picked < 0.9]:
            print(f"    {o.name}: fused {o.fused / 1e3:.1f} us, chain {o.chain / 1e3:.1f} us")
    if not options.dry_run:
        CONSTANTS.write_text("\n".join(lines(groups, cpus)) + "\n")
        print(f"wrote {CONSTANTS}")


if __name__ == "__main__":
    main()
