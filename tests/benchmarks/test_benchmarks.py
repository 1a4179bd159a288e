"""The benchmark's own machinery: timing core, layer list, contenders and their check, command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import run
from benchmarks.core import bench, cpu_result, engines, layers, peers
from benchmarks.core.layers import Cell
from benchmarks.core.limits import Limits
from lowrank_ops import reference
from tests.support.benchmark_cells import SMALL_ON_CPU, same


class Clock:
    """A clock that only the timed functions move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def function(self, name: str, seconds: float):
        def call() -> None:
            self.log.append(name)
            self.now += seconds

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(bench.time, "perf_counter", made.perf_counter)
    return made


def test_timing_is_the_median_of_interleaved_calls(clock: Clock) -> None:
    functions = {"short": clock.function("short", 2.0**-10), "long": clock.function("long", 2.0**-4)}
    timings = bench.time_interleaved(functions, seconds=0.25, warmup=0.0, min_calls=4)
    assert timings["short"].median == timings["short"].p90 == 2.0**-10
    assert timings["long"].median == timings["long"].p10 == 2.0**-4
    # A turn lasts a quarter of the slowest call, 2^-6 s; 0.25 s of the short function make sixteen of them.
    assert timings["long"].calls == 16
    assert timings["short"].calls == 16 * 2**4
    turns = [name for name, previous in zip(clock.log, ["", *clock.log], strict=False) if name != previous]
    assert turns.count("long") >= 4 and turns.count("short") >= 4


def test_every_turn_is_prepared_and_its_first_call_is_not_timed(clock: Clock, monkeypatch) -> None:
    def before(name: str) -> None:
        clock.log.append(f"before {name}")

    monkeypatch.setattr(bench, "TURN_SECONDS", 2.0**-6)
    functions = {name: clock.function(name, 2.0**-7) for name in "ab"}
    timings = bench.time_interleaved(functions, seconds=2.0**-5, warmup=0.0, min_calls=1, before=before)
    assert timings["a"].calls == timings["b"].calls == 2 * 2
    warmup = ["before a", "a", "before b", "b"]
    a, b = ["before a", *"aaa"], ["before b", *"bbb"]
    assert clock.log == [*warmup, *a, *b, *b, *a]


@pytest.mark.parametrize("options", [{"seconds": 0.0}, {"warmup": -1.0}, {"min_calls": 0}])
def test_timing_refuses_bad_arguments(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        bench.time_interleaved({"a": lambda: None}, **options)
    with pytest.raises(ValueError, match="0 functions"):
        bench.time_interleaved({})


def test_geometric_mean() -> None:
    assert bench.geometric_mean([0.5, 8.0, 2.0]) == pytest.approx(2.0)
    assert math.isnan(bench.geometric_mean([]))


def test_machine_and_versions_say_what_the_figures_depend_on() -> None:
    assert bench.machine()["cpu"] and bench.machine()["cores"] >= 1
    assert bench.versions()["torch"] == torch.__version__ and bench.versions()["git_sha"]


def test_results_do_not_make_a_commit_dirty(tmp_path: Path) -> None:
    """A run that writes its results into the checkout is still of the commit; a changed source file is not."""
    environment = {"GIT_CONFIG_GLOBAL": os.devnull, "PATH": os.environ["PATH"]}

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        command = ["git", *who, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    source, result = tmp_path / "benchmarks/core/bench.py", tmp_path / "benchmarks/results/a.csv"
    for path in (source, result):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "--short", "HEAD").strip()
    result.write_text("2")
    (result.parent / "new.json").write_text("3")
    assert bench.git_sha(source.parent) == commit
    source.write_text("2")
    assert bench.git_sha(source.parent) == f"{commit}-dirty"


@pytest.mark.parametrize("cell", [*SMALL_ON_CPU, *dict.fromkeys(layers.quick() + layers.quick_gpu())], ids=str)
def test_figures_of_a_cell_agree_with_torch(cell: Cell) -> None:
    """Output size, FLOPs and weights against PyTorch's own on meta tensors."""
    with torch.device("meta"):
        (KH, KW), options = cell.kernel, {}
        if cell.is_linear:
            input, dense = torch.empty(cell.batch, cell.S), torch.empty(cell.T, cell.S)
            factors = [torch.empty(cell.rank, cell.S), torch.empty(cell.T, cell.rank)]
        else:
            input, dense = torch.empty(cell.batch, cell.S, *cell.size), torch.empty(cell.T, cell.S, KH, KW)
            options = {"stride": cell.stride, "padding": cell.paddings, "dilation": cell.dilation}
            if isinstance(cell.rank, tuple):
                R1, R2 = cell.rank
                shapes = [(R1, cell.S), (R2, R1, KH, KW), (cell.T, R2)]
            else:
                shapes = [(cell.rank, cell.S), (cell.rank, KH), (cell.rank, KW), (cell.T, cell.rank)]
            factors = [torch.empty(shape) for shape in shapes]
        with FlopCounterMode(display=False) as chain:
            output = getattr(reference, cell.op)(input, *factors, **options)
        with FlopCounterMode(display=False) as whole:
            _ = F.linear(input, dense) if cell.is_linear else F.conv2d(input, dense, **options)
    assert cell.flops == chain.get_total_flops()
    assert cell.dense_flops == whole.get_total_flops()
    assert cell.weights == sum(factor.numel() for factor in factors)
    assert cell.dense_weights == dense.numel()
    assert cell.bytes(2) == 2 * (input.numel() + output.numel() + cell.weights + cell.T)
    if not cell.is_linear:
        assert cell.output_size == tuple(output.shape[2:])


def test_quick_list_is_spread_over_the_grid() -> None:
    quick, full = layers.quick(), layers.full()
    assert 35 <= len(quick) <= 50
    assert len(set(quick)) == len(quick) and len(set(full)) == len(full)
    assert set(quick) <= set(full)
    assert {cell.batch for cell in quick if not cell.is_linear} == {1, 8, 32}
    assert {2} < {cell.stride for cell in quick}
    assert any(cell.dilation > 1 for cell in quick) and any(cell.kernel == (2, 2) for cell in quick)
    for network in ("vgg16", "resnet", "english_g2", "craft", "conv1d"):
        assert {cell.op for cell in quick if cell.layer.startswith(network)} >= {"tucker_conv2d", "cp_conv2d"}
    for op, divisors in (("tucker_conv2d", {8, 4, 2}), ("cp_conv2d", {4, 2, 1})):
        cells = [cell for cell in quick if cell.op == op]
        ranks = [cell.rank if isinstance(cell.rank, tuple) else (cell.rank,) for cell in cells]
        assert {cell.S // rank[0] for cell, rank in zip(cells, ranks, strict=True)} == divisors
    assert sum(cell.S != cell.T for cell in quick) >= 10
    assert {cell.op for cell in quick if cell.size == (480, 640)} == {"tucker_conv2d", "cp_conv2d"}
    long = {(cell.S, cell.T, cell.size, cell.kernel) for cell in quick if cell.layer.startswith("conv1d")}
    assert long == {(128, 128, (1, 64), (1, 64)), (1024, 128, (1, 128), (1, 64))}
    assert {cell.batch for cell in quick if cell.is_linear} >= {1, 8, 64, 256}
    assert all(cell.flops < cell.dense_flops for cell in full)


@pytest.mark.parametrize(
    ("op", "channels", "size", "rank"),
    [
        *(("tucker_conv2d", *rest) for rest in [(64, 56, 16), (128, 28, 32), (256, 14, 64), (512, 7, 128)]),
        *(("tucker_conv2d", *rest) for rest in [(256, 56, 64), (64, 224, 32)]),
        *(("cp_conv2d", *rest) for rest in [(64, 56, 64), (256, 14, 256), (512, 7, 512), (256, 56, 256)]),
    ],
)
def test_quick_list_holds_the_blocks_of_the_prototype(op: str, channels: int, size: int, rank: int) -> None:
    wanted = (op, channels, channels, (rank, rank) if op == "tucker_conv2d" else rank, (size, size), 1)
    assert wanted in {(cell.op, cell.S, cell.T, cell.rank, cell.size, cell.batch) for cell in layers.quick()}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", SMALL_ON_CPU, ids=str)
def test_all_contenders_compute_the_same(cell: Cell, dtype: torch.dtype, layout: str) -> None:
    problem = peers.make_problem(cell, dtype, layout)
    found = peers.contenders(problem, ["chain", "merged", "dense", "prepared"])
    names = {contender.name.split()[0] for contender in found}
    assert names == {"fused", "prepared", "chain", "dense"} | ({"merged"} if cell.op == "cp_conv2d" else set())
    with torch.inference_mode():
        for contender in found:
            assert peers.check(problem, contender.run()) == "", contender.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", SMALL_ON_CPU, ids=str)
def test_check_finds_what_is_wrong(cell: Cell, dtype: torch.dtype) -> None:
    problem = peers.make_problem(cell, dtype)
    output = peers.contenders(problem, [])[0].run()
    assert peers.check(problem, output) == ""
    assert "relative error" in peers.check(problem, output * 1.1)
    assert "relative error" in peers.check(problem, output - problem.bias.reshape(-1, *[1] * (output.dim() - 2)))
    assert "relative error" in peers.check(problem, torch.full_like(output, math.nan))
    assert "shape" in peers.check(problem, output[..., :-1])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="layout must be one of nchw, channels_last, got 'nhwc'"):
        peers.make_problem(SMALL_ON_CPU[0], torch.float32, "nhwc")
    with pytest.raises(ValueError, match="onnx"):
        peers.contenders(peers.make_problem(SMALL_ON_CPU[0], torch.float32), ["onnx"])
    with pytest.raises(SystemExit):
        run.parse_arguments(["--layer", "no such layer"])


def test_options_choose_cells_and_peers(monkeypatch) -> None:
    assert run.parse_arguments([]).cells == layers.quick()
    monkeypatch.setattr(engines, "missing", lambda engine: "")
    assert run.parse_arguments([]).peers == ["chain", "merged", "compile", "dense", "onnxruntime", "openvino"]
    assert run.parse_arguments(["--full"]).cells == layers.full()
    assert run.parse_arguments(["--full"]).peers == list(peers.PEERS)
    assert run.parse_arguments(["--peers", "none"]).peers == []
    chosen = run.parse_arguments(["--layer", "craft conv6 .*R128"]).cells
    assert chosen and all(cell.layer == "craft conv6" and "128" in cell.ranks for cell in chosen)


def test_engines_that_are_missing_are_left_out_unless_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr(engines, "NEEDED", {"onnxruntime": ("no_such_package",), "openvino": ("torch",)})
    options = run.parse_arguments([])
    assert options.peers == ["chain", "merged", "compile", "dense", "openvino"]
    assert options.left_out == {"onnxruntime": "no_such_package not installed (pip install '.[bench]')"}
    for arguments, message in (
        (["--peers", "onnxruntime"], "--peers onnxruntime: no_such_package not installed"),
        (["--device", "cuda", "--peers", "openvino"], "peers on CPUs only"),
    ):
        with pytest.raises(SystemExit):
            run.parse_arguments(arguments)
        assert message in capsys.readouterr().err


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"seconds": 0.001, "matrix_sizes": (32,), "copy_bytes": (4096, 8192)}
    monkeypatch.setattr(run, "LIMIT_SIZES", sizes)


def test_a_run_prints_a_table_and_writes_every_median(monkeypatch, small_limits, tmp_path, capsys) -> None:
    monkeypatch.setattr(layers, "quick", lambda: SMALL_ON_CPU)
    threads = torch.get_num_threads()
    file = tmp_path / "results.json"
    try:
        arguments = ["--dtype", "float32", "--seconds", "0.001", "--json", str(file), "--peers", *peers.DEFAULT_PEERS]
        status = run.main(arguments)
    finally:
        torch.set_num_threads(threads)
    assert status == 0
    printed = capsys.readouterr().out
    assert "threads: 1" in printed and "the fused op's input is channels_last" in printed
    written = json.loads(file.read_text())
    assert {"machine", "versions", "threads", "layout", "peers", "limits", "no_peer", "summary", "cells"} <= set(
        written
    )
    gemm, copies = written["limits"]["float32"].values()
    assert gemm > 0 and list(copies) == ["4096", "8192"]
    assert [entry["op"] for entry in written["summary"]][-1] == "all"
    for cell, entry in zip(SMALL_ON_CPU, written["cells"], strict=True):
        assert cell.shape in printed
        contenders = entry["contenders"]
        medians = {name: contender["median_us"] for name, contender in contenders.items()}
        assert all(median > 0 for median in medians.values())
        of_peers = [medians[name] for name in medians if contenders[name]["kind"] == "peer"]
        assert len(of_peers) == {"tucker_conv2d": 2, "cp_conv2d": 4, "lowrank_linear": 1}[cell.op]
        assert entry["over_fastest_peer"] == pytest.approx(min(of_peers) / medians["fused"])
        saved = entry["over_dense"] * entry["flops"] / entry["dense_flops"]
        assert entry["flop_saving_realised"] == pytest.approx(saved)
        assert entry["over"]["chain"] == pytest.approx(entry["over_fastest_peer"])
        assert entry["over"]["dense"] == pytest.approx(entry["over_dense"])
        assert entry["share_of_gemm"] == pytest.approx(entry["flops"] / medians["fused"] * 1e6 / gemm)
        copy = copies["4096" if entry["bytes"] <= 4096 else "8192"]
        assert entry["share_of_copy"] == pytest.approx(entry["bytes"] / medians["fused"] * 1e6 / copy)
        bound = max(entry["flops"] / gemm, entry["bytes"] / copy)
        assert entry["share_of_bound"] == pytest.approx(bound * 1e6 / medians["fused"])
        assert entry["extra_bytes"]["fused"] > 0 and entry["extra_bytes"]["chain"] > 0
    assert same(written["cells"], [result.as_json() for result in cpu_result.cells_of(written)])
    with pytest.raises(ValueError, match="measure again"):
        cpu_result.cells_of({"cells": []})


def test_a_wrong_peer_is_left_out_and_a_wrong_fused_op_fails_the_run(monkeypatch, small_limits, capsys) -> None:
    contenders = peers.contenders

    def spoiled(kind: str):
        def make(problem, names):
            return [
                peers.Contender(c.name, c.kind, (lambda run=c.run: run() + 1) if c.kind == kind else c.run)
                for c in contenders(problem, names)
            ]

        return make

    monkeypatch.setattr(peers, "contenders", spoiled("peer"))
    limits = Limits(1e9, {4096: 1e9})
    result = run.measure(SMALL_ON_CPU[0], "float32", "channels_last", ["chain", "dense"], 0.001, limits)
    assert set(result.wrong) == {"chain nchw", "chain channels_last"}
    assert result.ratio("peer") is None and result.ratio("dense") is not None

    monkeypatch.setattr(layers, "quick", lambda: SMALL_ON_CPU[:1])
    monkeypatch.setattr(peers, "contenders", spoiled("fused"))
    threads = torch.get_num_threads()
    try:
        assert run.main(["--dtype", "float32", "--seconds", "0.001"]) == 1
    finally:
        torch.set_num_threads(threads)
    assert "output of fused is wrong" in capsys.readouterr().err
