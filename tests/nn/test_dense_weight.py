"""`weight` of the factorized modules, for code that treats them as nn.Linear, nn.Conv1d and nn.Conv2d."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ops import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.nn.base import FactorizedModule

MAKERS: dict[str, Callable[..., Any]] = {
    "linear": lambda **options: LowRankLinear(10, 13, 6, **options),
    "tucker": lambda **options: TuckerConv2d(10, 13, (3, 2), (5, 7), padding=1, stride=(2, 1), **options),
    "tucker 1d": lambda **options: TuckerConv1d(10, 13, 3, (5, 7), padding="same", **options),
    "cp": lambda **options: CPConv2d(10, 13, (3, 2), 6, padding=(1, 0), dilation=2, **options),
    "cp 1d": lambda **options: CPConv1d(10, 13, 3, 6, **options),
}
EQUATIONS = {
    "linear": "tr,rs->ts",
    "tucker": "tb,baij,as->tsij",
    "tucker 1d": "tb,bai,as->tsi",
    "cp": "tr,rs,ri,rj->tsij",
    "cp 1d": "tr,rs,ri->tsi",
}
INPUTS = {"linear": (4, 10), "tucker": (2, 10, 8, 9), "tucker 1d": (2, 10, 8), "cp": (2, 10, 8, 9), "cp 1d": (2, 10, 8)}
kinds = pytest.mark.parametrize("kind", MAKERS)


def make(kind: str, **options: object) -> Any:
    torch.manual_seed(0)
    return MAKERS[kind](**options)


def product(kind: str, module: FactorizedModule) -> Tensor:
    """The factors' product in fp64, by one einsum."""
    factors = {name: factor.double() for name, factor in module.factors().items()}
    out = factors.pop("out_factor")
    if kind.startswith("tucker"):
        return torch.einsum(EQUATIONS[kind], out, factors["core"], factors["in_factor"])
    return torch.einsum(EQUATIONS[kind], out, *factors.values())


def dense_layer(kind: str) -> Any:
    module = make(kind)
    if kind == "linear":
        return nn.Linear(10, 13)
    plain = nn.Conv2d if len(module.kernel_size) == 2 else nn.Conv1d
    return plain(10, 13, module.kernel_size, module.stride, module.padding, module.dilation)


class Reader(nn.Module):
    """A block that asks for dtype and device (T5) and computes with the weight itself (Swin, BEiT)."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        layer = self.layer
        input = input.to(layer.weight.device, layer.weight.dtype)
        if layer.weight.dim() == 2:
            return F.linear(input, layer.weight, layer.bias)
        conv = F.conv2d if layer.weight.dim() == 4 else F.conv1d
        return conv(input, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_is_the_product_of_the_factors(kind: str, dtype: torch.dtype) -> None:
    module = make(kind, dtype=dtype)
    exact = product(kind, module)
    # one rounding to the dtype; before it sums of at most 5 * 7 products of 4 factors, in float32 at least
    small = 40 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * float(exact.detach().abs().max())
    weights = [module.weight, module.to_dense().weight]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights += [module.weight + 0, module.to_dense().weight]
    for weight in weights:
        assert weight.dtype is dtype and weight.shape == exact.shape and weight.is_contiguous()
        torch.testing.assert_close(weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=small)


@kinds
def test_gradients_reach_the_factors(kind: str) -> None:
    module = make(kind, dtype=torch.float64)
    target = torch.randn(module.weight.shape, dtype=torch.float64)
    factors = list(module.factors().values())
    expected = torch.autograd.grad((product(kind, module) * target).sum(), factors)
    (module.weight * target).sum().backward()
    for factor, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(factor.grad, gradient)
    module.requires_grad_(False)
    assert not module.weight.requires_grad and not (module.weight * 2).requires_grad


@kinds
def test_metadata_form_no_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(kind, dtype=torch.bfloat16)
    dense = dense_layer(kind).bfloat16()
    monkeypatch.setattr(type(module), "_dense_weight", lambda self: pytest.fail("the product was formed"))
    weight = module.weight
    assert isinstance(weight, Tensor) and hasattr(module, "weight")
    for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "nbytes", "itemsize"):
        assert getattr(weight, name) == getattr(dense.weight, name), name
    for name in ("is_cpu", "is_cuda", "is_meta"):
        assert getattr(weight, name) is getattr(dense.weight, name), name
    for name in ("size", "dim", "numel", "element_size", "is_floating_point", "get_device"):
        assert getattr(weight, name)() == getattr(dense.weight, name)(), name
    assert weight.size(0) == len(weight) == 13 and hash(weight) == hash(weight)
    meta = copy.deepcopy(module).to("meta")
    assert meta.weight.is_meta and meta.weight.device == torch.device("meta")


@kinds
def test_weight_follows_the_factors(kind: str) -> None:
    module = make(kind)
    weight = module.weight
    before = weight.clone()
    with torch.no_grad():
        module.out_factor.mul_(2)
    torch.testing.assert_close(weight.clone(), 2 * before)
    assert module.double().weight.dtype is torch.float64


@kinds
def test_it_is_no_parameter(kind: str) -> None:
    module = make(kind)
    names = [*module.factors(), "bias"]
    assert list(module.state_dict()) == [name for name, _ in module.named_parameters()] == names
    assert not list(module.buffers())
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again.weight, module.weight) and torch.equal(copy.deepcopy(module).weight, module.weight)
    buffer = io.BytesIO()
    torch.save(module.weight, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer)) is Tensor


def test_convolutions_have_a_dense_layers_attributes() -> None:
    for kind in MAKERS:
        module, dense = make(kind), dense_layer(kind)
        for name in dense.__constants__:
            if name != "in_channels" or kind != "linear":
                assert getattr(module, name) == getattr(dense, name), (kind, name)
        if kind != "linear":
            assert module.transposed is dense.transposed


CHANGES: dict[str, Callable[[Any], object]] = {
    "merge_and_unload": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
    "data +=": lambda layer: layer.weight.data.__iadd__(1),
    "data.add_": lambda layer: layer.weight.data.add_(1),
    "add_": lambda layer: layer.weight.add_(1),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(13, 10)),
    "items": lambda layer: layer.weight.__setitem__(0, 1.0),
    "data's items": lambda layer: layer.weight.data.__setitem__((slice(3), 2), 1.0),
    "a view": lambda layer: layer.weight.detach().view(-1).zero_(),
    "a view of a view": lambda layer: layer.weight.data[3][2:4].fill_(1),
    "a row": lambda layer: next(iter(layer.weight.data)).zero_(),
    "init": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "init, keyword": lambda layer: nn.init.normal_(tensor=layer.weight),
    "out": lambda layer: torch.add(torch.zeros(13, 10), 1, out=layer.weight.data),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight.data], 2.0),
    "inplace": lambda layer: F.relu(layer.weight.data, inplace=True),
    "max_norm": lambda layer: F.embedding(torch.tensor([0]), layer.weight.detach(), max_norm=1e-3),
    "requires_grad": lambda layer: setattr(layer.weight, "requires_grad", False),
    "requires_grad_": lambda layer: layer.weight.requires_grad_(False),
    "an attribute": lambda layer: setattr(layer.weight, "no_decay", True),
    "a hook": lambda layer: layer.weight.register_hook(print),
    "retain_grad": lambda layer: layer.weight.retain_grad(),
    "a parameter": lambda layer: nn.Parameter(layer.weight),
    "a parameter of a slice": lambda layer: nn.Parameter(layer.weight.data[:3]),
    "its address": lambda layer: layer.weight.data_ptr(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_change_of_the_product_is_lost(change: str, mode: Callable[[], Any]) -> None:
    layer = make("linear")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with mode(), pytest.raises(RuntimeError, match=r"LowRankLinear\.weight is read-only.*module\.to_dense\(\)"):
        CHANGES[change](layer)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_setting_it_says_what_to_do() -> None:
    for value in (nn.Parameter(torch.zeros(13, 10)), torch.zeros(13, 10), None):
        layer = make("linear")
        with pytest.raises(AttributeError, match=r"LowRankLinear: weight cannot be set.*to_dense\(\)"):
            layer.weight = value
        assert layer.weight.any()
    with pytest.raises(KeyError, match="already exists"):
        layer.register_buffer("weight", torch.zeros(3))
    with pytest.raises(AttributeError, match=r"fold_batchnorm_"):
        nn.utils.fuse_conv_bn_eval(make("tucker").eval(), nn.BatchNorm2d(13).eval())
    embedding = nn.Embedding(13, 10)
    with pytest.raises(AttributeError, match="ties weights"):
        layer.weight = embedding.weight


def test_a_missing_factor_is_not_reported_as_a_missing_weight() -> None:
    layer = make("linear")
    del layer.in_factor
    with pytest.raises(RuntimeError, match="no attribute 'in_factor'"):
        _ = layer.weight


@kinds
def test_other_tensors_take_its_values(kind: str) -> None:
    """Code that copies a layer's weight into another tensor: resized heads, pruned layers, a model's own `fuse()`."""
    module = make(kind).requires_grad_(False)
    expected = product(kind, module).float()
    copies = [dense_layer(kind).requires_grad_(False) for _ in range(4)]
    copies[0].weight.copy_(module.weight)
    copies[1].weight.data = module.weight.data
    copies[2].weight.data[:5], copies[2].weight.data[5:] = module.weight.data[:5], module.weight[5:]
    copies[3].weight = nn.Parameter(module.weight.clone())
    for layer in copies:
        torch.testing.assert_close(layer.weight, expected, rtol=1e-5, atol=1e-6)
        assert type(layer.weight.data) is Tensor
        layer.weight.data.zero_()
    torch.testing.assert_close(product(kind, module).float(), expected)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        copies[0].weight.data = module.weight


def test_a_models_own_fuse_reads_the_right_weight() -> None:
    """The way in which Ultralytics and RepVGG fold a BatchNorm, into a convolution of their own."""
    torch.manual_seed(0)
    conv, norm = make("tucker", bias=False), nn.BatchNorm2d(13).eval()
    nn.init.uniform_(norm.weight, 0.5, 2)
    norm.running_var.uniform_(0.5, 2), norm.running_mean.normal_()
    fused = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    ).to(conv.weight.device)
    with torch.no_grad():
        scale = torch.diag(norm.weight.div(torch.sqrt(norm.eps + norm.running_var)))
        fused.weight.copy_(torch.mm(scale, conv.weight.view(conv.out_channels, -1)).view(fused.weight.shape))
        assert conv.bias is None
        fused.bias.copy_(norm.bias - norm.weight * norm.running_mean / torch.sqrt(norm.running_var + norm.eps))
        input = torch.randn(2, 10, 8, 9)
        torch.testing.assert_close(fused(input), norm(conv(input)), rtol=1e-4, atol=1e-5)


@kinds
def test_parents_that_compute_with_it(kind: str) -> None:
    reader, input = Reader(make(kind)), torch.randn(INPUTS[kind])
    expected = reader.layer(input)
    for output in (reader(input), reader(input.double())):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert type(reader(input)) is Tensor
    gradients = torch.autograd.grad(reader(input).square().sum(), list(reader.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(reader.parameters()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(reader(input), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reader(input).dtype is torch.bfloat16


@kinds
def test_recorded_programs_see_a_tensor(kind: str) -> None:
    reader, input = Reader(make(kind)), torch.randn(INPUTS[kind])
    expected = reader(input)
    parameters = dict(reader.named_parameters())

    class Plain(Reader):
        def forward(self, input: Tensor) -> Tensor:
            layer = self.layer
            if kind == "linear":
                return F.linear(input, layer.weight, layer.bias)
            conv = F.conv2d if len(layer.kernel_size) == 2 else F.conv1d
            return conv(input, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)

    torch._dynamo.reset()
    runs = {
        "compile": torch.compile(reader, fullgraph=True, backend="aot_eager"),
        "export": torch.export.export(reader, (input,)).module(),
        "export strict": torch.export.export(reader, (input,), strict=True).module(),
        "trace": torch.jit.trace(reader, input),
        "fx": torch.fx.symbolic_trace(Plain(reader.layer)),
        "functional_call": lambda x: torch.func.functional_call(reader, parameters, (x,)),
        "vmap": torch.vmap(lambda x: reader(x[None])[0]),
    }
    for name, run in runs.items():
        torch.testing.assert_close(run(input), expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    doubled = {name: 2 * value.detach() for name, value in parameters.items()}
    # the program reads the factors, not the product they had when it was recorded
    outputs = runs["fx"], Plain(reader.layer)
    given = [torch.func.functional_call(model, doubled, (input,)) for model in outputs]
    torch.testing.assert_close(*given, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(given[0], expected)


def test_functorch() -> None:
    reader, input = Reader(make("linear")), torch.randn(4, 10)
    parameters = {name: value.detach() for name, value in reader.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(reader, parameters, (input,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(reader(input).square().sum(), list(reader.parameters()))
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(gradients[name], gradient)
    stacked = {name: torch.stack([value, 2 * value]) for name, value in parameters.items()}
    losses = torch.vmap(loss)(stacked)
    torch.testing.assert_close(losses[0], loss(parameters))
    torch.testing.assert_close(losses[1], loss({name: 2 * value for name, value in parameters.items()}))


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return input @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ input


def test_no_gradient_is_lost() -> None:
    """A custom function's gradient does not go through `__torch_function__`."""
    layer, input = make("linear"), torch.randn(4, 10)
    torch.testing.assert_close(Product.apply(input, layer.weight), F.linear(input, layer.weight))
    with pytest.raises(RuntimeError, match=r"gradient of a custom function.*clone\(\)"):
        Product.apply(input, layer.weight).sum().backward()
    Product.apply(input, layer.weight.clone()).sum().backward()
    expected = torch.autograd.grad(F.linear(input, layer.weight).sum(), [layer.in_factor, layer.out_factor])
    torch.testing.assert_close([layer.in_factor.grad, layer.out_factor.grad], list(expected))
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([layer.weight], lr=0.1)
    with pytest.raises(RuntimeError, match=r"called from C\+\+"), torch._C.DisableTorchFunctionSubclass():
        _ = layer.weight.sum()
