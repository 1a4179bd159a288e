"""`python -m benchmarks.run`: the fused ops against every other way to run the same block.

In every cell run: the fused op under policy "auto", the chain of library layers in NCHW and in channels_last, for CP
also the chain with the two depthwise stages merged into one, the chain under torch.compile (max-autotune, frozen), all
of these in the inference engines ONNX Runtime and OpenVINO where they are installed (`pip install '.[bench]'`), and the
dense layer in both formats and in the engines. `--peers` leaves some out, or adds both paths of the op, forced. Outputs
are checked before anything is timed (`peers.check`): a contender with a wrong output is reported and left out; after a
wrong output of the fused op the run continues and ends with exit status 1.

`--device cuda` does the same on a GPU (benchmarks/gpu/run.py), with other cells and with CUDA graphs as further
contenders; `--dry-run` only lists both, on any machine.
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

from benchmarks.core import bench, engines, layers, peers
from benchmarks.core.bench import Table
from benchmarks.core.cpu_result import COLUMNS, LEGEND, CpuResult, print_summary, summary
from benchmarks.core.layers import Cell
from benchmarks.core.limits import Limits, intermediate_bytes, measure_limits, scratch_bytes
from benchmarks.core.outcome import DTYPES, check_all, explain, plan, use_policy
from benchmarks.core.random_cells import random_cells
from benchmarks.gpu import run as gpu_run


def measure(
    cell: Cell, dtype: str, layout: str, chosen_peers: Sequence[str], seconds: float, limits: Limits
) -> CpuResult:
    """Checks and times all contenders of a cell with torch's present number of threads.

    Raises:
        RuntimeError: the fused op's output is outside the error budget.
    """
    problem = peers.make_problem(cell, DTYPES[dtype], layout)
    contenders = {contender.name: contender for contender in peers.contenders(problem, chosen_peers)}
    threads = torch.get_num_threads()

    def before(name: str) -> None:
        use_policy(contenders[name].policy)
        if threads > 1:
            bench.settle()

    with torch.inference_mode():
        wrong = check_all(problem, contenders.values(), fatal=("fused", "forced", "prepared"))
        functions = {name: contender.run for name, contender in contenders.items() if name not in wrong}
        timings = bench.time_interleaved(functions, seconds=seconds, before=before)
    use_policy("auto")
    explanation = explain(problem)
    told = {name: contenders[name] for name in timings if contenders[name].precision}
    size = DTYPES[dtype].itemsize
    return CpuResult(
        cell,
        dtype,
        plan(explanation),
        timings,
        kinds={name: contender.kind for name, contender in contenders.items()},
        wrong=wrong,
        features={plan["path"]: plan["features"] for plan in (explanation.chosen, *explanation.others)},
        limits=limits,
        precisions={name: contender.precision for name, contender in told.items()},
        kernels={name: contender.kernels for name, contender in told.items()},
        scratch_bytes=scratch_bytes(explanation, cell, size, threads),
        chain_bytes=intermediate_bytes(cell, size),
    )


def select(
    use_full: bool,
    pattern: str | None,
    sample: int | None = None,
    part: str | None = None,
    device: str = "cpu",
    drawn: int | None = None,
    seed: int = 0,
) -> list[Cell]:
    """The quick list, the full list, `sample` cells of the full list, `drawn` random ones, or those matching a pattern.

    `part`, "a:b", selects a slice of these.

    Raises:
        ValueError: the pattern matches nothing, or `part` is no slice or an empty one.
    """
    quick, full = (layers.quick, layers.full) if device == "cpu" else (layers.quick_gpu, layers.full_gpu)
    if drawn is not None:
        found = random_cells(drawn, seed)
    elif sample is not None:
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
    add_cell_arguments(parser)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    choose_peers(parser, options)
    on_cpu = options.device == "cpu"
    options.dtype = options.dtype or (["float32", "bfloat16"] if on_cpu else ["bfloat16", "float16", "tf32"])
    options.seconds = options.seconds or (0.25 if on_cpu else 2.0)
    refuse_what_does_not_fit(parser, options)
    try:
        options.cells = select(
            options.full, options.layer, options.sample, options.cells, options.device, options.random, options.seed
        )
    except ValueError as error:
        parser.error(str(error))
    return options


def add_cell_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cells run."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="the device's fixed list of cells (the default)")
    which.add_argument("--full", action="store_true", help="the whole grid, with every peer; takes hours")
    which.add_argument("--layer", metavar="PATTERN", help="cells that match a regular expression")
    which.add_argument(
        "--sample", type=int, metavar="N", help="N cells drawn from the whole grid, always the same ones"
    )
    which.add_argument(
        "--random", type=int, metavar="N", help="N random blocks, always the same ones, for every layout"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of --random; the planner's constants are fitted to blocks of seed 0"
    )
    parser.add_argument("--cells", metavar="A:B", help="only these of the cells chosen, counted from 0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How they run."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    default = "default: float32 bfloat16; cuda: bfloat16 float16 tf32"
    parser.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), type=lambda name: ALIASES.get(name, name), help=default
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU's kernels (default: 1)")
    memory = "where outputs lie: as in the call before, or on pages that were never used (default: kept)"
    parser.add_argument("--memory", choices=list(bench.MEMORY), default="kept", help=memory)
    layout = "of the fused op's input (default: channels_last); peers run in both"
    parser.add_argument("--layout", choices=list(peers.FORMATS), default="channels_last", help=layout)
    which_peers = (
        "default: all but forced and prepared (the op with weights packed before, as engines have them), engines where "
        "installed; with --full or on cuda: all"
    )
    parser.add_argument("--peers", nargs="+", choices=[*peers.ALL_PEERS, "all", "none"], help=which_peers)
    seconds = "measured per contender (default: 0.25); cuda: per cell, for all contenders (default: 2)"
    parser.add_argument("--seconds", type=float, help=seconds)
    file = "write every contender's figures there; cuda: a folder takes <device>_<dtype>.json"
    parser.add_argument("--json", metavar="FILE", help=file)
    of_gpus = parser.add_argument_group("with --device cuda")
    of_gpus.add_argument("--dry-run", action="store_true", help="list cells, contenders, predictions; needs no GPU")
    of_gpus.add_argument("--gpu", default="H100", help="that --dry-run predicts for (default: H100)")
    of_gpus.add_argument("--minutes", type=float, help="stop before this limit; the results so far are written")
    of_gpus.add_argument("--resume", action="store_true", help="measure only the cells that the --json file lacks")


def choose_peers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Sets `peers` to those that run, `peers_named` to the user's words and `left_out` to those that are missing."""
    options.peers_named = options.peers
    on_cpu = options.device == "cpu"
    known = peers.PEERS if on_cpu else peers.GPU_PEERS
    default_peers = [name for name in peers.PEERS if name not in ("forced", "prepared")]
    asked = options.peers or (["all"] if options.full or not on_cpu else default_peers)
    options.peers = [name for name in known if "all" in asked or name in asked]
    options.left_out = {
        name: why for name in options.peers if name in engines.ENGINES and (why := engines.missing(name))
    }
    for name, why in options.left_out.items():
        if name in (options.peers_named or ()):
            parser.error(f"--peers {name}: {why}")
    options.peers = [name for name in options.peers if name not in options.left_out]


def refuse_what_does_not_fit(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Options of a GPU's run on a CPU, and the other way round."""
    on_cpu, named = options.device == "cpu", options.peers_named or ()
    for name, default_value in GPU_ONLY.items():
        if on_cpu and getattr(options, name) != default_value:
            parser.error(f"--{name.replace('_', '-')}: needs --device cuda")
    if on_cpu and ("tf32" in options.dtype or "graph" in named):
        parser.error("tf32 and graph: need --device cuda")
    if not on_cpu and set(engines.ENGINES) & set(named):
        parser.error(f"{' and '.join(engines.ENGINES)}: are peers on CPUs only")
    if options.resume and options.json is None:
        parser.error("--resume: needs --json")
    if not on_cpu and len(options.dtype) > 1 and (options.json or "").endswith(".json"):
        parser.error("--json: for several dtypes must be a folder, got " + options.json)


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
        f"{len(options.cells)} cells, medians over {options.seconds} s per contender, interleaved\n"
        f"outputs lie on {options.memory} memory\n{LEGEND}"
    )
    for name, why in options.left_out.items():
        print(f"{name} is left out: {why}")
    record = Record(options, machine, versions)
    failed = False
    for dtype in options.dtype:
        limits = measure_limits(DTYPES[dtype], **LIMIT_SIZES)
        record.limits[dtype] = limits
        print(f"\n{dtype}: gemm {limits.gemm / 1e9:.0f} GFLOP/s, copies {copies(limits)}")
        for why in record.absences(dtype).values():
            print(why)
        table = Table(COLUMNS, lambda line: print(line, flush=True))
        table.header()
        for cell in options.cells:
            try:
                result = measure(cell, dtype, options.layout, options.peers, options.seconds, limits)
            except RuntimeError as error:
                failed = True
                print(f"FAILED: {error}", file=sys.stderr)
                continue
            record.results.append(result)
            record.write()
            table.row(result.row())
    print_summary(record.results)
    record.write()
    return int(failed)


def copies(limits: Limits) -> str:
    """The rates of the copies in words, the largest copy last."""
    return ", ".join(f"{rate / 1e9:.0f} GB/s of {moved / 2**20:g} MiB" for moved, rate in limits.copies.items())


LIMIT_SIZES: dict[str, Any] = {}  # arguments of `measure_limits`; tests set smaller sizes


class Record:
    """The results file. It is written after every cell, so that a run that is killed leaves its results so far."""

    def __init__(self, options: argparse.Namespace, machine: dict[str, Any], versions: dict[str, str]) -> None:
        self.options = options
        self.head = {
            "machine": machine,
            "versions": versions,
            "threads": torch.get_num_threads(),
            "layout": options.layout,
            "memory": options.memory,
            "peers": options.peers,
            "seconds_a_contender": options.seconds,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self.limits: dict[str, Limits] = {}
        self.results: list[CpuResult] = []

    def absences(self, dtype: str) -> dict[str, str]:
        """The selected peers that do not run in a dtype, and why."""
        asked = [name for name in self.options.peers if name in engines.ENGINES]
        return {name: why for name in asked if (why := engines.unsupported(name, DTYPES[dtype]))}

    def write(self) -> None:
        if self.options.json is None:
            return
        bench.write_json(self.options.json, {
            **self.head,
            "limits": {dtype: limits.as_json() for dtype, limits in self.limits.items()},
            "no_peer": {
                **{name: {"all": why} for name, why in self.options.left_out.items()},
                **{dtype: self.absences(dtype) for dtype in self.limits},
            },
            "summary": summary(self.results),
            "cells": [result.as_json() for result in self.results],
        })  # fmt: skip


if __name__ == "__main__":
    bench.set_memory(parse_arguments().memory)
    sys.exit(main())
