"""Every CUDA kernel that can run a problem, with the planner's cut or with another one.

A cut is the way in which a kernel divides a problem (csrc/plan/gpu/planner.h): images x rows x columns of a tile, slots
of the ring buffer ("stages" in JSON and in `explain`), splits of the output channels, CTAs of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import lowrank_ops
from benchmarks.core import peers
from benchmarks.core.outcome import explain
from lowrank_ops.ops.extension import _C

HOPELESS = 5  # kernels predicted to be this many times slower than the best are not timed, as under policy "measure"


@dataclass(frozen=True)
class Cut:
    """One kernel with one cut of the problem."""

    kernel: str
    tile: tuple[int, int, int]
    """Images, rows and columns of output pixels."""
    stages: int
    splits: int
    predicted_seconds: float | None = None
    """The planner's prediction; None: the cut is not the planner's."""
    cluster: int = 1

    @property
    def name(self) -> str:
        cluster = f"/{self.cluster}" if self.cluster > 1 else ""
        return f"{self.kernel} {'x'.join(map(str, self.tile))}/{self.stages}/{self.splits}{cluster}"

    def as_json(self) -> dict[str, Any]:
        predicted = None if self.predicted_seconds is None else self.predicted_seconds * 1e6
        return {"kernel": self.kernel, "tile": list(self.tile), "stages": self.stages, "splits": self.splits,
                "cluster": self.cluster, "predicted_us": predicted}  # fmt: skip


def parse_cut(name: str) -> tuple[str, list[int]]:
    """The inverse of `Cut.name`: the kernel; images, rows, columns, slots, splits and CTAs of a cluster."""
    kernel, numbers = name.split(" ")
    tile, *others = numbers.split("/")
    cluster = [] if len(others) > 2 else [1]
    return kernel, [*map(int, tile.split("x")), *map(int, others), *cluster]


def planned_cuts(problem: peers.Problem, device: str | None = None) -> list[Cut]:
    """The planner's cut of every kernel that can run the problem, the lowest prediction first."""
    with lowrank_ops.set_policy("fused"):
        found = explain(problem, device)
    plans = [plan for plan in (found.chosen, *found.others) if plan["path"] == "fused"]
    return [
        Cut(
            plan["kernel"],
            tuple(plan["tile"]),
            plan["stages"],
            plan["splits"],
            plan["predicted_seconds"],
            plan["cluster"],
        )
        for plan in sorted(plans, key=lambda plan: float(plan["predicted_seconds"]))
    ]


def hopeful(cuts: Sequence[Cut]) -> list[Cut]:
    """The cuts that are not predicted to be much slower than the best (HOPELESS)."""
    seconds = [cut.predicted_seconds or 0 for cut in cuts]
    return [cut for cut, taken in zip(cuts, seconds, strict=True) if taken <= HOPELESS * min(seconds)]


def other_cuts(cut: Cut) -> Iterator[Cut]:
    """Cuts around a planned one: other numbers of slots, a tile halved along an axis or turned, twice the splits. Of
    Hopper's kernels the tile is fixed, and those of CP and linear layers form clusters or none."""
    if "_sm90a_" in cut.kernel:
        if not cut.kernel.startswith("tucker"):
            yield replace(cut, cluster=3 - cut.cluster, predicted_seconds=None)
        return
    images, rows, columns = cut.tile
    for stages in (2, 3, 4):
        yield Cut(cut.kernel, cut.tile, stages, cut.splits)
    turned = [(images, columns, rows)] if rows > 1 else []  # a linear layer's tile is one line
    for tile in ((images, max(1, rows // 2), columns), (images, rows, max(1, columns // 2)), *turned):
        yield Cut(cut.kernel, tile, cut.stages, cut.splits)
    if not cut.kernel.endswith("_persistent"):  # which has no splits
        yield Cut(cut.kernel, cut.tile, cut.stages, 2 * cut.splits)


def runner(problem: peers.Problem, cut: Cut) -> Callable[[], Tensor]:
    """A function that launches the cut's kernel with this cut, whatever the planner would choose."""
    cell, (first, *middle, last) = problem.cell, problem.factors
    core = middle[0] if cell.op == "tucker_conv2d" else None
    height, width = middle if cell.op == "cp_conv2d" else (None, None)
    windows = [[cell.stride] * 2, list(cell.paddings), [cell.dilation] * 2]
    numbers = [*cut.tile, cut.stages, cut.splits, cut.cluster]
    tensors = (problem.input, first, core, height, width, last, problem.bias)
    return lambda: _C.run_gpu_kernel(cut.kernel, numbers, *tensors, windows, "none", None)


def contenders(problem: peers.Problem) -> list[peers.Contender]:
    """Every hopeful kernel with its planned cut, for `benchmarks.run --peers kernels`."""
    if problem.input.device.type != "cuda":
        return []
    return [peers.Contender(cut.name, "kernel", runner(problem, cut)) for cut in hopeful(planned_cuts(problem))]
