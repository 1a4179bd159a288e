"""`python -m benchmarks.gpu.choices RESULTS`: what the planner of today makes of a GPU's measurements.

Reads a file of `benchmarks.run --device cuda --peers chain merged dense graph kernels --json`, or a set of
benchmarks/results/h200.csv by its name. For each cell the
planner chooses among the ways that were timed: every kernel that exists today with the cut of that run, and the
chain. Printed are the times of its choice and of the fastest other way to run the block, in microseconds: on the GPU
alone, as from a CUDA graph, and of a call from Python on an idle GPU. In a file of NCHW inputs the other ways are those
in NCHW; none of them was timed in a CUDA graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.core.bench import Column, Table, geometric_mean
from benchmarks.core.layers import Cell
from benchmarks.core.outcome import SHORT_OPS, number
from benchmarks.studies import fit_gpu_cost, gpu_times
from benchmarks.studies.gpu_times import GpuTimes, Way
from lowrank_ops.ops.extension import _C

GPU = "H200"


@dataclass(frozen=True)
class Choice:
    """A cell with the planner's choice and the fastest peer. Times in microseconds; dense: None if not timed."""

    cell: Cell
    way: str
    graph: float
    peer: str
    peer_graph: float
    dense: float | None
    call: float
    peer_call: float

    @property
    def over_peer(self) -> float:
        return self.peer_graph / self.graph

    @property
    def over_peer_call(self) -> float:
        return self.peer_call / self.call

    def row(self) -> list[str]:
        cell, over_dense = self.cell, None if self.dense is None else self.dense / self.graph
        return [SHORT_OPS[cell.op], cell.layer, cell.shape, cell.ranks, self.way, f"{self.graph:.1f}",
                f"{self.peer_graph:.1f}", self.peer, number(self.over_peer), number(over_dense),
                f"{self.call:.0f}", f"{self.peer_call:.0f}", number(self.over_peer_call)]  # fmt: skip


COLUMNS = [
    Column("op", 6, left=True), Column("layer", 17, left=True), Column("shape", 26, left=True),
    Column("ranks", 7, left=True), Column("choice", 25, left=True), Column("us", 6), Column("peer us", 7),
    Column("that peer", 17, left=True), Column("x peer", 6), Column("x dense", 7), Column("call us", 7),
    Column("peer us", 7), Column("x call", 6),
]  # fmt: skip


def choose(measured: GpuTimes, constants: dict[str, Any], launch: float) -> Choice:
    """The planner's choice for a cell: on the GPU alone, and of a call with its launches."""
    cell, dtype, layout = measured.cell, measured.dtype, measured.layout
    nchw = layout == "nchw"
    ways = {way.name: way for way in measured.ways if not (nchw and takes_channels_last(way.name))}
    described = fit_gpu_cost.described(cell, dtype, not nchw)
    times = {name: way.us * 1e-6 for name, way in ways.items()}
    kernels = {line["name"] for line in _C.gpu_kernels()}
    predicted = {}
    for name in times:
        if name.split(" ")[0] in kernels:
            o = fit_gpu_cost.fused(cell, dtype, name, times[name], GPU, layout, False)
            predicted[name] = fit_gpu_cost.predict(o, constants, launch)
    kind = fit_gpu_cost.chain_kind(described)
    chain = kind if cell.is_linear else f"{kind} {layout}"
    of_chain = fit_gpu_cost.chain(cell, dtype, chain, times[chain], GPU, layout)
    assert of_chain is not None
    chain_seconds = fit_gpu_cost.predict(of_chain, constants, launch) + of_chain.beside
    launches = _C.library_call_seconds * float(of_chain.features[0])
    best = min(predicted, key=lambda name: predicted[name])
    recorded = chain if nchw else f"{kind} graph"
    in_graph = best if predicted[best] < chain_seconds else recorded
    called = best if predicted[best] < max(chain_seconds, launches) else chain
    peers = {name: way for name, way in ways.items() if way.kind == "peer"}
    peer = min(peers, key=lambda name: peers[name].us)
    return Choice(
        cell,
        "chain" if in_graph == recorded else in_graph.split("_", 2)[2],
        ways[in_graph].us,
        peer,
        peers[peer].us,
        min((way.us for way in ways.values() if way.kind == "dense"), default=None),
        call_time(ways[called]),
        min(call_time(way) for name, way in peers.items() if not name.endswith("graph")),
    )


def call_time(way: Way) -> float:
    assert way.call_us is not None, f"no call of {way.name} was timed"
    return way.call_us


def takes_channels_last(peer: str) -> bool:
    """Whether a peer reads a channels_last input even in a run with NCHW inputs."""
    return peer.endswith((" channels_last", "chain graph", "merged graph"))


def choices(path: str | Path) -> list[Choice]:
    """The choices in all cells of a results file, or of a set of h200.csv."""
    (clock,) = (known["clock"] for known in _C.named_gpus() if known["name"] == GPU)
    launch, constants = fit_gpu_cost.parse(fit_gpu_cost.CONSTANTS.read_text(), clock)
    return [choose(measured, constants, launch) for measured in gpu_times.read_set(path)]


def summary(found: Iterable[Choice]) -> str:
    found = list(found)
    over, call = [one.over_peer for one in found], [one.over_peer_call for one in found]
    return (f"{len(found)} cells: {geometric_mean(over):.2f} times as fast as the fastest other way on the GPU "
            f"(worst {min(over):.2f}, below 0.95: {sum(ratio < 0.95 for ratio in over)}); called from Python "
            f"{geometric_mean(call):.2f} (worst {min(call):.2f})")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.choices", description=__doc__)
    parser.add_argument("results", help=f"a JSON file, or a set of {gpu_times.H200.name}")
    found = choices(parser.parse_args(arguments).results)
    table = Table(COLUMNS)
    table.header()
    for one in found:
        table.row(one.row())
    for op, short in SHORT_OPS.items():
        of_op = [one for one in found if one.cell.op == op]
        if of_op:
            print(f"{short}: {summary(of_op)}")


if __name__ == "__main__":
    main()
