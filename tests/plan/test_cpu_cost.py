"""The CPU's cost model: what it counts, how it was fitted, and what its choices cost on measured cells."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.core.layers import Cell
from benchmarks.core.random_cells import random_cells
from benchmarks.studies import cpu_times, fit_cost
from lowrank_ops.ops.extension import _C

# Measured cells by the run that they are of; a Zen 4's are not among the fitted ones either.
FITTED = cpu_times.by_set(cpu_times.read(cpu_times.FITTED))
NOT_FITTED = cpu_times.by_set(cpu_times.read(cpu_times.HELD_OUT))
MEASURED = FITTED | {name: times for name, times in NOT_FITTED.items() if name.startswith("zen4")}
RANDOM = [name for name in FITTED if name.startswith("random")]
HELD_OUT = [name for name in NOT_FITTED if name.startswith("random")]
MACHINE = {"isa": ["avx2", "avx512f", "avx512_bf16"], "torch_cpu_capability": "AVX512", "caches": {"L2": "1024K"}}


def counts(cell: Cell, way: str = "fused", layout: str = "channels_last", isa: str = "", dtype: str = "float32"):
    machine = {**MACHINE, "lowrank_ops_cpu_isa": isa}
    found = fit_cost.prediction(cell, dtype, layout, machine)[f"{way}_features"]
    return dict(zip(getattr(_C, f"{way}_feature_names"), found, strict=True))


def tucker(S: int, T: int, ranks: tuple[int, int], size: tuple[int, int], batch: int = 1, **window) -> Cell:
    return Cell("tucker_conv2d", "made", S, T, ranks, size, batch, **window)


# ---- what it counts


@pytest.mark.parametrize(("isa", "lanes"), [("generic", 4), ("avx2", 8), ("avx512", 16)])
def test_ranks_count_in_whole_vectors(isa: str, lanes: int) -> None:
    cell = Cell("lowrank_linear", "made", 40, 70, 3, batch=1000, kernel=(1, 1), padding=0)
    found = counts(cell, isa=isa)
    width = -(-70 // lanes) * lanes
    assert found["products"] == 1000 * (40 * lanes + 3 * width)
    assert found["values"] == 1000 * (lanes + width)


def test_whole_blocks_take_one_step_of_the_depth_each() -> None:
    """AVX-512: 64 columns are one panel of four vectors, whose register blocks have six rows."""
    cell = Cell("lowrank_linear", "made", 256, 64, 64, batch=600, kernel=(1, 1), padding=0)
    assert counts(cell)["steps"] == 100 * (256 + 64)
    narrow = Cell("lowrank_linear", "made", 256, 16, 16, batch=1400, kernel=(1, 1), padding=0)
    assert counts(narrow)["steps"] == 100 * (256 + 16)  # blocks of fourteen rows


def test_few_rows_are_dot_products() -> None:
    cell = Cell("lowrank_linear", "made", 100, 30, 20, batch=2, kernel=(1, 1), padding=0)
    found = counts(cell)
    assert found["dots"] == 2 * (20 + 30) and found["steps"] == found["values"] == found["weights"] == 0
    assert found["products"] == 2 * (20 * 112 + 30 * 32)


def test_taps_outside_the_image_count_for_neither_path() -> None:
    """5x5 taps on one pixel: one of them is inside. On a row of pixels our kernel skips rows of taps only."""
    cell = tucker(64, 64, (16, 16), (1, 1), 64, kernel=(5, 5), padding=2)
    inside, outer = 64 * 16 * 16, 64 * (64 * 16 + 16 * 64)
    assert counts(cell)["products"] == pytest.approx(inside + outer)
    chain = counts(cell, "chain")
    assert chain["core"] == 64 * 16 * 16 * 25 and chain["core_inside"] == pytest.approx(64 * 16 * 16)
    row = tucker(64, 64, (16, 16), (1, 8), 8, kernel=(5, 5), padding=2)
    assert counts(row)["products"] == pytest.approx(5 * inside + outer)


@pytest.mark.parametrize(("isa", "lanes"), [("generic", 4), ("avx2", 8), ("avx512", 16)])
def test_a_hidden_rank_of_one_is_summed_over_channels(isa: str, lanes: int) -> None:
    """channels_last: a dot product a pixel; NCHW: vectors along the 18 pixels of a row, which are not moved."""
    cell = tucker(40, 32, (1, 16), (12, 18), 2)
    pixels = 2 * 12 * 18
    later = pixels * (9 * 16 * 34 / 36 + 16 * 32)  # the core, 34 of 36 rows of taps inside, and the last stage
    dots, planes = counts(cell, isa=isa), counts(cell, isa=isa, layout="nchw")
    assert dots["dots"] == pixels and dots["products"] == pytest.approx(pixels * -(-40 // lanes) * lanes + later)
    assert planes["dots"] == 0 and planes["products"] == pytest.approx(24 * -(-18 // lanes) * lanes * 40 + later)
    assert planes["moved"] == pixels * 32
    assert dots["weights"] == planes["weights"] == 9 * 16 + 16 * 32  # in_factor is not packed


def test_a_core_of_one_output_channel_is_dot_products() -> None:
    """Windows without padding: KW * R1 = 36 elements of a row of taps are three vectors of sixteen."""
    cell = tucker(64, 32, (12, 1), (10, 18), 2, padding=0)
    outputs = 2 * 8 * 16
    found = counts(cell)
    assert found["dots"] == outputs and found["weights"] == 64 * 12 + 32
    assert found["products"] == 2 * 180 * 64 * 16 + outputs * (3 * 48 + 32)
    assert found["taps"] == 2 * 8 * 3
    assert counts(tucker(64, 32, (1, 1), (10, 18), 2, padding=0))["dots"] == 2 * 180  # runs of three: no vector


def test_few_pixels_of_cp_are_dot_products() -> None:
    found = counts(Cell("cp_conv2d", "made", 100, 30, 20, (1, 2), 3, padding=1))
    assert found["dots"] == 6 * (20 + 30) and found["steps"] == found["values"] == found["weights"] == 0
    assert found["products"] == 6 * (20 * 112 + 30 * 32)
    assert counts(Cell("cp_conv2d", "made", 100, 30, 20, (1, 3), 3, padding=1))["dots"] == 0


def test_rows_of_a_window_of_one_column_are_one_run() -> None:
    """7x7 pixels: 49 in blocks of six rows are nine blocks; row by row they would be fourteen."""
    cell = Cell("cp_conv2d", "made", 64, 16, 64, (7, 7), 4, kernel=(3, 1), padding=1)
    assert counts(cell)["steps"] == 4 * (9 * 64 + 4 * 64)


def test_taps_inside_the_image_are_counted() -> None:
    """Against one look at each tap of each output: strides and dilations that divide each other or not, windows wider
    than the image, padding beyond the window."""
    source = random.Random(0)
    for _ in range(300):
        length, taps = source.randint(1, 40), source.randint(1, 30)
        stride, dilation, padding = source.randint(1, 9), source.randint(1, 9), source.randint(0, 60)
        outputs = (length + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        if outputs < 1:
            continue
        sizes, window = [2, 5, length, 1, 4, 3, 2, taps, 1], [stride, 1, padding, 0, dilation, 1]
        found = _C.cpu_prediction("tucker_conv2d", "float32", False, sizes, window, "avx2", 1 << 20, 1 << 25)
        chain = dict(zip(_C.chain_feature_names, found["chain_features"], strict=True))
        read = [o * stride + tap * dilation - padding for o in range(outputs) for tap in range(taps)]
        inside = sum(0 <= position < length for position in read)
        assert chain["core_inside"] / chain["core"] == pytest.approx(inside / len(read), rel=1e-12)


@pytest.mark.parametrize(("batch", "native"), [(1, 3), (2, 0)])
def test_small_single_images_run_in_torchs_own_convolution(batch: int, native: int) -> None:
    chain = counts(tucker(64, 32, (16, 16), (14, 14), batch), "chain")
    assert (chain["native_calls"], chain["calls"]) == (native, 3 - native)
    assert (chain["core"] == 0) == (chain["native_core"] > 0) == (native > 0)
    assert counts(tucker(64, 32, (16, 16), (14, 14), batch), "chain", dtype="bfloat16")["native_calls"] == 0


def test_rows_of_an_output_whole_pages_apart() -> None:
    cell = Cell("lowrank_linear", "made", 64, 1024, 16, batch=100, kernel=(1, 1), padding=0)
    assert counts(cell)["odd_stores"] == 100 * 1024
    other = Cell("lowrank_linear", "made", 64, 1000, 16, batch=100, kernel=(1, 1), padding=0)
    assert counts(other)["odd_stores"] == 0


# ---- how it was fitted


def test_the_fit_finds_the_constants_that_made_the_times() -> None:
    rng = np.random.default_rng(0)
    features, constants = rng.uniform(1, 100, (60, 4)), np.array([3.0, 0.0, 0.5, 2.0])
    times = features @ constants
    assert fit_cost.solve(features, times) == pytest.approx(constants, abs=1e-6)
    times[0] *= 20  # one cell that nothing explains bends it little
    assert fit_cost.solve(features, times) == pytest.approx(constants, abs=0.15)


def test_the_constants_are_those_of_the_committed_results() -> None:
    """Every group that was measured has constants, and no other."""
    groups = {o.group for o in fit_cost.read(cpu_times.FITTED)}
    text = fit_cost.CONSTANTS.read_text()
    for isa, op, dtype, layout, ones in groups:
        kind = f"DType::{fit_cost.DTYPES[dtype]}, Layout::{fit_cost.LAYOUTS[layout]}, {ones},"
        names = f'"{isa}", Op::{fit_cost.OPS[op]}, {kind}'
        assert text.count(names) == 1, names
    assert text.count("\n{") == len(groups)


# ---- what its choices cost


@pytest.mark.parametrize("name", MEASURED)
def test_regret_of_the_planner(name: str) -> None:
    """What today's planner picks, at most so much slower than the faster path over the cells of a run."""
    observations = fit_cost.observations(MEASURED[name])
    assert len(observations) >= 37
    assert fit_cost.regret(observations) <= 0.02


@pytest.mark.parametrize("name", RANDOM)
def test_few_random_blocks_are_slower_than_the_librarys_chain(name: str) -> None:
    """In the same layout, with a rank of one and without: 2 % under 0.9, single ones (generic: 2 of 343) under 0.8."""
    observations = fit_cost.observations(FITTED[name])
    for thin in (False, True):
        found = [o for o in observations if (o.group[-1] > 0) == thin]
        assert fit_cost.share_below(found, 0.9) <= 0.02
        assert fit_cost.share_below(found, 0.8) <= (0.006 if "generic" in name and not thin else 0.005)


@pytest.mark.parametrize("name", HELD_OUT)
def test_few_blocks_that_no_constant_was_fitted_to_are_slower(name: str) -> None:
    observations = fit_cost.observations(NOT_FITTED[name])
    assert len(observations) == 150
    assert fit_cost.share_below(observations, 0.9) <= 0.02
    assert fit_cost.share_below(observations, 0.8) == 0


def test_there_are_committed_results() -> None:
    assert len(RANDOM) == 10 and len(HELD_OUT) == 6 and len(FITTED) == 14 and len(MEASURED) == 18
    assert sum(map(len, FITTED.values())) == 4260 and sum(map(len, NOT_FITTED.values())) == 1260


# ---- the files of times


def results_file(path: Path, **times: float) -> Path:
    """What benchmarks.run would write of one cell."""
    cell = tucker(40, 32, (1, 16), (12, 18), 2)
    contenders = {name.replace("_", " "): {"median_us": time} for name, time in times.items()}
    entry = {**dataclasses.asdict(cell), "dtype": "float32", "plan": "fused 4x18", "contenders": contenders}
    machine = {**MACHINE, "cpu": "a CPU"}
    path.write_text(json.dumps({"machine": machine, "layout": "nchw", "cells": [entry, {**entry, "dtype": "float16"}]}))
    return path


def test_results_join_the_file_of_times(tmp_path: Path) -> None:
    """As a set, which a second file of the same name replaces."""
    table, run = tmp_path / "times.csv", tmp_path / "run.json"
    for fused in (10.1, 10.2):
        results_file(run, fused=fused, chain_nchw=1 / 3, chain_channels_last=0.25)
        cpu_times.add(table, [run])
    cpu_times.add(table, [results_file(tmp_path / "other.json", fused=3.0, chain_nchw=2.0)])
    first, other = cpu_times.read(table)
    assert (first.set, other.set) == ("run", "other")
    assert [first] == cpu_times.read(run), "nothing is rounded"
    assert (first.fused, first.chain, first.library, first.peer) == (10.2, 1 / 3, 1 / 3, 0.25)
    assert first.isa == "avx512" and first.caches == {"L2": "1024K"} and first.cell.rank == (1, 16)
    (seen,) = fit_cost.read(run)
    assert seen.group == ("avx512", "tucker_conv2d", "float32", "nchw", 1) and seen.fused == 10.2e3


# ---- the random blocks


def test_random_cells_are_the_same_for_a_seed_and_bounded() -> None:
    cells = random_cells(50)
    assert cells == random_cells(60)[:50] != random_cells(50, seed=1)
    assert {cell.op for cell in cells} == {"tucker_conv2d", "cp_conv2d", "lowrank_linear"}
    assert all(min(cell.output_size) >= 1 for cell in cells)


def test_capped_runs_tell_their_instruction_set(tmp_path: Path) -> None:
    for capability, isa, dtype, found in [
        ("AVX2", "", "bfloat16", "avx2"),
        ("DEFAULT", "", "float32", "generic"),
        ("AVX512", "avx512", "bfloat16", "avx512"),
        ("AVX512", "", "bfloat16", "avx512bf16"),
        ("AVX512", "", "float32", "avx512"),
    ]:
        machine = {**MACHINE, "torch_cpu_capability": capability, "lowrank_ops_cpu_isa": isa}
        assert fit_cost.isa_class(machine, dtype) == found
    gpu = tmp_path / "gpu.json"
    gpu.write_text(json.dumps({"device": {"name": "a GPU"}, "cells": []}))
    with pytest.raises(ValueError, match="a CPU's"):
        fit_cost.read(gpu)
