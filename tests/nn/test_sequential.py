"""Chains of plain layers: those that equal one op are read exactly, others are refused with the reason."""

from __future__ import annotations

import copy
import itertools

import pytest
import tensorly as tl
import torch
import torch.nn.functional as F
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor, nn

import lowrank_ops
from lowrank_ops.compress.fuse import fuse_
from lowrank_ops.nn.modules import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d

S, T, R, R1, R2 = 6, 9, 7, 4, 5


def tucker_chain(between: tuple[nn.Module, ...] = (), bias: bool = False, **core: object) -> nn.Sequential:
    """The chain as the TensorLy notebook and jacobgil's script build it, with the dilation on the 1x1 stages too."""
    dilation = core.get("dilation", 1)
    return nn.Sequential(
        nn.Conv2d(S, R1, 1, dilation=dilation, bias=bias),
        *between,
        nn.Conv2d(R1, R2, **{"kernel_size": (3, 2), "bias": False, **core}),
        *between,
        nn.Conv2d(R2, T, 1, dilation=dilation),
    )


def cp_chain(vertical: dict, horizontal: dict, swapped: bool = False) -> nn.Sequential:
    pair = [
        nn.Conv2d(R, R, **{"kernel_size": (3, 1), "groups": R, "bias": False, **vertical}),
        nn.Conv2d(R, R, **{"kernel_size": (1, 4), "groups": R, "bias": False, **horizontal}),
    ]
    return nn.Sequential(nn.Conv2d(S, R, 1, bias=False), *pair[:: -1 if swapped else 1], nn.Conv2d(R, T, 1))


def assert_same(kind: type, chain: nn.Sequential, sizes: tuple[tuple[int, ...], ...]) -> None:
    module = kind.from_sequential(chain)
    for size in sizes:
        input = torch.randn(2, S, *size, dtype=torch.float64)
        expected = copy.deepcopy(chain).double()(input)
        assert expected.norm() > 0
        torch.testing.assert_close(copy.deepcopy(module).double()(input), expected)


SIZES = ((9, 11), (10, 12), (13, 10))


@pytest.mark.parametrize(
    "core",
    [
        {},
        {"kernel_size": 3, "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
        {"padding": "same"},
        {"padding": "valid", "stride": 2},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"kernel_size": 1},
    ],
)
def test_tucker_recipe(core: dict) -> None:
    assert_same(TuckerConv2d, tucker_chain(**core), SIZES)
    assert_same(TuckerConv2d, nn.Sequential(*tucker_chain(**core), nn.SiLU()), SIZES)


def test_cp_recipe_of_the_notebook() -> None:
    """Vertical stage with stride 1, horizontal stage with the layer's stride on both axes."""
    vertical = {"padding": (1, 0), "dilation": (2, 1)}
    horizontal = {"stride": (2, 3), "padding": (0, 2), "dilation": (2, 1)}
    assert_same(CPConv2d, cp_chain(vertical, horizontal), SIZES)
    module = CPConv2d.from_sequential(cp_chain(vertical, horizontal))
    assert (module.stride, module.padding, module.dilation) == ((2, 3), (1, 2), (2, 1))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("stride", [(2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("where", ["first", "second", "both"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_cp_stride_on_either_stage(swapped: bool, stride: tuple[int, int], where: str, dilation: int) -> None:
    """A stride before the other stage's window spreads that window, which is read as dilation and equal."""
    strides = [stride if where in (place, "both") else 1 for place in ("first", "second")]
    if swapped:
        strides.reverse()
    vertical = {"stride": strides[0], "padding": (1, 0), "dilation": (dilation, 1)}
    horizontal = {"stride": strides[1], "padding": (0, 2), "dilation": (1, dilation)}
    assert_same(CPConv2d, cp_chain(vertical, horizontal, swapped), ((23, 31), (24, 32), (25, 33), (26, 30)))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_cp_padding(swapped: bool, mode: str) -> None:
    kind = {"padding_mode": mode}
    assert_same(CPConv2d, cp_chain({"padding": (2, 0), **kind}, {"padding": (0, 1), **kind}, swapped), SIZES)
    assert_same(CPConv2d, cp_chain({"padding": "same", **kind}, {"padding": "same", **kind}, swapped), SIZES)
    assert_same(CPConv2d, cp_chain({"padding": (1, 0), **kind}, {}, swapped), SIZES)


def recipe_cp(layer: nn.Conv2d, rank: int) -> nn.Sequential:
    """The CP part of jacobgil's pytorch-tensor-decompositions (and the TensorLy notebook), as published."""
    last, first, vertical, horizontal = parafac(layer.weight.data, rank=rank, init="random", n_iter_max=5)[1]
    pointwise_in = nn.Conv2d(first.shape[0], rank, 1, dilation=layer.dilation, bias=False)
    depthwise_vertical = nn.Conv2d(
        rank,
        rank,
        (vertical.shape[0], 1),
        padding=(layer.padding[0], 0),
        dilation=layer.dilation,
        groups=rank,
        bias=False,
    )
    depthwise_horizontal = nn.Conv2d(
        rank,
        rank,
        (1, horizontal.shape[0]),
        stride=layer.stride,
        padding=(0, layer.padding[0]),
        dilation=layer.dilation,
        groups=rank,
        bias=False,
    )
    pointwise_out = nn.Conv2d(rank, last.shape[0], 1, dilation=layer.dilation, bias=True)
    pointwise_out.bias.data = layer.bias.data
    depthwise_horizontal.weight.data = horizontal.T.unsqueeze(1).unsqueeze(1)
    depthwise_vertical.weight.data = vertical.T.unsqueeze(1).unsqueeze(-1)
    pointwise_in.weight.data = first.T.unsqueeze(-1).unsqueeze(-1)
    pointwise_out.weight.data = last.unsqueeze(-1).unsqueeze(-1)
    return nn.Sequential(pointwise_in, depthwise_vertical, depthwise_horizontal, pointwise_out)


def recipe_tucker(layer: nn.Conv2d, ranks: tuple[int, int]) -> nn.Sequential:
    """The Tucker part; ranks are (output, input) there."""
    (core, (last, first)), _ = partial_tucker(layer.weight.data, modes=[0, 1], rank=list(ranks), init="svd")
    chain = nn.Sequential(
        nn.Conv2d(first.shape[0], first.shape[1], 1, dilation=layer.dilation, bias=False),
        nn.Conv2d(
            core.shape[1],
            core.shape[0],
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            bias=False,
        ),
        nn.Conv2d(last.shape[1], last.shape[0], 1, dilation=layer.dilation, bias=True),
    )
    chain[2].bias.data = layer.bias.data
    chain[0].weight.data = first.T.unsqueeze(-1).unsqueeze(-1)
    chain[2].weight.data = last.unsqueeze(-1).unsqueeze(-1)
    chain[1].weight.data = core
    return chain


@pytest.mark.parametrize("dilation", [1, 2])
def test_published_recipes(dilation: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(S, T, 3, stride=2, padding=1, dilation=dilation)
    previous = tl.get_backend()
    tl.set_backend("pytorch")
    try:
        cp, tucker = recipe_cp(layer, R), recipe_tucker(layer, (R2, R1))
    finally:
        tl.set_backend(previous)
    assert_same(CPConv2d, cp, SIZES)
    assert_same(TuckerConv2d, tucker, SIZES)
    assert TuckerConv2d.from_sequential(tucker).rank == (R1, R2)
    model = nn.Sequential(nn.Conv2d(3, S, 1), cp, nn.ReLU())
    assert [entry.name for entry in fuse_(model).replaced] == ["1"] and isinstance(model[1], CPConv2d)


def test_cp_padding_before_the_window() -> None:
    """Zero padding of the first stage along the axis of the second one adds to that of the second."""
    chain = cp_chain({"padding": (1, 2), "stride": (1, 2)}, {"padding": (0, 1)})
    assert_same(CPConv2d, chain, SIZES)
    assert CPConv2d.from_sequential(chain).padding == (1, 4)


def test_one_dimension() -> None:
    tucker = nn.Sequential(
        nn.Conv1d(S, R1, 1, bias=False),
        nn.Conv1d(R1, R2, 4, 2, 3, bias=False),
        nn.Conv1d(R2, T, 1),
        nn.ReLU6(),
    )
    cp = nn.Sequential(
        nn.Conv1d(S, R, 1, bias=False), nn.Conv1d(R, R, 3, 2, 1, groups=R, bias=False), nn.Conv1d(R, T, 1)
    )
    assert_same(TuckerConv1d, tucker, ((9,), (12,)))
    assert_same(CPConv1d, cp, ((9,), (12,)))
    with pytest.raises(ValueError, match="groups=7"):
        TuckerConv1d.from_sequential(cp)
    with pytest.raises(ValueError, match="depthwise"):
        CPConv1d.from_sequential(tucker)


WINDOWS_OF_ONE_TAP = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 1, "stride": (1, 2)},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "same": {"padding": "same"},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("window", WINDOWS_OF_ONE_TAP.values(), ids=WINDOWS_OF_ONE_TAP.keys())
@pytest.mark.parametrize(("kind", "size"), [(CPConv2d, (9, 11)), (CPConv1d, (11,))])
def test_a_block_of_one_tap_is_two_pointwise_convolutions(kind: type, size: tuple[int, ...], window: dict) -> None:
    if kind is CPConv1d:
        window = {name: value[-1] if isinstance(value, tuple) else value for name, value in window.items()}
    module = kind(S, T, 1, 4, activation="relu", **window).double()
    with torch.no_grad():
        for factor in module.factors().values():
            factor.copy_(torch.randn_like(factor))
    chain = module.to_sequential()
    assert [type(layer) for layer in chain] == [nn.Conv2d if kind is CPConv2d else nn.Conv1d] * 2 + [nn.ReLU]
    input = torch.randn(2, S, *size, dtype=torch.float64)
    torch.testing.assert_close(chain(input), module(input))
    again = kind.from_sequential(chain)
    torch.testing.assert_close(again(input), module(input))
    assert again.rank == 4 and torch.equal(again.width_factor, torch.ones_like(again.width_factor))
    assert type(fuse_then_first(nn.Sequential(nn.Identity(), chain))) is kind


def fuse_then_first(model: nn.Sequential) -> nn.Module:
    fuse_(model)
    return model[1]


def test_a_block_of_one_tap_keeps_flags_and_modes() -> None:
    module = CPConv2d(S, T, 1, 4).eval()
    module.in_factor.requires_grad_(False)
    chain = module.to_sequential()
    assert not chain.training and [layer.weight.requires_grad for layer in chain] == [False, True]
    again = CPConv2d.from_sequential(chain)
    assert not again.in_factor.requires_grad and again.out_factor.requires_grad


def test_pairs_that_are_no_factorized_convolution() -> None:
    def pair(first: nn.Module, last: nn.Module) -> nn.Sequential:
        return nn.Sequential(first, last)

    with pytest.raises(ValueError, match="stage 2 of 2 must be a pointwise"):
        CPConv2d.from_sequential(pair(nn.Conv2d(S, 4, 1, bias=False), nn.Conv2d(4, T, 3)))
    with pytest.raises(ValueError, match="stage 1 of 2 has a bias"):
        CPConv2d.from_sequential(pair(nn.Conv2d(S, 4, 1), nn.Conv2d(4, T, 1)))
    with pytest.raises(ValueError, match="has stride"):
        CPConv2d.from_sequential(pair(nn.Conv2d(S, 4, 1, bias=False), nn.Conv2d(4, T, 1, stride=2)))
    widening = pair(nn.Conv2d(S, 2 * S, 1, bias=False), nn.Conv2d(2 * S, T, 1))  # no fewer multiplications
    assert not fuse_(widening).layers
    assert CPConv2d.from_sequential(widening).rank == 2 * S


def test_pairs_between_other_layers_are_fused() -> None:
    def pair() -> list[nn.Module]:
        return [nn.Conv2d(16, 4, 1, bias=False), nn.Conv2d(4, 16, 1)]

    model = nn.Sequential(
        *pair(), nn.ReLU(), *pair(), nn.BatchNorm2d(16), *pair(), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)
    )
    expected = copy.deepcopy(model).eval()
    report = fuse_(model.eval())
    kinds = [type(layer) for layer in model]
    assert kinds == [CPConv2d, CPConv2d, nn.BatchNorm2d, CPConv2d, nn.BatchNorm2d, nn.Conv2d]
    assert len(report.layers) == 3
    input = torch.randn(1, 16, 5, 6)
    torch.testing.assert_close(model(input), expected(input))


def test_linear() -> None:
    chain = nn.Sequential(nn.Linear(S, R, bias=False), nn.Linear(R, T), nn.GELU())
    input = torch.randn(3, S)
    torch.testing.assert_close(LowRankLinear.from_sequential(chain)(input), chain(input))
    with pytest.raises(ValueError, match="stage 1 of 2 has a bias"):
        LowRankLinear.from_sequential(nn.Sequential(nn.Linear(S, R), nn.Linear(R, T)))
    with pytest.raises(ValueError, match="stage 1 gives 7 channels, stage 2 takes 5"):
        LowRankLinear.from_sequential(nn.Sequential(nn.Linear(S, R, bias=False), nn.Linear(5, T)))


def test_values_are_copies_and_flags_are_kept() -> None:
    chain = tucker_chain().eval()
    chain[1].weight.requires_grad_(False)
    module = TuckerConv2d.from_sequential(chain)
    assert not module.training and not module.core.requires_grad and module.in_factor.requires_grad
    chain[0].weight.data.zero_()
    assert module.in_factor.abs().sum() > 0 and module.relative_error is None


def conv_tucker_factorization(between: nn.Module) -> nn.Sequential:
    """The course exercise's chain, with something between the stages."""
    return tucker_chain(between=(between,))


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (conv_tucker_factorization(nn.ReLU()), "ReLU between the stages"),
        (conv_tucker_factorization(nn.BatchNorm2d(R1)), "BatchNorm2d between the stages"),
        (conv_tucker_factorization(nn.Dropout()), "Dropout between the stages"),
        (tucker_chain(bias=True), "stage 1 of 3 has a bias"),
        (tucker_chain(**{"kernel_size": 3, "bias": True}), "stage 1 of 3 has a bias|stage 2 of 3 has a bias"),
        (nn.Sequential(*tucker_chain(), nn.Sigmoid()), "none of the activations"),
        (nn.Sequential(*tucker_chain(), nn.GELU("tanh")), "none of the activations"),
        (nn.Sequential(*tucker_chain(), nn.ReLU(), nn.ReLU()), "ReLU"),
        (tucker_chain()[:2], "must have 3 nn.Conv2d stages, got 2"),
        (nn.Sequential(), "must have 3 nn.Conv2d stages, got 0"),
        (
            nn.Sequential(nn.Conv2d(S, 6, 1, bias=False), nn.Conv2d(6, 6, 3, groups=2, bias=False), nn.Conv2d(6, T, 1)),
            "stage 2 of 3 has groups=2",
        ),
        (
            nn.Sequential(nn.Conv2d(S, 6, 1, groups=2, bias=False), nn.Conv2d(6, 6, 3, bias=False), nn.Conv2d(6, T, 1)),
            "stage 1 of 3 has groups=2",
        ),
        (
            nn.Sequential(nn.Conv2d(S, 6, 1, stride=2, bias=False), nn.Conv2d(6, 6, 3, bias=False), nn.Conv2d(6, T, 1)),
            "stage 1 of 3 has stride",
        ),
        (
            nn.Sequential(
                nn.Conv2d(S, 6, 1, bias=False), nn.Conv2d(6, 6, 3, bias=False), nn.Conv2d(6, T, 1, padding=1)
            ),
            "stage 3 of 3 has padding",
        ),
        (
            nn.Sequential(nn.Conv2d(S, 6, 3, bias=False), nn.Conv2d(6, 6, 3, bias=False), nn.Conv2d(6, T, 1)),
            "stage 1 of 3 must be a pointwise",
        ),
        (
            nn.Sequential(nn.Conv2d(S, 6, 1, bias=False).double(), nn.Conv2d(6, 6, 3, bias=False), nn.Conv2d(6, T, 1)),
            "different dtypes",
        ),
    ],
)
def test_no_tucker_block(chain: nn.Sequential, reason: str) -> None:
    before = copy.deepcopy(chain.state_dict())
    with pytest.raises(ValueError, match=reason):
        TuckerConv2d.from_sequential(chain)
    assert all(torch.equal(value, before[name]) for name, value in chain.state_dict().items())


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (
            cp_chain({}, {"kernel_size": (3, 1)}),
            "both depthwise stages have more than one tap along the height",
        ),
        (cp_chain({}, {"groups": 1}), "stage 3 of 4 must be depthwise"),
        (cp_chain({}, {"padding": (1, 0)}), "second depthwise stage pads along the height"),
        (cp_chain({"padding": (1, 0)}, {"padding": (0, 1), "padding_mode": "reflect"}), "different modes"),
        (
            cp_chain({"stride": (1, 2)}, {"padding": (0, 1), "padding_mode": "reflect"}),
            "only zero padding commutes",
        ),
        (cp_chain({"stride": (1, 2)}, {"padding": "same"}), "neither symmetric"),
        (cp_chain({}, {"bias": True}), "stage 3 of 4 has a bias"),
        (tucker_chain(), "must have 4"),
    ],
)
def test_no_cp_block(chain: nn.Sequential, reason: str) -> None:
    with pytest.raises(lowrank_ops.NotOneOp, match=reason):
        CPConv2d.from_sequential(chain)


def test_no_chain_at_all() -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Sequential, got Conv2d"):
        TuckerConv2d.from_sequential(nn.Conv2d(S, T, 3))
    with pytest.raises(ValueError, match="already factorized"):
        TuckerConv2d.from_sequential(TuckerConv2d(S, T, 3, 4))
    hooked = tucker_chain()
    hooked[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="stage 2 of 3 has hooks"):
        TuckerConv2d.from_sequential(hooked)


# fuse_


def network() -> nn.Sequential:
    """Chains as modules of their own and inside a longer nn.Sequential, with and without an activation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, S, 3),
        tucker_chain(padding=1),  # 1, takes the ReLU6 at 2
        nn.ReLU6(),
        nn.BatchNorm2d(T),
        nn.Sequential(nn.Conv2d(T, S, 1), *cp_chain({"padding": (1, 0)}, {"stride": 2}), nn.ReLU(), nn.Sigmoid()),
        nn.Sequential(nn.Conv2d(T, S, 1), nn.ReLU(), *tucker_chain(between=(nn.ReLU(),))),
        nn.Flatten(2),
        nn.Sequential(nn.LazyLinear(4), nn.Linear(4, R, bias=False), nn.Linear(R, T), nn.GELU("tanh")),
    )


def test_fuse_replaces_every_chain() -> None:
    model = network().eval()
    input = torch.randn(2, 3, 20, 21)
    expected = model(input)
    seen: list[torch.Size] = []
    handle = model[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        plain = copy.deepcopy(model).double()
    report = fuse_(model)
    # its hook sees the same values as before
    assert isinstance(model[1], TuckerConv2d) and model[1].activation == "none"
    assert list(model[4]._modules) == ["0", "1", "6"] and isinstance(model[4][1], CPConv2d)
    assert model[4][1].activation == "relu" and not model[4][1].training
    assert list(model[7]._modules) == ["0", "1", "3"] and isinstance(model[7][1], LowRankLinear)
    assert [type(layer) for layer in model[5]][0:2] == [nn.Conv2d, nn.ReLU]
    torch.testing.assert_close(copy.deepcopy(model).double()(input.double()), plain(input.double()))
    assert model(input).shape == expected.shape
    assert len(seen) >= 1
    handle.remove()
    count = len(seen)
    model(input)
    assert len(seen) == count  # the handle still removes its hook
    reasons = {layer.name: layer.reason for layer in report.skipped}
    assert "ReLU between the stages" in reasons["5.2"]
    assert "several places" in reasons["1"] or "hooks" in reasons["1"]
    assert {"4.1", "7.1"} <= {layer.name for layer in report.replaced}
    assert "between the stages" in str(report)


def test_fuse_takes_the_activation_after_a_nested_chain() -> None:
    model = network()
    report = fuse_(model)
    assert list(model._modules) == ["0", "1", "3", "4", "5", "6", "7"] and model[1].activation == "relu6"
    assert report["1"].type == "Conv2d, Conv2d, Conv2d, ReLU6" and report["1"].replaced_by == "TuckerConv2d"


def test_fuse_root_and_whole_children() -> None:
    root = nn.Sequential(*tucker_chain(), nn.ReLU())
    input = torch.randn(1, S, 6, 7)
    expected = root(input)
    fuse_(root)
    assert [type(layer) for layer in root] == [TuckerConv2d]
    torch.testing.assert_close(root(input), expected)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(*tucker_chain(), nn.ReLU())
            self.again = self.first

        def forward(self, input: Tensor) -> Tensor:
            return self.first(input) + self.again(input)

    model = Twice()
    expected = model(input)
    report = fuse_(model)
    assert isinstance(model.first, TuckerConv2d) and model.again is model.first and len(report) == 1
    torch.testing.assert_close(model(input), expected)


def test_fuse_leaves_what_is_shared() -> None:
    chain, other = tucker_chain(), nn.Conv2d(R1, R2, (3, 2), bias=False)
    other.weight = chain[1].weight
    model = nn.ModuleDict({"chain": chain, "other": other})
    report = fuse_(model)
    assert model["chain"] is chain and "shares a parameter with" in str(report["chain"].reason)
    stage = nn.Conv2d(S, S, 1, bias=False)
    model = nn.Sequential(nn.Sequential(stage, nn.Conv2d(S, S, 3, bias=False), stage), stage)
    assert "several places" in str(fuse_(model)["0"].reason)


def test_fuse_leaves_networks_without_chains() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 4), nn.ReLU())
    layers = list(model)
    report = fuse_(model)
    assert len(report) == 0 and list(model) == layers and "0 of 0" in str(report)
    assert list(report.to_pandas().columns)[:2] == ["model", "layer"]
    with pytest.raises(ValueError, match="already factorized"):
        fuse_(TuckerConv2d(4, 6, 3, 2))
    with pytest.raises(TypeError, match="model must be"):
        fuse_([model])


def test_fused_activation_equals_the_module() -> None:
    for activation, function in itertools.product((nn.ReLU6, nn.Hardswish, nn.SiLU), (False, True)):
        layer = activation(inplace=function)
        chain = tucker_chain().double()
        input = 5 * torch.randn(1, S, 6, 7, dtype=torch.float64)
        expected = copy.deepcopy(layer)(F.conv2d(chain[:2](input), chain[2].weight, chain[2].bias))
        module = TuckerConv2d.from_sequential(nn.Sequential(*chain, layer))
        torch.testing.assert_close(module(input), expected)
