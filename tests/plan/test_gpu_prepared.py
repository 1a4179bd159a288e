"""What the planner knows of factors that were prepared for GPUs: padded ranks, and CP's product."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lowrank_ops
from lowrank_ops.ops.extension import _C
from tests.support.gpu_problems import GPUS, OPS, Problem, former_state  # noqa: F401

NOTE = "reads the factors that prepare_for_inference_ has copied"


def explained(problem: Problem, prepared: bool, gpu: str = "H100") -> dict[str, Any]:
    op, dtype, channels_last, sizes, window, _ = problem.described()
    found: dict[str, Any] = _C.explain(op, dtype, channels_last, sizes, window, "none", gpu, prepared)
    return found


def plans(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {plan["kernel"]: plan for plan in (found["chosen"], *found["others"])}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", OPS)
def test_any_rank_runs_as_a_whole_number_of_vectors(op: str, dtype: str) -> None:
    """The kernels' plans are those of the padded ranks, Hopper's included."""
    odd = Problem(op, dtype=dtype, n=8, s=256, t=256, h=28, w=28, r1=37, r2=37 if op != "tucker_conv2d" else 21)
    even = Problem(op, dtype=dtype, n=8, s=256, t=256, h=28, w=28, r1=40, r2=40 if op != "tucker_conv2d" else 24)
    ordinary, prepared, padded = explained(odd, False), explained(odd, True), explained(even, False)
    assert not any("sm90a" in kernel for kernel in plans(ordinary))
    assert any("sm90a" in kernel for kernel in plans(prepared))
    assert set(plans(prepared)) == set(plans(padded))
    for kernel, plan in plans(prepared).items():
        if plan["path"] == "chain":
            continue
        other = plans(padded)[kernel]
        for key in set(plan) - {"notes"}:
            assert plan[key] == other[key], (kernel, key)
        note, *rest = plan["notes"]
        assert note.startswith(NOTE) and rest == other["notes"]
        if "sm80" in kernel and not kernel.endswith("persistent"):
            assert plan["predicted_seconds"] <= plans(ordinary)[kernel]["predicted_seconds"]


@pytest.mark.parametrize("op", OPS)
def test_the_chain_reads_the_ordinary_factors(op: str) -> None:
    problem = Problem(op, r1=3, r2=3)
    chains = [plans(explained(problem, prepared))["chain of torch ops"] for prepared in (False, True)]
    for key in ("flops", "bytes", "features"):
        assert chains[0][key] == chains[1][key], key
    assert not any(NOTE in note for note in chains[1]["notes"])


@pytest.mark.parametrize("gpu", GPUS)
def test_the_product_of_the_depthwise_factors_costs_nothing(gpu: str) -> None:
    """With many pixels the chain's launches, which the CPU makes meanwhile, do not count."""
    problem = Problem("cp_conv2d", n=64, s=256, t=256, h=56, w=56, r1=256, r2=256)
    ordinary, prepared = (plans(explained(problem, ready, gpu))["chain of torch ops"] for ready in (False, True))
    saved = ordinary["predicted_seconds"] - prepared["predicted_seconds"]
    assert saved == pytest.approx(_C.factor_product_seconds, rel=1e-6)
    assert "multiplied out into one 3x3 convolution" in ordinary["notes"][0]
    assert prepared["notes"][0] == ordinary["notes"][0] + ", once before the calls"
    wide = Problem("cp_conv2d", channels_last=False, n=64, s=256, t=256, h=56, w=56, r1=256, r2=256, kernel=(9, 9))
    ordinary, prepared = (plans(explained(wide, ready, gpu))["chain of torch ops"] for ready in (False, True))
    assert ordinary["predicted_seconds"] == prepared["predicted_seconds"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_vectors_of_other_dtypes(dtype: str) -> None:
    """16 bytes are four or two values."""
    problem = Problem("lowrank_linear", dtype=dtype, n=512, s=64, t=64, r1=21, r2=21)
    (simt,) = (plan for name, plan in plans(explained(problem, True)).items() if "simt_64x64" in name)
    rank = 24 if dtype == "float32" else 22
    even = Problem("lowrank_linear", dtype=dtype, n=512, s=64, t=64, r1=rank, r2=rank)
    (wanted,) = (plan for name, plan in plans(explained(even, False)).items() if "simt_64x64" in name)
    assert simt["features"] == wanted["features"] and simt["tile"] == wanted["tile"]


@pytest.mark.parametrize("device", ["H100", "A100"])
def test_explain_says_it_of_a_prepared_module(device: str) -> None:
    block = lowrank_ops.TuckerConv2d(64, 64, 3, (37, 21), padding=1).eval()
    for prepared in (False, True):
        if prepared:
            lowrank_ops.prepare_for_inference_(block)
        (found,) = lowrank_ops.explain(
            block, (8, 64, 28, 28), torch.bfloat16, device, memory_format=torch.channels_last
        )
        fused = [plan for plan in (found.chosen, *found.others) if plan["path"] == "fused"]
        assert all((NOTE in " ".join(plan["notes"])) == prepared for plan in fused) and fused
        assert (NOTE in str(found).replace("\n", " ")) == prepared
        assert "ranks (37, 21)" in found.problem


def test_plans_are_remembered_apart() -> None:
    problem = Problem("cp_conv2d", n=64, s=256, t=256, h=56, w=56, r1=200, r2=200).described()
    with lowrank_ops.set_policy("chain"):
        plans = [_C.cached_gpu_plan(problem, "A100", 11, ready)[0] for ready in (False, True, False)]
    assert plans[0] == plans[2] != plans[1]
