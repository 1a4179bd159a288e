"""Problems for the sm90a kernels, by what is special about each."""

from __future__ import annotations

from typing import Any

import torch
from conftest import Problem
from simt import harness
from simt.cases import Case
from simt.harness import Cut, Kernel

TUCKER = Kernel("tucker_conv2d", "sm90a", 0)
CP = Kernel("cp_conv2d", "sm90a", 1)
HALVES = (torch.bfloat16, torch.float16)
SAME = dict(kernel=(3, 3), padding=(1, 1))

TUCKER_CASES: dict[str, dict[str, Any]] = {
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
    "many tiles": dict(n=5, s=72, t=72, r1=16, r2=16, h=15, w=17, **SAME),
    "much of everything": dict(n=2, s=328, t=200, r1=64, r2=64, h=17, w=16, **SAME, activation="relu"),
}
CP_CASES: dict[str, dict[str, Any]] = {
    "whole tiles": dict(n=1, s=64, t=64, r1=64, h=28, w=16, **SAME),
    "every size padded": dict(n=2, s=72, t=96, r1=72, h=9, w=11, **SAME, activation="relu"),
    "few channels": dict(n=1, s=8, t=32, r1=8, h=15, w=9, **SAME, bias=False, activation="silu"),
    "most channels": dict(n=1, s=256, t=256, r1=256, h=14, w=9, **SAME, activation="gelu"),
    "three slices": dict(n=1, s=136, t=128, r1=200, h=7, w=7, **SAME, activation="hardswish"),
    "a large rank": dict(n=1, s=64, t=32, r1=520, h=5, w=8, **SAME),
    "one part, many tiles": dict(n=2, s=64, t=32, r1=24, h=28, w=24, **SAME),
    "no padding": dict(n=1, s=32, t=32, r1=64, h=18, w=13, kernel=(3, 3), activation="relu6"),
    "padding beyond the window": dict(n=1, s=32, t=32, r1=16, h=4, w=5, kernel=(3, 3), padding=(4, 2)),
    "one pixel": dict(n=3, s=32, t=32, r1=16, h=1, w=1, **SAME),
    "much of everything": dict(n=3, s=136, t=160, r1=136, h=17, w=16, **SAME),
}
CASES = [*((TUCKER, name) for name in TUCKER_CASES), *((CP, name) for name in CP_CASES)]


def hopper_case(kernel: Kernel, name: str, dtype: torch.dtype) -> Case:
    """With the planner's cut."""
    options = (TUCKER_CASES if kernel == TUCKER else CP_CASES)[name]
    call = Problem(kernel.op, dtype=dtype, layout=torch.channels_last, **options).make()
    if kernel == TUCKER:
        call.tensors["core"] = call.tensors["core"].contiguous(memory_format=torch.channels_last)
    _, _, tensors, numbers, output = Case(kernel, Cut(), call).launch()
    cut, _ = harness.planned(kernel, tensors, numbers, output, "H100")
    return Case(kernel, cut, call)
