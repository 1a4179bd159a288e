"""Problems for the sm90a kernels, named by what is special about each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.support.problems import Problem
from tests.support.simulator import harness
from tests.support.simulator.cases import Case
from tests.support.simulator.harness import Cut, Kernel

TUCKER = Kernel("tucker_conv2d", "sm90a", 0)
CP = Kernel("cp_conv2d", "sm90a", 1)
WIDE = Kernel("tucker_conv2d", "sm90a", 2)
LINEAR = Kernel("lowrank_linear", "sm90a", 3)
HALVES = (torch.bfloat16, torch.float16)
SAME = dict(kernel=(3, 3), padding=(1, 1))
HALF = dict(**SAME, stride=(2, 2))
WIDER = dict(kernel=(3, 3), padding=(2, 2), dilation=(2, 2))

# Strides and dilations of 3x3 windows, for every kernel of convolutions: which of the kernel's sizes, and the rest.
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "stride, even sizes": ("whole", dict(n=1, h=16, w=32, **HALF)),
    "stride, every size padded": ("padded", dict(n=2, h=17, w=23, **HALF, activation="relu")),
    # Three tiles across: a tile of the second CTA lies above one of the first, which ran before, so a row too many is
    # seen.
    "stride of the height": ("uneven", dict(n=1, h=17, w=17, **SAME, stride=(2, 1), activation="silu")),
    "stride of the width": ("uneven", dict(n=1, h=9, w=18, **SAME, stride=(1, 2), bias=False)),
    "stride, padding beyond the window": (
        "small",
        dict(n=1, h=4, w=5, kernel=(3, 3), padding=(5, 4), stride=(2, 2)),
    ),
    "stride, one pixel": ("small", dict(n=3, h=1, w=1, **HALF)),
    "stride, many tiles": ("small", dict(n=5, h=17, w=16, **HALF)),
    "stride, much of everything": ("much", dict(n=2, h=33, w=31, **HALF, activation="relu")),
    "dilation, even sizes": ("whole", dict(n=1, h=16, w=32, **WIDER)),
    "dilation, every size padded": ("padded", dict(n=2, h=17, w=21, **WIDER, activation="relu")),
    "dilation of the height": ("uneven", dict(n=1, h=19, w=9, **SAME, dilation=(2, 1), bias=False)),
    "dilation of 3 in the height": ("small", dict(n=1, h=25, w=9, kernel=(3, 3), padding=(3, 1), dilation=(3, 1))),
    "dilation of 4 in the width": ("uneven", dict(n=1, h=8, w=37, kernel=(3, 3), padding=(0, 5), dilation=(1, 4))),
    "dilation, one pixel per class": ("small", dict(n=3, h=2, w=2, **WIDER)),
    "dilation, padding beyond the window": (
        "small",
        dict(n=1, h=3, w=1, kernel=(3, 3), padding=(5, 6), dilation=(2, 2)),
    ),
    "dilation, many tiles": ("small", dict(n=3, h=20, w=33, **WIDER)),
    "stride and dilation of 2": (
        "uneven",
        dict(n=1, h=20, w=19, kernel=(3, 3), padding=(2, 1), stride=(2, 2), dilation=(2, 2)),
    ),
    "stride and dilation": (
        "padded",
        dict(n=2, h=35, w=19, kernel=(3, 3), padding=(2, 3), stride=(2, 1), dilation=(1, 2)),
    ),
}
SIZES: dict[Kernel, dict[str, dict[str, int]]] = {
    TUCKER: {
        "whole": dict(s=64, t=64, r1=64, r2=64),
        "padded": dict(s=72, t=136, r1=40, r2=56),
        "uneven": dict(s=136, t=24, r1=24, r2=8),
        "small": dict(s=72, t=72, r1=16, r2=16),
        "much": dict(s=328, t=200, r1=64, r2=64),
    },
    WIDE: {
        "whole": dict(s=64, t=64, r1=128, r2=128),
        "padded": dict(s=72, t=136, r1=104, r2=88),
        "uneven": dict(s=136, t=72, r1=128, r2=72),
        "small": dict(s=72, t=72, r1=72, r2=72),
        "much": dict(s=200, t=136, r1=128, r2=104),
    },
    CP: {
        "whole": dict(s=64, t=64, r1=64),
        "padded": dict(s=72, t=96, r1=72),
        "uneven": dict(s=136, t=32, r1=200),
        "small": dict(s=32, t=32, r1=16),
        "much": dict(s=136, t=160, r1=136),
    },
}


def _with_steps(kernel: Kernel) -> dict[str, dict[str, Any]]:
    return {name: {**SIZES[kernel][sizes], **rest} for name, (sizes, rest) in STEPS.items()}


TUCKER_CASES: dict[str, dict[str, Any]] = {
    "whole tiles": dict(n=1, s=64, t=64, r1=64, r2=64, h=16, w=16, **SAME),
    "every size padded": dict(n=2, s=72, t=136, r1=40, r2=56, h=9, w=11, **SAME, activation="relu"),
    "narrow ranks": dict(n=1, s=40, t=24, r1=24, r2=8, h=8, w=17, **SAME, activation="silu"),
    "one narrow rank": dict(n=1, s=8, t=8, r1=8, r2=48, h=8, w=8, **SAME, bias=False),
    "many slices": dict(n=1, s=328, t=64, r1=32, r2=32, h=10, w=9, **SAME, activation="gelu"),
    "many chunks": dict(n=1, s=64, t=328, r1=64, r2=32, h=8, w=9, **SAME, activation="hardswish"),
    "1x1 core": dict(n=1, s=64, t=64, r1=16, r2=24, h=9, w=9, kernel=(1, 1), activation="relu6"),
    "tall core": dict(n=1, s=32, t=32, r1=32, r2=32, h=12, w=9, kernel=(5, 1), padding=(2, 0)),
    "wide core": dict(n=1, s=32, t=32, r1=64, r2=40, h=9, w=12, kernel=(1, 7), padding=(0, 3)),
    "5x5 core": dict(n=1, s=32, t=40, r1=32, r2=24, h=9, w=9, kernel=(5, 5), padding=(2, 2)),
    "uneven core, no padding": dict(n=1, s=32, t=32, r1=32, r2=32, h=12, w=11, kernel=(2, 3)),
    "padding beyond the core": dict(n=1, s=32, t=32, r1=16, r2=16, h=4, w=5, kernel=(3, 3), padding=(4, 2)),
    "one pixel": dict(n=3, s=32, t=32, r1=16, r2=16, h=1, w=1, **SAME),
    "many tiles": dict(n=5, s=72, t=72, r1=16, r2=16, h=15, w=17, **SAME),
    "much of everything": dict(n=2, s=328, t=200, r1=64, r2=64, h=17, w=16, **SAME, activation="relu"),
    **_with_steps(TUCKER),
    "stride, a wide R1": dict(n=1, s=40, t=24, r1=64, r2=48, h=9, w=18, **SAME, stride=(1, 2), bias=False),
    "stride, 1x1 core": dict(n=1, s=72, t=64, r1=16, r2=24, h=17, w=18, kernel=(1, 1), stride=(2, 2)),
    "long steps, 1x1 core": dict(n=1, s=72, t=64, r1=16, r2=24, h=17, w=5, kernel=(1, 1), stride=(5, 3)),
    "stride, uneven core": dict(n=1, s=40, t=32, r1=32, r2=32, h=20, w=19, kernel=(2, 3), stride=(2, 2)),
    "stride, 5x5 core": dict(n=1, s=40, t=32, r1=32, r2=24, h=17, w=8, kernel=(5, 5), padding=(2, 2), stride=(2, 2)),
    "stride, 3x9 core": dict(n=1, s=40, t=24, r1=16, r2=8, h=17, w=21, kernel=(3, 9), padding=(1, 4), stride=(2, 2)),
    "stride, 1x13 core": dict(n=1, s=40, t=24, r1=64, r2=8, h=5, w=25, kernel=(1, 13), padding=(0, 5), stride=(2, 2)),
    "stride, lines of padding alone": dict(
        n=2, s=32, t=32, r1=16, r2=16, h=1, w=5, kernel=(1, 1), padding=(1, 1), stride=(2, 2)
    ),
    "stride of 4 in the width": dict(n=1, s=40, t=24, r1=24, r2=24, h=9, w=33, kernel=(3, 5), stride=(1, 4)),
    "dilation, uneven core": dict(n=1, s=40, t=32, r1=32, r2=32, h=20, w=19, kernel=(2, 3), dilation=(2, 2)),
    "stride of 3, dilation of 6": dict(
        n=1, s=72, t=40, r1=24, r2=24, h=67, w=7, kernel=(3, 1), padding=(4, 1), stride=(3, 1), dilation=(6, 1)
    ),
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
    **_with_steps(CP),
    "stride, whole tiles": dict(n=1, s=64, t=64, r1=64, h=32, w=16, **HALF),
    "stride, most channels": dict(n=1, s=256, t=256, r1=256, h=13, w=9, **HALF, activation="gelu"),
    "dilation, most channels": dict(n=1, s=256, t=256, r1=256, h=8, w=9, **SAME, dilation=(1, 2)),
    "stride of 2, dilation of 3": dict(
        n=1, s=72, t=32, r1=24, h=47, w=10, kernel=(3, 3), padding=(4, 1), stride=(2, 1), dilation=(3, 1)
    ),
    "stride of 4, dilation of 2": dict(
        n=1, s=40, t=32, r1=24, h=9, w=41, kernel=(3, 3), padding=(0, 3), stride=(1, 4), dilation=(1, 2)
    ),
    "pairs": dict(n=1, s=64, t=64, r1=64, h=28, w=16, **SAME, cluster=2),
    "pairs, an odd number of tiles": dict(n=1, s=72, t=96, r1=72, h=9, w=20, **SAME, cluster=2, activation="relu"),
    "pairs, a single tile": dict(n=1, s=8, t=32, r1=8, h=5, w=7, **SAME, cluster=2),
    "pairs, most channels": dict(n=1, s=256, t=256, r1=256, h=14, w=9, **SAME, cluster=2, activation="gelu"),
    "pairs, one part, many tiles": dict(n=3, s=64, t=32, r1=24, h=28, w=24, **SAME, cluster=2),
    "pairs, strides": dict(n=3, s=136, t=160, r1=136, h=17, w=9, **HALF, cluster=2, bias=False),
    "pairs, dilations": dict(n=1, s=72, t=32, r1=200, h=17, w=21, **WIDER, cluster=2, activation="silu"),
    "pairs, much of everything": dict(n=3, s=136, t=160, r1=136, h=17, w=16, **SAME, cluster=2),
}
WIDE_CASES: dict[str, dict[str, Any]] = {
    "whole tiles": dict(n=1, s=64, t=64, r1=128, r2=128, h=16, w=16, **SAME),
    "every size padded": dict(n=2, s=72, t=136, r1=104, r2=88, h=9, w=11, **SAME, activation="relu"),
    "a wide R1": dict(n=1, s=40, t=72, r1=128, r2=72, h=8, w=17, **SAME, activation="silu"),
    "a wide R2": dict(n=1, s=72, t=40, r1=72, r2=128, h=9, w=8, **SAME, bias=False),
    "R1 alone above 64": dict(n=1, s=64, t=72, r1=80, r2=64, h=8, w=17, **SAME),
    "R2 alone above 64": dict(n=1, s=72, t=64, r1=24, r2=72, h=9, w=8, **SAME),
    "narrow ranks, many channels": dict(n=1, s=512, t=512, r1=64, r2=64, h=7, w=7, **SAME),
    "narrow ranks, large factors": dict(n=1, s=72, t=1480, r1=48, r2=40, h=4, w=5, **SAME, activation="relu"),
    "many slices and chunks": dict(n=1, s=328, t=328, r1=96, r2=96, h=9, w=9, **SAME, activation="gelu"),
    "1x1 core": dict(n=1, s=64, t=64, r1=72, r2=80, h=9, w=9, kernel=(1, 1), activation="relu6"),
    "tall core": dict(n=1, s=32, t=32, r1=72, r2=72, h=12, w=9, kernel=(5, 1), padding=(2, 0)),
    "uneven core, no padding": dict(n=1, s=32, t=32, r1=96, r2=72, h=12, w=11, kernel=(2, 3)),
    "padding beyond the core": dict(n=1, s=32, t=32, r1=72, r2=72, h=4, w=5, kernel=(3, 3), padding=(4, 2)),
    "one pixel": dict(n=3, s=32, t=32, r1=72, r2=72, h=1, w=1, **SAME),
    "an odd number of tiles": dict(n=3, s=72, t=72, r1=72, r2=72, h=15, w=24, kernel=(1, 1)),
    "much of everything": dict(n=3, s=200, t=136, r1=128, r2=104, h=17, w=16, **SAME, activation="hardswish"),
    **_with_steps(WIDE),
    "stride, a wide R2": dict(n=1, s=72, t=40, r1=72, r2=128, h=9, w=18, **SAME, stride=(1, 2), bias=False),
    "stride, 1x1 core": dict(n=1, s=72, t=64, r1=72, r2=80, h=17, w=18, kernel=(1, 1), stride=(2, 2)),
    "stride, uneven core": dict(n=1, s=40, t=32, r1=96, r2=72, h=20, w=19, kernel=(2, 3), stride=(2, 2)),
    "stride, 5x5 core": dict(n=1, s=40, t=32, r1=72, r2=72, h=17, w=8, kernel=(5, 5), padding=(2, 2), stride=(2, 2)),
    "stride, narrow ranks": dict(n=1, s=72, t=1480, r1=48, r2=40, h=7, w=9, **HALF, activation="relu"),
    "dilation, uneven core": dict(n=1, s=40, t=32, r1=96, r2=72, h=20, w=19, kernel=(2, 3), dilation=(2, 2)),
    "dilation, an odd number of tiles": dict(n=3, s=72, t=72, r1=72, r2=72, h=19, w=8, **SAME, dilation=(2, 1)),
}
# The layer's input is [n, h, s]: n x h rows. `splits`: instead of the planner's, which gives so few tiles all CTAs.
# `cluster`: CTAs of a cluster (the simulator runs two clusters), which the planner forms of many tiles.
LINEAR_CASES: dict[str, dict[str, Any]] = {
    "whole tiles": dict(n=1, h=256, s=64, t=64, r1=64),
    "every size padded": dict(n=3, h=47, s=72, t=136, r1=40, activation="relu"),
    "one row": dict(n=1, h=1, s=72, t=72, r1=72, activation="silu"),
    "three rows, three axes": dict(n=3, h=1, s=136, t=40, r1=128, activation="gelu"),
    "65 rows": dict(n=5, h=13, s=40, t=200, r1=104),
    "the least sizes": dict(n=1, h=8, s=8, t=8, r1=8, bias=False),
    "the largest rank": dict(n=2, h=65, s=128, t=128, r1=256, activation="hardswish"),
    "a rank padded to 256": dict(n=2, h=70, s=72, t=136, r1=136, activation="relu6"),
    "a rank padded to 128": dict(n=1, h=130, s=200, t=72, r1=72, bias=False),
    "many slices": dict(n=1, h=9, s=1000, t=64, r1=64),
    "many chunks": dict(n=1, h=9, s=64, t=1000, r1=128, splits=1, activation="relu"),
    "many slices and chunks": dict(n=1, h=20, s=1000, t=1000, r1=200, splits=3),
    "many slices, a split per chunk": dict(n=1, h=20, s=1000, t=1000, r1=64),
    "many tiles": dict(n=7, h=129, s=72, t=72, r1=16, splits=1),
    "much of everything": dict(n=3, h=231, s=200, t=328, r1=136, splits=2, activation="relu"),
    "pairs": dict(n=1, h=512, s=128, t=128, r1=64, splits=1, cluster=2),
    "pairs, an odd number of tiles": dict(n=3, h=100, s=72, t=136, r1=40, splits=1, cluster=2, activation="relu"),
    "pairs, a single tile": dict(n=1, h=9, s=72, t=72, r1=16, splits=1, cluster=2, activation="silu"),
    "pairs, two parts of the rank": dict(n=5, h=129, s=200, t=72, r1=72, splits=1, cluster=2, bias=False),
    "pairs, the largest rank, a split per chunk": dict(n=1, h=500, s=136, t=320, r1=256, splits=5, cluster=2),
    "pairs, much of everything": dict(n=3, h=231, s=200, t=328, r1=136, splits=2, cluster=2, activation="gelu"),
}
KERNEL_CASES = {TUCKER: TUCKER_CASES, CP: CP_CASES, WIDE: WIDE_CASES, LINEAR: LINEAR_CASES}
CASES = [(kernel, name) for kernel, cases in KERNEL_CASES.items() for name in cases]


def hopper_case(kernel: Kernel, name: str, dtype: torch.dtype) -> Case:
    """The problem with the planner's cut, or with the case's splits and clusters."""
    options = dict(KERNEL_CASES[kernel][name])
    given = {part: options.pop(part) for part in ("splits", "cluster") if part in options}
    case = _planned(kernel, options, dtype)
    return replace(case, cut=replace(case.cut, **given))


def case_for_a_gpu(kernel: Kernel, dtype: torch.dtype, window: dict[str, Any] = SAME) -> Case:
    """More than two tiles per multiprocessor, not equally many for all. The emulator would need minutes for it."""
    if kernel == LINEAR:
        return _planned(kernel, dict(n=47, h=1000, s=136, t=160, r1=200, activation="silu"), dtype)
    ranks = {TUCKER: dict(r1=64, r2=48), WIDE: dict(r1=104, r2=128), CP: dict(r1=136)}[kernel]
    size = {
        axis: pixels * step for axis, pixels, step in zip("hw", (28, 20), window.get("stride", (1, 1)), strict=True)
    }
    return _planned(kernel, dict(n=47, s=136, t=160, **size, **ranks, **window, activation="silu"), dtype)


def _planned(kernel: Kernel, options: dict[str, Any], dtype: torch.dtype) -> Case:
    call = Problem(kernel.op, dtype=dtype, layout=torch.channels_last, **options).make()
    if kernel.op == TUCKER.op:
        call.tensors["core"] = call.tensors["core"].contiguous(memory_format=torch.channels_last)
    _, _, tensors, numbers, output = Case(kernel, Cut(), call).launch()
    cut, _ = harness.planned(kernel, tensors, numbers, output, "H100")
    return Case(kernel, cut, call)
