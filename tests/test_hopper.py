"""The sm90a kernels on the emulator of Hopper (simt/emulator.h): values, and that the emulator notices what is broken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Problem
from simt import harness
from simt.cases import Case
from simt.harness import Cut, Kernel, Result

KERNEL = Kernel("tucker_conv2d", "sm90a", 0)
HALVES = [torch.bfloat16, torch.float16]
SAME = dict(kernel=(3, 3), padding=(1, 1))

# By what is special about it.
CASES: dict[str, dict[str, Any]] = {
    "whole tiles": dict(n=1, s=64, t=64, r1=64, r2=64, h=16, w=16, **SAME),
    "every size padded": dict(n=2, s=72, t=136, r1=40, r2=56, h=9, w=11, **SAME, activation="relu"),
    "narrow ranks": dict(n=1, s=40, t=24, r1=24, r2=8, h=8, w=17, **SAME, activation="silu"),
    "one narrow rank": dict(n=1, s=8, t=8, r1=8, r2=48, h=8, w=8, **SAME, bias=False),
    "many slices": dict(n=1, s=328, t=64, r1=32, r2=32, h=10, w=9, **SAME, activation="gelu"),
    "many chunks": dict(n=1, s=64, t=328, r1=64, r2=32, h=8, w=9, **SAME, activation="hardswish"),
    "streamed in_factor": dict(n=1, s=512, t=512, r1=64, r2=64, h=7, w=7, **SAME),
    "1x1 core": dict(n=1, s=64, t=64, r1=16, r2=24, h=9, w=9, kernel=(1, 1), activation="relu6"),
    "tall core": dict(n=1, s=32, t=32, r1=32, r2=32, h=12, w=9, kernel=(5, 1), padding=(2, 0)),
    "wide core": dict(n=1, s=32, t=32, r1=64, r2=40, h=9, w=12, kernel=(1, 7), padding=(0, 3)),
    "5x5 core": dict(n=1, s=32, t=40, r1=32, r2=24, h=9, w=9, kernel=(5, 5), padding=(2, 2)),
    "uneven core, no padding": dict(n=1, s=32, t=32, r1=32, r2=32, h=12, w=11, kernel=(2, 3)),
    "padding beyond the core": dict(n=1, s=32, t=32, r1=16, r2=16, h=4, w=5, kernel=(3, 3), padding=(4, 2)),
    "one pixel": dict(n=3, s=32, t=32, r1=16, r2=16, h=1, w=1, **SAME),
    "broken": dict(n=2, s=328, t=200, r1=64, r2=64, h=17, w=16, **SAME, activation="relu"),
    "many tiles": dict(n=5, s=72, t=72, r1=16, r2=16, h=15, w=17, **SAME),
}


def case_of(name: str, dtype: torch.dtype) -> Case:
    call = Problem("tucker_conv2d", dtype=dtype, layout=torch.channels_last, **CASES[name]).make()
    call.tensors["core"] = call.tensors["core"].contiguous(memory_format=torch.channels_last)
    case = Case(KERNEL, Cut(1, 8, 8, 2), call)
    kernel, _, tensors, options, output = case.launch()
    cut, _ = harness.planned(kernel, tensors, options, output, "H100")
    return Case(KERNEL, cut, call)


def run(case: Case) -> Result:
    result = case.run()
    result.report["error"] = harness.hopper_fault()
    return result


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, dtype: torch.dtype) -> None:
    case = case_of(name, dtype)
    case.assert_right(run(case))


def test_cuts_of_every_kind_are_seen() -> None:
    """in_factor in shared memory and streamed, one and two groups, two slots and more: by what their sizes need."""
    needed = {name: case_of(name, torch.bfloat16).cut.stages for name in ("whole tiles", "streamed in_factor")}
    assert needed == {"whole tiles": 4, "streamed in_factor": 3}


@pytest.mark.parametrize(
    ("mutation", "fault"),
    [
        (dict(skip_fence_proxy=1), "without fence.proxy.async"),
        (dict(early_release=1), ""),
        (dict(skip_store_wait=1), ""),
        (dict(short_expect=1), ""),
        *((dict(skip_group_barrier=number), "") for number in range(1, 7)),
    ],
    ids=str,
)
def test_a_broken_kernel_is_noticed(mutation: dict[str, int], fault: str) -> None:
    """By the emulator, or by the result."""
    case = case_of("broken", torch.bfloat16)
    harness.hopper_mutate(**mutation)
    try:
        result = run(case)
    finally:
        harness.hopper_mutate()
    assert fault in result.error
    if not result.error:
        with pytest.raises(AssertionError):
            case.assert_right(result)
