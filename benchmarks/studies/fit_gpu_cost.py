"""`python -m benchmarks.studies.fit_gpu_cost`: the GPU cost model's constants from results on one GPU.

Reads the sets of benchmarks/results/h200.csv, or those and the files that are named: JSON files of `benchmarks.run
--device cuda --peers chain merged kernels --json` and of `benchmarks.gpu.kernels --json`. Fits what each feature of
csrc/plan/gpu/cost.h costs (non-negative least squares on relative errors), and writes csrc/plan/gpu/cost_constants.inc.
What it is judged by is the regret: how much longer the planner's choices take on the GPU than the fastest of the
kernels, each with its planned cut, and the chain.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.core.bench import geometric_mean
from benchmarks.core.layers import Cell
from benchmarks.gpu.cuts import parse_cut
from benchmarks.studies import gpu_times
from benchmarks.studies.fit_cost import Vector, solve
from benchmarks.studies.gpu_times import GpuTimes
from lowrank_ops.ops.extension import _C

CONSTANTS = Path(__file__).parents[2] / "csrc/plan/gpu/cost_constants.inc"
FUSED_GROUPS = (
    "kSm90aTucker", "kSm90aWide", "kSm90aCp", "kSm90aLinear",
    "kLeanHalves", "kLeanWords", "kSm80Halves", "kSm80Words", "kSimt",
)  # fmt: skip
TAKEN_OVER = {"kSm90aLinear": "kSm90aWide"}  # without measurements of a group its constants are those of another one
GENERAL = "first_design"  # sets of h200.csv with this name: there were no lean kernels yet
UNKNOWN = 5e-8  # seconds of a feature that no file has measured in any group
CHAIN_GROUPS = ("kChainConvolutions", "kChainLinear")


@dataclass(frozen=True)
class Observation:
    """One way to run a cell: its features and the seconds that it took on the GPU.

    Attributes:
        beside: seconds that the op takes besides, where the library's chain was timed instead of the op's own.
        is_ours: whether the op could run the input of that run in this way (not the chain in the other layout).
    """

    cell: str
    group: str
    way: str
    features: Vector
    seconds: float
    beside: float = 0.0
    is_ours: bool = True


Described = tuple[str, str, bool, list[int], list[int], bool]


def described(cell: Cell, dtype: str, channels_last: bool = True) -> Described:
    """A cell as `_C` takes it."""
    tf32 = dtype == "tf32"
    name = "float32" if tf32 else dtype
    r1, r2 = cell.rank if isinstance(cell.rank, tuple) else (cell.rank, cell.rank)
    if cell.is_linear:
        return (cell.op, name, True, [cell.batch, cell.S, 1, 1, cell.T, r1, r2, 1, 1], [1, 1, 0, 0, 1, 1], tf32)
    sizes = [cell.batch, cell.S, *cell.size, cell.T, r1, r2, *cell.kernel]
    window = [cell.stride] * 2 + list(cell.paddings) + [cell.dilation] * 2
    return (cell.op, name, channels_last, sizes, window, tf32)


def chain_kind(described: Described) -> str:
    """Which of the peers is the chain that the op runs."""
    return "merged" if _C.merges_depthwise(described) else "chain"


def group_of(kernel: str, dtype: str, lean: bool) -> str:
    if "_simt_" in kernel:
        return "kSimt"
    if "_sm90a_" in kernel:
        if kernel.startswith("cp_"):
            return "kSm90aCp"
        if kernel.startswith("lowrank_linear_"):
            return "kSm90aLinear"
        return "kSm90aWide" if kernel.endswith("_64x128") else "kSm90aTucker"
    return ("kLean" if lean else "kSm80") + ("Words" if dtype == "tf32" else "Halves")


def fused(cell: Cell, dtype: str, way: str, seconds: float, gpu: str, layout: str, general: bool) -> Observation:
    kernel, cut = parse_cut(way)
    features, lean = _C.fused_gpu_features(described(cell, dtype, layout != "nchw"), kernel, cut, gpu)
    group = group_of(kernel, dtype, lean and not general)
    return Observation(f"{cell} {dtype}", group, way, np.array(features), seconds)


def chain(cell: Cell, dtype: str, name: str, seconds: float, gpu: str, layout: str) -> Observation | None:
    """The chain as the op runs it, with CP's depthwise stages merged where the planner says so. None: another chain.

    The library's chain in the input's layout was timed in its place. For Tucker in NCHW the op took 0.8 to 1.1 times as
    long where it keeps the core in channels_last (library_core of chain.cpp); elsewhere the op's copy of the core is
    missing in these times.
    """
    whole = described(cell, dtype, "nchw" not in name)
    if not name.startswith(chain_kind(whole)) or name.endswith("graph"):
        return None
    group = "kChainLinear" if cell.is_linear else "kChainConvolutions"
    is_ours = cell.is_linear or ("nchw" in name) == (layout == "nchw")
    beside = _C.factor_product_seconds if name.startswith("merged") else 0
    features = np.array(_C.chain_gpu_features(whole, gpu))
    return Observation(f"{cell} {dtype}", group, name, features, seconds, beside, is_ours)


def read(path: str | Path, general: bool = False) -> tuple[str, list[Observation]]:
    """The GPU and what was measured on it, of a file or of a set of h200.csv.

    `general`: the file is of the time before there were lean kernels.

    Raises:
        ValueError: no GPU's file, or that of a GPU that the planner has no figures of.
        FileNotFoundError: neither a file nor a set.
    """
    times = gpu_times.read_set(path)
    name = times[0].gpu if times else ""
    gpu = next((known["name"] for known in _C.named_gpus() if known["name"] in name), None)
    if gpu is None:
        raise ValueError(
            f"fit_gpu_cost: {path} must be of a GPU in csrc/plan/gpu/known_gpus.cpp, got {name or 'a CPU'!r}"
        )
    # A cell is what one run measured: times of two runs, or of two layouts, are not compared.
    found = fastest_slots(one for cell in times for one in observations(cell, gpu, general))
    return gpu, [replace(one, cell=f"{Path(path).stem} {one.cell}") for one in found]


def observations(times: GpuTimes, gpu: str, general: bool) -> Iterator[Observation]:
    """The ways to run a cell that the planner knows: kernels of today and the op's chains."""
    kernels = {line["name"] for line in _C.gpu_kernels()}
    for way in times.ways:
        seconds = way.us * 1e-6
        if not way.name.startswith(times.cell.op):
            found = chain(times.cell, times.dtype, way.name, seconds, gpu, times.layout)
            if found is not None:
                yield found
        elif way.name.split(" ")[0] in kernels:  # others were measured, and dropped
            yield fused(times.cell, times.dtype, way.name, seconds, gpu, times.layout, general)


def fastest_slots(observations: Iterable[Observation]) -> list[Observation]:
    """Keeps the fastest number of slots of every sm90a kernel: the cost model has no term for the slots.

    It has terms for splits and clusters, so these count as different ways.
    """
    kept: dict[tuple[str, str], Observation] = {}
    for one in observations:
        way = one.way
        if one.group.startswith("kSm90a"):
            kernel, (*_, splits, cluster) = parse_cut(one.way)
            way = f"{kernel} {splits}/{cluster}"
        former = kept.get((one.cell, way))
        if former is None or one.seconds < former.seconds:
            kept[one.cell, way] = one
    return list(kept.values())


def predict(observation: Observation, constants: Mapping[str, Vector], launch: float) -> float:
    """The planner's predicted seconds on the GPU, where neither memory nor the peak rate is the limit."""
    seconds = float(observation.features @ constants[observation.group])
    return seconds + (launch if observation.group in FUSED_GROUPS else 0)


def regret(observations: Iterable[Observation], found: Mapping[str, Vector], launch: float) -> tuple[float, int]:
    """How much longer the ways chosen by prediction take on the GPU than the fastest of the op's measured ways.

    Returns:
        The geometric mean over the cells, minus 1, and the number of cells that have both a kernel and the chain.
    """
    cells: dict[str, list[tuple[float, float, bool]]] = defaultdict(list)
    for o in filter(lambda o: o.is_ours, observations):
        cells[o.cell].append((predict(o, found, launch) + o.beside, o.seconds + o.beside, o.group in FUSED_GROUPS))
    ratios = [min(ways)[1] / min(seconds for _, seconds, _ in ways)
              for ways in cells.values() if len({is_fused for *_, is_fused in ways}) == 2]  # fmt: skip
    return geometric_mean(ratios) - 1, len(ratios)


def fit(observations: Iterable[Observation], launch: float) -> dict[str, Vector]:
    """Constants by group, in seconds. `launch` is subtracted from the times of fused kernels, not from those of chains.

    A feature that no observation of a fused group has (element-wise copies, for example) gets the largest constant that
    it has in the other groups.
    """
    groups = defaultdict(list)
    for o in filter(lambda o: o.is_ours, observations):
        groups[o.group].append(o)
    found = {}
    for group, members in groups.items():
        taken_off = launch if group in FUSED_GROUPS else 0
        times = np.array([o.seconds - taken_off for o in members])
        features = np.array([o.features for o in members])
        found[group] = solve(features, times, rounds=1)
        ratios = features @ found[group] / times
        spread = float(np.exp(np.std(np.log(ratios))))
        print(f"{group}: {len(members)} figures, predicted / measured {ratios.min():.2f} to {ratios.max():.2f}, "
              f"spread {spread:.2f}")  # fmt: skip
    for group in filter(found.__contains__, FUSED_GROUPS):
        unseen = np.all([o.features == 0 for o in groups[group]], axis=0)
        others = np.max([found[other] for other in FUSED_GROUPS if other in found], axis=0)
        found[group] = np.where(unseen, np.where(others > 0, others, UNKNOWN), found[group])
    return found


def parse(text: str, clock: float) -> tuple[float, dict[str, Vector]]:
    """The launch and the constants of csrc/plan/gpu/cost_constants.inc, in seconds as `fit` returns them."""
    found = {}
    for kind, group, values in re.findall(r"(Fused|Chain)Constants (\w+) = \{\{([^}]*)\}\};", text):
        found[group] = np.array([float(value) for value in values.split(",")]) / (clock if kind == "Fused" else 1)
    for group, other in re.findall(r"FusedConstants (\w+) = (\w+);", text):
        found[group] = found[other]
    (launch,) = re.findall(r"kFusedLaunch = (\S+);", text)
    return float(launch), found


def write(gpu: str, clock: float, launch: float, found: dict[str, Vector]) -> None:
    lines = [f"// Written by benchmarks/studies/fit_gpu_cost.py from measurements on NVIDIA {gpu}. Do not edit.",
             f"constexpr double kFusedLaunch = {launch:.3g};"]  # fmt: skip
    for group in FUSED_GROUPS:  # a group without observations raises KeyError, before anything is written
        other = TAKEN_OVER.get(group)
        measured = other is None or (group in found and not np.array_equal(found[group], found[other]))
        if measured:
            values = ", ".join(f"{value * clock:.4g}" for value in found[group])
            lines.append(f"constexpr FusedConstants {group} = {{{{{values}}}}};")
        else:
            lines.append(f"constexpr FusedConstants {group} = {other};  // taken over, not measured")
    for group in CHAIN_GROUPS:
        values = ", ".join(f"{value:.4g}" for value in found[group])
        lines.append(f"constexpr ChainConstants {group} = {{{{{values}}}}};")
    CONSTANTS.write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.fit_gpu_cost", description=__doc__)
    what = f"JSON files of one GPU, or sets of {gpu_times.H200.name} (default: all of its sets)"
    parser.add_argument("results", nargs="*", help=what)
    general = "the same, of the kernels before there were lean ones: for the general kernels' constants"
    parser.add_argument("--general", nargs="*", default=[], metavar="RESULTS", help=general)
    parser.add_argument("--launch", type=float, default=2.5e-6, help="seconds of an empty launch (default: 2.5e-6)")
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    options = parser.parse_args(arguments)
    if not options.results:
        sets = list(gpu_times.by_set(gpu_times.read(gpu_times.H200)))
        options.general = [name for name in sets if name.startswith(GENERAL)]
        options.results = [name for name in sets if not name.startswith(GENERAL)]
    files = [read(path) for path in options.results] + [read(path, general=True) for path in options.general]
    (gpu,) = {name for name, _ in files}
    found = fit([observation for _, found in files for observation in found], options.launch)
    of_now = [observation for _, found_here in files[: len(options.results)] for observation in found_here]
    lost, cells = regret(of_now, found, options.launch)
    print(f"regret on the GPU: {lost:.1%} over {cells} cells")
    for group, values in found.items():
        print(group, " ".join(f"{value:.4g}" for value in values))
    if not options.dry_run:
        (clock,) = (known["clock"] for known in _C.named_gpus() if known["name"] == gpu)
        write(gpu, clock, options.launch, found)


if __name__ == "__main__":
    main()
