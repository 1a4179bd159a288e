"""The results of a cell, on CPUs and GPUs: the times and their ratios, the plan, complaints about wrong outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import lowrank_ops
from benchmarks.core import peers
from benchmarks.core.bench import Timing
from benchmarks.core.layers import Cell
from lowrank_ops.ops import functional

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,  # GPUs: float32 that products may round to tf32
}
SHORT_OPS = {"tucker_conv2d": "tucker", "cp_conv2d": "cp", "lowrank_linear": "linear"}


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


@dataclass(frozen=True)
class Result:
    """A cell's medians and their ratios; a ratio is None where there is nothing to compare with."""

    cell: Cell
    dtype: str
    plan: str
    timings: dict[str, Timing]
    kinds: dict[str, str]
    wrong: dict[str, str]
    """The contenders that were left out, each with the complaint about it."""
    features: dict[str, list[float]]
    """The features of the planner's cost model, of the fused kernel and of the chain (fit_cost.py)."""

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
        """The share of the FLOP saving that was saved in time."""
        over_dense = self.ratio("dense")
        return None if over_dense is None else over_dense * self.cell.flops / self.cell.dense_flops

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
                name: {"kind": self.kinds[name], **timing.as_json()} for name, timing in self.timings.items()
            },
            "wrong": self.wrong,
            "features": self.features,
        }  # fmt: skip


def use_policy(name: str) -> None:
    lowrank_ops.set_policy(name)


def check_all(
    problem: peers.Problem, contenders: Iterable[peers.Contender], fatal: Collection[str], calls: int = 1
) -> dict[str, str]:
    """The complaint about each contender that has to be left out, by name.

    Raises:
        RuntimeError: a contender of a `fatal` kind is wrong.
    """
    wrong = {}
    for contender in contenders:
        found = complaint(problem, contender, calls)
        if found and contender.kind in fatal:
            raise RuntimeError(f"{problem.cell} {problem.dtype}: the output of {contender.name} is wrong: {found}")
        if found:
            wrong[contender.name] = found
    return wrong


def complaint(problem: peers.Problem, contender: peers.Contender, calls: int = 1) -> str:
    """The complaint about a contender: its output is wrong, or it cannot run. Empty: it is right.

    The output of the last of `calls` calls counts: compiled contenders record their graph in an earlier one.
    """
    use_policy(contender.policy)
    try:
        for _ in range(calls - 1):
            contender.run()
        return peers.check(problem, contender.run(), lenient=contender.kind in ("peer", "dense"))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def explain(problem: peers.Problem, device: str | None = None) -> lowrank_ops.Explanation:
    """The planner's decision for a problem under the present policy, on the problem's device or on a named one."""
    op = getattr(functional, problem.cell.op)
    tensors = [problem.input, *problem.factors, problem.bias]
    (explanation,) = lowrank_ops.explain(op, tensors, device=device, verbose=False, **problem.options)
    return explanation


def plan(explanation: lowrank_ops.Explanation) -> str:
    """The path that is taken, and the tile if it is the fused path."""
    sizes = [str(explanation.chosen[key]) for key in ("tile_rows", "tile_columns") if key in explanation.chosen]
    return " ".join([explanation.path, "x".join(sizes)]).strip()
