"""What is known of a cell after its run: the figures and their ratios, the plan, what was wrong."""

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
    """What is wrong with each contender that is to be left out, by name.

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
    """What is wrong with a contender's output, empty where it is right; it may also be unable to run.

    The output of the last of `calls` calls is judged: compiled contenders record their graph in an earlier one.
    """
    use_policy(contender.policy)
    try:
        for _ in range(calls - 1):
            contender.run()
        return peers.check(problem, contender.run(), lenient=contender.kind in ("peer", "dense"))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def explain(problem: peers.Problem, device: str | None = None) -> lowrank_ops.Explanation:
    """What the planner decides for a problem under the policy in force, on its own or a named device."""
    op = getattr(functional, problem.cell.op)
    tensors = [problem.input, *problem.factors, problem.bias]
    (explanation,) = lowrank_ops.explain(op, tensors, device=device, verbose=False, **problem.options)
    return explanation


def plan(explanation: lowrank_ops.Explanation) -> str:
    """The path that is taken, and the tile of a fused one."""
    sizes = [str(explanation.chosen[key]) for key in ("tile_rows", "tile_columns") if key in explanation.chosen]
    return " ".join([explanation.path, "x".join(sizes)]).strip()
