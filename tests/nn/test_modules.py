"""The modules against nn.Conv2d, nn.Conv1d and nn.Linear with the dense weight of their factors, in fp64."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from lowrank_ops.decompose.ranks import VBMF, Energy
from lowrank_ops.nn.modules import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.ops.functional import ACTIVATIONS

# kind, rank, (S, T): unequal channels, unequal ranks, no multiples of 8
CONV2D = [(TuckerConv2d, (5, 7)), (CPConv2d, 9)]
CONV1D = [(TuckerConv1d, (5, 7)), (CPConv1d, 9)]
S, T = 10, 13

WINDOWS = {
    "plain": {"kernel_size": (3, 3)},
    "per axis": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 3), "dilation": (2, 1)},
    "even": {"kernel_size": (2, 4), "padding": (1, 0)},
    "same": {"kernel_size": (3, 5), "padding": "same", "dilation": (1, 2)},
    "same, even": {"kernel_size": (4, 2), "padding": "same", "dilation": (3, 1)},
    "valid": {"kernel_size": (3, 2), "padding": "valid", "stride": (1, 2)},
    "no bias": {"kernel_size": (3, 1), "bias": False, "padding": (1, 0)},
    "pointwise": {"kernel_size": (1, 1)},
    "pointwise, strided": {"kernel_size": (1, 1), "stride": (2, 3)},
    "pointwise, padded and strided": {"kernel_size": (1, 1), "stride": (2, 3), "padding": (1, 0)},
    **{
        f"padded {kernel}, {mode}": {"kernel_size": kernel, "stride": (2, 3), "padding": 1, "padding_mode": mode}
        for mode in ("zeros", "reflect", "replicate", "circular")
        for kernel in ((3, 1), (1, 3), (1, 1))
    },
    "one axis without a window": {"kernel_size": (1, 3), "stride": (2, 2), "padding": (0, 1)},
    **{
        f"{mode} {padding}": {"kernel_size": (3, 4), "padding": padding, "padding_mode": mode}
        for mode in ("reflect", "replicate", "circular")
        for padding in ((1, 2), "same")
    },
}
WINDOWS_1D = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 5, "stride": 2, "padding": 3, "dilation": 2},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "pointwise, strided": {"kernel_size": 1, "stride": 2, "bias": False},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
}


def make(kind: type, rank: object, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(S, T, rank=rank, **arguments)


def assert_equals_dense(module: nn.Module, input: Tensor) -> None:
    """fp32 against the dense layer in fp64, within 2 u ||A||, A the chain on absolute values."""
    exact = copy.deepcopy(module).double()
    reference = exact.to_dense()(input.double())
    absolute = copy.deepcopy(exact)
    for parameter in absolute.parameters():
        parameter.data.abs_()
    bound = torch.finfo(torch.float32).eps * absolute(input.double().abs()).norm()
    output = module(input)
    assert reference.norm() > 0
    assert output.shape == reference.shape and output.dtype == input.dtype
    assert (output.double() - reference).norm() <= bound


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize(("kind", "rank"), CONV2D)
def test_conv2d_equals_dense(kind: type, rank: object, window: dict) -> None:
    module = make(kind, rank, **window)
    input = torch.randn(2, S, 11, 12)
    assert_equals_dense(module, input)
    assert_equals_dense(module, input.contiguous(memory_format=torch.channels_last))
    assert_equals_dense(module, input[0])


@pytest.mark.parametrize("window", WINDOWS_1D.values(), ids=WINDOWS_1D.keys())
@pytest.mark.parametrize(("kind", "rank"), CONV1D)
def test_conv1d_equals_dense(kind: type, rank: object, window: dict) -> None:
    module = make(kind, rank, **window)
    assert_equals_dense(module, torch.randn(2, S, 17))
    assert_equals_dense(module, torch.randn(2, 17, S).transpose(1, 2))
    assert_equals_dense(module, torch.randn(S, 17))
    assert isinstance(module.to_dense(), nn.Conv1d)


@pytest.mark.parametrize("shape", [(S,), (3, S), (2, 3, S)])
def test_linear_equals_dense(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert_equals_dense(LowRankLinear(S, T, 4), torch.randn(shape))
    assert_equals_dense(LowRankLinear(S, T, 4, bias=False), torch.randn(shape))


@pytest.mark.parametrize(
    "module",
    [
        make(TuckerConv2d, (5, 7), kernel_size=3),
        make(CPConv2d, 9, kernel_size=3),
        make(CPConv2d, 9, kernel_size=1),
        make(TuckerConv1d, (5, 7), kernel_size=3),
        make(CPConv1d, 9, kernel_size=3),
        make(LowRankLinear, 4),
    ],
    ids=lambda module: f"{type(module).__name__} {getattr(module, 'kernel_size', '')}",
)
def test_conversions_lose_nothing_inside_autocast(module: nn.Module) -> None:
    dense, sequential = module.to_dense(), module.to_sequential()
    convert = getattr(type(module), f"from_{type(dense).__name__.lower()}")
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [
            (dense, module.to_dense()),
            (sequential, module.to_sequential()),
            (type(module).from_sequential(sequential), type(module).from_sequential(module.to_sequential())),
        ]
        inside = convert(dense, module.rank)
    for outer, inner in [*pairs, (convert(dense, module.rank), inside)]:
        assert all(torch.equal(value, inner.state_dict()[name]) for name, value in outer.state_dict().items())


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize(("kind", "rank"), CONV2D)
def test_sequential_round_trip(kind: type, rank: object, window: dict) -> None:
    module = make(kind, rank, **window, activation="relu").eval()
    sequential = module.to_sequential()
    assert not sequential.training
    assert all(type(layer) in (nn.Conv2d, nn.ReLU) for layer in sequential)
    input = torch.randn(2, S, 11, 12)
    exact = copy.deepcopy(sequential).double()(input.double())
    torch.testing.assert_close(module.double()(input.double()), exact)  # same sums, same order of stages
    again = kind.from_sequential(sequential)
    assert again.rank == module.rank and again.activation == "relu" and not again.training
    if kind is CPConv2d and max(module.kernel_size) == 1:  # the chain multiplies the taps into its first factor
        assert torch.equal(again.width_factor, torch.ones(module.rank, 1))
        torch.testing.assert_close(again.double()(input.double()), exact)
        return
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.float(), again.get_parameter(name))
    torch.testing.assert_close(again.double()(input.double()), exact)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (make(TuckerConv1d, (5, 7), kernel_size=4, padding="same"), (2, S, 9)),
        (make(CPConv1d, 9, kernel_size=3, stride=2, padding=1), (2, S, 9)),
        (LowRankLinear(S, T, 4), (2, S)),
    ],
)
def test_other_sequential_round_trips(module: nn.Module, shape: tuple[int, ...]) -> None:
    again = type(module).from_sequential(module.to_sequential())
    input = torch.randn(shape)
    assert torch.equal(module(input), again(input))
    torch.testing.assert_close(module.to_sequential().double()(input.double()), module.double()(input.double()))
    module.float()


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
@pytest.mark.parametrize(("kind", "rank"), [*CONV2D, *CONV1D])
def test_activation(kind: type, rank: object, activation: str) -> None:
    module = make(kind, rank, kernel_size=3, padding=1, activation=activation).double()
    input = 4 * torch.randn((2, S, 7, 8) if "2d" in kind.__name__ else (2, S, 8), dtype=torch.float64)
    function = {"relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}
    linear = make(kind, rank, kernel_size=3, padding=1).double()
    torch.testing.assert_close(module(input), function[activation](linear(input)))
    dense, chain = module.to_dense(), module.to_sequential()
    assert isinstance(dense, nn.Sequential) and len(dense) == 2
    torch.testing.assert_close(dense(input), module(input))
    torch.testing.assert_close(chain(input), module(input))
    assert f"activation={activation}" in repr(module)


@pytest.mark.parametrize(("kind", "rank"), CONV2D)
@pytest.mark.parametrize("window", [w for name, w in WINDOWS.items() if name != "pointwise, padded and strided"])
def test_from_conv2d_keeps_everything(kind: type, rank: object, window: dict) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(S, T, **window).double().eval()
    conv.weight.requires_grad_(False)
    full = (min(S, T * math.prod(window["kernel_size"])), T) if kind is TuckerConv2d else rank
    if math.prod(window["kernel_size"]) < 2 and kind is TuckerConv2d:
        full = (S, S)  # a matrix: both ranks at most min(S, T)
    module = kind.from_conv2d(conv, full, activation="silu")
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "padding_mode",
    ):
        assert getattr(module, name) == getattr(conv, name)
    assert module.activation == "silu" and not module.training
    assert (module.bias is None) == (conv.bias is None)
    if conv.bias is not None:
        assert torch.equal(module.bias, conv.bias) and module.bias is not conv.bias and module.bias.requires_grad
    for factor in module.factors().values():
        assert factor.dtype == torch.float64 and not factor.requires_grad
    dense = module.to_dense()[0]
    error = (dense.weight - conv.weight).norm() / conv.weight.norm()
    torch.testing.assert_close(error.item(), module.relative_error, atol=1e-12, rtol=1e-6)
    if kind is TuckerConv2d:  # nothing was cut off
        assert module.relative_error < 1e-12
        input = torch.randn(2, S, 11, 12, dtype=torch.float64)
        torch.testing.assert_close(module(input), F.silu(conv(input)))
    assert dense.weight.requires_grad is False


def test_pointwise_conv_is_the_svd_of_its_matrix() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(S, T, 1, stride=2).double()
    module = CPConv2d.from_conv2d(conv, 4)
    assert module.rank == 4 and bool((module.height_factor == 1).all()) and bool((module.width_factor == 1).all())
    values = torch.linalg.svdvals(conv.weight.flatten(1))
    best = (values[4:].norm() / values.norm()).item()
    assert module.relative_error == pytest.approx(best, rel=1e-9)


def test_from_conv1d_and_from_linear() -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(S, T, 3, stride=2, padding=1, bias=False).double()
    input = torch.randn(2, S, 9, dtype=torch.float64)
    torch.testing.assert_close(TuckerConv1d.from_conv1d(conv, (S, T))(input), conv(input))
    module = CPConv1d.from_conv1d(conv, 6)
    error = (module.to_dense().weight - conv.weight).norm() / conv.weight.norm()
    assert error.item() == pytest.approx(module.relative_error, rel=1e-6) and 0 < module.relative_error < 1
    linear = nn.Linear(S, T).double().eval()
    full = LowRankLinear.from_linear(linear, S)
    input = torch.randn(3, S, dtype=torch.float64)
    torch.testing.assert_close(full(input), linear(input))
    assert not full.training and full.relative_error < 1e-12
    assert LowRankLinear.from_linear(linear, 1.0).rank == S
    kept = LowRankLinear.from_linear(linear, Energy(0.9))
    assert kept.relative_error**2 <= 0.1 and kept.rank < S


def modules_of_every_kind() -> list[tuple[nn.Module, Tensor]]:
    image, line = torch.randn(2, S, 9, 8), torch.randn(2, S, 9)
    return [
        *((make(kind, rank, kernel_size=(3, 2), padding=1), image) for kind, rank in CONV2D),
        *((make(kind, rank, kernel_size=3, padding=1), line) for kind, rank in CONV1D),
        (LowRankLinear(S, T, 4), torch.randn(3, S)),
    ]


def core_is_laid_out(module: nn.Module, layout: torch.memory_format = torch.contiguous_format) -> bool:
    core = getattr(module, "core", None)
    if core is None or core.dim() == 3:
        return core is None or core.is_contiguous()
    return core.is_contiguous(memory_format=layout) and core.is_contiguous() == (layout == torch.contiguous_format)


@pytest.mark.parametrize(("module", "input"), modules_of_every_kind())
def test_copies_and_moves_keep_values_and_layout(module: nn.Module, input: Tensor) -> None:
    expected = module(input)
    assert core_is_laid_out(module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh, assigned = copy.deepcopy(module), copy.deepcopy(module)
    torch.manual_seed(1)  # other values than at construction
    for other in (fresh, assigned):
        other.reset_parameters()
        assert not torch.equal(other(input), expected)
    owned = list(fresh.parameters())
    fresh.load_state_dict({name: value.contiguous() for name, value in state.items()})
    assert all(now is before for now, before in zip(fresh.parameters(), owned, strict=True))
    assigned.load_state_dict(dict(state), assign=True)  # a copy: torch marks the metadata of what it assigned
    meta = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    meta.load_state_dict(state)
    copies = [fresh, assigned, meta, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    nhwc = copy.deepcopy(module).to(memory_format=torch.channels_last)
    nhwc.load_state_dict(state)
    copies.append(copy.deepcopy(nhwc).to(memory_format=torch.contiguous_format))
    assert all(parameter.is_contiguous() for other in copies for parameter in other.parameters())
    in_nhwc = (nhwc, copy.deepcopy(nhwc), pickle.loads(pickle.dumps(nhwc)))
    for other in (*copies, *in_nhwc):
        assert core_is_laid_out(other, torch.channels_last if other in in_nhwc else torch.contiguous_format)
        assert torch.equal(other(input), expected)
        assert repr(other) == repr(module)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        moved = copy.deepcopy(module).to(dtype)
        assert core_is_laid_out(moved) and moved(input.to(dtype)).dtype == dtype
        assert core_is_laid_out(copy.deepcopy(nhwc).to(dtype), torch.channels_last)


@pytest.mark.parametrize(("module", "input"), modules_of_every_kind())
def test_edits_show_at_once(module: nn.Module, input: Tensor) -> None:
    module, input = module.double(), input.double()
    with torch.no_grad():
        before = module(input)
        module.out_factor.mul_(2)
        doubled = module(input)
        bias = module.bias.view(-1, *(1,) * (input.dim() - 2)) if input.dim() > 2 else module.bias
        torch.testing.assert_close(doubled - bias, 2 * (before - bias))
        module.in_factor.data.zero_()
        torch.testing.assert_close(module(input), bias.expand_as(before))


@pytest.mark.parametrize(("module", "input"), modules_of_every_kind())
def test_made_in_inference_mode_yet_trainable(module: nn.Module, input: Tensor) -> None:
    kind = type(module)
    with torch.inference_mode():
        made = [
            kind(S, T, rank=module.rank)
            if kind is LowRankLinear
            else kind(S, T, module.kernel_size, module.rank, padding=1),
            kind.from_sequential(module.to_sequential()),
        ]
        dense = module.to_dense()
    for other in (*made, dense):
        assert not any(parameter.is_inference() for parameter in other.parameters())
        other(input).square().sum().backward()
        assert all(parameter.grad is not None for parameter in other.parameters())


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_fully_sharded(process_group: None) -> None:
    """FSDP2 over one process: outputs, gradients and a step of SGD are those of the unsharded copy."""
    plain = nn.Sequential(
        make(TuckerConv2d, (5, 7), kernel_size=(3, 2)),
        CPConv2d(T, 6, (2, 3), 8, activation="silu"),
        nn.Flatten(),
        LowRankLinear(6 * 3 * 4, 9, 4),
    ).to(memory_format=torch.contiguous_format)
    sharded = copy.deepcopy(plain)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in sharded:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    input = torch.randn(2, S, 6, 7)
    outputs = []
    for model in (plain, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        first = model(input)
        first.square().sum().backward()
        optimizer.step()
        outputs.append((first, model(input)))
    for expected, actual in zip(*outputs, strict=True):
        assert torch.equal(actual, expected)
    assert not torch.equal(*outputs[1])
    for expected, actual in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(actual.full_tensor(), expected)
        assert torch.equal(actual.grad.full_tensor(), expected.grad)


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


@pytest.mark.parametrize(("module", "input"), modules_of_every_kind())
def test_parametrization(module: nn.Module, input: Tensor) -> None:
    name = "core" if hasattr(module, "core") else "in_factor"
    twice = copy.deepcopy(module)
    with torch.no_grad():
        getattr(twice, name).mul_(2)
        parametrize.register_parametrization(module, name, Doubled())
        assert torch.equal(module(input), twice(input))
        module.to(memory_format=torch.contiguous_format)
        parametrize.remove_parametrizations(module, name)
        assert torch.equal(module(input), twice(input))


@pytest.mark.parametrize(("module", "input"), modules_of_every_kind())
def test_new_values_have_the_variance_of_the_default(module: nn.Module, input: Tensor) -> None:
    """Products of independent factors: variances multiply, summed over the ranks. The estimated variance of
    n uniform values has the relative standard deviation sqrt(0.8 / n); six of them are allowed."""
    fan_in, ranks = S * math.prod(getattr(module, "kernel_size", ())), module.rank
    product, spread = 1.0, 0.0
    torch.manual_seed(3)
    draws: dict[str, list[Tensor]] = {name: [] for name in module.factors()}
    for _ in range(50):
        module.reset_parameters()
        for name, factor in module.factors().items():
            draws[name].append(factor.detach().flatten().double())
    for values in map(torch.cat, draws.values()):
        product *= values.square().mean().item()
        spread += 0.8 / len(values)
    product *= math.prod(ranks) if isinstance(ranks, tuple) else ranks
    assert product * 3 * fan_in == pytest.approx(1, abs=6 * math.sqrt(spread))
    assert module.bias.abs().max() <= 1 / math.sqrt(fan_in)


def test_ranks_of_the_constructor() -> None:
    assert TuckerConv2d(64, 96, 3, 24).rank == (24, 24)
    assert TuckerConv2d(64, 96, 3, 0.5).rank == (32, 48)
    assert TuckerConv2d(64, 96, 3, (16, 0.25)).rank == (16, 24)
    assert CPConv2d(64, 96, (3, 5), 40).rank == 40
    assert LowRankLinear(64, 96, 0.25).rank == 16


def test_repr() -> None:
    text = repr(TuckerConv2d(10, 13, (3, 2), (5, 7), 2, (1, 0), 1, bias=False, activation="gelu"))
    assert text == (
        "TuckerConv2d(10, 13, kernel_size=(3, 2), rank=(5, 7), stride=(2, 2), padding=(1, 0), bias=False, "
        "activation=gelu)"
    )
    assert repr(LowRankLinear(10, 13, 4)) == "LowRankLinear(in_features=10, out_features=13, rank=4)"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"groups": 2}, ValueError, "groups must be 1, got 2"),
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be an int or 2 ints"),
        ({"kernel_size": 2.5}, TypeError, "kernel_size must be an int, got 2.5"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"dilation": (1, 0)}, ValueError, "dilation must be at least 1, got 0"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"padding": "full"}, ValueError, "padding must be 'same', 'valid'"),
        ({"padding": "same", "stride": 2}, ValueError, "requires stride 1"),
        ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"dtype": torch.int32}, TypeError, "dtype must be one of"),
        ({"rank": 0}, ValueError, "rank"),
        ({"rank": 10_000}, ValueError, "rank"),
        ({"rank": 1.5}, ValueError, "fraction"),
        ({"rank": Energy(0.9)}, TypeError, "new layer has no weight"),
        ({"rank": (0.5, Energy(0.9))}, TypeError, "rank"),
        ({"rank": VBMF()}, TypeError, "new layer has no weight"),
    ],
)
@pytest.mark.parametrize("kind", [TuckerConv2d, CPConv2d])
def test_bad_arguments(kind: type, arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        kind(**{"in_channels": S, "out_channels": T, "kernel_size": 3, "rank": 4, **arguments})


@pytest.mark.parametrize(("module", "input"), modules_of_every_kind())
def test_bad_input(module: nn.Module, input: Tensor) -> None:
    with pytest.raises(TypeError, match="dtype"):
        module(input.double())
    with pytest.raises(ValueError, match="S, the"):
        module(torch.randn(*(size + (axis == 1) for axis, size in enumerate(input.shape))))
    if input.dim() > 2:
        with pytest.raises(ValueError, match=r"input must be \[N, S"):
            module(torch.randn(3))


@pytest.mark.parametrize(("module", "input"), modules_of_every_kind())
def test_gradients_are_those_of_the_chain(module: nn.Module, input: Tensor) -> None:
    module, input = module.double(), input.double()
    chain = module.to_sequential()
    outputs = []
    for layer in (module, chain):
        leaf = input.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        outputs.append(leaf.grad)
    torch.testing.assert_close(*outputs)
    grads = [parameter.grad.flatten() for parameter in module.parameters()]
    sizes = {name: index for index, name in enumerate(dict(module.named_parameters()))}
    expected = [*(layer.weight.grad.flatten() for layer in chain), chain[-1].bias.grad]
    assert len(grads) == len(expected) and "bias" in sizes
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("module", "input"), modules_of_every_kind())
def test_compile_and_export(module: nn.Module, input: Tensor) -> None:
    expected = module(input)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(input), expected)
    assert torch.equal(torch.export.export(module, (input,)).module()(input), expected)


class Overridden(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_layers_that_cannot_be_replaced() -> None:
    for kind in (TuckerConv2d, CPConv2d):
        with pytest.raises(ValueError, match=rf"{kind.__name__}: 'c' cannot be .*groups must be 1, got 2"):
            kind.from_conv2d(nn.Conv2d(4, 6, 3, groups=2), 2, name="'c'")
        with pytest.raises(ValueError, match=r"overrides Conv2d\.forward"):
            kind.from_conv2d(Overridden(4, 6, 3), 2)
        with pytest.raises(ValueError, match="lazy"):
            kind.from_conv2d(nn.LazyConv2d(4, 6), 2)
        with pytest.raises(ValueError, match="weight or bias is computed"):
            kind.from_conv2d(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), 2)
        with pytest.raises(ValueError, match="meta device"):
            kind.from_conv2d(nn.Conv2d(4, 6, 3, device="meta"), 2)
        with pytest.raises(ValueError, match="already factorized"):
            kind.from_conv2d(TuckerConv2d(4, 6, 3, 2), 2)
        with pytest.raises(TypeError, match=r"must be an nn\.Conv2d, got ConvTranspose2d"):
            kind.from_conv2d(nn.ConvTranspose2d(4, 6, 3), 2)
        with pytest.raises(ValueError, match="activation"):
            kind.from_conv2d(nn.Conv2d(4, 6, 3), 2, activation="elu")
    broken = nn.Conv2d(4, 6, 3)
    broken.weight.data[1, 2, 0, 1] = math.nan
    with pytest.raises(ValueError, match=r"features\.3"):
        TuckerConv2d.from_conv2d(broken, 2, name="features.3")
    with pytest.raises(TypeError, match=r"must be an nn\.Linear"):
        LowRankLinear.from_linear(nn.Conv2d(4, 6, 1), 2)
    with pytest.raises(TypeError, match=r"must be an nn\.Conv1d"):
        CPConv1d.from_conv1d(nn.Conv2d(4, 6, 1), 2)
