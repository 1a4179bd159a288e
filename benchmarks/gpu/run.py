"""`python -m benchmarks.run --device cuda`: measures the cells of a GPU list, or only lists them (`--dry-run`)."""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import lowrank_ops
from benchmarks.core import bench, peers
from benchmarks.core.bench import Column, Table
from benchmarks.core.layers import Cell
from benchmarks.core.outcome import DTYPES, SHORT_OPS, check_all, explain, number, use_policy
from benchmarks.gpu import cuts
from benchmarks.gpu import timing as gpu
from benchmarks.gpu.result import COLUMNS, LEGEND, GpuResult, print_summary, summary
from benchmarks.gpu.timing import Device, Peaks

SAME = ("device", "dtype", "layout", "peers", "torch", "git_sha")  # these must agree in two runs that share a file
CHECKED_CALLS = 3  # torch.compile records its CUDA graph in the second call and replays it from the third on


@contextmanager
def settings(dtype: str) -> Iterator[None]:
    """Sets torch's switches for a dtype: cuDNN searches its algorithms; products are tf32 for dtype "tf32" alone."""
    backends = torch.backends
    cudnn, matmul = backends.cudnn, backends.cuda.matmul
    former = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, cudnn.fp32_precision
    cudnn.benchmark = True
    cudnn.allow_tf32 = matmul.allow_tf32 = dtype == "tf32"
    if dtype == "tf32":
        cudnn.fp32_precision = "tf32"  # inductor's convolution templates read this one
    try:
        yield
    finally:
        cudnn.fp32_precision = former[3]
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = former[:3]


class Bench:
    """A device with its peaks in one dtype, which are measured once. `where` is torch's name of the device."""

    def __init__(self, device: Device, where: str, multiprocessors: int, peaks: Peaks) -> None:
        self.device = device
        self.where = where
        self.multiprocessors = multiprocessors
        self.peaks = peaks

    def measure(self, cell: Cell, dtype: str, layout: str, chosen_peers: Sequence[str], seconds: float) -> GpuResult:
        """Checks all contenders of a cell and times them for `seconds` altogether.

        Raises:
            RuntimeError: the fused op's output is outside the error budget. Another contender with a wrong output, the
            op in a CUDA graph or forced included, is left out and noted in `wrong`.
        """
        problem = peers.make_problem(cell, DTYPES[dtype], layout, device=self.where, tf32=dtype == "tf32")
        contenders = {contender.name: contender for contender in peers.contenders(problem, chosen_peers)}
        if "kernels" in chosen_peers:
            contenders |= {contender.name: contender for contender in cuts.contenders(problem)}
        try:
            with torch.inference_mode():
                wrong = check_all(problem, contenders.values(), fatal=("fused",), calls=CHECKED_CALLS)
                timings = gpu.time_on(
                    self.device,
                    {name: contender.run for name, contender in contenders.items() if name not in wrong},
                    seconds=seconds,
                    warmup=seconds / 20,
                    before=lambda name: use_policy(contenders[name].policy),
                )
        finally:
            use_policy("auto")
        explanation = explain(problem)
        return GpuResult.of(
            timings,
            cell=cell,
            dtype=dtype,
            plan=plan_name(explanation),
            kinds={name: contender.kind for name, contender in contenders.items()},
            wrong=wrong,
            features={},
            peaks=self.peaks,
            multiprocessors=self.multiprocessors,
            predicted=predictions(explanation),
        )


def plan_name(explanation: lowrank_ops.Explanation) -> str:
    """The kernel without its op, its tile (images x rows x columns), splits and clusters ("c2"); or "chain"."""
    chosen = explanation.chosen
    if explanation.path != "fused":
        return explanation.path
    name = chosen["kernel"].removeprefix(f"{explanation.op}_")
    tile = "x".join(map(str, chosen.get("tile", ())))
    splits = f"/{chosen['splits']}" if chosen.get("splits", 1) > 1 else ""
    cluster = f"/c{chosen['cluster']}" if chosen.get("cluster", 1) > 1 else ""
    return f"{name} {tile}{splits}{cluster}".strip()


def predictions(explanation: lowrank_ops.Explanation) -> dict[str, float]:
    """The planner's seconds for the best plan of each path; empty where its cost model has no constants."""
    found: dict[str, float] = {}
    for plan in (explanation.chosen, *explanation.others):
        seconds = plan["predicted_seconds"]
        if seconds > 0:
            found[plan["path"]] = min(seconds, found.get(plan["path"], seconds))
    return found


def file_for(path: str, device: str, dtype: str) -> Path:
    """`path` itself if it names a .json file, otherwise <device>_<dtype>.json in the folder `path`."""
    if path.endswith(".json"):
        return Path(path)
    plain = re.sub(r"^(nvidia|amd)_", "", re.sub(r"[^a-z0-9]+", "_", device.lower())).strip("_")
    return Path(path) / f"{plain}_{dtype}.json"


class Record:
    """The JSON of a device and dtype. It is written after every cell, and a later run can resume it."""

    def __init__(self, path: Path | None, head: dict[str, Any], resume: bool) -> None:
        """Raises ValueError if the file to resume is of another device, commit or setting."""
        self.path = path
        self.head = head
        self.runs = [dict(head["run"])]
        self.results: list[GpuResult] = []
        self.failed: dict[str, str] = {}
        if path is None or not resume or not path.exists():
            return
        content = json.loads(path.read_text())
        for key in SAME:
            ours, theirs = (_plain(_value(part, key)) for part in (head, content))
            if ours != theirs:
                raise ValueError(f"--resume: {path} is of {key} {theirs!r}, this run is of {ours!r}")
        self.runs = [*content["runs"], *self.runs]
        self.results = [GpuResult.from_json(entry) for entry in content["cells"]]

    def done(self) -> set[Cell]:
        return {result.cell for result in self.results}

    def write(self, missing: int, **of_this_run: Any) -> None:
        """Writes the results so far. `missing`: cells without a result; a later run tries failed ones again."""
        self.runs[-1].update(of_this_run)
        if self.path is not None:
            bench.write_json(self.path, {
                **{key: value for key, value in self.head.items() if key != "run"},
                "runs": self.runs,
                "missing": missing,
                "failed": self.failed,
                "summary": summary(self.results),
                "cells": [result.as_json() for result in self.results],
            })  # fmt: skip


def _value(head: dict[str, Any], key: str) -> Any:
    if key == "device":
        return head["device"]["name"]
    return head["versions"][key] if key in ("torch", "git_sha") else head[key]


def _plain(value: Any) -> Any:
    """A commit without "-dirty": the results file itself may be the local change."""
    return value.removesuffix("-dirty") if isinstance(value, str) else value


class Clock:
    """Stops a run before a cell that would probably exceed the time limit."""

    def __init__(self, minutes: float | None) -> None:
        self.start = time.monotonic()
        self.limit = None if minutes is None else 60 * minutes
        self.longest = 0.0

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def cell_took(self, seconds: float) -> None:
        self.longest = max(self.longest, seconds)

    def has_time(self) -> bool:
        return self.limit is None or self.elapsed() + self.longest < self.limit


def run_dtype(
    options: argparse.Namespace, dtype: str, workbench: Bench, record: Record, clock: Clock
) -> tuple[bool, bool]:
    """Measures the cells that the record lacks.

    Returns:
        Whether something of ours was wrong, and whether the GPU still answers.
    """
    failed, alive = False, True
    left = [cell for cell in options.cells if cell not in record.done()]
    if len(left) < len(options.cells):
        print(f"{len(options.cells) - len(left)} cells are in {record.path} already")
    table = Table(COLUMNS, lambda line: print(line, flush=True))
    table.header()
    missing = len(left)
    for cell in left:
        if not clock.has_time():
            print(f"stopped after {clock.elapsed():.0f} s: {missing} cells are missing; --resume goes on with them")
            break
        start = clock.elapsed()
        try:
            result = workbench.measure(cell, dtype, options.layout, options.peers, options.seconds)
            failed |= any(result.kinds[name] in ("ours", "forced", "kernel") for name in result.wrong)
            record.results.append(result)
            missing -= 1
            table.row(result.row())
        except RuntimeError as error:
            failed = True
            record.failed[str(cell)] = str(error)
            print(f"FAILED: {error}", file=sys.stderr, flush=True)
            try:
                workbench.device.synchronize()
            except RuntimeError:
                alive = False
        clock.cell_took(clock.elapsed() - start)
        record.write(missing)
        if not alive:
            print(f"the GPU no longer answers: {missing} cells are missing", file=sys.stderr)
            break
        _free()
    record.write(missing, finished=_now(), driver_at_end=gpu.query_driver(record.head["device"].get("uuid")))
    if record.results:
        print_summary(record.results)
    return failed, alive


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def main(options: argparse.Namespace) -> int:
    """Runs `benchmarks.run --device cuda`; returns the exit status."""
    if options.dry_run:
        return dry_run(options)
    if not torch.cuda.is_available():
        print("no CUDA GPU here; --dry-run lists what would run, with the planner's predictions", file=sys.stderr)
        return 2
    return run(options, gpu.CudaDevice(), "cuda", gpu.describe_device())


def run(options: argparse.Namespace, device: Device, where: str, described: dict[str, Any], **sizes: Any) -> int:
    """Measures on a device; `sizes` go to `gpu.measure_peaks`. Exit status 1 where something of ours was wrong."""
    clock, versions, failed = Clock(options.minutes), gpu.versions(), False
    print(", ".join(f"{key} {value}" for key, value in {**described, **versions}.items()))
    print(
        f"peers: {', '.join(options.peers)}; the fused op's input is {options.layout}; {len(options.cells)} cells, "
        f"{options.seconds} s each, interleaved\n{LEGEND}"
    )
    for dtype in options.dtype:
        if not clock.has_time():
            print(f"{dtype}: no time left")
            break
        with settings(dtype):
            peaks = gpu.measure_peaks(device, where, DTYPES[dtype], **sizes)
            print(f"\n{dtype}: copy {peaks.copy / 1e9:.0f} GB/s, product {peaks.matmul / 1e12:.1f} TFLOP/s")
            head = {
                "device": described,
                "machine": bench.machine(),
                "versions": versions,
                "dtype": dtype,
                "layout": options.layout,
                "peers": options.peers,
                "run": {
                    "started": _now(),
                    "copy_bytes_per_second": peaks.copy,
                    "matmul_flops_per_second": peaks.matmul,
                    "empty_call_us": gpu.empty_call(device) * 1e6,
                    "flushed_bytes": getattr(device, "flushed_bytes", 0),
                    "seconds_a_cell": options.seconds,
                    "cudnn_benchmark": torch.backends.cudnn.benchmark,
                },
            }
            path = None if options.json is None else file_for(options.json, described["name"], dtype)
            try:
                record = Record(path, head, options.resume)
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
            wrong, alive = run_dtype(options, dtype, Bench(device, where, described["multiprocessors"], peaks),
                                     record, clock)  # fmt: skip
            failed |= wrong
            if not alive:
                return 1
    return int(failed)


DRY_COLUMNS = [
    *COLUMNS[:4],
    Column("MFLOP", 8),
    Column("MB", 7),
    Column("FLOP/B", 6),
    Column("plan", 30, left=True),
    Column("fused us", 8),
    Column("chain us", 9),
    Column("x chain", 7),
]


def dry_run(options: argparse.Namespace) -> int:
    """Lists cells, contenders and the planner's predictions for a named GPU. Computes nothing and needs no GPU."""
    print(f"dry run: nothing is measured; the times are those that the planner predicts for {options.gpu}")
    without: dict[str, None] = {}
    over_chain: dict[tuple[str, str], list[float]] = {}
    for dtype in options.dtype:
        print(f"\n{dtype}: {len(options.cells)} cells")
        table = Table(DRY_COLUMNS)
        table.header()
        with settings(dtype):
            for cell in options.cells:
                problem = peers.make_problem(cell, DTYPES[dtype], options.layout, device="meta", tf32=dtype == "tf32")
                try:
                    explanation = explain(problem, options.gpu)
                except ValueError as error:
                    print(f"--gpu: {error}", file=sys.stderr)
                    return 2
                found = predictions(explanation)
                if len(found) == 2:
                    # "auto" takes the chain where that is predicted to be faster.
                    over_chain.setdefault((dtype, cell.op), []).append(max(1.0, found["chain"] / found["fused"]))
                if not found:
                    without.update(dict.fromkeys(reason for _, reason in explanation.rejections))
                table.row(_dry_row(cell, dtype, explanation, found))
    for op in dict.fromkeys(cell.op for cell in options.cells):
        cell = next(cell for cell in options.cells if cell.op == op)
        names = ", ".join(f"{way.name} ({way.kind})" for way in peers.ways(cell, options.peers))
        print(f"\ncontenders of {op}: {names}")
    for (dtype, op), ratios in over_chain.items():
        print(f"{dtype} {op}: predicted {bench.geometric_mean(ratios):.2f}x the eager chain, geometric mean of "
              f"{len(ratios)} cells; no other peer is predicted")  # fmt: skip
    if without:
        print(f"\nno predictions: {'; '.join(without)}")
    return 0


def _dry_row(cell: Cell, dtype: str, explanation: lowrank_ops.Explanation, predicted: dict[str, float]) -> list[str]:
    moved = cell.bytes(DTYPES[dtype].itemsize)
    fused, chain = predicted.get("fused"), predicted.get("chain")
    return [
        SHORT_OPS[cell.op], cell.layer, cell.shape, cell.ranks, f"{cell.flops / 1e6:.1f}", f"{moved / 1e6:.2f}",
        f"{cell.flops / moved:.0f}", plan_name(explanation),
        *("-" if seconds is None else f"{seconds * 1e6:.1f}" for seconds in (fused, chain)),
        number(chain / fused if chain and fused else None),
    ]  # fmt: skip
