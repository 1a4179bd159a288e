"""`python -m benchmarks.gpu.kernels`: every CUDA kernel by itself, with the planner's cut and with similar ones.

    python -m benchmarks.gpu.kernels --json FILE            the blocks of docs/kernels.md
    python -m benchmarks.gpu.kernels --ablations            besides, the planned cuts of each block with less of a stage
    python -m benchmarks.gpu.kernels --profile KERNEL ...   launches each kernel once on its block: for ncu

Times are GPU times with a cold L2 (timing.py). Beside each planned cut stands the planner's prediction (cuts.py).
`python -m benchmarks.run --device cuda --peers ... kernels` times the planned cuts alone, on any list of cells.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import bench, layers, peers
from benchmarks.core.layers import Cell
from benchmarks.core.outcome import DTYPES, check_all
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import timing as gpu
from benchmarks.gpu.cuts import hopeful, other_cuts, planned_cuts, runner

# The blocks by which the design of the kernels is judged: Tucker and CP with 256 channels at 56x56, and a linear layer.
BLOCKS = {
    "tucker": layers.LAYERS["vgg16 conv3_2"].cell("tucker", 4, 32),
    "tucker stride 2": replace(layers.LAYERS["vgg16 conv3_2"].cell("tucker", 4, 32), stride=2),
    "cp": layers.LAYERS["vgg16 conv3_2"].cell("cp", 1, 32),
    "linear": layers.linear("mlp", 256, 4096),
    "linear, many rows": layers.linear("mlp", 128, 16384),
}


def ablations(cell: Cell) -> dict[str, Cell]:
    """The block with little left of one stage: what that stage costs in the whole block is the difference."""
    found = {"64 input channels": replace(cell, S=64), "64 output channels": replace(cell, T=64)}
    return found if cell.is_linear else {**found, "1x1 window": replace(cell, kernel=(1, 1))}


def measure(
    cell: Cell, dtype: str, device: gpu.Device, seconds: float, where: str = "cuda", planned_alone: bool = False
) -> dict[str, Any]:
    """A cell's entry of the JSON: planned and similar cuts and the peers, checked and timed in turns; or the planned
    cuts alone."""
    problem = peers.make_problem(cell, DTYPES[dtype], device=where, tf32=dtype == "tf32")
    planned = hopeful(planned_cuts(problem))
    cuts = {cut.name: cut for cut in planned}
    for cut in () if planned_alone else planned:
        for other in other_cuts(cut):
            cuts.setdefault(other.name, other)
    found = {name: peers.Contender(name, "kernel", runner(problem, cut)) for name, cut in cuts.items()}
    if not planned_alone:
        found |= {peer.name: peer for peer in peers.contenders(problem, ("chain", "merged", "dense", "graph"))}
    with torch.inference_mode():
        wrong = check_all(problem, found.values(), fatal=(), calls=2)
        functions = {name: contender.run for name, contender in found.items() if name not in wrong}
        timings = gpu.time_on(device, functions, seconds=seconds, warmup=0.01)
    taken = {name: {**timing.gpu.as_json(), "call_us": timing.call.median * 1e6} for name, timing in timings.items()}
    return {
        "cell": str(cell),
        "dtype": dtype,
        "flops": cell.flops,
        "bytes": cell.bytes(DTYPES[dtype].itemsize),
        "cuts": [{**cut.as_json(), **taken[name]} for name, cut in cuts.items() if name in taken],
        "peers": {name: figures for name, figures in taken.items() if name not in cuts},
        "wrong": wrong,
    }


def print_entry(entry: dict[str, Any]) -> None:
    """The planned cut and the fastest one of each kernel, then the peers."""
    print(f"\n{entry['cell']} {entry['dtype']}{', ' + entry['ablation'] if 'ablation' in entry else ''}")
    for kernel in dict.fromkeys(cut["kernel"] for cut in entry["cuts"]):
        cuts = [cut for cut in entry["cuts"] if cut["kernel"] == kernel]
        fastest = min(cuts, key=lambda cut: float(cut["median_us"]))
        for cut in [cut for cut in cuts if cut["predicted_us"] is not None] + [fastest]:
            tile = "x".join(map(str, cut["tile"]))
            words = f"{tile}, {cut['stages']} slots, {cut['splits']} splits, clusters of {cut['cluster']}"
            note = "fastest of " + str(len(cuts)) if cut is fastest else f"planned, {cut['predicted_us']:.1f} predicted"
            print(f"  {cut['median_us']:8.1f} us  {kernel} {words} ({note})")
    for name, figures in entry["peers"].items():
        print(f"  {figures['median_us']:8.1f} us  {name}")
    for name, text in entry["wrong"].items():
        print(f"  left out: {name}: {text}")


def profile(kernels: Sequence[str], dtype: str) -> None:
    """Launches each kernel once with the planner's cut of its block, and no other kernel of ours."""
    for kernel in kernels:
        name = next(name for name, cell in BLOCKS.items() if kernel.startswith(cell.op))
        problem = peers.make_problem(BLOCKS[name], DTYPES[dtype], device="cuda", tf32=dtype == "tf32")
        (cut,) = [cut for cut in planned_cuts(problem) if cut.kernel == kernel]
        runner(problem, cut)()
        torch.cuda.synchronize()
        print(f"launched {cut.name} on {BLOCKS[name]} {dtype}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float16", "tf32"], default=["bfloat16"])
    parser.add_argument("--ablations", action="store_true", help="also blocks with less of a stage, in the first dtype")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured per block, for all cuts (default: 4)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", nargs="+", metavar="KERNEL", help="launch these once instead of timing")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA GPU here", file=sys.stderr)
        return 2
    if options.profile:
        profile(options.profile, options.dtype[0])
        return 0
    device = gpu.CudaDevice()
    content: dict[str, Any] = {"device": gpu.describe_device(), "versions": gpu.versions(), "entries": []}

    def add(entry: dict[str, Any]) -> None:
        print_entry(entry)
        content["entries"].append(entry)
        if options.json:
            bench.write_json(options.json, content)

    for dtype in options.dtype:
        with gpu_run.settings(dtype):
            for block in options.blocks:
                add(measure(BLOCKS[block], dtype, device, options.seconds))
    for block in options.blocks if options.ablations else ():
        with gpu_run.settings(options.dtype[0]):
            for name, cell in ablations(BLOCKS[block]).items():
                entry = measure(cell, options.dtype[0], device, options.seconds / 4, planned_alone=True)
                add({**entry, "ablation": f"{block}: {name}"})
    return int(any(entry["wrong"] for entry in content["entries"]))


if __name__ == "__main__":
    sys.exit(main())
