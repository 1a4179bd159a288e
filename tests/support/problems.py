"""One call of one op: its shapes, its tensors, and what its result is judged by."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_ops
from lowrank_ops import reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu", "gelu")
OPS = ("tucker_conv2d", "cp_conv2d", "lowrank_linear")
POLICIES = ("fused", "chain")
ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx", "brgemm")

# The largest second derivative of each activation, away from its kinks.
_CURVATURE = {"none": 0.0, "relu": 0.0, "relu6": 0.0, "hardswish": 1 / 3, "silu": 0.5, "gelu": 0.8}


@dataclass(frozen=True)
class Problem:
    """One call of one op: shapes, options and a seed, from which `make` draws the tensors."""

    op: str
    n: int = 2
    s: int = 5
    h: int = 7
    w: int = 6
    t: int = 4
    r1: int = 3  # the rank of CP and linear
    r2: int = 2
    kernel: tuple[int, int] = (3, 2)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    activation: str = "none"
    bias: bool = True
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    device: str = "cpu"
    seed: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self.op == "tucker_conv2d":
            shapes = {
                "input": (self.n, self.s, self.h, self.w),
                "in_factor": (self.r1, self.s),
                "core": (self.r2, self.r1, *self.kernel),
                "out_factor": (self.t, self.r2),
            }
        elif self.op == "cp_conv2d":
            shapes = {
                "input": (self.n, self.s, self.h, self.w),
                "in_factor": (self.r1, self.s),
                "height_factor": (self.r1, self.kernel[0]),
                "width_factor": (self.r1, self.kernel[1]),
                "out_factor": (self.t, self.r1),
            }
        else:
            shapes = {
                "input": (self.n, self.h, self.s),
                "in_factor": (self.r1, self.s),
                "out_factor": (self.t, self.r1),
            }
        return {**shapes, "bias": (self.t,)} if self.bias else shapes

    def options(self) -> dict[str, object]:
        window = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return {"activation": self.activation, **({} if self.op == "lowrank_linear" else window)}

    def make(self) -> Call:
        """The call with normally distributed tensors, those of four axes in `layout`."""
        generator = torch.Generator().manual_seed(self.seed)
        tensors = {}
        for name, shape in self.shapes().items():
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
            tensor = tensor.to(self.device, self.dtype)
            tensors[name] = tensor.contiguous(memory_format=self.layout) if len(shape) == 4 else tensor
        return Call(self, tensors)


@dataclass
class Call:
    """A problem with its tensors, and what its result is judged by."""

    problem: Problem
    tensors: dict[str, Tensor] = field(repr=False)

    def run(self) -> Tensor:
        return getattr(lowrank_ops, self.problem.op)(**self.tensors, **self.problem.options())

    def reference(self, dtype: torch.dtype) -> Tensor:
        """The chain of library calls on the same values, in ``dtype``; bf16 and fp16: `_rounded_chain`."""
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        if dtype.itemsize < 4:
            return _rounded_chain(self.problem, tensors)
        return getattr(reference, self.problem.op)(**tensors, **self.problem.options())

    def exact(self) -> Tensor:
        return self.reference(torch.float64)

    def magnitude(self) -> Tensor:
        """The fp64 chain of the absolute values, no activation: what rounding errors are relative to."""
        return self._absolute().exact()

    def gradients(self, grad_output: Tensor, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
        """What the op's own backward gives for each tensor, or for those alone whose names are `wanted`."""
        wanted = list(self.tensors if wanted is None else wanted)
        tensors = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in self.tensors.items()}
        output = Call(self.problem, tensors).run()
        leaves = [tensors[name] for name in wanted]
        return dict(zip(wanted, torch.autograd.grad(output, leaves, grad_output), strict=True))

    def reference_gradients(self, grad_output: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Autograd through the reference in `dtype`."""
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in self.tensors.items()}
        output = Call(self.problem, leaves).reference(dtype)
        found = torch.autograd.grad(output, list(leaves.values()), grad_output.to(dtype))
        return dict(zip(leaves, found, strict=True))

    def gradient_magnitudes(self, grad_output: Tensor) -> dict[str, Tensor]:
        """The fp64 gradients of the absolute values.

        The activation's derivative, too, is computed from a rounded argument: its error is that argument's,
        times the activation's curvature.
        """
        linear = Call(replace(self.problem, activation="none"), self.tensors)
        before = linear.exact().requires_grad_()
        derivative = torch.ones_like(before)
        if self.problem.activation != "none":
            activated = reference._ACTIVATIONS[self.problem.activation](before)
            (derivative,) = torch.autograd.grad(activated, before, derivative)
        derivative = derivative.abs() + _CURVATURE[self.problem.activation] * self.magnitude()
        return self._absolute().reference_gradients(grad_output.double().abs() * derivative, torch.float64)

    def _absolute(self) -> Call:
        problem = replace(self.problem, activation="none")
        return Call(problem, {name: tensor.abs() for name, tensor in self.tensors.items()})


def _rounded_chain(problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
    """PyTorch's chain in bf16 or fp16 as it is meant to be: fp32 sums, every result and gradient rounded.

    Not the library's own bf16 convolutions: as of torch 2.13 some of them crash the process or read unset
    memory on CPUs (library_bfloat16_fails of csrc/plan/problem.h says which).
    """
    dtype = tensors["input"].dtype
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    hidden, bias = wide["input"], wide.get("bias")
    if problem.op == "lowrank_linear":
        hidden = F.linear(hidden, wide["in_factor"]).to(dtype).float()
        before = F.linear(hidden, wide["out_factor"], bias)
    else:
        hidden = F.conv2d(hidden, wide["in_factor"][:, :, None, None]).to(dtype).float()
        (sh, sw), (ph, pw), (dh, dw) = problem.stride, problem.padding, problem.dilation
        if problem.op == "tucker_conv2d":
            hidden = F.conv2d(hidden, wide["core"], None, (sh, sw), (ph, pw), (dh, dw)).to(dtype).float()
        else:
            height, width = wide["height_factor"][:, None, :, None], wide["width_factor"][:, None, None, :]
            rank = height.shape[0]
            hidden = F.conv2d(hidden, height, None, (sh, 1), (ph, 0), (dh, 1), rank).to(dtype).float()
            hidden = F.conv2d(hidden, width, None, (1, sw), (0, pw), (1, dw), rank).to(dtype).float()
        before = F.conv2d(hidden, wide["out_factor"][:, :, None, None], bias)
    return reference._ACTIVATIONS[problem.activation](before.to(dtype).float()).to(dtype)


LAYOUTS = (torch.contiguous_format, torch.channels_last)


CONVS = ("tucker_conv2d", "cp_conv2d")


# Of all ops, in the order in which csrc/python takes them.
FACTORS = ("in_factor", "core", "height_factor", "width_factor", "out_factor")


# Batches whose backward pass works in several chunks (32 MiB each, csrc/ops/backward.cpp), the last one smaller.
_CHUNKED_CONV = dict(n=5, s=16, t=24, r1=20, r2=12, h=112, w=112, kernel=(3, 3), padding=(1, 1))
CHUNKED = {
    "tucker_conv2d": _CHUNKED_CONV,
    "cp_conv2d": _CHUNKED_CONV,
    "lowrank_linear": dict(n=3, h=50_000, s=16, t=24, r1=20),
}


# Named after what is special about each.
GEOMETRIES = {
    "plain": {},
    "padded": dict(kernel=(3, 3), padding=(1, 1)),
    "stride": dict(kernel=(3, 3), stride=(2, 3), padding=(1, 0), h=9, w=11),
    "dilation": dict(kernel=(3, 2), dilation=(2, 3), padding=(2, 1), h=8, w=9),
    "stride and dilation": dict(kernel=(3, 5), stride=(3, 2), dilation=(2, 3), padding=(4, 5), h=11, w=13),
    "wide kernel": dict(kernel=(1, 7), padding=(0, 3), h=5, w=9),
    "tall kernel": dict(kernel=(7, 1), padding=(3, 0), h=9, w=5),
    "even kernel": dict(kernel=(4, 2), padding=(2, 1)),
    "1x1 core": dict(kernel=(1, 1)),
    "1x1 core, stride": dict(kernel=(1, 1), stride=(2, 3), padding=(1, 0)),
    "input smaller than kernel": dict(kernel=(5, 7), padding=(2, 3), h=2, w=1),
    "padding beyond kernel": dict(kernel=(2, 3), padding=(3, 4), h=4, w=3),
    "one output pixel": dict(kernel=(7, 6)),
    "stride beyond input": dict(kernel=(2, 2), stride=(9, 9)),
    "1x1 image": dict(kernel=(3, 3), padding=(1, 1), h=1, w=1),
    "one input channel": dict(s=1, r1=1, r2=4, padding=(1, 1)),
    "one output channel": dict(t=1, padding=(1, 1)),
    "ranks of one": dict(r1=1, r2=1),
    "prime ranks": dict(s=19, t=23, r1=13, r2=17, padding=(1, 1)),
    "ranks above channels": dict(s=3, t=2, r1=11, r2=7),
    "ranks of whole vectors": dict(s=64, t=48, r1=32, r2=16, kernel=(3, 3), padding=(1, 1), h=14, w=14),
    "ranks past whole vectors": dict(s=65, t=33, r1=17, r2=49, kernel=(3, 3), padding=(1, 1), h=13, w=17),
    "wide image": dict(s=8, t=16, r1=8, r2=16, h=5, w=131, padding=(1, 1)),
    "many images": dict(n=9, h=4, w=3, padding=(1, 1)),
}
