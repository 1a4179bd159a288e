"""ONNX Runtime and OpenVINO as contenders, what the machine can do, and the figures of a cell on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lowrank_ops
from benchmarks.core import bench, cpu_result, engines, layers, peers
from benchmarks.core.bench import Timing
from benchmarks.core.layers import Cell
from benchmarks.core.limits import Limits, _packed, intermediate_bytes, measure_limits, scratch_bytes
from benchmarks.core.outcome import explain
from tests.support.benchmark_cells import LIMITS, SMALL_ON_CPU, result

# The engines are large and only peers of the benchmark: `make test` does not install them (CI stays light), a checkout
# with `pip install .[bench]` runs these tests.
needs = {
    name: pytest.mark.skipif(bool(engines.missing(name)), reason=engines.missing(name) or "installed")
    for name in engines.ENGINES
}
CELLS = [*SMALL_ON_CPU, Cell("cp_conv2d", "conv1d", 6, 10, 7, (1, 12), kernel=(1, 5), padding=2)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    former = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(former)


def names_of(cell: Cell, engine: str) -> set[str]:
    kinds = {"", " dense", *([" merged"] if cell.op == "cp_conv2d" else [])}
    formats = {""} if cell.is_linear or engine == "onnxruntime" else {" nchw", " channels_last"}
    return {f"{engine}{kind}{format}" for kind in kinds for format in formats}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        pytest.param("onnxruntime", torch.float32, marks=needs["onnxruntime"]),
        pytest.param("openvino", torch.float32, marks=needs["openvino"]),
        pytest.param("openvino", torch.bfloat16, marks=needs["openvino"]),
    ],
)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_engines_compute_the_same(cell, engine, dtype, layout, threads) -> None:
    problem = peers.make_problem(cell, dtype, layout)
    found = [c for c in peers.contenders(problem, [engine, "merged", "dense"]) if c.name.startswith(engine)]
    assert {contender.name for contender in found} == names_of(cell, engine)
    assert {c.kind for c in found if "dense" in c.name} == {"dense"}
    # All are made before any runs: memory that an engine only borrowed would be used again by now.
    for contender in found:
        contender.run()
        problem.input.add_(0)
        assert peers.check(problem, contender.run()) == "", contender.name
        assert contender.precision in ("f32", "bf16") and (dtype is torch.bfloat16 or contender.precision == "f32")


@needs["openvino"]
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_openvino_reads_and_writes_our_memory(dtype) -> None:
    problem = peers.make_problem(SMALL_ON_CPU[0], dtype, "channels_last")
    run = engines.openvino_layers(peers.stages(problem), problem.input, 1)
    first = run()
    kept = first.clone()
    problem.input.neg_()
    second = run()
    assert second.data_ptr() == first.data_ptr() and second.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(second, kept) and peers.check(problem, second) == ""
    assert run.kernels and run.precision


@needs["onnxruntime"]
def test_onnxruntime_reads_and_writes_our_memory() -> None:
    problem = peers.make_problem(SMALL_ON_CPU[-1], torch.float32)
    run = engines.onnxruntime_layers(peers.stages(problem), problem.input, 1)
    kept = run().clone()
    problem.input.neg_()
    assert not torch.equal(run(), kept) and peers.check(problem, run.output) == ""


def test_shared_memory_must_be_contiguous() -> None:
    pytest.importorskip("openvino", reason=engines.missing("openvino"))
    with pytest.raises(ValueError, match="contiguous"):
        engines.shared(torch.zeros(4, 4).t()[:, :2], [])


def test_an_engine_is_no_peer_in_a_dtype_that_it_lacks() -> None:
    assert "no bfloat16 kernels" in engines.unsupported("onnxruntime", torch.bfloat16)
    assert engines.unsupported("onnxruntime", torch.float32) == ""
    assert engines.unsupported("openvino", torch.bfloat16) == ""
    assert "float32 and bfloat16 only" in engines.unsupported("openvino", torch.float16)
    problem = peers.make_problem(SMALL_ON_CPU[0], torch.bfloat16)
    assert [contender.name for contender in peers.contenders(problem, ["onnxruntime"])] == ["fused"]


def test_settling_waits_for_threads_that_spin(monkeypatch) -> None:
    """On clocks of its own: a worker computes until `stop` seconds."""
    now = [0.0]
    stop = 0.0305

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench.time, "process_time", lambda: min(now[0], stop))
    monkeypatch.setattr(bench.time, "sleep", sleep)
    assert not bench.settle(limit=0.02) and now[0] == pytest.approx(0.02, abs=0.0011)
    assert bench.settle(limit=0.2) and stop <= now[0] < stop + 0.002
    before = now[0]
    assert bench.settle() and now[0] == pytest.approx(before + 0.001)


def test_a_cell_is_held_against_the_copy_of_its_size() -> None:
    assert LIMITS.copy_of(1) == LIMITS.copy_of(1000) == 4e10
    assert LIMITS.copy_of(1001) == 2e10 and LIMITS.copy_of(10**9) == LIMITS.stream == 1e10
    assert Limits.from_json(LIMITS.as_json()) == LIMITS
    small, large = SMALL_ON_CPU[-1], layers.LAYERS["resnet layer1"].cell("tucker", 2)
    assert small.bytes(4) <= 1000 and LIMITS.bound(small, 4) == small.bytes(4) / 4e10 > small.flops / 1e11
    assert LIMITS.bound(large, 4) == large.flops / 1e11


def test_limits_are_rates_of_what_was_timed(monkeypatch) -> None:
    made = {"gemm 8": 1e-6, "gemm 16": 1e-6, "copy 64": 1e-8, "copy 128": 1e-7}

    def timed(functions, seconds):
        for function in functions.values():
            function()
        return {name: Timing(made.get(name, 1.0), 0.0, 0.0, 1) for name in functions}

    monkeypatch.setattr(bench, "time_interleaved", timed)
    limits = measure_limits(torch.bfloat16, matrix_sizes=(8, 16), copy_bytes=(128, 64))
    assert limits.gemm == pytest.approx(2 * 16**3 / 1e-6)
    made["packed 8"] = 1e-7
    assert measure_limits(torch.float32, matrix_sizes=(8, 16), copy_bytes=(64,)).gemm == pytest.approx(1.024e10)
    assert limits.copies == pytest.approx({64: 6.4e9, 128: 1.28e9}) and limits.stream == pytest.approx(1.28e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_are_packed_where_torch_can(dtype: torch.dtype) -> None:
    """Without an error on any CPU (make test-avx2: no half precision), for any dtype."""
    packed = _packed(torch.ones(16, 16, dtype=dtype))
    assert (packed is None) == (dtype == torch.float64) or dtype.itemsize == 2


def test_memory_of_a_chain_and_of_our_tiles() -> None:
    tucker, cp, _, linear = SMALL_ON_CPU
    OH, OW = tucker.output_size
    assert intermediate_bytes(tucker, 4) == 4 * 3 * (9 * 7 * 3 + OH * OW * 5)
    (OH, OW), (H, W) = cp.output_size, cp.size
    assert OH * OW > H * W  # the padding makes the last intermediate the largest
    assert intermediate_bytes(cp, 2) == 2 * 2 * 7 * (OH * W + OH * OW)
    assert intermediate_bytes(cp, 2, merged=True) == 2 * 2 * 7 * (H * W + OH * OW)
    assert intermediate_bytes(linear, 4) == 4 * 5 * 4
    cell = layers.LAYERS["vgg16 conv1_2"].cell("tucker", 2)
    problem = peers.make_problem(cell, torch.float32)
    with lowrank_ops.set_policy("fused"):
        explanation = explain(problem)
        tiles = explanation.chosen["scratch_bytes"]
        assert scratch_bytes(explanation, cell, 4, 2) == 2 * tiles < intermediate_bytes(cell, 4) / 10
    with lowrank_ops.set_policy("chain"):
        assert scratch_bytes(explain(problem), cell, 4, 2) == intermediate_bytes(cell, 4)


def test_families_take_the_fastest_of_their_variants() -> None:
    made = result(SMALL_ON_CPU[1], fused=10, chain_nchw=40, merged_nchw=30, compile=20, openvino_nchw=15,
                  openvino_merged_nchw=12, dense_nchw=80, openvino_dense_nchw=60)  # fmt: skip
    assert set(made.families()) == {"chain", "compile", "openvino", "dense"}
    assert made.over("chain") == pytest.approx(3.0) and made.over("openvino") == pytest.approx(1.2)
    assert made.over("dense") == made.ratio("dense") == pytest.approx(6.0) and made.over("onnxruntime") is None
    assert made.fastest("dense") == "openvino dense nchw" and made.ratio("peer") == pytest.approx(1.2)
    assert made.named("openvino merged nchw") == "openvino merged nchw (ran f32)" and made.named(None) == "-"
    assert "openvino merged nchw (ran f32)" in made.row()
    assert len(made.row()) == len(cpu_result.COLUMNS)
    assert result(SMALL_ON_CPU[1], "float32", fused=1, openvino=2).named("openvino") == "openvino"


def test_prepared_weights_are_held_against_the_same_peer() -> None:
    with_prepared = result(SMALL_ON_CPU[0], fused=10, prepared=8, chain=20, openvino=16, dense=40)
    without = result(SMALL_ON_CPU[1], fused=10, chain=20)
    assert with_prepared.prepared == pytest.approx(2.0) and without.prepared is None
    assert with_prepared.ratio("peer") == pytest.approx(1.6) and with_prepared.fastest("peer") == "openvino"
    assert with_prepared.as_json()["prepared_over_fastest_peer"] == pytest.approx(2.0)
    place = [column.title for column in cpu_result.COLUMNS].index("prepared")
    assert (with_prepared.row()[place], without.row()[place]) == ("2.00", "-")
    *_, line = cpu_result.summary([with_prepared, without])
    assert line["prepared_over_fastest_peer"] == pytest.approx(2.0)


def test_summary_counts_losing_cells_and_leaves_out_what_was_not_run(capsys) -> None:
    large = layers.LAYERS["resnet layer2"].cell("tucker", 4)
    results = [
        result(SMALL_ON_CPU[0], fused=10, chain=8, openvino=20, dense=40),
        result(large, fused=10, chain=9.2, dense=80),
        result(SMALL_ON_CPU[-1], fused=10, chain=40),
    ]
    *_, line = cpu_result.summary(results)
    assert line["op"] == "all" and line["cells"] == 3
    assert line["over_fastest_peer"] == pytest.approx((0.8 * 0.92 * 4) ** (1 / 3)) and line["worst"] == 0.8
    assert [line[f"below_{limit}"] for limit in (1.0, 0.95, 0.9, 0.85)] == [2, 2, 1, 1]
    assert line["over_dense"] == pytest.approx((4 * 8) ** 0.5)
    assert line["over"]["openvino"] == {"cells": 1, "mean": pytest.approx(2.0)} and line["over"]["chain"]["cells"] == 3
    assert line["flop_saving_realised_large"] == pytest.approx(results[1].saving)
    assert cpu_result.summary([result(SMALL_ON_CPU[-1], fused=10)])[0]["over_dense"] is None
    cpu_result.print_summary(results)
    printed = capsys.readouterr().out
    assert "openvino 2.00 (1)" in printed and f"ran in f32: openvino of {SMALL_ON_CPU[0]} bfloat16" in printed
