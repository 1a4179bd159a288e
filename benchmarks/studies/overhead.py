"""`python -m benchmarks.studies.overhead`: the time of the smallest calls, and of packing weights in larger ones."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

import lowrank_ops
from benchmarks.core import bench


def main() -> None:
    torch.set_num_threads(1)
    lowrank_ops.set_policy("fused")
    x, weight, bias = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3), torch.randn(8)
    factors = torch.randn(4, 8), torch.randn(4, 4, 3, 3), torch.randn(8, 4)
    cp = torch.randn(4, 8), torch.randn(4, 3), torch.randn(4, 3), torch.randn(8, 4)
    rows = torch.randn(4, 8)
    calls = {
        "F.conv2d": lambda: F.conv2d(x, weight, bias, padding=1),
        "tucker_conv2d": lambda: lowrank_ops.tucker_conv2d(x, *factors, bias, padding=1),
        "cp_conv2d": lambda: lowrank_ops.cp_conv2d(x, *cp, bias, padding=1),
        "F.linear": lambda: F.linear(rows, weight[:, :, 0, 0], bias),
        "lowrank_linear": lambda: lowrank_ops.lowrank_linear(rows, factors[0], factors[2], bias),
    }
    machine, versions = bench.machine(), bench.versions()
    print(f"{machine['cpu']}, torch {versions['torch']}, 1 thread, input [1, 8, 8, 8] (linear: [4, 8]), fp32")
    for name, mode in (("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)):
        with mode():
            timings = bench.time_interleaved(calls, seconds=0.3)
        print(f"{name}: " + ", ".join(f"{call} {timing.median * 1e6:.1f} us" for call, timing in timings.items()))

    print("share of a call that packing takes (the call on one pixel row against the whole image):")
    for channels, rank, size in ((64, 16, 56), (128, 32, 28), (256, 64, 14), (512, 128, 7)):
        for dtype in (torch.float32, torch.bfloat16):
            made = torch.randn(rank, channels), torch.randn(rank, rank, 3, 3), torch.randn(channels, rank)
            in_factor, core, out_factor = (factor.to(dtype) for factor in made)
            core = core.to(memory_format=torch.channels_last)
            image = torch.randn(1, channels, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
            pixel = image[:, :, :1, :1].contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                timings = bench.time_interleaved(
                    {
                        name: functools.partial(lowrank_ops.tucker_conv2d, x, in_factor, core, out_factor, padding=1)
                        for name, x in (("whole", image), ("pixel", pixel))
                    },
                    seconds=0.2,
                )
            whole, least = timings["whole"].median, timings["pixel"].median
            print(
                f"  {channels} channels {size}x{size}, rank {rank}, {str(dtype).removeprefix('torch.')}: "
                f"{least * 1e6:.1f} of {whole * 1e6:.1f} us ({least / whole:.0%})"
            )


if __name__ == "__main__":
    main()
