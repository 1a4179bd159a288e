"""What the tests of the planner for GPUs share: problems by their numbers, and the state that they leave as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import lowrank_ops
from lowrank_ops.ops.extension import _C

KERNELS = _C.gpu_kernels()
GPUS = {gpu["name"]: gpu for gpu in _C.named_gpus()}
OPS = ("tucker_conv2d", "cp_conv2d", "lowrank_linear")


@pytest.fixture(autouse=True)
def former_state() -> Iterator[None]:
    policy = lowrank_ops.policy()
    yield
    lowrank_ops.set_policy(policy)
    _C.force_gpu_kernel("")
    _C.forget_measurements()


@dataclass(frozen=True)
class Problem:
    """One call of an op, by its numbers."""

    op: str = "tucker_conv2d"
    dtype: str = "bfloat16"
    channels_last: bool = True
    n: int = 8
    s: int = 64
    h: int = 28
    w: int = 28
    t: int = 96
    r1: int = 32
    r2: int = 32
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    tf32: bool = False

    def described(self) -> tuple[object, ...]:
        """As _C takes it."""
        if self.op == "lowrank_linear":
            sizes, window = [self.n, self.s, 1, 1, self.t, self.r1, self.r1, 1, 1], [1, 1, 0, 0, 1, 1]
        else:
            r2 = self.r1 if self.op == "cp_conv2d" else self.r2
            sizes = [self.n, self.s, self.h, self.w, self.t, self.r1, r2, *self.kernel]
            window = [*self.stride, *self.padding, *self.dilation]
        return (self.op, self.dtype, self.channels_last, sizes, window, self.tf32)

    def output(self) -> tuple[int, int]:
        """Height and width of the output; a linear layer is one line of rows."""
        if self.op == "lowrank_linear":
            return 1, self.n
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (self.h, self.w), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        return sizes[0], sizes[1]

    def shapes(self) -> list[tuple[int, ...] | None]:
        if self.op == "lowrank_linear":
            return [(self.n, self.s), (self.r1, self.s), (self.t, self.r1)]
        r2 = self.r1 if self.op == "cp_conv2d" else self.r2
        middle = (
            [(self.r1, self.kernel[0]), (self.r1, self.kernel[1])]
            if self.op == "cp_conv2d"
            else [(r2, self.r1, *self.kernel)]
        )
        return [(self.n, self.s, self.h, self.w), (self.r1, self.s), *middle, (self.t, r2)]

    def explain(self, device: str) -> lowrank_ops.Explanation:
        window = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        (found,) = lowrank_ops.explain(
            getattr(lowrank_ops, self.op),
            self.shapes(),
            dtype=getattr(torch, self.dtype),
            device=device,
            memory_format=torch.channels_last if self.channels_last else torch.contiguous_format,
            verbose=False,
            **({} if self.op == "lowrank_linear" else window),
        )
        return found


def drawn(seed: int) -> Problem:
    """A random problem with an output."""
    draw = random.Random(seed)
    while True:
        kernel = (draw.choice((1, 2, 3, 5, 7)), draw.choice((1, 2, 3, 5)))
        problem = Problem(
            op=draw.choice(OPS),
            dtype=draw.choice(("bfloat16", "float16", "float32", "float64")),
            channels_last=draw.random() < 0.7,
            n=draw.choice((1, 2, 3, 8, 32, 1000)),
            s=draw.choice((1, 3, 36, 64, 256, 2048)),
            h=draw.choice((1, 5, 7, 14, 28, 57, 224)),
            w=draw.choice((1, 6, 7, 14, 28, 56, 224)),
            t=draw.choice((1, 10, 64, 100, 512, 4096)),
            r1=draw.choice((1, 5, 16, 33, 64, 128, 400)),
            r2=draw.choice((1, 6, 16, 64, 100, 256)),
            kernel=kernel,
            stride=(draw.choice((1, 2, 3)), draw.choice((1, 2, 4))),
            padding=(draw.choice((0, 1, 3)), draw.choice((0, 1, 2))),
            dilation=(draw.choice((1, 1, 2, 6)), draw.choice((1, 1, 3))),
            tf32=draw.random() < 0.5,
        )
        if min(problem.output()) > 0:
            return problem


def plan(problem: Problem, kernel: str, gpu: str, **options: object) -> dict[str, object]:
    return _C.plan_gpu_kernel(problem.described(), kernel, gpu, **options)


def problem_for(line: dict[str, object]) -> Problem:
    """One that this kernel takes on a GPU of its architecture."""
    wide = line["family"] == "sm90a" and line["columns"] == 128
    return Problem(str(line["op"]), r1=72 if wide else 32, r2=72 if wide else 32, tf32=line["family"] == "sm80")
