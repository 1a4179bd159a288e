"""The persistent kernel of the sm80 family on the simulator: its CTAs keep all factors and take tile after tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.simulator import building

if building.missing():
    pytest.skip(building.missing(), allow_module_level=True)

from tests.support.problems import Problem
from tests.support.simulator import harness
from tests.support.simulator.cases import CHANNELS_LAST, SAME, Case, convolution_case, name_of
from tests.support.simulator.harness import Cut, Result, Settings
from tests.support.simulator.persistent_cases import CASES, DTYPES, KERNEL, case_of


def ran_persistent(result: Result) -> bool:
    return any(entry["file"].endswith("block_persistent.cuh") for entry in result.report["conflicts"]) or (
        str(harness.barriers()["kSecondWritten"]) in result.report["barriers"]
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_tile_after_tile(dtype: torch.dtype, name: str) -> None:
    """Few CTAs with several tiles each, a tile per CTA, and fewer tiles than the GPU holds CTAs. All give the bits of
    the kernel with one tile per CTA."""
    case = case_of(name, dtype)
    one_tile = replace(case, kernel=replace(KERNEL, config=0)).run(Settings(count=False))
    expected, tiles = one_tile.output.clone(), one_tile.report["ctas"]
    assert tiles > 3 and not ran_persistent(one_tile)
    for held in (1, 2, 3, tiles, tiles + 5):
        for order in (0, 2):  # of lanes and warps: ascending, shuffled
            result = case.run(Settings(count=False, held_ctas=held, order=order, seed=held))
            case.assert_right(result)
            assert ran_persistent(result) and result.report["ctas"] == min(held, tiles)
            assert torch.equal(result.output, expected)


@pytest.mark.parametrize("name", ("splits", "narrow copies", "one below"))
def test_other_calls_run_the_kernel_of_one_tile(name: str) -> None:
    case = convolution_case(name, KERNEL, torch.bfloat16)
    result = case.run(Settings(count=False))
    case.assert_right(result)
    assert not ran_persistent(result)


@pytest.mark.parametrize("gpu", ("A100", "RTX 3090"))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_what_the_planner_chooses(dtype: torch.dtype, gpu: str) -> None:
    sizes = dict(n=2, h=20, w=17, s=32, t=72, r1=8, r2=16)
    case = Case(KERNEL, Cut(), Problem(KERNEL.op, dtype=dtype, layout=CHANNELS_LAST, **sizes, **SAME).make())
    _, _, *arguments = case.launch()
    cut, shared_limit = harness.planned(KERNEL, *arguments, gpu)
    assert cut.splits == 1
    found = replace(case, cut=cut)
    result = found.run(Settings(count=False, shared_limit=shared_limit))
    found.assert_right(result)
    assert ran_persistent(result)


@pytest.mark.parametrize("held", (1, 3))
def test_traffic(held: int) -> None:
    """A CTA reads every factor once, whatever the number of its tiles."""
    case = case_of("3x3", torch.bfloat16)
    report = case.run(Settings(held_ctas=held))
    for name in ("in_factor", "core", "out_factor"):
        read = report.traffic(name)
        assert (read["least"], read["most"]) == (held, held), name
    written = report.traffic("output", "written")
    assert (written["least"], written["most"]) == (1, 1)


@pytest.mark.parametrize("name", ("3x3", "halo"))
def test_every_barrier_is_needed_between_tiles(name: str) -> None:
    case, numbers = case_of(name, torch.bfloat16), harness.barriers()
    used = {number for number in numbers.values() if str(number) in case.run(Settings(count=False)).report["barriers"]}
    assert {numbers["kHiddenWritten"], numbers["kSecondWritten"], numbers["kChunk"]} < used
    for number in used:
        error = case.run(Settings(count=False, skip_barrier=number)).error
        assert "race" in error or "under way" in error or "uninitialized" in error, number
