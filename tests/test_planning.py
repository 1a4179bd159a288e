"""explain(), set_policy() and the planner behind them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import OPS, Problem, assert_output
from torch import nn

import lowrank_ops
from benchmarks import fit_cost
from lowrank_ops._ops import _C

RESULTS = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("planner_*.json"))


@pytest.fixture(autouse=True)
def _former_policy() -> Iterator[None]:
    former = lowrank_ops.policy()
    yield
    lowrank_ops.set_policy(former)
    _C.forget_measurements()


def explain_one(problem: Problem, **options: object) -> lowrank_ops.Explanation:
    call = problem.make()
    (found,) = lowrank_ops.explain(
        getattr(lowrank_ops, problem.op), list(call.tensors.values()), verbose=False, **problem.options(), **options
    )
    return found


def test_set_policy_as_function_and_context_manager() -> None:
    lowrank_ops.set_policy("chain")
    assert lowrank_ops.policy() == "chain"
    with lowrank_ops.set_policy("fused"):
        assert lowrank_ops.policy() == "fused"
        with pytest.raises(RuntimeError, match="inside"), lowrank_ops.set_policy("measure"):
            raise RuntimeError("inside")
        assert lowrank_ops.policy() == "fused"
    assert lowrank_ops.policy() == "chain"


def test_unknown_policy_is_refused_and_changes_nothing() -> None:
    lowrank_ops.set_policy("chain")
    with pytest.raises(ValueError, match="set_policy: policy must be one of auto, fused, chain, measure, got 'fast'"):
        lowrank_ops.set_policy("fast")
    assert lowrank_ops.policy() == "chain"


@pytest.mark.parametrize("policy", ["fused", "chain"])
@pytest.mark.parametrize("op", OPS)
def test_explain_names_the_path_that_the_policy_forces(op: str, policy: str) -> None:
    with lowrank_ops.set_policy(policy):
        found = explain_one(Problem(op))
    assert (found.op, found.path, found.policy) == (op, policy, policy)
    assert [reason for _, reason in found.rejections] == [f'the policy is "{policy}"']
    assert found.chosen["flops"] > 0 and found.chosen["bytes"] > 0
    assert found.chosen["kernel"] in str(found)


def count_convolutions(problem: Problem, policy: str) -> int:
    """How many library convolutions (matrix products) an op really runs."""
    call = problem.make()
    with lowrank_ops.set_policy(policy), torch.profiler.profile() as profile, torch.inference_mode():
        call.run()
    names = {"aten::convolution", "aten::linear"}
    return sum(event.count for event in profile.key_averages() if event.key in names)


@pytest.mark.parametrize("op", OPS)
def test_the_policy_decides_what_runs(op: str) -> None:
    stages = {"tucker_conv2d": 3, "cp_conv2d": 4, "lowrank_linear": 2}[op]
    assert count_convolutions(Problem(op), "fused") == 0
    assert count_convolutions(Problem(op), "chain") == stages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_auto_runs_what_explain_says(op: str, dtype: torch.dtype) -> None:
    for size in (3, 40):
        problem = Problem(
            op, n=1, s=size, t=size + 1, r1=max(1, size // 4), r2=max(1, size // 5), h=9, w=8, dtype=dtype
        )
        with lowrank_ops.set_policy("auto"):
            path = explain_one(problem).path
        assert (count_convolutions(problem, "auto") == 0) == (path == "fused")


@pytest.mark.parametrize("op", OPS)
def test_measure_gives_the_right_result_and_remembers(op: str) -> None:
    call = Problem(op, activation="relu").make()
    with lowrank_ops.set_policy("measure"):
        first = call.run()
        assert_output(call, first)
        again = call.run()
    assert torch.equal(first, again)
    call_counts = count_convolutions(Problem(op, activation="relu"), "measure")
    assert call_counts in (0, {"tucker_conv2d": 3, "cp_conv2d": 4, "lowrank_linear": 2}[op])


def test_other_devices_run_the_chain_and_explain_says_so() -> None:
    for device in ("cuda", "A100", "H100", "mps"):
        found = explain_one(Problem("tucker_conv2d"), device=device)
        assert found.path == "chain" and found.device == device
        assert found.rejections == [("fused", f"lowrank_ops has no kernels for {device} in this build")]


def test_explain_takes_shapes() -> None:
    (found,) = lowrank_ops.explain(
        lowrank_ops.cp_conv2d,
        [(2, 8, 30, 40), (6, 8), (6, 3), (6, 5), (10, 6), None],
        dtype=torch.bfloat16,
        memory_format=torch.channels_last,
        padding=(1, 2),
        stride=(2, 1),
        verbose=False,
    )
    assert "[2, 8, 30, 40] to 10 channels, 3x5, rank 6, stride [2, 1], padding [1, 2]" in found.problem
    assert "bfloat16, channels_last" in found.problem
    # Two images of 30x40 pixels through 8x6; 15x40 outputs of 3 + 5 taps for each of 6 ranks, then 6x10.
    macs = 2 * (30 * 40 * 8 * 6 + 15 * 40 * 6 * (3 + 5) + 15 * 40 * 6 * 10)
    (chain,) = [plan for plan in (found.chosen, *found.others) if plan["path"] == "chain"]
    assert chain["flops"] == 2 * macs


def test_explain_a_model_names_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(
        lowrank_ops.TuckerConv2d(3, 8, 3, (2, 4), padding="same"),
        nn.ReLU(),
        lowrank_ops.CPConv2d(8, 6, 3, 5),
        nn.Flatten(),
        lowrank_ops.LowRankLinear(6 * 6 * 6, 10, 4),
    )
    found = lowrank_ops.explain(model, (2, 3, 8, 8))
    assert [part.op for part in found] == ["tucker_conv2d", "cp_conv2d", "lowrank_linear"]
    printed = capsys.readouterr().out
    assert all(part.op in printed for part in found)
    assert lowrank_ops.explain(nn.ReLU(), (1, 2), verbose=False) == ()


def test_explain_refuses_what_the_op_refuses() -> None:
    with pytest.raises(ValueError, match="core must have size"):
        lowrank_ops.explain(lowrank_ops.tucker_conv2d, [(1, 4, 8, 8), (2, 4), (3, 5, 3, 3), (6, 3)], verbose=False)


def test_windows_that_crash_torch_in_bf16_never_go_to_the_chain_on_their_own() -> None:
    problem = Problem("tucker_conv2d", kernel=(1, 1), stride=(1, 2), padding=(0, 1), dtype=torch.bfloat16)
    with lowrank_ops.set_policy("auto"):
        found = explain_one(problem)
    assert found.path == "fused" and "bf16 convolutions fail" in found.rejections[0][1]


@pytest.mark.parametrize("op", ["tucker_conv2d", "cp_conv2d"])
@pytest.mark.parametrize("size", [7, 56, 640])
@pytest.mark.parametrize("rank", [8, 512])
def test_scratch_does_not_grow_with_the_image(op: str, size: int, rank: int) -> None:
    """Tiles fit L2 whatever the image; only ranks too large for that may exceed it, by their narrowest tile."""
    shapes = {
        "tucker_conv2d": [(rank, 64), (rank, rank, 3, 3), (64, rank)],
        "cp_conv2d": [(rank, 64), (rank, 3), (rank, 3), (64, rank)],
    }[op]
    with lowrank_ops.set_policy("fused"):
        (found,) = lowrank_ops.explain(
            getattr(lowrank_ops, op), [(1, 64, size, size), *shapes], padding=1, verbose=False
        )
    narrowest = 28 + 2
    assert found.chosen["scratch_bytes"] <= max(1 << 19, 8 * narrowest * (rank + 64) * 4)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_regret_on_the_committed_results(path: Path) -> None:
    """What the cost model picks is at most 5 % slower than the faster path, over the cells of a results file."""
    constants = fit_cost.parse(fit_cost.CONSTANTS.read_text())
    observations = fit_cost.read(path)
    assert len(observations) >= 40
    for group in {o.group for o in observations}:
        cells = [o for o in observations if o.group == group]
        assert fit_cost.regret(cells, constants[group]) <= 0.05, group


def test_there_are_committed_results() -> None:
    assert RESULTS
