"""torch.func over factorized modules: grad, vmap and their compositions give the same as for the plain chain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

from lowrank_ops import (
    CPConv1d,
    CPConv2d,
    LowRankLinear,
    TuckerConv1d,
    TuckerConv2d,
    cp_conv2d,
    lowrank_linear,
    prepare_for_inference_,
    tucker_conv2d,
)

# torch warns where an op has no rule for vmap and is looped over; forward-mode derivatives compile something by jit.
pytestmark = [
    pytest.mark.filterwarnings("error:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning"),
]

IMAGE = torch.randn(4, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BLOCKS: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "tucker": (lambda: TuckerConv2d(3, 4, 3, 2, padding=1, activation="silu"), IMAGE),
    "tucker channels_last": (
        lambda: TuckerConv2d(3, 4, (3, 2), (2, 3), stride=(2, 1), dilation=(1, 2)),
        IMAGE.contiguous(memory_format=torch.channels_last),
    ),
    "tucker reflect": (
        lambda: TuckerConv2d(3, 4, 3, 2, padding=1, padding_mode="reflect", bias=False, activation="gelu"),
        IMAGE,
    ),
    "cp": (lambda: CPConv2d(3, 4, 3, 2, stride=2, padding=1, activation="hardswish"), IMAGE),
    "linear": (lambda: LowRankLinear(7, 4, 3, activation="gelu"), IMAGE),
    "tucker 1-D": (lambda: TuckerConv1d(3, 4, 3, 2, padding=1, activation="relu6"), IMAGE[:, :, 0]),
    "cp 1-D": (lambda: CPConv1d(3, 4, 3, 2, padding=1, activation="relu"), IMAGE[:, :, 0]),
}


@pytest.fixture(params=BLOCKS)
def case(request: pytest.FixtureRequest) -> tuple[Any, nn.Module, Tensor]:
    """A block, its chain with the same values, an input; in float64."""
    torch.manual_seed(0)
    make, input = BLOCKS[request.param]
    block = make().double()
    return block, block.to_sequential(), input


def loss(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().sum()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda model, x: vmap(model)(x),
    "vmap of vmap": lambda model, x: vmap(vmap(model))(torch.stack([x, -x])),
    "vmap along another axis": lambda model, x: vmap(model, in_dims=-1, out_dims=1)(torch.stack([x, -x], -1)),
    "grad": lambda model, x: grad(loss(model))(x),
    "grad of grad": lambda model, x: grad(lambda y: grad(loss(model))(y).square().sum())(x),
    "vmap of grad": lambda model, x: vmap(grad(loss(model)))(x),
    "grad of vmap": lambda model, x: grad(loss(vmap(model)))(x),
    "vjp": lambda model, x: vjp(model, x)[1](torch.ones_like(model(x))),
    "jvp": lambda model, x: jvp(model, (x,), (x.cos(),)),
    "jacrev": lambda model, x: jacrev(model)(x[:2]),
    "jacfwd": lambda model, x: jacfwd(model)(x[:2]),
    "hessian": lambda model, x: hessian(loss(model))(x[:1]),
    "hessian, backward twice": lambda model, x: jacrev(jacrev(loss(model)))(x[:1]),
    "functionalize": lambda model, x: functionalize(model)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_give_what_they_give_for_the_chain(case: tuple[Any, nn.Module, Tensor], transform: str) -> None:
    block, chain, input = case
    found, expected = (TRANSFORMS[transform](model, input) for model in (block, chain))
    torch.testing.assert_close(found, expected)


def per_sample(block: Any, x: Tensor) -> dict[str, Tensor]:
    def one(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        output = functional_call(block, parameters, (sample,))
        return output.square().sum()  # type: ignore[no-any-return]

    parameters = {name: parameter.detach() for name, parameter in block.named_parameters()}
    return vmap(grad(one), in_dims=(None, 0))(parameters, x)  # type: ignore[no-any-return]


def one_by_one(block: Any, x: Tensor) -> dict[str, Tensor]:
    """The same gradients by ordinary backward passes, which run the ops' own backward."""
    names, parameters = zip(*block.named_parameters(), strict=True)
    rows = [torch.autograd.grad(block(sample).square().sum(), parameters) for sample in x]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
def test_per_sample_gradients(case: tuple[Any, nn.Module, Tensor], prepared: bool) -> None:
    block, _, input = case
    if prepared:
        prepare_for_inference_(block.eval())
    torch.testing.assert_close(per_sample(block, input), one_by_one(block, input))
    if prepared:
        with torch.no_grad():
            torch.testing.assert_close(vmap(block)(input), block(input))


def test_per_sample_gradients_under_autocast(case: tuple[Any, nn.Module, Tensor]) -> None:
    block, chain, input = case
    block, chain, input = block.float(), chain.float(), input.float()
    with torch.autocast("cpu", torch.bfloat16):
        output, derivative = vmap(block)(input), per_sample(block, input)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), chain(input), rtol=0.1, atol=0.1)
    exact = per_sample(block, input)
    for name, found in derivative.items():  # bfloat16 keeps 8 bits; some 10 rounded steps in a row
        assert (found - exact[name]).norm() <= 0.1 * exact[name].norm(), name


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_per_sample_gradients(case: tuple[Any, nn.Module, Tensor], dynamic: bool) -> None:
    block, _, input = case
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: per_sample(block, x), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for x in (input, torch.cat([input, -input])):
        torch.testing.assert_close(compiled(x), per_sample(block, x))


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0), (None, 0)], ids=str)
def test_ensembles(case: tuple[Any, nn.Module, Tensor], in_dims: tuple[int | None, int | None]) -> None:
    """Factors, bias and input with or without the mapped axis."""
    block, _, input = case
    blocks = [copy.deepcopy(block) for _ in range(3)]
    for other in blocks[1:]:
        other.reset_parameters()
    if in_dims[0] is None:
        blocks = [block] * 3
        parameters = {name: parameter.detach() for name, parameter in block.named_parameters()}
    else:
        parameters = stack_module_state(blocks)[0]
    inputs = torch.stack([input, input.cos(), -input])
    x = inputs if in_dims[1] == 0 else input
    found = vmap(lambda values, one: functional_call(block, values, (one,)), in_dims=in_dims)(parameters, x)
    expected = [other(inputs[i] if in_dims[1] == 0 else input) for i, other in enumerate(blocks)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_vmap_over_backward_passes(case: tuple[Any, nn.Module, Tensor]) -> None:
    """Ordinary backward passes of the ops, with a batch of output gradients."""
    block, _, input = case
    x = input.clone().requires_grad_()
    output = block(x)
    wanted = [x, *block.parameters()]
    directions = torch.randn(3, *output.shape, dtype=output.dtype)
    batched = torch.func.vmap(lambda one: torch.autograd.grad(output, wanted, one, retain_graph=True))(directions)
    expected = [torch.autograd.grad(output, wanted, one, retain_graph=True) for one in directions]
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*expected, strict=True))))
    torch.testing.assert_close(
        torch.autograd.grad(output, wanted, directions, is_grads_batched=True, retain_graph=True), batched
    )


def test_ordinary_calls_inside_a_transform_keep_the_kernels(case: tuple[Any, nn.Module, Tensor]) -> None:
    """A call that does not depend on the transformed variable runs as one op."""
    block, _, input = case
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found, torch.no_grad():
        grad(lambda scale: (block(input) * scale).sum())(torch.ones((), dtype=input.dtype))
    names = {event.name for event in found.events()}
    assert any(name.startswith("lowrank_ops::") for name in names)


def test_errors_name_the_argument() -> None:
    x = torch.randn(2, 1, 3, 5, 5)
    a, core, b, rows = torch.randn(2, 3), torch.randn(2, 2, 3, 3), torch.randn(4, 2), torch.randn(2, 3)
    for call in (
        lambda image: tucker_conv2d(image, a[:, :2], core, b),
        lambda image: cp_conv2d(image, a[:, :2], rows, rows, b),
        lambda image: lowrank_linear(image.transpose(1, 3), a[:, :2], b),
    ):
        with pytest.raises(ValueError, match="in_factor must have size 3 on axis 1"):
            vmap(call)(x)
        with pytest.raises(ValueError, match="in_factor must have size 3 on axis 1"):
            grad(lambda image, call=call: call(image[0]).sum())(x)
