"""`fold_activations_`: an activation is folded into the block where nothing else uses the block's output."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ops import (
    CPConv1d,
    CPConv2d,
    LowRankLinear,
    TuckerConv1d,
    TuckerConv2d,
    fold_activations_,
    fold_batchnorm_,
)

IMAGE = torch.randn(2, 5, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_folds(model: nn.Module, input: Tensor, folded: list[tuple[str, str, str]]) -> None:
    """Asserts that exactly these are folded, and that output and state_dict do not change."""
    model.double()
    expected, names = model(input.clone()), list(model.state_dict())
    assert expected.norm() > 0
    report = fold_activations_(model)
    assert [(fold.layer, fold.follower, fold.step) for fold in report.folded] == folded
    torch.testing.assert_close(model(input.clone()), expected)
    assert list(model.state_dict()) == names
    for layer, follower, step in folded:
        assert model.get_submodule(layer).activation == step
        assert type(model.get_submodule(follower)) is nn.Identity


def assert_left(model: nn.Module, reason: str) -> None:
    model.double()
    expected, modules = model(IMAGE.clone()), list(model.modules())
    report = fold_activations_(model)
    assert not report.folded and [reason in str(fold.reason) for fold in report.left] == [True] * len(report)
    assert len(report) > 0
    assert list(model.modules()) == modules and torch.equal(model(IMAGE.clone()), expected)
    assert all(module.activation == "none" for module in model.modules() if isinstance(module, TuckerConv2d))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.Hardswish(), "hardswish"),
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
    ],
)
def test_every_activation(activation: nn.Module, name: str) -> None:
    blocks = [TuckerConv2d(5, 6, 3, 4), copy.deepcopy(activation), CPConv2d(6, 4, 3, 5), activation]
    assert_folds(nn.Sequential(*blocks), IMAGE, [("0", "1", name), ("2", "3", name)])


@pytest.mark.parametrize(
    ("block", "input"),
    [
        (TuckerConv1d(5, 6, 3, 4), IMAGE[:, :, 0]),
        (CPConv1d(5, 6, 3, 4), IMAGE[:, :, 0]),
        (LowRankLinear(8, 6, 3), IMAGE),
    ],
)
def test_every_kind_of_block(block: nn.Module, input: Tensor) -> None:
    assert_folds(nn.Sequential(block, nn.SiLU()), input, [("0", "1", "silu")])


def test_other_activations_and_plain_layers_stay() -> None:
    layers = [TuckerConv2d(5, 5, 3, 4), nn.GELU(approximate="tanh"), TuckerConv2d(5, 5, 3, 4), nn.LeakyReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(5, 5, 1), nn.ReLU())
    assert len(fold_activations_(model)) == 0 and model[0].activation == "none"


def test_through_what_fold_batchnorm_leaves() -> None:
    model = nn.Sequential(TuckerConv2d(5, 6, 3, 4), nn.BatchNorm2d(6), nn.ReLU(inplace=True)).eval()
    model[1].running_mean.normal_()
    model.double()
    assert len(fold_activations_(model)) == 0, "a BatchNorm stands between"
    fold_batchnorm_(model)
    assert_folds(model, IMAGE, [("0", "2", "relu")])


class Uses(nn.Module):
    """A block, an activation, and a forward that the test chooses."""

    def __init__(self, forward: Callable, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.block, self.other = TuckerConv2d(5, 5, 3, 4, padding=1), TuckerConv2d(5, 5, 3, 4, padding=1)
        self.activation = activation or nn.ReLU(inplace=True)
        self.rest = nn.Identity()
        self._forward = forward

    def forward(self, input: Tensor) -> Tensor:
        return self._forward(self, input)


def skip_behind_identity(model: Uses, input: Tensor) -> Tensor:
    hidden = model.rest(model.block(input))
    return torch.cat([model.activation(hidden), hidden])


def result_is_not_used(model: Uses, input: Tensor) -> Tensor:
    hidden = model.block(input)
    model.activation(hidden)
    return hidden


def activation_called_twice(model: Uses, input: Tensor) -> Tensor:
    return model.activation(model.block(input)) + model.activation(input)


def block_called_twice(model: Uses, input: Tensor) -> Tensor:
    return model.activation(model.block(model.block(input)))


def in_eval_only(model: Uses, input: Tensor) -> Tensor:
    hidden = model.block(input)
    return hidden if model.training else model.activation(hidden)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (skip_behind_identity, "used elsewhere too"),
        (result_is_not_used, "used elsewhere too"),
        (activation_called_twice, "activation is called 2 times"),
        (block_called_twice, "block is called 2 times"),
        (in_eval_only, "in train mode they are called another way"),
    ],
)
def test_left_for_its_use(forward: Callable, reason: str) -> None:
    assert_left(Uses(forward).eval(), reason)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_skip_tensor_keeps_what_its_in_place_relu_makes_of_it(inplace: bool) -> None:
    class Craft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Sequential(TuckerConv2d(5, 6, 3, 4, padding=1)), nn.Sequential()
            self.second.append(nn.ReLU(inplace=inplace)).append(TuckerConv2d(6, 6, 3, 4, padding=1))

        def forward(self, input: Tensor) -> Tensor:
            skip = self.first(input)
            return torch.cat([self.second(skip), skip])

    assert_left(Craft(), "used elsewhere too")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (F.relu, "relu"),
        (lambda hidden: F.relu(hidden, inplace=True), "relu"),
        (torch.relu, "relu"),
        (torch.relu_, "relu"),
        (F.relu6, "relu6"),
        (F.hardswish, "hardswish"),
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (lambda hidden: hidden.relu(), "relu"),
        (lambda hidden: hidden.relu_(), "relu"),
    ],
)
def test_functions_in_a_forward_are_left_and_reported(call: Callable, name: str) -> None:
    model = nn.Sequential(Uses(lambda model, input: call(model.block(input))))
    assert_left(model, "in the source of a forward")
    (fold,) = fold_activations_(model).left
    assert (fold.layer, fold.follower, fold.step) == ("0.block", f"{name}() in the forward of 0", name)


def test_other_functions_are_nothing_to_report() -> None:
    for call in (lambda hidden: F.gelu(hidden, approximate="tanh"), torch.sigmoid, lambda hidden: hidden.tanh()):
        assert len(fold_activations_(Uses(lambda model, input, call=call: call(model.block(input))))) == 0


@pytest.mark.parametrize("which", ["block", "activation", "rest"])
def test_left_for_hooks(which: str) -> None:
    model = Uses(lambda model, input: model.activation(model.rest(model.block(input))))
    model.get_submodule(which).register_forward_hook(lambda *_: None)
    assert_left(model, f"{which} has hooks")


def test_left_where_the_block_has_an_activation() -> None:
    model = nn.Sequential(TuckerConv2d(5, 6, 3, 4, activation="silu"), nn.ReLU())
    (fold,) = fold_activations_(model).left
    assert fold.reason == "the block has an activation already (silu)"
    assert model[0].activation == "silu" and type(model[1]) is nn.ReLU


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(TuckerConv2d(5, 6, 3, 4), nn.ReLU())
        self.parts = nn.ModuleList([nn.Sequential(CPConv2d(6, 6, 3, 4), nn.SiLU()), nn.ReLU()])

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.body(input)
        if hidden.sum() > 1e9:
            return hidden
        for part in self.parts:
            hidden = part(hidden)
        return hidden


def test_children_of_what_fx_cannot_trace() -> None:
    model = Branch()
    assert list(fold_activations_(copy.deepcopy(model)).untraced) == [""]
    assert_folds(model, IMAGE, [("body.0", "body.1", "relu"), ("parts.0.0", "parts.0.1", "silu")])


def test_several_places_under_what_fx_cannot_trace() -> None:
    """torch.fx does not see the other call of the body, so its ReLU might also be called alone."""
    model = Branch()
    model.parts.append(model.body[1])
    report = fold_activations_(model)
    assert [fold.layer for fold in report.folded] == ["parts.0.0"]
    assert "stands in several places" in str(report.left[0].reason)


def test_a_skip_tensor_behind_a_folded_batchnorm() -> None:
    """nn.Identity hands the convolution's own output on: the in-place ReLU of the next stage changes it as before."""

    class Craft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(TuckerConv2d(5, 6, 3, 4, padding=1), nn.BatchNorm2d(6))
            self.second = nn.Sequential(nn.ReLU(inplace=True), CPConv2d(6, 6, 3, 4, padding=1))

        def forward(self, input: Tensor) -> Tensor:
            skip = self.first(input)
            return torch.cat([self.second(skip), skip])

    model = Craft().eval().double()
    model.first[1].running_mean.normal_()
    expected = model(IMAGE)
    assert len(fold_batchnorm_(model).folded) == 1
    torch.testing.assert_close(model(IMAGE), expected)
    assert_left(model, "used elsewhere too")


class Tapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(TuckerConv2d(5, 6, 3, 4), nn.ReLU())

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.body[0](input)
        return hidden - self.body[1](hidden) if hidden.sum() < 1e9 else self.body(input)


def test_example_input_shows_what_no_graph_does() -> None:
    model = Tapped().double()
    expected = model(IMAGE)
    with pytest.raises(RuntimeError, match=r"fold_activations_: the output on example_input changes.*left as it was"):
        fold_activations_(model, IMAGE)
    assert model.body[0].activation == "none" and type(model.body[1]) is nn.ReLU
    assert torch.equal(model(IMAGE), expected)
    with pytest.raises(TypeError, match=r"fold_activations_: model must be an nn.Module, got NoneType"):
        fold_activations_(None)  # type: ignore[arg-type]


def test_gradients_stay() -> None:
    model = nn.Sequential(TuckerConv2d(5, 6, 3, 4), nn.SiLU(), CPConv2d(6, 4, 3, 5)).double()
    folded = copy.deepcopy(model)
    assert len(fold_activations_(folded, IMAGE).folded) == 1
    for each in (model, folded):
        each(IMAGE).square().sum().backward()
    for ours, reference in zip(folded.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)
