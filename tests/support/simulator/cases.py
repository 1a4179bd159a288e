"""Problems for the simulated kernels, at the edges of their tiles, and the error budgets of their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_ops import reference
from tests.support.budgets import assert_within_budget
from tests.support.problems import Call, Problem
from tests.support.simulator.harness import Cut, Kernel, Result, Settings, kernels, run, shape_of

CHANNELS_LAST = torch.channels_last


def dtypes_of(kernel: Kernel) -> tuple[torch.dtype, ...]:
    """The dtypes that a kernel takes. float32 on tensor cores (sm80) is multiplied as tf32."""
    narrow = (torch.bfloat16, torch.float16, torch.float32)
    return (*narrow, torch.float64) if (kernel.family, kernel.config) == ("simt", 1) else narrow


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


KERNELS = [(kernel, dtype) for kernel in kernels() for dtype in dtypes_of(kernel)]
CONVOLUTIONS = [pair for pair in KERNELS if pair[0].op != "lowrank_linear"]
LINEAR = [pair for pair in KERNELS if pair[0].op == "lowrank_linear"]


@dataclass(frozen=True)
class Case:
    kernel: Kernel
    cut: Cut
    call: Call

    def output(self) -> Tensor:
        """An empty tensor for the result: dense, in the input's memory format."""
        shape = self.call.exact().shape
        x = self.call.tensors["input"]
        memory_format = torch.contiguous_format
        if x.dim() == 4 and torch._prims_common.suggest_memory_format(x) == CHANNELS_LAST:
            memory_format = CHANNELS_LAST
        return torch.empty(shape, dtype=x.dtype, memory_format=memory_format)

    def launch(self) -> tuple[Kernel, Cut, dict[str, Tensor], dict[str, Any], Tensor]:
        """The arguments of `harness.run`, in which a linear layer's rows are one axis."""
        tensors, output = dict(self.call.tensors), self.output()
        if self.kernel.op == "lowrank_linear":
            tensors["input"], output = tensors["input"].flatten(0, -2), output.flatten(0, -2)
        return self.kernel, self.cut, tensors, self.call.problem.options(), output

    def run(self, settings: Settings | None = None) -> Result:
        return run(*self.launch(), settings)

    def assert_right(self, result: Result) -> None:
        assert (result.code, result.error) == (0, "")
        exact, output = self.call.exact(), result.output
        output = output.reshape(exact.shape)
        if self.kernel.family == "sm80" and output.dtype == torch.float32:
            assert_within_tf32_budget(self.call, output, exact)
        else:
            low = output.dtype.itemsize < 4
            library = self.call.reference(output.dtype) if low else None
            assert_within_budget(output, exact, self.call.magnitude(), library)


def round_to_tf32(tensor: Tensor) -> Tensor:
    """Rounds to the nearest tf32, ties away from zero."""
    return ((tensor.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def tf32_chain(call: Call) -> Tensor:
    """The chain in fp64 with the operands of its matrix products, intermediates included, rounded to tf32."""
    wide = {name: tensor.double() for name, tensor in call.tensors.items()}
    problem, bias = call.problem, wide.get("bias")
    x, in_factor, out_factor = (round_to_tf32(wide[name]) for name in ("input", "in_factor", "out_factor"))
    (sh, sw), (ph, pw), (dh, dw) = problem.stride, problem.padding, problem.dilation
    if problem.op == "lowrank_linear":
        before = F.linear(round_to_tf32(F.linear(x, in_factor)), out_factor, bias)
    else:
        hidden = F.conv2d(x, in_factor[:, :, None, None])
        if problem.op == "tucker_conv2d":
            core = round_to_tf32(wide["core"])
            hidden = F.conv2d(round_to_tf32(hidden), core, None, (sh, sw), (ph, pw), (dh, dw))
        else:  # the depthwise stages are plain fp32
            height, width = wide["height_factor"][:, None, :, None], wide["width_factor"][:, None, None, :]
            hidden = F.conv2d(hidden, height, None, (sh, 1), (ph, 0), (dh, 1), len(height))
            hidden = F.conv2d(hidden, width, None, (1, sw), (0, pw), (1, dw), len(height))
        before = F.conv2d(round_to_tf32(hidden), out_factor[:, :, None, None], bias)
    return reference._ACTIVATIONS[problem.activation](before)


def assert_within_tf32_budget(call: Call, output: Tensor, exact: Tensor) -> None:
    norm = exact.norm().item()
    assert norm > 0, "the reference is all zeros, the comparison would prove nothing"
    allowed = 2 * (tf32_chain(call) - exact).norm().item()
    budget = allowed + torch.finfo(torch.float32).eps * call.magnitude().norm().item()
    error = (output.double() - exact).norm().item()
    assert error <= budget, f"error {error:.3e}, budget {budget:.3e}, norm of the reference {norm:.3e}"


def _input_size(out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (out - 1) * stride + dilation * (kernel - 1) + 1 - 2 * padding


def convolution(kernel: Kernel, dtype: torch.dtype, out: tuple[int, int], cut: Cut, /, **options: Any) -> Case:
    """A convolution whose output has size ``out``. CP's only rank is r1."""
    problem = Problem(kernel.op, dtype=dtype, **options)
    window = zip(out, problem.kernel, problem.stride, problem.padding, problem.dilation, strict=True)
    h, w = (_input_size(*axis) for axis in window)
    return Case(kernel, cut, replace(problem, h=h, w=w).make())


def tile_of(kernel: Kernel) -> tuple[int, int]:
    return (8, 16) if shape_of(kernel).pixels == 128 else (8, 8)


SAME: dict[str, Any] = dict(kernel=(3, 3), padding=(1, 1))
Cases = dict[str, Callable[[], Case]]


def _vector(dtype: torch.dtype) -> int:
    """Values in 16 bytes."""
    return 16 // dtype.itemsize


def _few(dtype: torch.dtype) -> dict[str, Any]:
    """Sizes of one or two vectors."""
    vector = _vector(dtype)
    return dict(s=vector, r1=2 * vector, r2=2 * vector, t=vector)


def _cases_of_tiles(kernel: Kernel, dtype: torch.dtype) -> Cases:
    """Outputs and channels about as large as the kernel's tiles, and ways to cut them."""
    shape, (th, tw) = shape_of(kernel), tile_of(kernel)
    c, vector, few = shape.columns, _vector(dtype), _few(dtype)
    chunk = 4 * vector  # 64 bytes of channels
    half = th // 2 if dtype.itemsize >= 4 else th  # two hidden tiles of 128 ranks in fp32 would not fit for 128 pixels
    return {
        "whole tiles": lambda: convolution(
            kernel, dtype, (th, 2 * tw), Cut(1, th, tw, 3), n=1, s=2 * chunk, r1=c, r2=c, t=c, **SAME,
            layout=CHANNELS_LAST, activation="relu",
        ),
        "one below": lambda: convolution(
            kernel, dtype, (th - 1, tw - 1), Cut(1, th, tw), n=1, s=2 * vector + 1, r1=c - 1, r2=c - 3, t=c - 1,
            kernel=(3, 2), padding=(1, 0), bias=False, activation="gelu",
        ),
        "one above": lambda: convolution(
            kernel, dtype, (half + 1, tw + 1), Cut(1, half, tw), n=1, s=5 * vector, r1=c + 1, r2=c + 8, t=c + 2,
            kernel=(2, 2), padding=(1, 0), layout=CHANNELS_LAST,
        ),
        "several images": lambda: convolution(
            kernel, dtype, (4, 4), Cut(shape.pixels // 16, 4, 4), n=shape.pixels // 16 + 1, **few, **SAME,
            layout=CHANNELS_LAST,
        ),
        "splits": lambda: convolution(
            kernel, dtype, (th - 3, tw), Cut(1, th, tw, splits=3), n=1, s=vector, r1=vector + 1, r2=vector - 1,
            t=3 * c + 5, kernel=(2, 3), padding=(0, 1),
        ),
        "passes of the halo": lambda: convolution(
            kernel, dtype, (th, tw), Cut(1, th, tw, 4), n=1, **few, kernel=(4, 3), stride=(2, 2), padding=(3, 1),
            layout=CHANNELS_LAST, activation="gelu",
        ),
        "lean edges": lambda: convolution(
            kernel, dtype, (half + 1, tw + 1), Cut(1, half, tw, 3, splits=2), n=1, s=5 * vector, r1=c + vector,
            r2=c + 3 * vector, t=2 * c + vector, kernel=(2, 3), padding=(1, 0), layout=CHANNELS_LAST, bias=False,
            activation="silu",
        ),
    }  # fmt: skip


def _cases_of_windows(kernel: Kernel, dtype: torch.dtype) -> Cases:
    """Windows, strides and channels that are not what a tile is made for."""
    shape, (th, tw) = shape_of(kernel), tile_of(kernel)
    vector, few = _vector(dtype), _few(dtype)
    chunk = 4 * vector  # 64 bytes of channels
    return {
        "stride and dilation": lambda: convolution(
            kernel, dtype, (5, 7), Cut(2, 3, 5), n=3, s=7, r1=9, r2=11, t=5, kernel=(3, 2), stride=(2, 3),
            dilation=(3, 2), padding=(2, 1), activation="silu",
        ),
        "common factors": lambda: convolution(
            kernel, dtype, (5, 6), Cut(1, 5, 3), n=1, **few, kernel=(2, 3), stride=(4, 2), dilation=(2, 4),
            padding=(0, 3), layout=CHANNELS_LAST, activation="hardswish",
        ),
        "1x1 kernel": lambda: convolution(
            kernel, dtype, (th, tw + 3), Cut(1, th, tw), n=1, s=chunk + 2, r1=6, r2=10, t=9, kernel=(1, 1),
            stride=(2, 1), padding=(0, 1), activation="relu6",
        ),
        "wide kernel": lambda: convolution(
            kernel, dtype, (3, tw + 1), Cut(1, 3, tw + 1 if 3 * (tw + 1) <= shape.pixels else tw), n=2, s=3, r1=5,
            r2=4, t=6, kernel=(1, 7), padding=(0, 3), bias=False,
        ),
        "narrow copies": lambda: convolution(
            kernel, dtype, (4, 6), Cut(1, 4, 6), n=1, s=3 * vector // 2, r1=5 * vector // 2, r2=vector // 2,
            t=7 * vector // 2, **SAME, layout=CHANNELS_LAST, activation="silu",
        ),
        "narrower copies": lambda: convolution(
            kernel, dtype, (4, 6), Cut(1, 4, 6), n=1, s=6, r1=14, r2=10, t=2, **SAME, layout=CHANNELS_LAST,
        ),
        "strided tensors": lambda: convolution(
            kernel, dtype, (6, 7), Cut(1, 6, 7), n=2, s=11, r1=13, r2=9, t=10, **SAME,
        ),
    }  # fmt: skip


def convolution_case(name: str, kernel: Kernel, dtype: torch.dtype) -> Case:
    """By what is special about it."""
    case = {**_cases_of_tiles(kernel, dtype), **_cases_of_windows(kernel, dtype)}[name]()
    if name == "strided tensors":
        tensors = case.call.tensors
        inside(tensors, "input", (0, 2, 1, 3))
        inside(tensors, "out_factor", (3, 2))
        tensors["in_factor"] = tensors["in_factor"].T.contiguous().T
        if "core" in tensors:
            tensors["core"] = tensors["core"].contiguous(memory_format=CHANNELS_LAST)
        else:
            tensors["height_factor"] = tensors["height_factor"].T.contiguous().T
    return case


CONVOLUTION_CASES = (
    "whole tiles",
    "one below",
    "one above",
    "stride and dilation",
    "common factors",
    "1x1 kernel",
    "several images",
    "splits",
    "passes of the halo",
    "wide kernel",
    "narrow copies",
    "narrower copies",
    "lean edges",
    "strided tensors",
)


def inside(tensors: dict[str, Tensor], name: str, before: tuple[int, ...]) -> None:
    """Makes a tensor a slice of a larger one that is NaN elsewhere."""
    tensor = tensors[name]
    around = torch.full([size + 2 * extra for size, extra in zip(tensor.shape, before, strict=True)], torch.nan)
    place = tuple(slice(extra, extra + size) for size, extra in zip(tensor.shape, before, strict=True))
    tensors[name] = around.to(tensor.dtype)[place].copy_(tensor)


def linear_case(name: str, kernel: Kernel, dtype: torch.dtype) -> Case:
    shape, vector = shape_of(kernel), 16 // dtype.itemsize
    c, p = shape.columns, shape.pixels
    cut, options = {
        "whole tiles": (Cut(1, 1, p, 3), dict(n=2, h=p, s=8 * vector, r1=c, t=2 * c, activation="relu")),
        "one below": (Cut(1, 1, p), dict(n=1, h=p - 1, s=vector + 3, r1=c - 1, t=c - 1, activation="gelu")),
        "one above": (Cut(1, 1, p, 4), dict(n=1, h=p + 1, s=5 * vector, r1=c + 8, t=c + 1, bias=False)),
        "lean edges": (
            Cut(1, 1, p, 4, splits=2),
            dict(n=1, h=p + 1, s=5 * vector, r1=c + vector, t=3 * c + vector, activation="relu6"),
        ),
        "one row": (Cut(1, 1, 16), dict(n=1, h=1, s=17, r1=3, t=9, activation="silu")),
        "splits": (Cut(1, 1, p, splits=3), dict(n=1, h=p // 2, s=vector, r1=vector, t=4 * c + 2)),
        "narrow copies": (Cut(1, 1, 24), dict(n=3, h=16, s=6, r1=10, t=14, activation="hardswish")),
        "strided tensors": (Cut(1, 1, p), dict(n=1, h=40, s=11, r1=9, t=12, activation="relu6")),
    }[name]
    case = Case(kernel, cut, Problem(kernel.op, dtype=dtype, **options).make())
    if name == "strided tensors":
        tensors = case.call.tensors
        inside(tensors, "input", (0, 1, 3))
        inside(tensors, "in_factor", (3, 2))
        tensors["out_factor"] = tensors["out_factor"].T.contiguous().T
    return case


LINEAR_CASES = (
    "whole tiles",
    "one below",
    "one above",
    "lean edges",
    "one row",
    "splits",
    "narrow copies",
    "strided tensors",
)
