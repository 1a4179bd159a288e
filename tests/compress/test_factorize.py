"""`factorize_`: what it replaces, what it leaves and why, what it keeps, what it reports."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from lowrank_ops.budget.knapsack import Budget
from lowrank_ops.compress.factorize import factorize_
from lowrank_ops.compress.fuse import fuse_
from lowrank_ops.decompose.ranks import Energy
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.counts import count_macs, count_parameters
from lowrank_ops.nn.modules import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.ops.explain import explain


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, (3, 5), stride=(1, 2), padding=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride=(1, 2))

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(input)) + self.short(input))


class Network(nn.Module):
    """Nested modules, a 1x1 and a strided convolution, groups, a transposed convolution, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding="same")
        self.blocks = nn.ModuleList([Block(24, 32), Block(32, 40)])
        self.grouped = nn.Conv2d(40, 40, 3, groups=4)
        self.up = nn.ConvTranspose2d(40, 16, 2, stride=2)
        self.head = nn.Sequential(nn.Flatten(2), nn.Conv1d(16, 28, 5, padding=1), nn.ReLU())
        self.classifier = nn.Linear(28, 36)

    def forward(self, input: Tensor) -> Tensor:
        features = self.stem(input)
        for block in self.blocks:
            features = block(features)
        return self.classifier(self.head(self.up(self.grouped(features))).mean(2))


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    return Network()


ALL = ["*", "stem"]  # layers of few channels only by name
INPUT = torch.randn(2, 3, 12, 24, generator=torch.Generator().manual_seed(0))
EXPECTED = {
    "tucker": {
        "stem": TuckerConv2d,
        "blocks.0.conv": TuckerConv2d,
        "blocks.0.short": CPConv2d,
        "blocks.1.conv": TuckerConv2d,
        "blocks.1.short": CPConv2d,
        "head.1": TuckerConv1d,
        "classifier": LowRankLinear,
    },
    "cp": {
        "stem": CPConv2d,
        "blocks.0.conv": CPConv2d,
        "blocks.0.short": CPConv2d,
        "blocks.1.conv": CPConv2d,
        "blocks.1.short": CPConv2d,
        "head.1": CPConv1d,
        "classifier": LowRankLinear,
    },
}


@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_replaces_layers_by_what_they_were(model: Network, method: str) -> None:
    dense = copy.deepcopy(model)
    report = factorize_(model, method, 0.25, multiple=1, include=ALL, progress=False)
    found = {name: type(m) for name, m in model.named_modules() if isinstance(m, FactorizedModule)}
    assert found == EXPECTED[method]
    assert {layer.name: layer.replaced_by for layer in report.replaced} == {
        name: kind.__name__ for name, kind in found.items()
    }
    rebuilt = copy.deepcopy(model).double()
    for name in found:  # the same network with the dense weights that the factors stand for
        parent = rebuilt.get_submodule(name.rpartition(".")[0])
        layer = model.get_submodule(name)
        setattr(parent, name.rpartition(".")[2], rebuilt.get_submodule(name).to_dense())
        original = dense.get_submodule(name)
        assert isinstance(layer.to_dense(), type(original))
        for argument in ("stride", "padding", "dilation", "kernel_size"):
            assert getattr(layer, argument, None) == getattr(original, argument, None)
        weight = layer.to_dense().weight
        error = ((weight - original.weight).norm() / original.weight.norm()).item()
        assert report[name].weight_error == pytest.approx(error, rel=1e-3) and 0 < error < 1
    output = copy.deepcopy(model).double()(INPUT.double())
    torch.testing.assert_close(output, rebuilt(INPUT.double()))


def test_full_rank_changes_nothing() -> None:
    """Energy 1 keeps all of a weight that is exactly of low rank."""
    torch.manual_seed(0)
    exact = TuckerConv2d(24, 30, 3, (5, 7)).double().to_dense()
    linear = LowRankLinear(30, 26, 4).double().to_dense()
    model = nn.Sequential(exact, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    input = torch.randn(2, 24, 6, 5, dtype=torch.float64)
    expected = model(input)
    report = factorize_(model, "tucker", Energy(1 - 1e-12), multiple=1, progress=False)
    assert report["0"].ranks == (5, 7) and report["3"].ranks == (4,)
    torch.testing.assert_close(model(input), expected)


def test_reasons(model: Network) -> None:
    factorize_(model, "tucker", 0.25, include="stem", progress=False)
    model.small = nn.Conv2d(2, 2, 1)
    model.three = nn.Conv3d(4, 4, 3)
    report = factorize_(model, "tucker", 0.5, include=["*", "small"], progress=False)
    for name, words in {
        "stem": "already factorized",
        "grouped": "groups must be 1, got 4",
        "up": "transposed",
        "three": "three-dimensional",
        "small": "would not shrink",
    }.items():
        assert words in str(report[name].reason)
        assert report[name].replaced_by is None
        assert report[name].parameters_after == report[name].parameters_before
    assert "would not shrink" in str(report)


def test_integer_rank_above_a_layers_limit_leaves_the_layer(model: Network) -> None:
    report = factorize_(model, "tucker", 10, include=ALL, progress=False)
    assert "between 1 and 3" in str(report["stem"].reason) and type(model.stem) is nn.Conv2d
    assert report["blocks.1.conv"].ranks == (10, 10) and report["blocks.1.short"].ranks == (10,)


def test_ranks_of_matrices_and_linear_layers(model: Network) -> None:
    second, third = copy.deepcopy(model), copy.deepcopy(model)
    report = factorize_(model, "tucker", (6, 9), progress=False)
    assert report["blocks.0.conv"].ranks == (6, 9) and report["blocks.0.short"].ranks == (6,)
    assert report["classifier"].ranks == (6,)
    report = factorize_(second, "tucker", (6, 9), linear=11, progress=False)
    assert report["classifier"].ranks == (11,) and report["blocks.0.short"].ranks == (6,)
    report = factorize_(third, "tucker", (6, 9), linear=False, progress=False)
    assert type(third.classifier) is nn.Linear and "linear=False" in str(report["classifier"].reason)


@pytest.mark.parametrize(
    ("rank", "same"), [([6, 9], (6, 9)), (np.int64(7), 7), ((np.int32(6), 0.5), (6, 0.5)), (np.float32(0.25), 0.25)]
)
def test_lists_and_numpy_numbers_are_ranks(model: Network, rank: object, same: object) -> None:
    second = copy.deepcopy(model)
    found = [layer.ranks for layer in factorize_(model, rank=rank, multiple=np.int64(4), progress=False)]
    assert found == [layer.ranks for layer in factorize_(second, rank=same, multiple=4, progress=False)]


@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_in_inference_mode_the_parameters_are_ordinary_ones(model: Network, method: str) -> None:
    with torch.inference_mode():
        report = factorize_(model, method, 0.25, example_input=INPUT, progress=False)
        fuse_(model)
    assert report.replaced
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(INPUT).sum().backward()
    assert model.classifier.in_factor.grad is not None


@pytest.mark.parametrize(
    ("include", "exclude", "replaced"),
    [
        ("blocks.*", None, {"blocks.0.conv", "blocks.0.short", "blocks.1.conv", "blocks.1.short"}),
        ("blocks", "*.short", {"blocks.0.conv", "blocks.1.conv"}),
        (["stem", nn.Linear], None, {"stem", "classifier"}),
        (Block, ["blocks.1"], {"blocks.0.conv", "blocks.0.short"}),
        (lambda name, layer: getattr(layer, "bias", None) is None, None, {"blocks.0.conv", "blocks.1.conv"}),
        (None, [nn.Conv2d, "head"], {"classifier"}),
    ],
)
def test_include_and_exclude(model: Network, include: object, exclude: object, replaced: set[str]) -> None:
    report = factorize_(model, "tucker", 0.25, include=include, exclude=exclude, progress=False)
    assert {layer.name for layer in report.replaced} == replaced
    assert len(report) == 9 and all(layer.reason for layer in report.skipped)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"exclude": "clasifier"}, ValueError, "exclude 'clasifier' matches no .* classifier"),
        ({"include": ["stem", "nothing.*"]}, ValueError, "include 'nothing.*' matches no"),
        ({"exclude": nn.Conv3d}, ValueError, "exclude Conv3d matches no"),
        ({"exclude": lambda name, layer: False}, ValueError, "matches no"),
        ({"include": [3]}, TypeError, "include takes patterns, types and callables .*, got int"),
        ({"exclude": 3}, TypeError, "exclude takes patterns, types and callables .*, got int"),
        ({"exclude": [nn.ReLU()]}, TypeError, "exclude takes .*, got ReLU; a module goes by its qualified name"),
        ({"exclude": nn.Sequential(nn.ReLU())}, TypeError, "got Sequential"),
        ({"method": "svd"}, ValueError, "method must be 'tucker', 'cp' or 'auto', got 'svd'"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 1.2}, ValueError, "rank as a fraction"),
        ({"rank": "half"}, TypeError, "rank must be an int"),
        ({"rank": (4, 0)}, ValueError, "rank must be at least 1"),
        ({"rank": (4, 5, 6)}, ValueError, "pair"),
        ({"rank": (4, 5), "method": "cp"}, ValueError, "single number"),
        ({"rank": [4, 5], "method": "cp"}, ValueError, "single number"),
        ({"rank": np.int64(0)}, ValueError, "rank must be at least 1"),
        (
            {"rank": 500, "include": ALL},
            ValueError,
            "rank 500 is above the limit of every .*stem.* 3 .*lower rank",
        ),
        ({"linear": 500, "include": nn.Linear}, ValueError, r"rank \(0.5, 500\) is above the limit of every layer"),
        ({"multiple": 0}, ValueError, "multiple must be an int of at least 1, got 0"),
        ({"linear": True}, TypeError, "linear must be"),
        ({"linear": (3, 4)}, ValueError, "linear must be a single rank"),
        ({"linear": [3, 4]}, ValueError, "linear must be a single rank"),
        ({"example_input": torch.randn(2, 5, 8, 8)}, RuntimeError, r"fails in stem \(Conv2d\), run on example_input"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(
    model: Network, arguments: dict, error: type[Exception], words: str
) -> None:
    layers = list(model.modules())
    with pytest.raises(error, match=words):
        factorize_(model, **{"progress": False, **arguments})
    assert all(now is before for now, before in zip(model.modules(), layers, strict=True))


def test_models_that_are_one_layer() -> None:
    for layer in (nn.Conv2d(4, 6, 3), nn.Linear(4, 6)):
        with pytest.raises(ValueError, match="no parent to hold the replacement"):
            factorize_(layer)
    with pytest.raises(ValueError, match="already factorized"):
        factorize_(TuckerConv2d(4, 6, 3, 2))
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        factorize_("model")


@pytest.mark.parametrize("rank", [0.25, Energy(0.5), 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(model: Network, value: float, rank: object) -> None:
    model.classifier.weight.data[3, 2] = value
    layers = list(model.modules())
    with pytest.raises(ValueError, match="classifier"):
        factorize_(model, rank=rank, progress=False)
    assert all(now is before for now, before in zip(model.modules(), layers, strict=True))
    factorize_(model, rank=rank, exclude="classifier", progress=False)
    assert isinstance(model.blocks[0].conv, FactorizedModule)


def test_keeps_modes_flags_and_hooks(model: Network) -> None:
    model.blocks[0].eval()
    model.stem.weight.requires_grad_(False)
    seen: list[str] = []
    handles = [
        model.stem.register_forward_hook(lambda *_: seen.append("forward")),
        model.stem.register_forward_pre_hook(lambda *_, **__: seen.append("pre"), with_kwargs=True),
        model.classifier.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    factorize_(model, "tucker", 0.25, include=ALL, example_input=INPUT, progress=False)
    assert seen == ["pre", "forward"]  # the run that records the calls
    seen.clear()
    assert model.training and not model.blocks[0].conv.training and model.blocks[1].conv.training
    assert not any(factor.requires_grad for factor in model.stem.factors().values())
    assert model.stem.bias.requires_grad and model.blocks[0].conv.core.requires_grad
    model(INPUT)
    assert seen == ["pre", "forward"]
    for handle in handles:
        handle.remove()
    model(INPUT)
    assert seen == ["pre", "forward"]
    assert not model.classifier._backward_hooks


def test_example_runs_move_no_statistics_and_draw_no_random_numbers(model: Network) -> None:
    state = {name: value.clone() for name, value in model.blocks[0].norm.state_dict().items()}
    random = torch.get_rng_state()
    factorize_(model, "cp", 0.25, example_input=INPUT, progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.blocks[0].norm.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_shared_module_is_replaced_once_and_everywhere() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 24, 3, padding=1)
    first, second = nn.Sequential(conv, nn.ReLU()), nn.Sequential(nn.ReLU(), conv)
    model = nn.ModuleDict({"a": first, "b": second, "c": conv, "d": first})
    report = factorize_(model, "tucker", 0.25, progress=False)
    assert len(report) == 1 and report["a.0"].aliases == ("b.1", "c", "d.0")
    assert isinstance(model["c"], TuckerConv2d) and model["a"][0] is model["c"] and model["b"][1] is model["c"]
    assert report.model_parameters_after == count_parameters(model["c"]) == report["b.1"].parameters_after


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight


class Shifted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Renamed(nn.Linear):
    """A subclass that computes what nn.Linear computes."""


def pruned() -> nn.Module:
    layer = nn.Linear(32, 40)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize(
    ("build", "name", "words"),
    [
        (lambda: Tied(), "head", "shares a parameter with embedding.weight"),
        (lambda: nn.Sequential(Shifted(32, 40)), "0", "overrides Linear.forward"),
        (lambda: nn.Sequential(nn.LazyConv2d(40, 3)), "0", "lazy"),
        (lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(32, 40))), "0", "computed"),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 40))), "0", "computed"),
        (lambda: nn.Sequential(pruned()), "0", "computed"),
        (lambda: nn.MultiheadAttention(32, 4), "out_proj", "MultiheadAttention reads out_proj.weight"),
        (
            lambda: nn.TransformerEncoderLayer(32, 4, 64),
            "linear1",
            "TransformerEncoderLayer reads linear1.weight",
        ),
        (lambda: nn.Sequential(nn.Linear(32, 40, device="meta")), "0", "meta device"),
    ],
)
def test_layers_that_are_not_safe_to_replace(build: Callable[[], nn.Module], name: str, words: str) -> None:
    model = build()
    layer = model.get_submodule(name)
    with pytest.warns(UserWarning, match="no layer of .* was replaced"):
        report = factorize_(model, "tucker", 0.25, progress=False)
    assert words in str(report[name].reason) and model.get_submodule(name) is layer
    assert report[name].replaced_by is None and words in str(report)


def test_harmless_subclasses_are_replaced() -> None:
    model = nn.Sequential(Renamed(32, 40))
    assert factorize_(model, rank=0.25, progress=False)["0"].type == "Renamed"
    assert isinstance(model[0], LowRankLinear)


def test_transformers_still_run() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(32, 48)).eval()
    input = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model[0](input)
        report = factorize_(model, rank=0.25, example_input=input, progress=False)
        torch.testing.assert_close(model[0](input), expected)
    assert [layer.name for layer in report.replaced] == ["1"]


class Padded(nn.Module):
    """Sequences with a padding mask: torch's fast path makes nested tensors of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.head = nn.Linear(32, 256)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens), src_key_padding_mask=padding))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("arguments", [{"rank": 0.25}, {"rank": Budget(macs=0.7)}], ids=["rank", "budget"])
def test_transformers_with_padded_sequences(arguments: dict) -> None:
    torch.manual_seed(0)
    model = Padded().eval()
    example = (torch.randint(10, (2, 6)), torch.tensor([[False] * 6, [False] * 3 + [True] * 3]))
    report = factorize_(model, example_input=example, calibration=example, progress=False, **arguments)
    assert [layer.name for layer in report.replaced] == ["head"]
    assert report["encoder.layers.0.linear1"].macs_before == 2 * 6 * 32 * 64
    assert report["head"].macs_before == 2 * 6 * 32 * 256 and report["head"].output_size == (2, 6, 256)
    assert len(explain(model, example, verbose=False)) == 1
    assert torch.backends.mha.get_fastpath_enabled()


class WantsLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 40)

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self.linear, nn.Linear):
            raise TypeError("no nn.Linear")
        return self.linear(input)


def test_model_that_fails_afterwards_is_restored() -> None:
    model = nn.Sequential(WantsLinear())
    linear = model[0].linear
    with pytest.raises(RuntimeError, match=r"fails in 0 \(WantsLinear\), .*: TypeError: no nn.Linear.*left as it was"):
        factorize_(model, rank=0.25, example_input=torch.randn(2, 32), progress=False)
    assert model[0].linear is linear
    with pytest.warns(UserWarning, match="excluded by '0.linear'"):
        factorize_(model, rank=0.25, exclude="0.linear", example_input=torch.randn(2, 32), progress=False)


def counted_macs(layer: nn.Module, input: Tensor) -> int:
    """The multiply-accumulates of the plain chain, stage by stage from the sizes that really flow."""
    total = 0
    for stage in layer.to_sequential() if isinstance(layer, FactorizedModule) else [layer]:
        output = stage(input)
        if hasattr(stage, "weight"):
            per_output = stage.weight[0].numel()
            total += output.numel() * per_output
        input = output
    return total


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(10, 12, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), (2, 10, 9, 8)),
        (nn.Conv2d(10, 12, (3, 2), padding="same", dilation=2), (10, 9, 8)),
        (nn.Conv1d(10, 12, 3, stride=2, padding="valid"), (2, 10, 9)),
        (nn.Conv3d(4, 5, (1, 2, 3)), (2, 4, 5, 6, 7)),
        (nn.Linear(10, 12), (2, 3, 10)),
        (TuckerConv2d(10, 12, (3, 2), (4, 5), stride=(2, 1), padding=(1, 0)), (2, 10, 9, 8)),
        (TuckerConv1d(10, 12, 3, (4, 5), stride=2), (2, 10, 9)),
        (CPConv2d(10, 12, (3, 2), 7, stride=(2, 3), padding=(1, 0)), (2, 10, 9, 8)),
        (CPConv1d(10, 12, 3, 7, stride=2, padding=2), (2, 10, 9)),
        (LowRankLinear(10, 12, 4), (2, 3, 10)),
    ],
)
def test_count_macs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert count_macs(layer, shape) == counted_macs(layer, torch.randn(shape))


def test_count_macs_per_output_pixel() -> None:
    assert count_macs(nn.Conv2d(10, 12, (3, 2), stride=2)) == 10 * 12 * 6
    tucker = TuckerConv2d(10, 12, (3, 2), (4, 5), stride=(2, 3))
    assert count_macs(tucker) == 10 * 4 * 6 + 4 * 5 * 6 + 5 * 12
    cp = CPConv2d(10, 12, (3, 2), 7, stride=(2, 3))
    assert count_macs(cp) == 10 * 7 * 6 + 7 * 3 * 3 + 7 * 2 + 7 * 12
    strided = CPConv2d(10, 12, 1, 7, stride=2)  # a pointwise layer drops the pixels first
    assert count_macs(strided) == 10 * 7 + 2 * 7 + 7 * 12
    assert count_macs(strided, (1, 10, 7, 8)) == 4 * 4 * (10 * 7 + 2 * 7 + 7 * 12)
    assert count_macs(nn.ConvTranspose2d(10, 12, 2)) is None and count_macs(nn.ReLU()) is None
    assert count_macs(nn.ConvTranspose2d(10, 12, 2), (1, 10, 3, 4)) == 12 * 10 * 12 * 4


def test_report_with_an_example_input(model: Network) -> None:
    dense = copy.deepcopy(model)
    report = factorize_(model, "tucker", 0.25, include=ALL, example_input=(INPUT,), progress=False)
    assert report.macs_per_call and len(report) == 9 and len(report.replaced) == 7
    conv = report["blocks.0.conv"]
    assert conv.output_size == (2, 32, 12, 12) and conv.kernel == (3, 5) and conv.type == "Conv2d"
    assert conv.macs_before == 2 * 32 * 12 * 12 * 24 * 15
    assert conv.macs_after == count_macs(model.blocks[0].conv, (2, 24, 12, 24))
    assert conv.parameters_before == count_parameters(dense.blocks[0].conv)
    assert conv.parameters_after == count_parameters(model.blocks[0].conv)
    for layer in report:
        assert (layer.milliseconds_before is None) == (layer.replaced_by is None)
        assert layer.replaced_by is None or min(layer.milliseconds_before, layer.milliseconds_after) > 0
    assert report.total("macs_before") == sum(layer.macs_before for layer in report)
    assert report.total("macs_after") < report.total("macs_before")
    assert (report.model_parameters_before, report.model_parameters_after) == (
        count_parameters(dense),
        count_parameters(model),
    )
    text = str(report)
    for word in ("blocks.0.conv", "TuckerConv2d", "3x5", "ms", "groups must be 1", "total"):
        assert word in text


def test_calls_of_a_layer_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(24, 24, 3, padding=1)
            self.unused = nn.Conv2d(24, 24, 3)

        def forward(self, *, image: Tensor) -> Tensor:
            return self.conv(input=self.conv(image)[:, :, ::2])

    model = Twice()
    report = factorize_(model, rank=0.25, example_input={"image": torch.randn(1, 24, 8, 6)}, progress=False)
    assert report["conv"].macs_before == 24 * 24 * 9 * (8 * 6 + 4 * 6)
    assert report["unused"].macs_before == 0 and report["unused"].milliseconds_before is None
    assert report["unused"].replaced_by == "TuckerConv2d"


def test_report_without_an_example_input(model: Network) -> None:
    report = factorize_(model, "cp", 0.25, progress=False)
    assert not report.macs_per_call and report.total("macs_before") is None
    assert report["classifier"].macs_before == 28 * 36 and report["up"].macs_before is None
    assert all(layer.milliseconds_before is None and layer.output_size is None for layer in report)
    assert "MACs per position" in " ".join(str(report).split())
    with pytest.raises(KeyError, match="no layer 'nothing'"):
        report["nothing"]


def test_to_pandas(model: Network) -> None:
    pandas = pytest.importorskip("pandas")
    table = factorize_(model, "tucker", 0.25, include=ALL, progress=False).to_pandas()
    assert isinstance(table, pandas.DataFrame) and len(table) == 9
    for column in ("model", "rank", "uncompressed_layer_size", "compressed_layer_size"):
        assert column in table.columns
    row = table[table.layer == "stem"].iloc[0]
    assert row["model"] == "Network" and row["rank"] == model.stem.rank
    assert row["uncompressed_layer_size"] == 3 * 24 * 9 + 24
    assert row["compressed_layer_size"] == count_parameters(model.stem)
    ratio = row["compressed_layer_size/uncompressed_layer_size"]
    assert ratio == row["compressed_layer_size"] / row["uncompressed_layer_size"]


def test_same_seed_same_factors(model: Network) -> None:
    second = copy.deepcopy(model)
    for network in (model, second):
        factorize_(network, "cp", 0.25, seed=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))


def test_progress_bar_on_stderr(model: Network, capsys: pytest.CaptureFixture[str]) -> None:
    factorize_(copy.deepcopy(model), rank=0.25)
    captured = capsys.readouterr()
    assert "decompose" in captured.err and not captured.out
    factorize_(model, rank=0.25, progress=False)
    assert not capsys.readouterr().err


def test_low_precision_models_keep_their_dtype(model: Network) -> None:
    model.to(torch.bfloat16)
    factorize_(model, "tucker", 0.25, include=ALL, progress=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_cores_are_laid_out_as_the_weights_were(layout: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3)).to(memory_format=layout)  # type: ignore[call-overload]
    factorize_(model, "tucker", 0.25, multiple=1, progress=False)
    chain = model[0].to_sequential().to(memory_format=layout)
    for core in (model[0].core, TuckerConv2d.from_sequential(chain).core):
        assert core.is_contiguous(memory_format=layout)
        assert core.is_contiguous() == (layout == torch.contiguous_format)


def test_state_dict_of_a_factorized_model(model: Network) -> None:
    second = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.5)
    for network in (model, second):
        factorize_(network, "tucker", 0.25, progress=False)
    second.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(INPUT), second.eval()(INPUT))


def test_fuse_after_factorize_takes_the_activations(model: Network) -> None:
    factorize_(model, "tucker", 0.25, progress=False)
    expected = model.eval()(INPUT)
    report = fuse_(model)
    assert [layer.name for layer in report] == ["head.1"] and model.head[1].activation == "relu"
    torch.testing.assert_close(model(INPUT), expected)
