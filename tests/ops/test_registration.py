"""Registration of the ops: fake kernels, torch.compile, torch.export, autocast and vmap."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from torch import Tensor

from tests.support.budgets import assert_gradients, assert_strides, assert_within_budget
from tests.support.calls import WINDOW, backward_op, output_gradient, schema_options
from tests.support.problems import CONVS, LAYOUTS, OPS, Call, Problem


def make(op: str, **options: object) -> Call:
    window = {} if op == "lowrank_linear" else WINDOW
    return Problem(op, **{"activation": "silu", **window, **options}).make()


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_backward_op(op: str) -> None:
    assert hasattr(torch.ops.lowrank_ops, op) and hasattr(torch.ops.lowrank_ops, f"{op}_backward")


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype, layout: torch.memory_format, requires_grad: bool) -> None:
    call = make(op, dtype=dtype, layout=layout)
    arguments = [tensor.requires_grad_(requires_grad) for tensor in call.tensors.values()]
    overload = getattr(torch.ops.lowrank_ops, op).default
    torch.library.opcheck(overload, (*arguments, *schema_options(call)))


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("wanted", ["all", "input", "factors"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck_backward(op: str, layout: torch.memory_format, requires_grad: bool, wanted: str) -> None:
    call = make(op, layout=layout)
    arguments = [output_gradient(call), *call.tensors.values()]
    arguments = [tensor.requires_grad_(requires_grad) for tensor in arguments]
    mask = [wanted == "all" or (wanted == "input") == (name == "input") for name in call.tensors]
    overload = getattr(torch.ops.lowrank_ops, f"{op}_backward").default
    checks = OPCHECKS if requires_grad and not traces_double_backward() else (*OPCHECKS, "test_aot_dispatch_dynamic")
    torch.library.opcheck(overload, (*arguments, *schema_options(call), mask), test_utils=checks)


@functools.cache
def traces_double_backward() -> bool:
    """Whether torch itself can trace the second derivative of a convolution for symbolic sizes: 2.11 cannot."""
    image, weight = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(2, 2, 3, 3, requires_grad=True)
    options = ([2], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, True])
    overload = torch.ops.aten.convolution_backward.default
    found = torch.library.opcheck(
        overload,
        (torch.randn(1, 2, 2, 2, requires_grad=True), image, weight, *options),
        test_utils="test_aot_dispatch_dynamic",
        raise_exception=False,
    )
    return found["test_aot_dispatch_dynamic"] == "SUCCESS"


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("s", [1, 4])
@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_fake_kernels_give_the_real_metadata(op: str, layout: torch.memory_format, t: int, s: int, n: int) -> None:
    """Shape, dtype and strides agree, forward and backward, also where sizes of 0 and 1 make a layout ambiguous."""
    call = Problem(op, n=n, s=s, t=t, layout=layout, padding=(1, 1)).make()
    grad_output = torch.ones(call.exact().shape)
    real = [call.run(), *backward_op(call, grad_output, [True] * len(call.tensors))]
    with torch._subclasses.FakeTensorMode() as mode:
        call.tensors = {name: mode.from_tensor(tensor) for name, tensor in call.tensors.items()}
        fake = [call.run(), *backward_op(call, mode.from_tensor(grad_output), [True] * len(call.tensors))]
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        significant = [axis for axis, size in enumerate(a.shape) if size > 1]
        assert a.numel() == 0 or [a.stride(i) for i in significant] == [b.stride(i) for i in significant]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_compile(op: str, layout: torch.memory_format, dynamic: bool) -> None:
    """The whole graph, forward and backward, gives what the op gives alone; again at another batch size."""
    torch._dynamo.reset()

    def run(call: Call, tensors: dict[str, Tensor]) -> Tensor:
        return Call(call.problem, tensors).run() * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for n in (2, 3):
        call = make(op, n=n, layout=layout)
        leaves = {name: tensor.requires_grad_() for name, tensor in call.tensors.items()}
        grad_output = output_gradient(call)
        results = []
        for function in (run, compiled):
            output = function(call, leaves)
            results.append([output, *torch.autograd.grad(output, list(leaves.values()), grad_output)])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            assert_strides(actual, expected)


class Layer(torch.nn.Module):
    """One op with its factors as parameters."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.problem = call.problem
        for name, tensor in call.tensors.items():
            if name != "input":
                self.register_parameter(name, torch.nn.Parameter(tensor))

    def forward(self, input: Tensor) -> Tensor:
        return Call(self.problem, {"input": input, **dict(self.named_parameters())}).run()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_export(op: str, layout: torch.memory_format) -> None:
    """Exported with a free batch size, the program holds the op and runs at another batch size."""
    call = make(op, n=4, layout=layout)
    layer, input = Layer(call), call.tensors["input"]
    batch = {"input": {0: torch.export.Dim("batch", min=2, max=64)}}
    exported = torch.export.export(layer, (input,), dynamic_shapes=batch)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert f"lowrank_ops.{op}.default" in targets
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    larger = torch.cat([input, input[:2]])
    assert torch.equal(loaded(larger), layer(larger))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_autocast(op: str, dtype: torch.dtype) -> None:
    """Inside a region the op computes in the region's dtype; gradients come back in the parameters'."""
    call = make(op)
    leaves = [tensor.requires_grad_() for tensor in call.tensors.values()]
    with torch.autocast("cpu", dtype):
        output = call.run()
    low = Call(call.problem, {name: tensor.detach().to(dtype) for name, tensor in call.tensors.items()})
    assert output.dtype == dtype and torch.equal(output, low.run())
    grad_output = output_gradient(call).to(dtype)
    for gradient, expected in zip(
        torch.autograd.grad(output, leaves, grad_output), low.gradients(grad_output).values(), strict=True
    ):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected.float())


@pytest.mark.parametrize("op", OPS)
def test_autocast_disabled_or_fp64(op: str) -> None:
    call = make(op)
    plain = call.run()
    with torch.autocast("cpu", enabled=False):
        assert torch.equal(call.run(), plain)
    double = make(op, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert double.run().dtype == torch.float64


@pytest.mark.parametrize("op", OPS)
def test_vmap(op: str) -> None:
    call = make(op, dtype=torch.float64)
    inputs = torch.stack([call.tensors["input"], call.tensors["input"] * 2])
    mapped = torch.vmap(lambda input: Call(call.problem, {**call.tensors, "input": input}).run())(inputs)
    for input, output in zip(inputs, mapped, strict=True):
        single = Call(call.problem, {**call.tensors, "input": input})
        assert_within_budget(output, single.exact(), single.magnitude())


@pytest.mark.parametrize("op", CONVS)
def test_channels_last_module(op: str) -> None:
    """`.to(memory_format=channels_last)` on a module and its input: the factors' own strides may be any."""
    call = make(op, dtype=torch.bfloat16)
    layer = Layer(call).to(memory_format=torch.channels_last)
    tensors = {name: tensor.detach() for name, tensor in layer.named_parameters()}
    tensors["input"] = call.tensors["input"].contiguous(memory_format=torch.channels_last)
    other = Call(call.problem, {name: tensors[name] for name in call.tensors})
    assert_gradients(other, output_gradient(other))
