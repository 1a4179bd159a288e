"""`python -m benchmarks.run`: the fused ops against every other way to run the same block.

Every cell runs the fused op under policy "auto", the chain of library layers in NCHW and in channels_last, for CP
the chain with the two depthwise stages merged into one, the chain under torch.compile (max-autotune, frozen), and
the dense layer in both formats; `--peers` leaves some out, or adds the fused kernel forced. Outputs are checked
before anything is timed (`peers.check`): a contender that is wrong is reported and left out; with a wrong fused op
the run goes on and ends with exit status 1.

`--device cuda` does the same on a GPU (gpu_run.py), with CUDA graphs besides and other cells; `--dry-run` only lists
them, on any machine.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from benchmarks import bench, gpu_run, layers, peers
from benchmarks.bench import Column, Table, geometric_mean
from benchmarks.layers import Cell
from benchmarks.outcome import DTYPES, Result, check_all, explain, plan, use_policy

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


def measure(cell: Cell, dtype: str, layout: str, chosen_peers: Sequence[str], seconds: float) -> Result:
    """Check and time all contenders of a cell; the fused op's output must be right.

    Raises:
        RuntimeError: the fused op's output is outside the error budget.
    """
    problem = peers.make_problem(cell, DTYPES[dtype], layout)
    contenders = {contender.name: contender for contender in peers.contenders(problem, chosen_peers)}
    with torch.inference_mode():
        wrong = check_all(problem, contenders.values(), fatal=("fused", "forced"))
        functions = {name: contender.run for name, contender in contenders.items() if name not in wrong}
        timings = bench.time_interleaved(
            functions, seconds=seconds, before=lambda name: use_policy(contenders[name].policy)
        )
    use_policy("auto")
    kinds = {name: contender.kind for name, contender in contenders.items()}
    explanation = explain(problem)
    features = {plan["path"]: plan["features"] for plan in (explanation.chosen, *explanation.others)}
    return Result(cell, dtype, plan(explanation), timings, kinds, wrong, features)


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


def select(
    use_full: bool, pattern: str | None, sample: int | None = None, part: str | None = None, device: str = "cpu"
) -> list[Cell]:
    """The quick or the full list, `sample` cells drawn from the full one, or the cells whose text matches a pattern.

    `part` is a slice of that: "a:b".

    Raises:
        ValueError: a pattern that matches nothing, a slice that is none or is empty.
    """
    quick, full = (layers.quick, layers.full) if device == "cpu" else (layers.quick_gpu, layers.full_gpu)
    if sample is not None:
        found = random.Random(0).sample(full(), sample)
    elif pattern is None:
        found = full() if use_full else quick()
    else:
        cells = dict.fromkeys(quick() + full())
        found = [cell for cell in cells if re.search(pattern, str(cell))]
        if not found:
            raise ValueError(f"--layer: must match a cell (as {str(quick()[0])!r}), got {pattern!r}")
    if part is not None:
        bounds = re.fullmatch(r"(\d*):(\d*)", part)
        found = found[slice(*(int(text) if text else None for text in bounds.groups()))] if bounds else []
        if not found:
            raise ValueError(f"--cells: must be a slice a:b that holds a cell, got {part!r}")
    return found


ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
GPU_ONLY = {"dry_run": False, "minutes": None, "resume": False}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="the device's fixed list of some 40 cells (the default)")
    which.add_argument("--full", action="store_true", help="the whole grid, with every peer; takes hours")
    which.add_argument("--layer", metavar="PATTERN", help="cells that match a regular expression")
    which.add_argument(
        "--sample", type=int, metavar="N", help="N cells drawn from the whole grid, always the same ones"
    )
    parser.add_argument("--cells", metavar="A:B", help="only these of the cells chosen, counted from 0")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    default = "default: float32 bfloat16; cuda: bfloat16 float16 tf32"
    parser.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), type=lambda name: ALIASES.get(name, name), help=default
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU's kernels (default: 1)")
    layout = "of the fused op's input (default: channels_last); peers run in both"
    parser.add_argument("--layout", choices=list(peers.FORMATS), default="channels_last", help=layout)
    which_peers = "default: chain merged dense compile; with --full or on cuda: all"
    parser.add_argument("--peers", nargs="+", choices=[*peers.GPU_PEERS, "all", "none"], help=which_peers)
    seconds = "measured per contender (default: 0.25); cuda: per cell, for all contenders (default: 2)"
    parser.add_argument("--seconds", type=float, help=seconds)
    file = "write every contender's figures there; cuda: a folder takes <device>_<dtype>.json"
    parser.add_argument("--json", metavar="FILE", help=file)
    of_gpus = parser.add_argument_group("with --device cuda")
    of_gpus.add_argument("--dry-run", action="store_true", help="list cells, contenders, predictions; needs no GPU")
    of_gpus.add_argument("--gpu", default="H100", help="that --dry-run predicts for (default: H100)")
    of_gpus.add_argument("--minutes", type=float, help="stop in time, with what was measured written")
    of_gpus.add_argument("--resume", action="store_true", help="measure what the --json file does not hold yet")
    options = parser.parse_args(arguments)
    on_cpu = options.device == "cpu"
    known = peers.PEERS if on_cpu else peers.GPU_PEERS
    asked = options.peers or (["all"] if options.full or not on_cpu else [*peers.DEFAULT_PEERS, "compile"])
    options.peers = [name for name in known if "all" in asked or name in asked]
    options.dtype = options.dtype or (["float32", "bfloat16"] if on_cpu else ["bfloat16", "float16", "tf32"])
    options.seconds = options.seconds or (0.25 if on_cpu else 2.0)
    for name, default_value in GPU_ONLY.items():
        if on_cpu and getattr(options, name) != default_value:
            parser.error(f"--{name.replace('_', '-')}: needs --device cuda")
    if on_cpu and ("tf32" in options.dtype or "graph" in asked):
        parser.error("tf32 and graph: need --device cuda")
    if options.resume and options.json is None:
        parser.error("--resume: needs --json")
    if not on_cpu and len(options.dtype) > 1 and (options.json or "").endswith(".json"):
        parser.error("--json: for several dtypes must be a folder, got " + options.json)
    try:
        options.cells = select(options.full, options.layer, options.sample, options.cells, options.device)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.device == "cuda":
        return gpu_run.main(options)
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
