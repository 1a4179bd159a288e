"""Cuts of the CUDA kernels as the benchmark names them, and the fit of the GPU cost model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.core import layers, peers
from benchmarks.gpu import cuts
from benchmarks.gpu import kernels as gpu_kernels
from benchmarks.gpu.cuts import Cut
from benchmarks.studies import fit_gpu_cost
from benchmarks.studies.fit_gpu_cost import Observation
from lowrank_ops.ops.extension import _C

BLOCKS = [pytest.param(cell, id=name) for name, cell in gpu_kernels.BLOCKS.items()]


@pytest.mark.parametrize("cell", BLOCKS)
def test_planned_cuts_are_what_the_planner_says(cell: layers.Cell) -> None:
    problem = peers.make_problem(cell, torch.bfloat16, device="meta")
    found = cuts.planned_cuts(problem, "H200")
    described = fit_gpu_cost.described(cell, "bfloat16")
    of_op = [line["name"] for line in _C.gpu_kernels() if line["op"] == cell.op]
    taking = {name for name in of_op if _C.plan_gpu_kernel(described, name, "H200")["reason"] == ""}
    assert {cut.kernel for cut in found} == taking
    assert {name for name in of_op if "_sm90a_" not in name} <= taking
    for cut in found:
        plan = _C.plan_gpu_kernel(described, cut.kernel, "H200")
        assert (list(cut.tile), cut.stages, cut.splits) == (plan["tile"], plan["stages"], plan["splits"])
        assert cut.cluster == plan["cluster"]
        assert cut.predicted_seconds == plan["predicted_seconds"]
        assert fit_gpu_cost.parse_cut(cut.name) == (cut.kernel, [*cut.tile, cut.stages, cut.splits, cut.cluster])


@pytest.mark.parametrize("cell", BLOCKS)
def test_other_cuts_stay_within_the_tile(cell: layers.Cell) -> None:
    problem = peers.make_problem(cell, torch.bfloat16, device="meta")
    pixels = {line["name"]: line["pixels"] for line in _C.gpu_kernels()}
    for planned in cuts.planned_cuts(problem, "H200"):
        found = list(cuts.other_cuts(planned))
        if "_sm90a_" in planned.kernel:
            other = [] if planned.kernel.startswith("tucker") else [3 - planned.cluster]
            assert [cut.cluster for cut in found] == other
            continue
        assert len({cut.name for cut in found}) > 3
        for cut in found:
            images, rows, columns = cut.tile
            assert 1 <= images * rows * columns <= pixels[cut.kernel] and cut.predicted_seconds is None
            assert not cell.is_linear or rows == 1


@pytest.mark.parametrize("cell", BLOCKS)
def test_an_ablation_has_less_of_one_stage(cell: layers.Cell) -> None:
    found = gpu_kernels.ablations(cell)
    assert len(found) == (2 if cell.is_linear else 3)
    for smaller in found.values():
        assert smaller.op == cell.op and smaller.output_size == cell.output_size
        assert smaller.rank == cell.rank and smaller.flops < cell.flops


def test_hopeless_cuts_are_left_out() -> None:
    made = [Cut("a", (1, 8, 8), 2, 1, 1e-5), Cut("b", (1, 8, 8), 2, 1, 4.9e-5), Cut("c", (1, 8, 8), 2, 1, 5.1e-5)]
    assert [cut.kernel for cut in cuts.hopeful(made)] == ["a", "b"]


def test_a_cpu_has_no_kernels() -> None:
    problem = peers.make_problem(layers.linear("resnet18 fc", 8, 16), torch.float32)
    assert cuts.contenders(problem) == []
    if not torch.cuda.is_available():
        assert gpu_kernels.main([]) == 2


def test_the_fit_finds_the_constants_that_made_the_times() -> None:
    draw = np.random.default_rng(0)
    launch, made = 2e-6, {"kLeanHalves": draw.uniform(1e-9, 1e-6, 9), "kChainLinear": draw.uniform(1e-9, 1e-6, 6)}
    observations = []
    for group, constants in made.items():
        for index in range(40):
            features = draw.uniform(1, 100, len(constants))
            taken = float(features @ constants) + (launch if group == "kLeanHalves" else 0)
            observations.append(Observation(f"cell {index}", group, group, features, taken))
    found = fit_gpu_cost.fit(observations, launch)
    for group, constants in made.items():
        np.testing.assert_allclose(found[group], constants, rtol=1e-6)
    lost, cells = fit_gpu_cost.regret(observations, found, launch)
    assert cells == 40 and abs(lost) < 1e-9
    wrong = {**found, "kLeanHalves": found["kLeanHalves"] * 1e-3}
    assert fit_gpu_cost.regret(observations, wrong, launch)[0] > 0.1


def test_constants_are_written_as_they_are_read(tmp_path, monkeypatch) -> None:
    clock = next(gpu["clock"] for gpu in _C.named_gpus() if gpu["name"] == "H200")
    launch, found = fit_gpu_cost.parse(fit_gpu_cost.CONSTANTS.read_text(), clock)
    assert set(found) == {*fit_gpu_cost.FUSED_GROUPS, *fit_gpu_cost.CHAIN_GROUPS}
    monkeypatch.setattr(fit_gpu_cost, "CONSTANTS", tmp_path / "constants.inc")
    fit_gpu_cost.write("H200", clock, launch, found)
    launch_again, again = fit_gpu_cost.parse((tmp_path / "constants.inc").read_text(), clock)
    assert launch_again == launch
    for group, values in found.items():
        np.testing.assert_allclose(again[group], values, rtol=1e-3)


def test_constants_of_another_kernel_are_marked_until_there_are_measurements(tmp_path, monkeypatch) -> None:
    launch, found = fit_gpu_cost.parse(fit_gpu_cost.CONSTANTS.read_text(), 1)
    monkeypatch.setattr(fit_gpu_cost, "CONSTANTS", tmp_path / "constants.inc")
    assert fit_gpu_cost.group_of("lowrank_linear_sm90a_128x256", "bfloat16", False) == "kSm90aLinear"
    for own in (None, found["kSm90aWide"] * 2):
        fitted = {group: values for group, values in found.items() if group != "kSm90aLinear"}
        if own is not None:
            fitted["kSm90aLinear"] = own
        fit_gpu_cost.write("H200", 1, launch, fitted)
        written = (tmp_path / "constants.inc").read_text()
        assert ("kSm90aLinear = kSm90aWide;" in written) == (own is None)
        expected = found["kSm90aWide"] if own is None else own
        np.testing.assert_allclose(fit_gpu_cost.parse(written, 1)[1]["kSm90aLinear"], expected, rtol=1e-3)


def test_a_cpus_file_is_refused(tmp_path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text('{"cells": []}')
    with pytest.raises(ValueError, match=r"must be of a GPU in csrc/plan/gpu/known_gpus\.cpp, got 'a CPU'"):
        fit_gpu_cost.read(path)
