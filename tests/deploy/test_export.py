"""`to_chain` and `export_onnx`: plain layers compute the same as the blocks, in torch and in ONNX Runtime."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_ops import (
    CPConv1d,
    CPConv2d,
    LowRankLinear,
    TuckerConv1d,
    TuckerConv2d,
    export_onnx,
    factorize_,
    fuse_,
    to_chain,
)
from lowrank_ops.nn.base import FactorizedModule

IMAGE = torch.randn(2, 5, 12, 11, generator=torch.Generator().manual_seed(0))
WINDOW = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}

BLOCKS = [
    (TuckerConv2d(5, 6, (3, 2), (3, 4), **WINDOW, activation="silu"), IMAGE),
    (TuckerConv2d(5, 6, 3, (3, 4), padding="same", bias=False), IMAGE),
    (TuckerConv2d(5, 6, 3, (3, 4), padding=(1, 2), padding_mode="reflect", activation="relu"), IMAGE),
    (TuckerConv2d(5, 6, 3, (3, 4), padding=2, padding_mode="replicate"), IMAGE),
    (TuckerConv2d(5, 6, 3, (3, 4), padding=2, padding_mode="circular", activation="relu6"), IMAGE),
    (CPConv2d(5, 6, (3, 2), 4, **WINDOW, activation="hardswish"), IMAGE),
    (CPConv2d(5, 6, 3, 4, padding=(1, 2), padding_mode="circular", activation="gelu"), IMAGE),
    (TuckerConv1d(5, 6, 3, (3, 4), stride=2, padding=1, activation="gelu"), IMAGE[:, :, 0]),
    (CPConv1d(5, 6, 3, 4, padding=2, dilation=2, padding_mode="reflect"), IMAGE[:, :, 0]),
    (LowRankLinear(11, 6, 4, activation="relu"), IMAGE),
]
each_block = pytest.mark.parametrize(
    ("block", "input"), BLOCKS, ids=lambda value: repr(value)[:60] if isinstance(value, nn.Module) else ""
)


@each_block
def test_chain_equals_the_block(block: FactorizedModule, input: Tensor) -> None:
    model = nn.Sequential(block).double()
    chain = to_chain(model)
    assert not any(isinstance(module, FactorizedModule) for module in chain.modules()) and model[0] is block
    torch.testing.assert_close(chain(input.double()), model(input.double()))
    torch.testing.assert_close(to_chain(block)(input.double()), model(input.double()))
    model.float()
    fuse_(chain)
    assert repr(chain[0]) == repr(block)


def test_the_model_is_not_touched_and_shares_nothing() -> None:
    shared = nn.Conv2d(16, 16, 3, padding=1)
    model = nn.Sequential(shared, nn.BatchNorm2d(16), nn.ReLU(), shared).eval()
    factorize_(model, "tucker", 4, progress=False)
    model[3].register_forward_hook(lambda module, args, output: 2 * output)
    before = copy.deepcopy(model.state_dict())
    chain = to_chain(model)
    assert chain[0] is chain[3] and type(chain[0]) is nn.Sequential and isinstance(model[0], TuckerConv2d)
    input = torch.randn(1, 16, 6, 6).double()
    model.double()
    torch.testing.assert_close(chain.double()(input), model(input))
    with torch.no_grad():
        for tensor in chain.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(value, before[name].to(value)) for name, value in model.float().state_dict().items())
    with pytest.raises(TypeError, match=r"to_chain: model must be an nn.Module, got int"):
        to_chain(1)  # type: ignore[arg-type]


def absolute(model: nn.Module, input: Tensor) -> Tensor:
    """The fp64 chain of absolute values without activation, to which rounding errors are relative."""
    (block,) = (copy.deepcopy(module) for module in model.modules() if isinstance(module, FactorizedModule))
    block.activation = "none"
    for parameter in block.double().parameters():
        parameter.data.abs_()
    return to_chain(block)(input.double().abs())


def run(path: Path, *inputs: Tensor) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install .[bench])")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {each.name: np.asarray(value) for each, value in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


@each_block
def test_onnx_runtime_agrees(block: FactorizedModule, input: Tensor, tmp_path: Path) -> None:
    """Within the budget of tests/conftest.py for fp32, 2 u |A|; an activation's slope is at most 1.5 (hardswish)."""
    pytest.importorskip("onnx", reason="onnx is not installed (pip install .[bench])")
    model = nn.Sequential(block).float()
    export_onnx(model, tmp_path / "model.onnx", input)
    assert model[0] is block
    output = run(tmp_path / "model.onnx", input)
    exact = copy.deepcopy(model).double()(input.double())
    assert output.shape == exact.shape and exact.norm() > 0
    error = (output.double() - exact).norm()
    assert error <= 1.5 * torch.finfo(torch.float32).eps * absolute(model, input).norm()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = TuckerConv2d(5, 5, 3, 4, padding=1), nn.BatchNorm2d(5)

    def forward(self, input: Tensor, scale: Tensor) -> Tensor:
        return self.norm(self.conv(input)) * scale


@pytest.mark.parametrize("as_keywords", [False, True])
def test_arguments_options_and_eval_mode(as_keywords: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed (pip install .[bench])")
    model = TwoInputs().train()
    arguments = (IMAGE, torch.full((1,), 3.0))
    example = dict(zip(("input", "scale"), arguments, strict=True)) if as_keywords else arguments
    names = {"input_names": ["input", "scale"], "output_names": ["output"], "dynamic_axes": {"input": {0: "batch"}}}
    export_onnx(model, tmp_path / "model.onnx", example, **names)
    assert model.training and model.norm.num_batches_tracked == 0
    more = torch.randn(7, *IMAGE.shape[1:])
    output = run(tmp_path / "model.onnx", more, arguments[1])
    torch.testing.assert_close(output, model.eval()(more, arguments[1]))


def test_the_exporter_of_torch_export(tmp_path: Path) -> None:
    """torch.export keeps the mode of the model, so `export_onnx` exports eval mode although this model is in train
    mode."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed, which dynamo=True needs")
    model = TwoInputs().train()
    arguments = (IMAGE, torch.full((1,), 3.0))
    export_onnx(model, tmp_path / "model.onnx", arguments, dynamo=True, verbose=False)
    torch.testing.assert_close(run(tmp_path / "model.onnx", *arguments), model.eval()(*arguments))


def test_example_input_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"export_onnx: example_input must be a tensor, a tuple .*, got list"):
        export_onnx(BLOCKS[0][0], tmp_path / "model.onnx", [IMAGE])
    assert not list(tmp_path.iterdir())
