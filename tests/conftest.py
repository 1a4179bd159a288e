"""Devices, seeds, problems and error budgets that the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_ops
from lowrank_ops import reference
from lowrank_ops.ops.extension import _C

# cuBLAS is deterministic only with a workspace of its own, and asked for it before its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if torch.cuda.is_available():  # fp32 means fp32; tests of tf32 say so
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu", "gelu")
OPS = ("tucker_conv2d", "cp_conv2d", "lowrank_linear")
POLICIES = ("fused", "chain")
ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx", "brgemm")

# The largest second derivative of each activation, away from its kinks.
_CURVATURE = {"none": 0.0, "relu": 0.0, "relu6": 0.0, "hardswish": 1 / 3, "silu": 0.5, "gelu": 0.8}


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills every `empty` tensor with NaN, so that an output that a kernel leaves unwritten is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are not folded, whatever the width of the terminal that the tests run in."""
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture(params=POLICIES, scope="module")
def policy(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests under each policy."""
    with lowrank_ops.set_policy(request.param):
        yield request.param


@pytest.fixture
def fused_policy() -> Iterator[None]:
    with lowrank_ops.set_policy("fused"):
        yield


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine's CPU, and the GEMM through oneDNN; fused."""
    try:
        _C.set_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(f"not on this CPU: {error}")
    try:
        with lowrank_ops.set_policy("fused"):
            yield request.param
    finally:
        _C.set_cpu_isa("")


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

    def gradients(self, grad_output: Tensor) -> dict[str, Tensor]:
        """What the op's own backward gives for each tensor."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        output = Call(self.problem, leaves).run()
        return dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), grad_output), strict=True))

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


def assert_within_budget(
    actual: Tensor,
    exact: Tensor,
    magnitude: Tensor,
    library: Tensor | float | None = None,
    what: str = "output",
    passes: int = 1,
) -> None:
    """Holds ``actual`` to the error that its dtype allows, in the Frobenius norm.

    fp32, fp64: ``|actual - exact| <= 2 u |magnitude|`` for each pass through the chain, with ``u = eps / 2``
    and ``magnitude`` the fp64 computation on absolute values. A gradient takes two passes, there and back:
    over 6,500 random ones PyTorch's own autograd in fp32 reaches 2.3 in units of ``u |magnitude|``, its
    forward chain 1.06. In fp64 ``exact`` is rounded as well, and as often: each of the two is within that budget of the
    true result (against rational numbers the reference reaches 1.8, our kernels without fused multiply-adds 1.1 for
    layers of 5, 3 and 4 features), so that they may lie twice as far apart. bf16, fp16: twice the error of the chain
    in that dtype (``library``: its result, or that error), plus one rounding of the output. The chain's share is capped
    at 2 eps, for a gradient at 2 eps of ``magnitude``: a number that much cancels to has no relative precision.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, required {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    norm = exact.norm().item()
    assert norm > 0, f"{what}: the reference is all zeros, the comparison would prove nothing"
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - exact).norm().item()
    if actual.dtype in (torch.float32, torch.float64):
        rounded = 2 if actual.dtype == torch.float64 else 1  # of `actual` and `exact`
        budget = rounded * passes * eps * magnitude.norm().item()
    else:
        assert library is not None
        library_error = library if isinstance(library, float) else (library.double() - exact).norm().item()
        cap = 2 * eps * (norm if passes == 1 else magnitude.norm().item())
        # The cap first, which also takes the place of NaN: torch's own bf16 convolutions read memory that nothing wrote
        # for some windows (library_bfloat16_fails).
        budget = 2 * min(cap, library_error) + eps / 2 * norm
    assert error <= budget, f"{what}: error {error:.3e}, budget {budget:.3e}, norm of the reference {norm:.3e}"


def assert_output(call: Call, output: Tensor) -> None:
    """Dtype, shape, strides, freshness and value of an op's output."""
    low = call.problem.dtype in (torch.bfloat16, torch.float16)
    exact = call.exact()
    assert output.dtype == call.problem.dtype
    assert_strides(output, call.tensors["input"])
    storages = {tensor.untyped_storage().data_ptr() for tensor in call.tensors.values() if tensor.numel()}
    assert output.numel() == 0 or output.untyped_storage().data_ptr() not in storages, "the output aliases"
    assert_within_budget(output, exact, call.magnitude(), call.reference(call.problem.dtype) if low else None)


def assert_same_bits_for_any_threads(run: Callable[[], Tensor], counts: tuple[int, ...]) -> None:
    """Runs with each number of threads."""
    threads, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def assert_strides(tensor: Tensor, like: Tensor) -> None:
    """Dense in ``like``'s memory format, as `torch.empty` would allocate it."""
    channels_last = like.dim() == 4 and torch._prims_common.suggest_memory_format(like) == torch.channels_last
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    expected = torch.empty(tensor.shape, memory_format=memory_format).stride()
    significant = [axis for axis, size in enumerate(tensor.shape) if size > 1]
    actual = tensor.stride()
    assert [actual[axis] for axis in significant] == [expected[axis] for axis in significant]


def assert_gradients(call: Call, grad_output: Tensor) -> None:
    """Shape, strides, dtype and value of the gradient of every argument.

    The library's error over a handful of numbers says little: it may be a sixth of what is usual (a gradient of five
    elements on a CPU without bf16 instructions, where ours and the plain chain's had the same bits). So where a small
    gradient is beyond it, the usual error counts.
    """
    few = 64
    dtype = call.problem.dtype
    actual = call.gradients(grad_output)
    exact = call.reference_gradients(grad_output, torch.float64)
    library = call.reference_gradients(grad_output, dtype)
    magnitudes = call.gradient_magnitudes(grad_output)
    for name, tensor in call.tensors.items():
        assert actual[name].dtype == dtype
        assert_strides(actual[name], tensor)
        arguments = (actual[name], exact[name], magnitudes[name])
        try:
            assert_within_budget(*arguments, library[name], f"gradient of {name}", passes=2)
        except AssertionError:
            if dtype not in (torch.bfloat16, torch.float16) or tensor.numel() >= few:
                raise
            usual = _usual_error(call, name, grad_output)
            assert_within_budget(*arguments, usual * magnitudes[name].norm().item(), f"gradient of {name}", passes=2)


def _usual_error(call: Call, name: str, grad_output: Tensor, draws: int = 8) -> float:
    """Of the library's gradient of an argument in the call's dtype, over other gradients of the output.

    Returns:
        The root mean square of ``|library - exact| / |magnitude|``.
    """
    generator = torch.Generator().manual_seed(0)
    squares = 0.0
    for _ in range(draws):
        drawn = torch.randn(grad_output.shape, generator=generator).to(grad_output)
        library, exact = (call.reference_gradients(drawn, dtype)[name] for dtype in (call.problem.dtype, torch.float64))
        error = (library.double() - exact).norm() / call.gradient_magnitudes(drawn)[name].norm()
        squares += error.item() ** 2
    return (squares / draws) ** 0.5
