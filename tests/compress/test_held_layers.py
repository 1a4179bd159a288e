"""Layers that a model holds besides in plain attributes, where a replacement would not reach them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_ops import TuckerConv2d, factorize_, fold_activations_, fold_batchnorm_, fuse_

INPUT = torch.randn(4, 16, 7, 7, generator=torch.Generator().manual_seed(0))


class Pyramid(nn.Module):
    """As detectron2's FPN: layers are registered one by one, and held in a list."""

    def __init__(self, layers: list[nn.Module], hold: Callable[[list[nn.Module]], Any]) -> None:
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(f"lateral{index}", layer)
        self.held = hold(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class Called(Pyramid):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.held:
            x = layer(x)
        return x


HOLDS: dict[str, Callable[[list[nn.Module]], Any]] = {
    "list": lambda layers: layers,
    "tuple": tuple,
    "dict": lambda layers: {"all": dict(enumerate(layers))},
    "deep": lambda layers: [("name", [layer]) for layer in layers],
}


def convolutions() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)]


@pytest.mark.parametrize("hold", HOLDS)
def test_they_are_left_with_the_name_of_the_attribute(hold: str) -> None:
    model = nn.Sequential(Pyramid(convolutions(), HOLDS[hold]), nn.Conv2d(32, 32, 3))
    report = factorize_(model, rank=8, progress=False)
    assert [row.name for row in report.replaced] == ["1"]
    for name in ("0.lateral0", "0.lateral1"):
        assert "the attribute 0.held holds it too" in str(report[name].reason)


def test_containers_of_layers_may_be_held() -> None:
    """A replacement stands in them."""
    model = Called([nn.Sequential(layer) for layer in convolutions()], list)
    before = model(INPUT)
    assert len(factorize_(model, rank=8, progress=False).replaced) == 2
    assert not torch.allclose(model(INPUT), before)


class Helper:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Helped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = convolutions()
        self.helper = Helper(self.second)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper.layer(self.first(x))  # type: ignore[no-any-return]


def test_a_layer_held_by_another_object_is_seen_when_the_model_runs() -> None:
    with pytest.warns(UserWarning, match="goes on calling the dense layers second, which it holds elsewhere"):
        report = factorize_(Helped(), rank=8, example_input=INPUT, progress=False)
    assert report["first"].note is None
    assert "goes on calling the dense layer, which it holds elsewhere" in str(report["second"].note)


def normed() -> list[nn.Module]:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16)
    nn.init.uniform_(norm.running_var, 0.3, 3)  # type: ignore[arg-type]
    return [nn.Conv2d(16, 16, 3, padding=1), norm, nn.SiLU(), TuckerConv2d(16, 16, 3, 8), nn.SiLU()]


def test_what_is_folded_is_not_applied_again() -> None:
    """The list would go on calling the BatchNorm and the activation."""
    model = Called(normed(), list).eval()
    before = model(INPUT)
    norms, activations = fold_batchnorm_(model), fold_activations_(model)
    torch.testing.assert_close(model(INPUT), before)
    for report in (norms, activations):
        assert not report.folded and "the attribute Called.held holds it too" in str(report.left[0].reason)


def test_stages_of_a_chain_are_not_fused() -> None:
    model = nn.Module()
    model.chain = TuckerConv2d(16, 32, 3, 8).to_sequential()
    model.held = [model.chain[1]]
    (row,) = fuse_(model)
    assert row.replaced_by is None and "the attribute Module.held holds it too" in str(row.reason)
