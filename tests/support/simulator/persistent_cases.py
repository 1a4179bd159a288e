"""Problems for the persistent kernel of the sm80 family, with more than three tiles each."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.simulator.cases import CHANNELS_LAST, SAME, Case, convolution
from tests.support.simulator.harness import Cut, Kernel

KERNEL = Kernel("tucker_conv2d", "sm80", 5)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def case_of(name: str, dtype: torch.dtype) -> Case:
    vector = 16 // dtype.itemsize
    few: dict[str, Any] = dict(s=vector, r1=vector, r2=2 * vector, t=3 * vector, layout=CHANNELS_LAST)
    windows: dict[str, tuple[tuple[int, int], Cut, dict[str, Any]]] = {
        # Three and a half lines of tiles, of which the last column is narrow.
        "3x3": ((27, 18), Cut(1, 8, 16, 2), {**few, **SAME, "n": 2, "s": 6 * vector, "activation": "relu"}),
        # The ranks and the output channels take two passes, the last one filled in part.
        "passes": (
            (8, 50), Cut(1, 8, 16, 4),
            dict(n=1, s=5 * vector, r1=32 + vector, r2=32 + 3 * vector, t=64 + vector, kernel=(1, 2), padding=(0, 1),
                 layout=CHANNELS_LAST, bias=False, activation="silu"),
        ),
        # The halo takes two passes.
        "halo": ((9, 20), Cut(1, 8, 16, 3), {**few, "n": 1, "kernel": (4, 3), "stride": (2, 2), "padding": (3, 1)}),
        "images": ((4, 4), Cut(3, 4, 4, 3), {**few, **SAME, "n": 11}),
        "dilation": (
            (7, 9), Cut(1, 3, 5, 2),
            {**few, "n": 2, "kernel": (3, 2), "stride": (1, 2), "dilation": (3, 1), "padding": (2, 1)},
        ),
    }  # fmt: skip
    out, cut, options = windows[name]
    return convolution(KERNEL, dtype, out, cut, **options)


CASES = ("3x3", "passes", "halo", "images", "dilation")
