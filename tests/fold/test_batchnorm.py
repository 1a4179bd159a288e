"""`fold_batchnorm_` and `reestimate_batchnorm_`: outputs equal in fp64, reasons for what is left, no change after
errors."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations
from torch import Tensor, nn

from lowrank_ops import (
    CPConv1d,
    CPConv2d,
    LowRankLinear,
    TuckerConv1d,
    TuckerConv2d,
    factorize_,
    fold_batchnorm_,
    reestimate_batchnorm_,
)
from lowrank_ops.fold.pairs import require_same

IMAGE = torch.randn(3, 5, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def trained(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, with random statistics, weights and biases in every BatchNorm."""
    model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.normal_(module.bias)
    return model


def assert_folds(model: nn.Module, input: Tensor, folded: list[tuple[str, str]], example: bool = False) -> nn.Module:
    """Asserts that exactly these pairs are folded, and that the outputs do not change."""
    expected = model(input)
    assert expected.norm() > 0
    names = set(model.state_dict())
    report = fold_batchnorm_(model, input if example else None)
    assert [(fold.layer, fold.follower) for fold in report.folded] == folded
    torch.testing.assert_close(model(input), expected)
    for layer, norm in folded:
        assert type(model.get_submodule(norm)) is nn.Identity
        names = {name for name in names if not name.startswith(f"{norm}.")} | {f"{layer}.bias"}
    assert set(model.state_dict()) == names
    return model


def assert_left(model: nn.Module, reason: str, example: Tensor | None = None) -> None:
    state = copy.deepcopy(model.state_dict())
    report = fold_batchnorm_(model, example)
    assert not report.folded
    assert any(reason in str(fold.reason) for fold in report.left), report.left
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        lambda bias: nn.Conv2d(5, 6, (3, 2), stride=2, padding=1, bias=bias),
        lambda bias: nn.Conv2d(5, 10, 3, groups=5, bias=bias),
        lambda bias: TuckerConv2d(5, 6, (3, 2), (3, 4), stride=(1, 2), padding=1, padding_mode="reflect", bias=bias),
        lambda bias: CPConv2d(5, 6, 3, 4, padding="same", bias=bias),
    ],
)
def test_after_a_convolution(kind, bias: bool, affine: bool) -> None:
    layer = kind(bias)
    model = trained(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels, affine=affine, eps=1e-2), nn.ReLU()))
    assert_folds(model, IMAGE, [("0", "1")])


@pytest.mark.parametrize("layer", [nn.Conv1d(5, 6, 3), TuckerConv1d(5, 6, 3, (3, 4)), CPConv1d(5, 6, 3, 4, bias=False)])
def test_after_a_convolution_in_one_dimension(layer: nn.Module) -> None:
    assert_folds(trained(nn.Sequential(layer, nn.BatchNorm1d(6))), IMAGE[:, :, 0], [("0", "1")])


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), LowRankLinear(8, 6, 3, bias=False)])
def test_after_a_linear_layer(layer: nn.Module) -> None:
    """Only the features of [N, T] are rows of the weight; an input [N, L, S] is normalized over L."""
    model = trained(nn.Sequential(layer, nn.BatchNorm1d(6)))
    assert_left(model, "give example_input")
    assert_left(model, "another axis", torch.randn(4, 6, 8, dtype=torch.float64))
    assert_folds(model, IMAGE[0, 0], [("0", "1")], example=True)


class Block(nn.Module):
    """A residual block whose forward calls its modules one by one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm2, self.norm1 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.relu(self.norm1(self.conv1(input)))
        return self.relu(self.norm2(self.conv2(hidden)) + input)


PAIRS = [("1", "2"), ("3.conv2", "3.norm2"), ("3.conv1", "3.norm1"), ("4.conv2", "4.norm2"), ("4.conv1", "4.norm1")]


def network() -> nn.Module:
    first = [nn.BatchNorm2d(5), nn.Conv2d(5, 16, 3, padding=1), nn.BatchNorm2d(16)]
    return trained(nn.Sequential(*first, Block(16), Block(16)))


def test_network_by_fx() -> None:
    model = network()
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    report = fold_batchnorm_(copy.deepcopy(model))
    assert not report.untraced
    assert [(fold.follower, fold.layer) for fold in report.left] == [("0", None)]
    assert "5 of 6 folded" in str(report) and "directly before it" in str(report)
    assert_folds(model, IMAGE, PAIRS)
    same = [name for name, parameter in model.named_parameters() if parameters.get(name) == id(parameter)]
    assert same == ["0.weight", "0.bias"], "what was folded into has new parameters, the rest its own"


def test_before_or_after_factorize() -> None:
    """Folding first or last gives the same function: rows are scaled by the same numbers."""
    before, after = network(), network()
    after.load_state_dict(before.state_dict())
    fold_batchnorm_(before)
    names = ["3.conv1", "3.conv2", "4.conv1", "4.conv2"]
    for model in (before, after):
        with pytest.warns(UserWarning, match="no layer of Sequential was replaced"):
            report = factorize_(model, "tucker", 16, include=names, multiple=1, progress=False)
        assert not report.replaced, "full rank saves nothing"
        report = factorize_(model, "tucker", 8, include=names, multiple=1, progress=False)
        assert len(report.replaced) == 4
    factorized = copy.deepcopy(after)
    assert_folds(after, IMAGE, PAIRS)
    torch.testing.assert_close(after(IMAGE), factorized(IMAGE))


def test_train_mode_is_kept_and_statistics_are_folded() -> None:
    model = network()
    expected = model(IMAGE)
    model.train()
    state = copy.deepcopy(model.state_dict())
    report = fold_batchnorm_(model)
    assert len(report.folded) == 5 and all(module.training for module in model.modules())
    assert torch.equal(model[0].running_mean, state["0.running_mean"]), "tracing runs nothing"
    torch.testing.assert_close(model.eval()(IMAGE), expected)


class Branch(nn.Module):
    """A module that torch.fx cannot trace, because of a branch on the input's size."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.last = nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.body(input)
        return self.norm(self.last(hidden)) if hidden.shape[2] > 1 else hidden


def test_children_of_what_fx_cannot_trace() -> None:
    model = trained(nn.Sequential(Branch(nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), nn.Conv2d(6, 3, 1)))
    report = fold_batchnorm_(copy.deepcopy(model))
    assert set(report.untraced) == {"", "0"} and "TraceError" in report.untraced[""]
    assert "cannot trace Sequential, 0, so its children were" in str(report)
    assert_folds(model, IMAGE, [("0.body.0", "0.body.1")])


class Uses(nn.Module):
    """One convolution, one BatchNorm, and a forward that the test chooses."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.conv, self.other, self.norm = nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5)
        self._forward = forward

    def forward(self, input: Tensor) -> Tensor:
        return self._forward(self, input)


def also_used(model: Uses, input: Tensor) -> Tensor:
    hidden = model.conv(input)
    return model.norm(hidden) + hidden


def called_twice(model: Uses, input: Tensor) -> Tensor:
    return model.norm(model.conv(model.conv(input)))


def norm_called_twice(model: Uses, input: Tensor) -> Tensor:
    return model.norm(model.other(model.norm(model.conv(input))))


def reads_the_weight(model: Uses, input: Tensor) -> Tensor:
    return model.norm(model.conv(input)) + F.conv2d(input, model.conv.weight)


def other_in_training(model: Uses, input: Tensor) -> Tensor:
    hidden = model.conv(input)
    return model.norm(F.relu(hidden) if model.training else hidden)


def activation_between(model: Uses, input: Tensor) -> Tensor:
    return model.norm(model.conv(input).relu())


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (also_used, "used elsewhere too"),
        (called_twice, "conv is called 2 times"),
        (norm_called_twice, "norm is called 2 times"),
        (reads_the_weight, "reads the parameters of conv"),
        (other_in_training, "in train mode they are called another way"),
        (activation_between, "directly before it"),
    ],
)
def test_left_for_its_use(forward, reason: str) -> None:
    model = trained(Uses(forward))
    assert_left(model, reason)
    assert_left(model, reason, IMAGE)


def pair(layer: nn.Module, norm: nn.Module | None = None) -> nn.Sequential:
    return trained(nn.Sequential(layer, norm or nn.BatchNorm2d(6)))


class OwnForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("layer", "norm", "reason"),
    [
        (nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6, track_running_stats=False), "no running statistics"),
        (nn.ConvTranspose2d(5, 6, 1), None, "transposed"),
        (TuckerConv2d(5, 6, 3, 4, activation="relu"), None, "activation (relu) comes between"),
        (torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(5, 6, 1)), None, "computed"),
        (OwnForward(5, 6, 1), None, "forward of its own"),
        (nn.Conv2d(5, 6, 1), nn.BatchNorm2d(7), "it has 7 features, the layer 6 outputs"),
        (nn.Conv2d(5, 6, 1), OwnNorm(6), "subclass of BatchNorm"),
        (nn.Conv2d(5, 6, 1), nn.LazyBatchNorm2d(), "lazy"),
    ],
)
def test_left_for_its_kind(layer: nn.Module, norm: nn.Module | None, reason: str) -> None:
    if isinstance(norm, nn.LazyBatchNorm2d):
        report = fold_batchnorm_(nn.Sequential(layer, norm))
        assert reason in str(report.left[0].reason)
    else:
        assert_left(pair(layer, norm), reason)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_left_for_hooks(which: int, register: str) -> None:
    model = pair(nn.Conv2d(5, 6, 1))
    getattr(model[which], register)(lambda *_: None)
    assert_left(model, f"{which} has hooks")


def test_hooks_of_containers_do_not_run_and_stay() -> None:
    """A container with hooks is one step to its parent, and is traced by itself."""
    model = trained(nn.Sequential(pair(nn.Conv2d(5, 6, 1)), nn.ReLU()))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    report = fold_batchnorm_(model)
    assert [fold.layer for fold in report.folded] == ["0.0"] and not seen
    model(IMAGE)
    assert len(seen) == 1


def test_left_for_shared_parameters() -> None:
    model = trained(nn.Sequential(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 1)))
    model[2].weight = model[0].weight
    assert_left(model, "shares a parameter with 2.weight")


def test_left_for_values_that_the_dtype_cannot_hold() -> None:
    model = pair(nn.Conv2d(5, 6, 1)).half()
    model[0].weight.data.fill_(1000)
    model[1].running_var.fill_(0)
    assert_left(model, "not finite in torch.float16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_layout_and_requires_grad_stay(dtype: torch.dtype) -> None:
    model = pair(TuckerConv2d(5, 6, 3, 4, bias=False)).to(dtype)
    model[0].out_factor.requires_grad_(False)
    strides = model[0].core.stride()
    exact = copy.deepcopy(model).double()
    fold_batchnorm_(model)
    block = model[0]
    assert block.out_factor.dtype == block.bias.dtype == dtype and block.core.stride() == strides
    assert not block.out_factor.requires_grad and not block.bias.requires_grad and block.core.requires_grad
    fold_batchnorm_(exact)
    torch.testing.assert_close(block.out_factor.double(), exact[0].out_factor, rtol=torch.finfo(dtype).eps / 2, atol=0)


def test_an_alias_is_folded_once() -> None:
    model = trained(Uses(lambda model, input: model.norm(model.conv(input))))
    model.also = nn.ModuleList([model.conv, model.norm])
    expected = model(IMAGE)
    assert len(fold_batchnorm_(model).folded) == 1
    assert model.also[1] is model.norm and type(model.norm) is nn.Identity
    torch.testing.assert_close(model(IMAGE), expected)


def test_a_forward_of_the_instance_is_not_mistaken_for_that_of_its_class() -> None:
    model = pair(nn.Conv2d(5, 6, 1))
    model.forward = lambda input: model[1](F.relu(model[0](input)))  # type: ignore[method-assign]
    expected = model(IMAGE)
    report = fold_batchnorm_(model)
    assert not report.folded and "replaced" in report.untraced[""]
    assert torch.equal(model(IMAGE), expected)
    model = pair(nn.Conv2d(5, 6, 1))
    model[0].forward = F.relu  # type: ignore[method-assign]
    assert_left(model, "0 has a forward that was replaced")


class Tapped(nn.Module):
    """Calls a Sequential's layers one by one and keeps an intermediate result; elsewhere torch.fx sees the whole
    Sequential called."""

    def __init__(self) -> None:
        super().__init__()
        self.body = pair(nn.Conv2d(5, 6, 1))

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2] > 100:
            return self.body(input)
        hidden = self.body[0](input)
        return hidden + self.body[1](hidden)


def test_example_input_shows_what_no_graph_does() -> None:
    model = Tapped()
    state = copy.deepcopy(model.state_dict())
    expected = model(IMAGE)
    with pytest.raises(RuntimeError, match=r"fold_batchnorm_: the output on example_input changes.*left as it was"):
        fold_batchnorm_(model, IMAGE)
    assert torch.equal(model(IMAGE), expected) and list(model.state_dict()) == list(state)
    with pytest.raises(
        RuntimeError, match=r"fold_batchnorm_: the model fails in body.0 \(Conv2d\), run on example_input"
    ):
        fold_batchnorm_(model, IMAGE[:, :2])
    with pytest.raises(ValueError, match="example_input: batch 0 holds 1 NaN"):
        fold_batchnorm_(model, torch.full((1, 1), float("nan")))
    assert torch.equal(model(IMAGE), expected)
    with pytest.raises(TypeError, match=r"fold_batchnorm_: model must be an nn.Module, got int"):
        fold_batchnorm_(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ([1.0, 2.0, float("-inf")], True),
        ([1.0, 2.0 + 1e-9, float("-inf")], True),
        ([1.0, 2.0 + 1e-6, float("-inf")], False),
        ([1.0, 2.0, 3.0], False),
        ([1.0, 2.0, float("-inf"), 0.0], False),
    ],
)
def test_what_counts_as_the_same_output(values: list[float], same: bool) -> None:
    """sqrt(eps) of float64 is 1.5e-8, the norm sqrt(5); values that are not finite must be in the same places."""
    before = torch.tensor([1.0, 2.0, float("-inf")], dtype=torch.float64)
    with nullcontext() if same else pytest.raises(RuntimeError, match="here: the output"):
        require_same([before], [torch.tensor(values, dtype=torch.float64)], "here")


def test_tracing_leaves_no_mark() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.seen = pair(nn.Conv2d(5, 6, 1)), []
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, input: Tensor) -> Tensor:
            self.calls.add_(1)
            self.seen.append(input)
            return self.body(input)

    model = Keeps().eval()
    assert len(fold_batchnorm_(model).folded) == 1
    assert model.calls == 0 and not model.seen


# reestimate_batchnorm_


def test_statistics_are_cumulative_averages_as_update_bn_makes_them() -> None:
    model = network().train()
    reference = copy.deepcopy(model)
    batches = [torch.randn(size, 5, 7, 6, dtype=torch.float64) for size in (4, 2, 3)]
    flags = [module.training for module in model.modules()]
    assert reestimate_batchnorm_(model, batches, progress=False) is model
    torch.optim.swa_utils.update_bn(batches, reference)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, msg=name)
    first = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(model[0].running_mean, first)
    variances = torch.stack([batch.transpose(0, 1).flatten(1).var(1, correction=1) for batch in batches])
    torch.testing.assert_close(model[0].running_var, variances.mean(0))
    assert [module.training for module in model.modules()] == flags
    assert model[0].momentum == 0.1 and model[0].num_batches_tracked == 3


def test_everything_else_is_in_eval_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4)).train()
    data = torch.randn(64, 4)
    reestimate_batchnorm_(model, [data], progress=False)
    torch.testing.assert_close(model[1].running_mean, data.mean(0))
    assert model[0].training and model[1].training and not model[1].running_mean.requires_grad


def test_data_of_every_kind_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    data = torch.randn(40, 4)
    expected = torch.stack([data[:32].mean(0), data[32:].mean(0)]).mean(0)
    for calibration in (
        data,
        [data[:32], data[32:]],
        [(data[:32],), {"input": data[32:]}],
        [[data[:32], 1], data[32:]],
    ):
        model = nn.Sequential(nn.BatchNorm1d(4))
        reestimate_batchnorm_(model, calibration)
        torch.testing.assert_close(model[0].running_mean, expected)
    assert "BatchNorm" in capsys.readouterr().err


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.aux = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(input) + (self.aux(input) if self.training else 0)


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([torch.randn(8, 4)], ValueError, "no batch of calibration reaches BatchNorm 'aux'"),
        ([torch.randn(8, 4), torch.randn(1, 4)], RuntimeError, r"fails in norm .*, run on batch 1 .*more than 1 value"),
        ([torch.randn(8, 4), torch.full((8, 4), float("nan"))], ValueError, "batch 1 holds 32 NaN"),
        ([torch.full((8, 4), 3e38)], ValueError, "BatchNorm '(norm|aux)'"),
        ([], ValueError, "reestimate_batchnorm_: calibration has no batch"),
        (iter([torch.randn(8, 4)]), TypeError, "read only once"),
    ],
)
def test_errors_leave_the_statistics(calibration, error: type[Exception], message: str) -> None:
    model = TwoHeads().train()
    with torch.no_grad():
        model(torch.randn(8, 4))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        reestimate_batchnorm_(model, calibration, progress=False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and model.norm.momentum == 0.1


def test_overflowing_statistics_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="inputs of BatchNorm '0' on calibration are not finite"):
        reestimate_batchnorm_(model, [torch.randn(8, 4) * 1e30], progress=False)
    assert torch.equal(model[0].running_var, torch.ones(4))


def test_nothing_to_estimate() -> None:
    model = pair(nn.Conv2d(5, 6, 1))
    fold_batchnorm_(model)
    with pytest.raises(ValueError, match=r"Sequential has no BatchNorm with running statistics.*estimate first"):
        reestimate_batchnorm_(model, IMAGE)
    with pytest.raises(TypeError, match=r"model must be an nn.Module"):
        reestimate_batchnorm_(None, IMAGE)  # type: ignore[arg-type]
