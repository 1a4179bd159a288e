"""Gradients: values, layouts, saved tensors, memory of a training step, and second derivatives."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import lowrank_ops
from lowrank_ops.ops.extension import _C
from tests.support.budgets import assert_gradients, assert_output, assert_strides
from tests.support.calls import SMOOTH, backward_op, integer_call, output_gradient
from tests.support.problems import ACTIVATIONS, CHUNKED, CONVS, DEVICES, DTYPES, GEOMETRIES, LAYOUTS, OPS, Call, Problem


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str, activation: str, bias: bool) -> None:
    options = dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2), activation=activation, bias=bias)
    call = Problem(op, dtype=torch.float64, **options).make()
    names = list(call.tensors)
    leaves = [tensor.requires_grad_() for tensor in call.tensors.values()]

    def run(*tensors: Tensor) -> Tensor:
        return Call(call.problem, dict(zip(names, tensors, strict=True))).run()

    assert gradcheck(run, leaves, check_forward_ad=True)
    assert gradgradcheck(run, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("op", CONVS)
@pytest.mark.parametrize("device", DEVICES)
def test_convolutions(device: str, op: str, geometry: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    call = Problem(op, device=device, dtype=dtype, layout=layout, **GEOMETRIES[geometry]).make()
    assert_gradients(call, output_gradient(call))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_merged_depthwise_stages(geometry: str) -> None:
    """CP's gradients as GPUs compute them equal those of the two stages, whichever gradients are wanted."""
    call = Problem("cp_conv2d", dtype=torch.float64, activation="silu", **GEOMETRIES[geometry]).make()
    problem, tensors, grad = call.problem, list(call.tensors.values()), output_gradient(call)
    window = [list(problem.stride), list(problem.padding), list(problem.dilation)]
    for wanted in ([True] * 6, [False, False, True, False, False, False], [True, False, False, True, False, True]):
        expected = torch.ops.lowrank_ops.cp_conv2d_backward(grad, *tensors, *window, "silu", wanted)
        found = _C.merged_cp_backward(grad, *tensors, *window, "silu", wanted)
        for one, other, is_wanted in zip(found, expected, wanted, strict=True):
            assert (one is not None and one.numel() > 0) == is_wanted or tensors[0].numel() == 0
            if is_wanted:
                assert one.dtype == other.dtype and one.shape == other.shape
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_merged_depthwise_stages_refuse_what_the_op_refuses() -> None:
    """Without the check, a window of one number would be read beyond its end."""
    call = Problem("cp_conv2d").make()
    grad, tensors = output_gradient(call), list(call.tensors.values())
    for window in ([[1], [0, 0], [1, 1]], [[1, 1], [0, 0, 0], [1, 1]], [[1, 1], [0, 0], []]):
        with pytest.raises(ValueError, match=r"cp_conv2d: .* must have 2 entries"):
            _C.merged_cp_chain(*tensors, *window, "none")
        with pytest.raises(ValueError, match=r"cp_conv2d: .* must have 2 entries"):
            _C.merged_cp_backward(grad, *tensors, *window, "none", [True] * 6)
    with pytest.raises(ValueError, match="merged_cp_backward: grad_output must have the output's shape"):
        _C.merged_cp_backward(grad[:, :, 1:], *tensors, 1, 0, 1, "none", [True] * 6)
    with pytest.raises(ValueError, match=r"cp_conv2d: height_factor must be \[R, KH\]"):
        _C.merged_cp_chain(*tensors[:2], tensors[2][0], *tensors[3:], 1, 0, 1, "none")


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", CONVS)
def test_backward_refuses_windows_of_other_lengths(op: str, requires_grad: bool) -> None:
    call = Problem(op).make()
    grad = output_gradient(call)
    tensors = [tensor.requires_grad_(requires_grad) for tensor in call.tensors.values()]
    backward = getattr(torch.ops.lowrank_ops, f"{op}_backward")
    for window in ([[1], [0, 0], [1, 1]], [[1, 1], [0, 0], [1, 1, 1]]):
        with pytest.raises(ValueError, match=f"{op}.*: .* must have 2 entries"):
            backward(grad, *tensors, *window, "none", [True] * len(tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(5, 4, 3), (1, 1, 1), (1, 9, 2), (7, 1, 3), (130, 67, 31)])
@pytest.mark.parametrize("device", DEVICES)
def test_linear(device: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    s, t, r = sizes
    call = Problem("lowrank_linear", device=device, dtype=dtype, s=s, t=t, r1=r, n=3).make()
    assert_gradients(call, output_gradient(call))


@pytest.mark.parametrize("shape", [(5,), (3, 2, 2, 5)], ids=str)
def test_linear_of_other_ranks(shape: tuple[int, ...]) -> None:
    call = Problem("lowrank_linear", s=5, n=3, h=4).make()
    call.tensors["input"] = call.tensors["input"].flatten()[: torch.Size(shape).numel()].reshape(shape)
    assert_gradients(call, output_gradient(call))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smooth_activations(dtype: torch.dtype, op: str, activation: str, bias: bool) -> None:
    call = Problem(op, dtype=dtype, activation=activation, bias=bias, n=3).make()
    assert_gradients(call, output_gradient(call))


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - set(SMOOTH)))
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_with_kinks(dtype: torch.dtype, op: str, activation: str) -> None:
    """In bf16 and fp16 rounding moves values over a kink: see `test_exact_on_small_integers`."""
    call = Problem(op, dtype=dtype, activation=activation, n=3).make()
    assert_gradients(call, output_gradient(call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("op", OPS)
def test_exact_on_small_integers(op: str, activation: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    sizes = dict(n=1, s=3, t=2, r1=2, r2=2, h=4, w=3, kernel=(2, 2))
    call = integer_call(Problem(op, activation=activation, layout=layout, dtype=dtype, **sizes))
    grad_output = output_gradient(call).clamp(-1.4, 1.4).round()
    assert max(m.max() for m in call.gradient_magnitudes(grad_output).values()) <= 256
    exact = call.reference_gradients(grad_output, torch.float64)
    assert any(gradient.any() for gradient in exact.values())
    for name, gradient in call.gradients(grad_output).items():
        assert torch.equal(gradient.double(), exact[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_several_chunks(op: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    call = Problem(op, dtype=dtype, layout=layout, activation="silu", **CHUNKED[op]).make()
    assert_gradients(call, output_gradient(call))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_empty_batch(op: str, layout: torch.memory_format) -> None:
    call = Problem(op, n=0, layout=layout, activation="gelu").make()
    gradients = call.gradients(output_gradient(call))
    for name, tensor in call.tensors.items():
        assert gradients[name].shape == tensor.shape
        assert not gradients[name].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", ["auto", "chain"])
@pytest.mark.parametrize(("r1", "kernel"), [(16, (1, 4)), (24, (4, 4)), (1, (4, 3)), (1, (3, 7))], ids=str)
@pytest.mark.parametrize("op", CONVS)
def test_one_column_of_output(op: str, r1: int, kernel: tuple[int, int], policy: str, dtype: torch.dtype) -> None:
    """torch 2.13's convolutions are wrong for outputs of one column."""
    sizes = dict(n=2, s=64, h=8, w=kernel[1], r1=r1, r2=8, t=16, kernel=kernel, stride=(1, 3))
    call = Problem(op, dtype=dtype, layout=torch.channels_last, activation="silu", **sizes).make()
    with lowrank_ops.set_policy(policy):
        assert_output(call, call.run())
        assert_gradients(call, output_gradient(call))


@pytest.mark.parametrize("op", OPS)
def test_strided_arguments_and_output_gradient(op: str) -> None:
    """Every argument is a slice of a larger tensor, and the output gradient one expanded number, as `sum` gives it."""
    call = Problem(op, s=6, padding=(1, 1), activation="silu").make()
    for name, tensor in call.tensors.items():
        larger = torch.zeros([2 * size for size in tensor.shape])
        call.tensors[name] = larger[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
    assert_gradients(call, output_gradient(call))
    assert_gradients(call, torch.ones(()).expand(call.exact().shape))


@pytest.mark.parametrize("op", CONVS)
def test_expanded_input(op: str) -> None:
    call = Problem(op, padding=(1, 1)).make()
    call.tensors["input"] = call.tensors["input"][:1].expand(3, -1, -1, -1)
    assert_gradients(call, output_gradient(call))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_only_what_is_asked_for(op: str, activation: str) -> None:
    """Each gradient alone equals the one computed with all others; masked results are None."""
    call = Problem(op, padding=(1, 1), activation=activation).make()
    grad_output = output_gradient(call)
    everything = backward_op(call, grad_output, [True] * len(call.tensors))
    for wanted in range(len(call.tensors)):
        mask = [index == wanted for index in range(len(call.tensors))]
        results = backward_op(call, grad_output, mask)
        assert [result is not None for result in results] == mask
        torch.testing.assert_close(results[wanted], everything[wanted])
    assert not any(result is not None for result in backward_op(call, grad_output, [False] * len(call.tensors)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("frozen", ["input", "factors"])
def test_frozen_arguments_get_no_gradient(op: str, frozen: str) -> None:
    call = Problem(op, padding=(1, 1)).make()
    for name, tensor in call.tensors.items():
        tensor.requires_grad_((name == "input") != (frozen == "input"))
    call.run().sum().backward()
    assert all((tensor.grad is not None) == tensor.requires_grad for tensor in call.tensors.values())


@pytest.mark.parametrize("op", OPS)
def test_no_graph_without_need(op: str) -> None:
    call = Problem(op).make()
    assert not call.run().requires_grad
    for tensor in call.tensors.values():
        tensor.requires_grad_()
    assert call.run().requires_grad
    with torch.no_grad():
        assert not call.run().requires_grad
    with torch.inference_mode():
        assert call.run().is_inference()


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("op", OPS)
def test_saves_only_input_and_factors(op: str, activation: str) -> None:
    call = Problem(op, padding=(1, 1), activation=activation).make()
    arguments = {tensor.requires_grad_().untyped_storage().data_ptr() for tensor in call.tensors.values()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        call.run()
    assert {tensor.untyped_storage().data_ptr() for tensor in saved} <= arguments
    assert len(saved) >= len(call.tensors) - 1


_PEAK = """
import sys, torch
import lowrank_ops
from lowrank_ops import reference
lowrank_ops.set_policy("fused")
torch.set_num_threads(1)
chain, channels_last = sys.argv[1] == "chain", sys.argv[2] == "channels_last"
n, s, t, r1, r2, size = 32, 64, 64, 48, 40, 96
layout = torch.channels_last if channels_last else torch.contiguous_format
leaf = lambda *shape: torch.randn(*shape).div_(shape[1]).requires_grad_()
factors = [leaf(r1, s), leaf(r2, r1, 3, 3), leaf(t, r2)]
bias = torch.zeros(t, requires_grad=True)
op = (reference if chain else lowrank_ops).tucker_conv2d
def step(x, grad):
    if sys.argv[3] == "training":
        op(x, *factors, bias, 1, 1, 1, "silu").backward(grad)
    else:
        with torch.inference_mode():
            op(x, *factors, bias, 1, 1, 1, "silu")
def make(n):
    return (torch.ones(n, s, size, size).to(memory_format=layout).requires_grad_(),
            torch.ones(n, t, size, size).to(memory_format=layout))
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
step(*make(1))
x, grad = make(n)
before = status("VmRSS")
step(x, grad)
print(status("VmHWM") - before)
"""


def _peak_growth(path: str, layout: str, what: str) -> int:
    """Bytes that one training step (or inference) of a Tucker block adds to the peak memory of a fresh process."""
    # Every large tensor is a mapping of its own, given back when freed: the peak is what lives at once.
    # VmHWM, not getrusage: ru_maxrss survives fork and exec, and would be this process's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", _PEAK, path, layout, what]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_peak_memory_of_a_training_step(layout: str) -> None:
    """The peak is the output, the input's gradient and a bounded rest; the chain also needs every intermediate."""
    pixels, float_bytes = 32 * 96 * 96, 4
    output_and_gradient = pixels * (64 + 64) * float_bytes
    intermediates = pixels * (48 + 40 + 64) * float_bytes
    limit = output_and_gradient + intermediates // 2
    assert _peak_growth("op", layout, "training") <= limit < _peak_growth("chain", layout, "training")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_peak_memory_of_inference(layout: str) -> None:
    """The peak is the output and tiles; the chain also needs at least its smaller intermediate."""
    pixels, float_bytes = 32 * 96 * 96, 4
    limit = pixels * 64 * float_bytes + pixels * 40 * float_bytes // 4
    assert _peak_growth("op", layout, "inference") <= limit < _peak_growth("chain", layout, "inference")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("edit", ["optimizer", "in place", "data", "load_state_dict", "numpy"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.usefixtures("fused_policy")
def test_never_stale(op: str, edit: str, mode: type) -> None:
    """After any edit of the factors the next call uses the new values."""
    call = Problem(op, s=24, t=40, r1=16, r2=32, kernel=(3, 3), padding=(1, 1)).make()
    input = call.tensors.pop("input")
    module = torch.nn.Module()
    for name, tensor in call.tensors.items():
        module.register_parameter(name, torch.nn.Parameter(tensor))
    call.tensors = {"input": input, **dict(module.named_parameters())}
    other = replace(call.problem, seed=7).make().tensors
    with mode():
        for _ in range(3):
            old = call.run()
    _edit(module, edit, other, call)
    values = {name: tensor.detach().clone() for name, tensor in call.tensors.items()}
    with mode():
        new = call.run()
        fresh = Call(call.problem, values).run()
    assert torch.equal(new, fresh)
    assert not torch.equal(new, old)


def _edit(module: torch.nn.Module, edit: str, other: dict[str, Tensor], call: Call) -> None:
    if edit == "optimizer":
        call.run().sum().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
    elif edit == "load_state_dict":
        module.load_state_dict({name: other[name] for name in module.state_dict()})
    else:
        for name, parameter in module.named_parameters():
            if edit == "in place":
                with torch.no_grad():
                    parameter.copy_(other[name])
            elif edit == "data":
                parameter.data.copy_(other[name])
            else:
                parameter.detach().numpy()[...] = other[name].numpy()


def test_second_derivatives_where_one_argument_comes_from_another() -> None:
    """The gradient with respect to one argument must not run through another that was computed from it."""
    call = Problem("lowrank_linear", dtype=torch.float64, s=4, r1=4, t=4, activation="silu").make()
    seed = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def run(seed: Tensor) -> Tensor:
        return Call(call.problem, {**call.tensors, "in_factor": seed, "out_factor": seed.sin()}).run()

    assert gradcheck(run, [seed]) and gradgradcheck(run, [seed])


@pytest.mark.parametrize("op", OPS)
def test_backward_ops_are_differentiable(op: str) -> None:
    """Backward ops called directly on tensors that require grad, also where only the mask asks for a bias gradient."""
    call = Problem(op, dtype=torch.float64, activation="gelu").make()
    names = list(call.tensors)
    grad_output = output_gradient(call).requires_grad_()
    leaves = [tensor.requires_grad_() for tensor in call.tensors.values()]

    def run(grad_output: Tensor, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        inner = Call(call.problem, dict(zip(names, tensors, strict=True)))
        return backward_op(inner, grad_output, [True] * len(names))

    assert gradcheck(run, [grad_output, *leaves])


@pytest.mark.parametrize("op", OPS)
def test_inside_autocast_backward_keeps_the_forward_dtype(op: str) -> None:
    call = Problem(op, activation="silu").make()
    for tensor in call.tensors.values():
        tensor.requires_grad_()
    output = call.run()
    grad_output = output_gradient(call)
    outside = torch.autograd.grad(output, list(call.tensors.values()), grad_output, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(output, list(call.tensors.values()), grad_output)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("op", CONVS)
def test_core_gradient_keeps_channels_last(op: str) -> None:
    call = Problem(op, s=6, r1=4, kernel=(3, 3), padding=(1, 1), layout=torch.channels_last).make()
    gradients = call.gradients(output_gradient(call))
    for name, tensor in call.tensors.items():
        assert_strides(gradients[name], tensor)
