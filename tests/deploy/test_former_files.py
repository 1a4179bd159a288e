"""Files that version 0.1.0 pickled and saved can be loaded and used; the names in its pickles can be imported."""

from __future__ import annotations

import copy
import importlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ops
from lowrank_ops import former_names
from tests.support.paths import REPOSITORY

DATA = Path(__file__).parent / "data"
PICKLED = DATA / "pickled_by_0.1.0.pt"
SAVED = DATA / "saved_by_0.1.0.safetensors"
BLOCKS = ("tucker", "cp", "conv1d", "cp1d", "fresh")


@pytest.fixture(scope="module")
def pickled() -> dict[str, Any]:
    return torch.load(PICKLED, weights_only=False)


def dense_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(12, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 20, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 24),
    )


def input_of(pickled: dict[str, Any], key: str) -> torch.Tensor:
    """The models and two-dimensional layers take the image, one-dimensional layers its first line."""
    return pickled["input"][:, :, 0] if key.endswith("1d") else pickled["input"]


@torch.no_grad()
def test_pickled_models_compute_what_they_did(pickled: dict[str, Any]) -> None:
    assert set(pickled["outputs"]) == {"tucker", "cp"}
    for key, output in pickled["outputs"].items():
        torch.testing.assert_close(pickled[key](pickled["input"]), output)


@torch.no_grad()
@pytest.mark.parametrize("key", BLOCKS)
def test_pickled_modules_can_be_used(pickled: dict[str, Any], key: str) -> None:
    module, x = copy.deepcopy(pickled[key]).eval(), input_of(pickled, key)
    output = module(x)
    assert output.isfinite().all() and output.norm() > 0
    torch.testing.assert_close(lowrank_ops.to_chain(module)(x), output)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), output)
    blocks = lowrank_ops.prepare_for_inference_(module)
    assert blocks and all(block.reason is None for block in blocks)
    torch.testing.assert_close(module(x), output)


@pytest.mark.parametrize("key", BLOCKS)
def test_pickled_modules_can_be_trained(pickled: dict[str, Any], key: str) -> None:
    module = copy.deepcopy(pickled[key]).train()
    module(input_of(pickled, key)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    for block in module.modules():
        if hasattr(block, "reset_parameters"):
            block.reset_parameters()


def test_pickled_reports_can_be_read(pickled: dict[str, Any]) -> None:
    report = pickled["report"]
    assert isinstance(report, lowrank_ops.Report)
    assert "TuckerConv2d" in str(report) and report["0"].ranks == (4, 4)
    assert list(report.to_pandas()["layer"]) == [layer.name for layer in report.layers]
    explanation = pickled["explanation"]
    assert all(isinstance(each, lowrank_ops.Explanation) for each in explanation)
    assert "tucker_conv2d: [2, 12, 9, 9] to 16 channels" in str(explanation)


def test_pickled_factors_and_arguments_can_be_used(pickled: dict[str, Any]) -> None:
    tucker, cp, linear = pickled["factors"]
    weights = [
        lowrank_ops.reference.tucker_weight(tucker.in_factor, tucker.core, tucker.out_factor),
        lowrank_ops.reference.cp_weight(cp.in_factor, cp.height_factor, cp.width_factor, cp.out_factor),
    ]
    matrix = lowrank_ops.reference.linear_weight(linear.in_factor, linear.out_factor)
    for rank in pickled["ranks"]:
        for weight in weights:
            assert lowrank_ops.tucker_decompose(weight, rank).core.dim() == 4
        assert lowrank_ops.svd_decompose(matrix, rank).in_factor.dim() == 2
    layer = lowrank_ops.LowRankLinear(8, 8, 2, init=pickled["spectral"])
    assert layer(torch.ones(1, 8)).isfinite().all()
    model = dense_model().eval()
    report = lowrank_ops.factorize_(
        model, "tucker", pickled["budget"], example_input=pickled["input"], multiple=1, progress=False
    )
    assert report.replaced


@torch.no_grad()
def test_a_pickled_chain_can_be_fused(pickled: dict[str, Any]) -> None:
    chain, x = copy.deepcopy(pickled["chain"]).eval(), pickled["input"]
    output = chain(x)
    assert lowrank_ops.fuse_(chain).replaced
    torch.testing.assert_close(chain(x), output)


@torch.no_grad()
def test_a_saved_model_loads_into_a_dense_one(pickled: dict[str, Any]) -> None:
    """The BatchNorm of the saved model was folded: nn.Identity takes its place here as well."""
    model = lowrank_ops.load(SAVED, dense_model().eval())
    assert [type(layer).__name__ for layer in model] == [type(layer).__name__ for layer in pickled["tucker"]]
    torch.testing.assert_close(model(pickled["input"]), pickled["outputs"]["tucker"])


@pytest.mark.parametrize("former", former_names._NOW)
def test_former_names_are_importable(former: str) -> None:
    now = importlib.import_module(f"lowrank_ops.{former_names._NOW[former]}")
    assert importlib.import_module(f"lowrank_ops.{former}") is now


@pytest.mark.parametrize(
    "name",
    [
        *(f"{module}.{kind}" for module in ("modules", "nn.modules") for kind in lowrank_ops.nn.modules.__all__),
        "module_base.FactorizedModule",
        "conv_base.FactorizedConv",
        "initialization.Spectral",
        "dense_weight.DenseWeight",
        "chains.NotOneOp",
        "pairs.FoldReport",
        "planning.Explanation",
        "prepare.Preparation",
        "distill.DistillReport",
        "report.Report",
        "ranks.Energy",
        "budget.Budget",
        "cp.CPFactors",
        "decompose.TuckerFactors",
        "decompose.LinearFactors",
    ],
)
def test_former_classes_exist(name: str) -> None:
    module, _, kind = name.rpartition(".")
    assert isinstance(getattr(importlib.import_module(f"lowrank_ops.{module}"), kind), type)


def test_a_pickle_loads_before_the_package_is_imported() -> None:
    script = f"import torch; print(sorted(torch.load({str(PICKLED)!r}, weights_only=False)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "'tucker'" in done.stdout
