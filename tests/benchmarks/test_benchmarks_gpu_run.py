"""The GPU benchmark's run, on the CPU and on small cells: command line, dry run, files; with a GPU, the real one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lowrank_ops
from benchmarks import run
from benchmarks.core import layers, peers
from benchmarks.core.graphs import Captured
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import timing as gpu
from benchmarks.studies import fit_cost
from tests.support.benchmark_cells import SMALL, HostDevice, same

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def test_file_names() -> None:
    assert gpu_run.file_for("out", "NVIDIA H100 80GB HBM3", "tf32") == Path("out/h100_80gb_hbm3_tf32.json")
    assert gpu_run.file_for("out/", "NVIDIA GeForce RTX 4090", "bfloat16") == Path("out/geforce_rtx_4090_bfloat16.json")
    assert gpu_run.file_for("out/mine.json", "NVIDIA A100", "tf32") == Path("out/mine.json")


def test_options_of_gpus() -> None:
    options = run.parse_arguments(["--device", "cuda"])
    assert options.cells == layers.quick_gpu() and options.peers == list(peers.GPU_PEERS)
    assert options.dtype == ["bfloat16", "float16", "tf32"] and options.seconds == 2.0
    options = run.parse_arguments(["--device", "cuda", "--dtype", "bf16", "--cells", "3:5", "--peers", "chain"])
    assert options.cells == layers.quick_gpu()[3:5] and options.dtype == ["bfloat16"] and options.peers == ["chain"]
    assert run.parse_arguments(["--device", "cuda", "--full"]).cells == layers.full_gpu()
    assert run.parse_arguments(["--cells", ":2"]).cells == layers.quick()[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "3"], "--minutes: needs --device cuda"),
        (["--dry-run"], "--dry-run: needs --device cuda"),
        (["--dtype", "tf32"], "tf32 and graph"),
        (["--peers", "graph"], "tf32 and graph"),
        (["--cells", "1-2"], "--cells: must be a slice"),
        (["--cells", "900:"], "--cells: must be a slice"),
        (["--device", "cuda", "--resume"], "--resume: needs --json"),
        (["--device", "cuda", "--json", "a.json"], "must be a folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        run.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_dry_run_lists_every_cell_and_contender(capsys) -> None:
    assert run.main(["--device", "cuda", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for dtype in ("bfloat16", "float16", "tf32"):
        assert f"{dtype}: {len(layers.quick_gpu())} cells" in printed
    for cell in layers.quick_gpu():
        assert printed.count(f"| {cell.shape} ") >= 3, cell
    for name in ("fused graph (ours)", "merged graph (peer)", "compile (peer)", "dense channels_last (dense)"):
        assert name in printed
    assert "bfloat16 tucker_conv2d: predicted " in printed
    assert "planner predicts for H100" in printed and "no predictions" not in printed


def test_dry_run_says_what_the_planner_says(capsys) -> None:
    cell = layers.quick_gpu()[0]
    shapes = [(1, 64, 224, 224), (32, 64), (32, 32, 3, 3), (64, 32), (64,)]
    (plan,) = lowrank_ops.explain(
        lowrank_ops.tucker_conv2d, shapes, torch.bfloat16, "A100", memory_format=torch.channels_last, verbose=False,
        padding=1,
    )  # fmt: skip
    assert str(cell).startswith("tucker_conv2d vgg16 conv1_2 1x64-64 224x224")
    arguments = ["--device", "cuda", "--dry-run", "--gpu", "A100", "--cells", "0:1", "--dtype", "bf16"]
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert plan.chosen["kernel"].removeprefix("tucker_conv2d_").removesuffix(" of torch ops") in printed
    assert f"{plan.chosen['predicted_seconds'] * 1e6:.1f}" in printed
    assert run.main(["--device", "cuda", "--dry-run", "--gpu", "GTX 480"]) == 2
    assert "GTX 480" in capsys.readouterr().err


def test_dry_run_degrades_without_predictions(monkeypatch, capsys) -> None:
    explain = gpu_run.explain

    def unknown(problem, device):
        made = explain(problem, device)
        chosen = {"path": "chain", "kernel": "chain of torch ops", "predicted_seconds": 0.0}
        return dataclasses.replace(made, path="chain", chosen=chosen, others=[], rejections=[("fused", "no code")])

    monkeypatch.setattr(gpu_run, "explain", unknown)
    assert run.main(["--device", "cuda", "--dry-run", "--cells", "0:2"]) == 0
    printed = capsys.readouterr().out
    assert "no predictions: no code" in printed and "the eager chain" not in printed


def test_without_a_gpu_the_way_out_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda"]) == 2
    assert "no CUDA GPU here; --dry-run" in capsys.readouterr().err


DESCRIBED = {"name": "Simulated 1", "multiprocessors": 4}


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs the GPU's path on the CPU, on small cells."""
    monkeypatch.setattr(layers, "quick_gpu", lambda: SMALL)
    monkeypatch.setattr(gpu, "query_driver", lambda uuid=None: {"driver_version": "1"})

    def measure(*arguments: str, device: object = None) -> int:
        options = run.parse_arguments(
            ["--device", "cuda", "--seconds", "0.01", "--peers", "chain", "merged", "dense", *arguments]
        )
        return gpu_run.run(options, device or HostDevice(), "cpu", DESCRIBED, copy_bytes=4096, size=16, seconds=0.01)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield measure
    torch.set_num_threads(threads)
    assert lowrank_ops.policy() == "auto"


@pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])
def test_a_run_writes_every_figure(simulated, dtype, tmp_path, capsys) -> None:
    assert simulated("--dtype", dtype, "--json", str(tmp_path)) == 0
    written = json.loads((tmp_path / f"simulated_1_{dtype}.json").read_text())
    assert {"device", "machine", "versions", "dtype", "layout", "peers", "runs", "missing", "failed", "summary",
            "cells"} == set(written)  # fmt: skip
    assert written["missing"] == 0 and written["failed"] == {} and written["dtype"] == dtype
    assert {"torch", "cuda", "cudnn", "git_sha"} <= set(written["versions"])
    (made,) = written["runs"]
    assert made["copy_bytes_per_second"] > 0 and made["matmul_flops_per_second"] > 0 and made["cudnn_benchmark"]
    printed = capsys.readouterr().out
    for cell, entry in zip(SMALL, written["cells"], strict=True):
        assert cell.shape in printed and entry["wrong"] == {} and entry["dtype"] == dtype
        contenders = entry["contenders"]
        medians = {name: contender["median_us"] for name, contender in contenders.items()}
        assert all(0 < c["p10_us"] <= c["median_us"] <= c["p90_us"] for c in contenders.values())
        assert all(c["call"]["median_us"] > 0 and c["launch_us"] > 0 for c in contenders.values())
        fastest = min(medians[name] for name in medians if contenders[name]["kind"] == "peer")
        assert entry["over_fastest_peer"] == pytest.approx(fastest / medians["fused"])
        bound = max(entry["bytes"] / made["copy_bytes_per_second"], entry["flops"] / made["matmul_flops_per_second"])
        assert entry["share_of_bound"] == pytest.approx(bound * 1e6 / medians["fused"])
    with pytest.raises(ValueError, match="is of Simulated 1"):
        fit_cost.read(tmp_path / f"simulated_1_{dtype}.json")


def test_a_run_is_taken_up_again(simulated, monkeypatch, tmp_path, capsys) -> None:
    file = str(tmp_path / "a.json")
    arguments = ["--dtype", "bf16", "--json", file, "--resume"]
    assert simulated(*arguments, "--cells", "1:2") == 0
    first = json.loads(Path(file).read_text())
    assert [entry["op"] for entry in first["cells"]] == ["cp_conv2d"]
    assert simulated(*arguments) == 0
    whole = json.loads(Path(file).read_text())
    assert "1 cells are in" in capsys.readouterr().out
    assert [entry["op"] for entry in whole["cells"]] == ["cp_conv2d", "tucker_conv2d", "lowrank_linear"]
    assert same(whole["cells"][0], first["cells"][0])
    assert len(whole["runs"]) == 2 and whole["missing"] == 0
    assert [line["cells"] for line in whole["summary"]["ops"]] == [1, 1, 1, 3]

    monkeypatch.setitem(DESCRIBED, "name", "Simulated 2")
    assert simulated(*arguments) == 2
    assert "is of device 'Simulated 1', this run is of 'Simulated 2'" in capsys.readouterr().err
    assert json.loads(Path(file).read_text()) == whole


def test_a_run_stops_in_time(simulated, monkeypatch, tmp_path, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu_run.time, "monotonic", lambda: now[0])
    measure = gpu_run.Bench.measure

    def slow(self, *arguments):
        now[0] += 50.0
        return measure(self, *arguments)

    monkeypatch.setattr(gpu_run.Bench, "measure", slow)
    assert simulated("--dtype", "bf16", "fp16", "--json", str(tmp_path), "--minutes", "2") == 0
    printed = capsys.readouterr().out
    assert "stopped after 100 s: 1 cells are missing" in printed and "float16: no time left" in printed
    written = json.loads((tmp_path / "simulated_1_bfloat16.json").read_text())
    assert written["missing"] == 1 and len(written["cells"]) == 2
    assert not (tmp_path / "simulated_1_float16.json").exists()


def spoil(monkeypatch: pytest.MonkeyPatch, kind: str, op: str, error: str = "") -> None:
    contenders = peers.contenders

    def made(problem, names):
        def wrong(run: Callable[[], Tensor]) -> Tensor:
            if error:
                raise RuntimeError(error)
            return run() + 1

        return [
            dataclasses.replace(c, run=lambda run=c.run: wrong(run)) if (c.kind, problem.cell.op) == (kind, op) else c
            for c in contenders(problem, names)
        ]

    monkeypatch.setattr(peers, "contenders", made)


def test_wrong_contenders_do_not_stop_a_run(simulated, monkeypatch, tmp_path, capsys) -> None:
    file = str(tmp_path / "a.json")
    arguments = ["--dtype", "bf16", "--json", file]
    with monkeypatch.context() as patch:
        spoil(patch, "fused", "cp_conv2d")
        assert simulated(*arguments) == 1
    written = json.loads(Path(file).read_text())
    assert list(written["failed"]) == [str(SMALL[1])] and written["missing"] == 1 and len(written["cells"]) == 2
    assert "output of fused is wrong: relative error" in capsys.readouterr().err

    with monkeypatch.context() as patch:
        spoil(patch, "peer", "tucker_conv2d", "no such algorithm")
        assert simulated(*arguments) == 0
    entry = json.loads(Path(file).read_text())["cells"][0]
    assert set(entry["wrong"]) == {"chain nchw", "chain channels_last"} and entry["over_fastest_peer"] is None
    assert entry["wrong"]["chain nchw"] == "RuntimeError: no such algorithm"

    with monkeypatch.context() as patch:
        spoil(patch, "forced", "tucker_conv2d")
        assert simulated(*arguments, "--peers", "chain", "forced") == 1
    entry = json.loads(Path(file).read_text())["cells"][0]
    assert set(entry["wrong"]) == {"fused (forced)", "chain (forced)"} and entry["over_fastest_peer"] > 0


def test_a_dead_gpu_ends_the_run(simulated, monkeypatch, tmp_path, capsys) -> None:
    class Dying(HostDevice):
        dead = False

        def synchronize(self) -> None:
            if self.dead:
                raise RuntimeError("an illegal memory access was encountered")

    device = Dying()
    measure = gpu_run.Bench.measure

    def fails(self, cell, *arguments):
        device.dead = cell.op == "cp_conv2d"
        return measure(self, cell, *arguments)

    monkeypatch.setattr(gpu_run.Bench, "measure", fails)
    assert simulated("--dtype", "bf16", "fp16", "--json", str(tmp_path), device=device) == 1
    written = json.loads((tmp_path / "simulated_1_bfloat16.json").read_text())
    assert written["missing"] == 2 and "illegal memory access" in written["failed"][str(SMALL[1])]
    assert "the GPU no longer answers: 2 cells are missing" in capsys.readouterr().err
    assert not (tmp_path / "simulated_1_float16.json").exists()


def test_the_driver_that_cannot_be_asked_says_nothing(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu.query_driver() == {}


@pytest.mark.parametrize(
    ("answer", "clock"), [("570.1, 1980, 2619, 1980, 120.5, 700.00, 35\n", "1980"), ("bad\n", None)]
)
def test_the_driver_answers_in_order(answer, clock, monkeypatch, tmp_path) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu.query_driver("1234").get("clocks.sm") == clock


@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32", "float32"])
def test_a_run_on_the_gpu(dtype, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(layers, "quick_gpu", lambda: SMALL)
    chosen = ["chain", "merged", "dense", "forced", "graph"]
    arguments = ["--device", "cuda", "--dtype", dtype, "--seconds", "0.05", "--json", str(tmp_path / "a.json")]
    assert run.main([*arguments, "--peers", *chosen]) == 0
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["missing"] == 0 and written["failed"] == {}
    for entry in written["cells"]:
        assert entry["wrong"] == {}
        assert all(contender["median_us"] > 0 for contender in entry["contenders"].values())


@needs_gpu
def test_a_captured_function_sees_new_values() -> None:
    input = torch.ones(8, device="cuda")
    captured = Captured(lambda: input * 2)
    assert captured().tolist() == [2.0] * 8
    input.fill_(3.0)
    assert captured().tolist() == [6.0] * 8


@needs_gpu
def test_events_time_the_gpu_and_not_the_flush() -> None:
    device = gpu.CudaDevice()
    source = torch.zeros(1 << 26, device="cuda")
    target = torch.empty_like(source)
    functions = {"nothing": lambda: None, "copy": lambda: target.copy_(source)}
    timings = gpu.time_on(device, functions, seconds=0.5)
    assert 0 < timings["nothing"].gpu.median < 2e-5
    rate = 2 * source.nbytes / timings["copy"].gpu.median
    assert 1e11 < rate < 2e13
