"""`factorize_` in models that read their layers: weights, attributes, and errors that say where they happen."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ops import (
    Budget,
    LowRankLinear,
    TuckerConv2d,
    factorize_,
    fold_activations_,
    fold_batchnorm_,
    frobenius_decay,
    fuse_,
    load,
    save,
    to_chain,
)
from lowrank_ops.model.weight_reads import WeightReads


class T5Block(nn.Module):
    """transformers' T5DenseActDense: asks for the dtype of `wo`."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.wi(hidden).relu()
        if (
            isinstance(self.wo.weight, Tensor)
            and hidden.dtype != self.wo.weight.dtype
            and self.wo.weight.dtype != torch.int8
        ):
            hidden = hidden.to(self.wo.weight.dtype)
        return self.wo(hidden)


class SwinBlock(nn.Module):
    """torchvision's shifted_window_attention: computes with the weights of `qkv` and `proj`, calls `mlp`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.mlp = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 64)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = F.linear(hidden, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        attention = (query @ key.transpose(-2, -1)).softmax(-1) @ value
        return self.mlp(F.linear(attention, self.proj.weight, self.proj.bias))


class Penalty(nn.Module):
    """Calls a layer and computes with its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 64)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden) / self.layer.weight.norm()


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 6, 32)


DATA = pytest.mark.parametrize("data", ["example_input", "calibration"])


@DATA
def test_metadata_are_no_reason_to_leave_a_layer(data: str) -> None:
    model = nn.Sequential(T5Block(), nn.LayerNorm(32), T5Block()).eval()
    report = factorize_(model, rank=0.25, progress=False, **{data: tokens()})
    assert len(report.replaced) == 4
    assert not any("computes with its weight" in (layer.note or "") for layer in report)
    assert model(tokens()).isfinite().all() and model.bfloat16()(tokens().bfloat16()).dtype is torch.bfloat16
    # `hidden` in float32, `wo` in bfloat16: the cast is there for this
    model[0].wi.float(), model[0].wo.bfloat16()
    assert model[0](tokens()).dtype is torch.bfloat16


@DATA
@pytest.mark.parametrize("rank", [0.25, Budget(params=0.8)], ids=["rank", "budget"])
def test_layers_whose_weights_the_model_computes_with_are_left(
    data: str, rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    model = nn.Sequential(SwinBlock()).eval()
    before = model[0].qkv, model[0].proj
    report = factorize_(model, rank=rank, progress=False, **{data: tokens()})
    assert [layer.name for layer in report.replaced] == ["0.mlp"]
    for name in ("0.qkv", "0.proj"):
        assert "computes with its weight instead of calling it" in str(report[name].reason), name
    assert (model[0].qkv, model[0].proj) == before
    assert "computes with its weight instead" in str(report)


@pytest.mark.filterwarnings("ignore:.* computes with the weight of this module")
def test_without_data_such_layers_still_work() -> None:
    model = nn.Sequential(SwinBlock()).eval()
    assert len(factorize_(model, rank=0.25, progress=False).replaced) == 3
    dense = SwinBlock().eval()
    for name in ("qkv", "proj", "mlp"):
        setattr(dense, name, getattr(model[0], name).to_dense())
    torch.testing.assert_close(model(tokens()), dense(tokens()), rtol=1e-4, atol=1e-5)


@DATA
def test_layers_that_are_called_and_read_are_replaced_with_a_note(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    model = nn.Sequential(Penalty()).eval()
    report = factorize_(model, rank=0.25, progress=False, **{data: tokens()})
    assert isinstance(model[0].layer, LowRankLinear)
    assert "also computes with its weight" in str(report["0.layer"].note) and report["0.layer"].reason is None
    assert "also computes with its weight" in str(report)


def told(call: Callable[[], object]) -> list[str]:
    """The warnings of a call that something computes with a weight."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught if "computes with the weight of this module" in str(each.message)]


class Fusable(nn.Sequential):
    """As LeViT's and RepVGG's: makes one dense layer of the convolution and its BatchNorm."""

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        conv, norm = self
        scale = norm.weight / (norm.running_var + norm.eps) ** 0.5
        fused = nn.Conv2d(conv.weight.shape[1], conv.weight.shape[0], conv.weight.shape[2:], padding=conv.padding)
        fused.weight.copy_(conv.weight * scale[:, None, None, None])
        fused.bias.copy_(norm.bias + (conv.bias - norm.running_mean) * scale)
        return fused


def test_a_models_own_fuse_is_told() -> None:
    model = Fusable(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)).eval()
    factorize_(model, rank=0.25, progress=False)
    (message,) = told(model.fuse)
    assert message.startswith("TuckerConv2d(16, 32, kernel_size=(3, 3)") and "fuse()" in message
    input = torch.randn(1, 16, 5, 5)
    assert not told(lambda: torch.testing.assert_close(model.fuse()(input), model(input)))
    assert len(told(lambda: copy.deepcopy(model).fuse())) == 1


@DATA
def test_a_read_is_told_once_and_not_where_the_report_has_it(data: str) -> None:
    """Nor while `factorize_` runs the model itself."""
    model = nn.Sequential(SwinBlock(), nn.Linear(64, 32), Penalty()).eval()
    for rank in (0.25, Budget(params=0.8)):
        tried = copy.deepcopy(model)
        arguments: dict[str, Any] = {"rank": rank, "progress": False, data: tokens()}
        assert not told(lambda tried=tried, arguments=arguments: factorize_(tried, **arguments))
        assert not told(lambda tried=tried: tried(tokens()))
    factorize_(model, rank=0.25, progress=False)
    assert len(told(lambda: model(tokens()))) == 3  # qkv, proj and the penalty's
    assert not told(lambda: model(tokens()))


def test_what_needs_no_values_is_not_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(288, 20)).eval()
    factorize_(model, rank=0.25, progress=False)
    reads: list[Callable[[], object]] = [
        lambda: [(layer.weight.dtype, layer.weight.shape, layer.weight.device) for layer in (model[0], model[2])],
        lambda: (model.state_dict(), list(model.parameters()), copy.deepcopy(model), repr(model)),
        lambda: (torch.save(model, tmp_path / "pickle"), save(model, tmp_path / "file")),
        lambda: load(tmp_path / "file", copy.deepcopy(model)),
        lambda: (model[0].to_dense(), to_chain(model), frobenius_decay(model, 0.1)),
        lambda: factorize_(nn.Sequential(model, nn.Linear(20, 20)), rank=2, calibration=torch.randn(60, 16, 5, 5)),
        lambda: model(torch.randn(2, 16, 5, 5)),
    ]
    for read in reads:
        assert not told(read)


def test_only_runs_of_the_model_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    reads = WeightReads(model, list(model))
    with reads:
        model[0].weight.norm(), model[1].requires_grad_(False)
        assert not reads.read and not reads.called
        model(torch.randn(2, 4))
    assert not reads.read and reads.called == {id(model[0]), id(model[1])}
    with contextlib.suppress(RuntimeError), reads:
        model(torch.randn(2, 5))
    assert not reads.read
    for layer in (model, *model):
        assert not layer._forward_hooks and not layer._forward_pre_hooks


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "a part"])
def test_reads_in_compiled_models(whole: bool) -> None:
    torch._dynamo.reset()
    model: Any = nn.Sequential(SwinBlock(), nn.Linear(64, 32)).eval()
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model[0].compile(backend="eager")
    report = factorize_(model, rank=0.25, example_input=tokens(), progress=False)
    left = {layer.name.removeprefix("_orig_mod.") for layer in report.skipped}
    assert {"0.qkv", "0.proj"} <= left
    assert len(report.replaced) == 2


# What was set on a layer.


class Routed(nn.Module):
    """YOLO's way: what each layer takes is written on the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
        for index, layer in enumerate(self.body):
            layer.index, layer.source = index, -1  # type: ignore[assignment]

    def forward(self, image: Tensor) -> Tensor:
        outputs = [image]
        for layer in self.body:
            assert layer.index == len(outputs) - 1
            outputs.append(layer(outputs[layer.source]))
        return outputs[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 0.25, "calibration": torch.randn(8, 16, 8, 8)},
        {"rank": 0.25, "n_jobs": 1},
        {"rank": Budget(latency=0.99), "example_input": torch.randn(2, 16, 32, 32)},
    ],
    ids=["calibration", "processes", "latency"],
)
def test_attributes_are_kept(arguments: dict) -> None:
    torch.manual_seed(0)
    model = Routed().eval()
    model.body[0].source_of_all = lambda: model  # type: ignore[assignment]  # no process could be sent this
    with contextlib.suppress(ValueError):  # a latency that this machine does not reach
        factorize_(model, progress=False, **arguments)
    assert "n_jobs" not in arguments or isinstance(model.body[0], TuckerConv2d)
    assert [(layer.index, layer.source) for layer in model.body] == [(0, -1), (1, -1)]
    assert model.body[0].source_of_all() is model
    assert model(torch.randn(1, 16, 8, 8)).shape == (1, 16, 8, 8)


def test_attributes_of_what_was_folded_or_fused_are_kept() -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(16, 4, 1, bias=False), nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 16, 1))
    model = nn.Sequential(chain, nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16, eps=1e-3))
    for index, layer in enumerate(model):
        layer.index = index  # type: ignore[assignment]

    def indices(model: nn.Module) -> list[int]:
        return [layer.index for layer in model.children()]  # type: ignore[misc]

    model.eval()
    fuse_(model), fold_batchnorm_(model), fold_activations_(model)
    factorize_(model, rank=0.25, progress=False)
    assert [type(layer) for layer in model] == [TuckerConv2d, nn.Identity, nn.Identity, TuckerConv2d, nn.Identity]
    assert indices(model) == [0, 1, 2, 3, 4] and model[4].eps == 1e-3
    assert indices(to_chain(model)) == [0, 1, 2, 3, 4]


def test_attributes_are_kept_by_load(tmp_path: Path) -> None:
    model = Routed()
    factorize_(model, rank=0.25, progress=False)
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", Routed())
    assert isinstance(loaded.body[0], TuckerConv2d)
    image = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(loaded(image), model(image))
    dense = Routed()
    dense.body[1].rank = 3  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"body\.1 cannot be replaced: it has an attribute 'rank' of its own"):
        load(tmp_path / "model.safetensors", dense)


class Gated(nn.Linear):
    def gate(self) -> Tensor:
        return self.weight.mean()


def with_(change: Callable[[nn.Linear], object]) -> nn.Linear:
    layer = nn.Linear(32, 40)
    change(layer)
    return layer


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Gated(32, 40), "Gated adds 'gate' to nn.Linear"),
        (lambda: with_(lambda layer: layer.register_buffer("scale", torch.ones(1))), "holds 'scale'"),
        (lambda: with_(lambda layer: layer.register_parameter("alpha", nn.Parameter(torch.ones(1)))), "holds 'alpha'"),
        (lambda: with_(lambda layer: layer.add_module("lora", nn.Linear(32, 4))), "holds 'lora'"),
        (lambda: with_(lambda layer: setattr(layer, "forward", lambda x: x)), "forward was replaced on the instance"),
        (lambda: with_(lambda layer: layer.compile()), "compile"),
        (lambda: with_(lambda layer: layer.register_state_dict_post_hook(lambda *_: None)), "state_dict hooks"),
        (lambda: with_(lambda layer: layer.weight.register_hook(print)), "gradient hooks"),
        (lambda: with_(lambda layer: layer.bias.register_post_accumulate_grad_hook(print)), "gradient hooks"),
        (lambda: with_(lambda layer: setattr(layer, "rank", 3)), "an attribute 'rank' of its own"),
        (lambda: with_(lambda layer: setattr(layer, "factors", 3)), "an attribute 'factors' of its own"),
    ],
)
def test_layers_with_more_than_a_replacement_keeps_are_left(build: Callable[[], nn.Module], words: str) -> None:
    model = nn.Sequential(build(), nn.Linear(32, 40))
    layer = model[0]
    report = factorize_(model, rank=0.25, progress=False)
    assert words in str(report["0"].reason) and model[0] is layer
    assert isinstance(model[1], LowRankLinear)


# Errors.


class Fails(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.layer = nn.Linear(32, 40)

    def forward(self, hidden: Tensor) -> Tensor:
        self.check(self.layer(hidden))
        return hidden

    def check(self, hidden: Tensor) -> None:
        raise self.error


@DATA
@pytest.mark.parametrize("error", [ValueError("a wrong value"), AttributeError("weight"), KeyError("mask")], ids=repr)
def test_errors_name_the_layer_in_which_they_happen(data: str, error: Exception) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ModuleDict({"block": Fails(error)})["block"])
    words = rf"factorize_: the model fails in 1 \(Fails\), run on .*{type(error).__name__}: .*{error.args[0]}"
    with pytest.raises(RuntimeError, match=words) as caught:
        factorize_(model, rank=0.25, progress=False, **{data: tokens()})
    assert caught.value.__cause__ is error
    with pytest.raises(RuntimeError, match=r"fails on .*TypeError: .*positional argument"):
        factorize_(model, rank=0.25, progress=False, **{data: (tokens(), tokens())})


class FailsLate(nn.Module):
    """Fails where its layer is factorized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden: Tensor) -> Tensor:
        if isinstance(self.first, LowRankLinear):
            raise ValueError("no nn.Linear")
        return self.layer(self.first(hidden))


@DATA
def test_errors_of_the_factorized_model_name_the_layer(data: str) -> None:
    model = nn.Sequential(FailsLate())
    layers = list(model.modules())
    with pytest.raises(RuntimeError, match=r"fails in 0 \(FailsLate\), run on .*ValueError: no nn.Linear"):
        factorize_(model, rank=0.25, progress=False, **{data: tokens()})
    assert all(now is before for now, before in zip(model.modules(), layers, strict=True))


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        raise KeyError("no backward")


class Forward(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return NoBackward.apply(hidden)


def test_errors_outside_of_all_layers() -> None:
    model = nn.Sequential(nn.Linear(32, 32), Forward())
    with pytest.raises(RuntimeError, match=r"the model fails on the calibration data: KeyError: 'no backward'"):
        factorize_(model, rank=0.25, progress=False, calibration=tokens())
    with pytest.raises(ValueError, match="holds 1 NaN"):
        factorize_(model, rank=0.25, progress=False, calibration=torch.tensor([[float("nan")] + [0.0] * 31]))
