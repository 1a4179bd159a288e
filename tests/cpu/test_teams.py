"""Convolutions of few tiles on the CPU, where the threads share every stage of a tile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lowrank_ops
from lowrank_ops.ops.extension import _C
from tests.support.budgets import assert_output
from tests.support.problems import DTYPES, Call, Problem

THREADS = (2, 3, 5, 8)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
CONVS = ("tucker_conv2d", "cp_conv2d")

# One image and work enough for threads to wait for each other; named after what is special about each.
SHAPES = {
    "7x7": dict(h=7, w=7, s=130, t=150, r1=136, r2=129, kernel=(3, 3), padding=(1, 1)),
    "three rows": dict(h=3, w=75, s=70, t=90, r1=80, r2=80, kernel=(3, 3), padding=(1, 1)),
    "one row": dict(h=1, w=64, s=128, t=128, r1=96, r2=40, kernel=(1, 64), padding=(0, 32)),
    "one panel": dict(h=5, w=90, s=128, t=200, r1=48, r2=48, kernel=(3, 3), padding=(1, 1)),
    "dilation": dict(h=11, w=12, s=96, t=256, r1=128, r2=128, kernel=(3, 3), padding=(4, 4), dilation=(4, 4)),
    "stride": dict(h=9, w=41, s=64, t=160, r1=112, r2=70, kernel=(3, 5), padding=(1, 2), stride=(1, 2)),
}


@pytest.fixture(autouse=True)
def _former_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    _C.set_cpu_teams("always")
    with lowrank_ops.set_policy("fused"):
        yield
    torch.set_num_threads(threads)
    _C.set_cpu_teams("auto")
    _C.set_cpu_winograd("auto")


def plan(call: Call) -> dict[str, object]:
    problem = call.problem
    (found,) = lowrank_ops.explain(
        getattr(lowrank_ops, problem.op), list(call.tensors.values()), verbose=False, **problem.options()
    )
    return found.chosen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", CONVS)
def test_teams_change_no_bit(op: str, shape: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    sizes = dict(SHAPES[shape])
    if op == "cp_conv2d":  # little work but in the outer stages
        sizes.update(s=4 * sizes["s"], t=4 * sizes["t"])
    call = Problem(op, n=1, dtype=dtype, layout=layout, activation="silu", **sizes).make()
    torch.set_num_threads(1)
    alone, output = plan(call), call.run()
    assert alone["team"] == 1
    assert_output(call, output)
    for count in THREADS:
        torch.set_num_threads(count)
        shared = plan(call)
        assert (shared["team"], shared["kernel"]) == (count, alone["kernel"])
        assert torch.equal(output, call.run()), (count, shared)


@pytest.mark.parametrize(
    ("dtype", "outputs"), [(torch.float32, "2x2"), (torch.float32, "4x4"), (torch.bfloat16, "2x2")], ids=str
)
@pytest.mark.parametrize("rank", [33, 115])
def test_winograd_teams_change_no_bit(rank: int, dtype: torch.dtype, outputs: str) -> None:
    """Odd sizes: the last patches are cut, and shares begin and end inside rows of patches."""
    sizes = dict(h=7, w=37, s=128, t=256, r1=rank, r2=rank + 30, kernel=(3, 3), padding=(1, 1))
    call = Problem("tucker_conv2d", n=1, dtype=dtype, layout=torch.channels_last, **sizes).make()
    _C.set_cpu_winograd(outputs)
    torch.set_num_threads(1)
    output = call.run()
    for count in THREADS:
        torch.set_num_threads(count)
        assert plan(call)["team"] == count
        assert torch.equal(output, call.run()), count


@pytest.mark.parametrize("op", CONVS)
def test_many_images_are_shared_out_whole(op: str) -> None:
    _C.set_cpu_teams("auto")
    call = Problem(op, n=8, **SHAPES["7x7"]).make()
    for count in (2, 4, 8):
        torch.set_num_threads(count)
        assert (plan(call)["team"], plan(call)["strips"]) == (1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [*CONVS, "lowrank_linear"])
def test_panels_of_its_own_for_each_thread_change_no_bit(op: str, dtype: torch.dtype) -> None:
    """Many tasks: each thread packs all factors, with sizes that end within vectors and panels."""
    _C.set_cpu_teams("never")
    sizes = dict(n=50, s=70, t=90, r1=33) if op == "lowrank_linear" else dict(n=7, s=70, t=90, r1=33, r2=21, h=9, w=13)
    window = {} if op == "lowrank_linear" else dict(kernel=(3, 3), padding=(1, 1))
    call = Problem(op, dtype=dtype, **sizes, **window).make()
    torch.set_num_threads(1)
    output = call.run()
    assert_output(call, output)
    for count in THREADS:
        torch.set_num_threads(count)
        for _ in range(3):
            assert torch.equal(output, call.run()), count


@pytest.mark.parametrize("op", CONVS)
def test_small_calls_have_no_team(op: str) -> None:
    """Waiting for each other would take longer than the work; one thread does it all."""
    _C.set_cpu_teams("auto")
    call = Problem(op, n=1, s=8, t=8, r1=4, r2=4, h=7, w=7, padding=(1, 1)).make()
    torch.set_num_threads(2)
    assert (plan(call)["team"], plan(call)["strips"]) == (1, 1)


def test_a_small_image_of_large_ranks_has_a_team() -> None:
    """Strips of 7x7 pixels repeat much of the first stage; the stages of 28x28 hand on more than strips repeat."""
    _C.set_cpu_teams("auto")
    torch.set_num_threads(2)
    sizes = dict(n=1, s=512, t=512, padding=(1, 1))
    assert plan(Problem("tucker_conv2d", h=7, w=7, r1=128, r2=128, **sizes).make())["team"] == 2
    assert plan(Problem("tucker_conv2d", h=28, w=28, r1=64, r2=64, **sizes).make())["team"] == 1


def test_teams_are_no_larger_than_their_work_pays_for() -> None:
    """Each wait takes longer the more threads there are. Waits were measured between two threads only."""
    _C.set_cpu_teams("auto")
    torch.set_num_threads(128)
    sizes = dict(n=1, s=512, t=512, r1=128, r2=128, h=4, w=56, padding=(1, 1))  # 50 million multiply-adds
    assert plan(Problem("cp_conv2d", **sizes).make())["team"] <= 16


@pytest.mark.parametrize("channels", [512, 1024, 2048])
def test_a_team_of_some_of_the_threads(channels: int) -> None:
    """Where a team of all would wait too much: no fewer threads work than where there are fewer, and no bit changes."""
    _C.set_cpu_teams("auto")
    call = Problem("tucker_conv2d", n=1, s=channels, t=channels, r1=256, r2=256, h=7, w=7, padding=(1, 1)).make()
    torch.set_num_threads(1)
    output, used = call.run(), [1]
    for count in (2, 4, 8, 16, 64, 128):
        torch.set_num_threads(count)
        used.append(max(plan(call)["team"], plan(call)["strips"]))
    assert used == sorted(used) and used[-1] < 128
    torch.set_num_threads(used[-1] + 3)
    assert torch.equal(call.run(), output)


def test_unknown_teams_are_refused() -> None:
    with pytest.raises(ValueError, match="auto, always, never"):
        _C.set_cpu_teams("sometimes")


@pytest.mark.parametrize("op", CONVS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scratch_of_a_team_is_bounded(op: str, layout: torch.memory_format) -> None:
    """Together no more than one thread may take for itself, half of L2 (1 MiB here at most), whatever the image."""
    for size in (14, 30, 60):
        shape = dict(n=1, s=512, t=512, r1=128, r2=128, h=size, w=size, kernel=(3, 3), padding=(6, 6), dilation=(6, 6))
        call = Problem(op, layout=layout, **shape).make()
        torch.set_num_threads(1)
        alone = plan(call)["scratch_bytes"]
        for count in THREADS:
            torch.set_num_threads(count)
            shared = plan(call)
            assert shared["team"] * shared["scratch_bytes"] <= max(alone, 1 << 19) + count


def test_all_threads_of_a_team_take_part() -> None:
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert _C.team_threads(count) == count


def test_the_stage_outlives_its_shares_when_the_leader_throws() -> None:
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        assert _C.team_shares_after_error(count) == 0
        assert _C.team_threads(count) == count, "the next team is as ever"


def test_explain_shows_the_team() -> None:
    torch.set_num_threads(2)
    call = Problem("tucker_conv2d", n=1, **SHAPES["7x7"]).make()
    (found,) = lowrank_ops.explain(
        lowrank_ops.tucker_conv2d, list(call.tensors.values()), verbose=False, **call.problem.options()
    )
    assert "team of 2" in str(found)
