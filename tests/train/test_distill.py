"""distill_: its loss against a computation by hand, what it learns, what it restores, what it refuses."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops
import lowrank_ops.train.training as training
from lowrank_ops import CPConv2d, LowRankLinear, TuckerConv2d, distill_
from lowrank_ops.nn.base import FactorizedModule

quiet = functools.partial(distill_, progress=False)


def network(inplace: bool = True) -> nn.Sequential:
    """Two convolutions, the first one's output changed in place behind it, BatchNorm, dropout, a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.SiLU(inplace=inplace),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 9, 5),
    ).double()
    with torch.no_grad():  # statistics that are not the initial ones
        for _ in range(20):
            model(torch.randn(16, 3, 8, 8, dtype=torch.float64))
    return model.eval()


def images(rows: int = 16) -> Tensor:
    return torch.randn(rows, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def factorized(teacher: nn.Module) -> nn.Module:
    student = copy.deepcopy(teacher)
    names = [name for name, layer in student.named_children() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    lowrank_ops.factorize_(student, "tucker", (3, 4), linear=3, include=names, progress=False)
    kinds = [type(layer) for layer in student if isinstance(layer, FactorizedModule)]
    assert kinds == [TuckerConv2d, TuckerConv2d, LowRankLinear]
    return student


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    teacher = network()
    return factorized(teacher), teacher


class Interrupted(list):
    """A loader during whose second batch somebody presses Ctrl-C."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield images()
        raise KeyboardInterrupt


def relative(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / target.square().sum()


def layer_outputs(model: nn.Sequential, input: Tensor, at: list[int]) -> list[Tensor]:
    """Outputs of some layers of a chain and, last, its own; nothing in place."""
    outputs = []
    for index, layer in enumerate(model):
        input = (
            F.relu(input)
            if isinstance(layer, nn.ReLU)
            else F.silu(input)
            if isinstance(layer, nn.SiLU)
            else layer(input)
        )
        if index in at:
            outputs.append(input)
    return [*outputs, input]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# What is minimized


@pytest.mark.parametrize("layer_weight", [0.0, 1.0, 2.5])
def test_the_loss_is_the_one_described(pair: tuple, layer_weight: float) -> None:
    """In-place activations behind the layers are in both networks; the same sums, so fp64's rounding of them."""
    student, teacher = pair
    at = [i for i, layer in enumerate(student) if isinstance(layer, FactorizedModule)]
    with torch.no_grad():
        *theirs, expected = layer_outputs(teacher, images(), at)
        *ours, output = layer_outputs(student, images(), at)
        layers = torch.stack([relative(a, b) for a, b in zip(ours, theirs, strict=True)])
        loss = relative(output, expected) + layer_weight * layers.mean()
    assert len(at) >= 2 and float(layers.min()) > 1e-3
    report = quiet(student, teacher, images(), steps=1, layer_weight=layer_weight)
    assert report.first == pytest.approx(float(loss), rel=1e-12)
    assert report.layers == (tuple(str(i) for i in at) if layer_weight else ())
    assert report.steps == 1 and report.last == report.first and report.seconds > 0
    assert str(report).startswith("1 steps in ")


def test_a_step_follows_the_gradient_of_the_loss(pair: tuple) -> None:
    student, teacher = pair
    plain = copy.deepcopy(student)
    output, expected = plain(images()), teacher(images()).detach()
    relative(output, expected).backward()
    quiet(student, teacher, images(), steps=1, layer_weight=0, optimizer=functools.partial(torch.optim.SGD, lr=1e-3))
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        assert bool(theirs.grad.any())
        torch.testing.assert_close(ours, theirs - 1e-3 * theirs.grad, rtol=1e-12, atol=1e-15)


def test_logits_by_temperature(pair: tuple) -> None:
    student, teacher = pair
    with torch.no_grad():
        ours, theirs = (torch.softmax(model(images()) / 3, -1) for model in (student, teacher))
    expected = 9 * (theirs * (theirs / ours).log()).sum(-1).mean()
    report = quiet(student, teacher, images(), steps=1, layer_weight=0, temperature=3)
    assert report.first == pytest.approx(float(expected), rel=1e-9) and report.first > 1e-4
    report = quiet(student, teacher, images(), steps=60, layer_weight=0, temperature=3, learning_rate=1e-2)
    assert report.last < 0.5 * report.first


def test_activations_folded_into_the_student() -> None:
    """The teacher's layer gives what comes before its activation; a chain taken over by fuse_ what comes after."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(6 * 36, 4)).double()
    folded = TuckerConv2d.from_conv2d(teacher[0], (3, 6), activation="silu")
    student = nn.Sequential(folded, nn.Identity(), nn.Flatten(), copy.deepcopy(teacher[3]))
    chain = nn.Sequential(folded.to_sequential(), nn.Identity(), nn.Flatten(), copy.deepcopy(teacher[3]))
    for against in (teacher, nn.Sequential(nn.Sequential(teacher[0], teacher[1]), *teacher[2:])):
        assert quiet(copy.deepcopy(student), against, images(), steps=1).first < 1e-24
    with torch.no_grad():
        chain[0][0].weight.mul_(1.1)
    assert 1e-4 < quiet(copy.deepcopy(student), chain, images(), steps=1).first < 0.1


class Recurrent(nn.Module):
    """A layer that is called twice, keyword arguments, several outputs, one of them of integers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, first: Tensor, *, second: Tensor) -> dict[str, object]:
        left, right = self.layer(first), self.layer(second)
        return {"sum": left + right, "both": (left, [right]), "best": left.argmax(-1)}


def test_calls_outputs_and_arguments() -> None:
    torch.manual_seed(0)
    teacher = Recurrent(nn.Linear(6, 5).double())
    student = Recurrent(LowRankLinear.from_linear(teacher.layer, 2))
    first, second = torch.randn(2, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        a, b = (teacher.layer(value) for value in (first, second))
        c, d = (student.layer(value) for value in (first, second))
        outputs = (relative(c + d, a + b) + relative(c, a) + relative(d, b)) / 3
        layer = ((c - a).square().sum() + (d - b).square().sum()) / (a.square().sum() + b.square().sum())
    report = quiet(student, teacher, [{"first": first, "second": second}], steps=1)
    assert report.first == pytest.approx(float(outputs + layer), rel=1e-12)


def test_a_layer_that_a_batch_does_not_reach_adds_nothing() -> None:
    class Branches(nn.Module):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, input: Tensor) -> Tensor:
            return self.layers[int(input.shape[0] > 4)](input)

    torch.manual_seed(0)
    teacher = Branches(nn.Linear(6, 5), nn.Linear(6, 5))
    student = Branches(*(LowRankLinear.from_linear(layer, 2) for layer in teacher.layers))
    before = values(student)
    report = quiet(student, teacher, [torch.randn(3, 6)], steps=3)
    assert report.last < report.first
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("layers.0")}


# Learning


@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
def test_the_student_comes_near_its_teacher(batchnorm: str) -> None:
    """The teacher's layers are exactly of the student's ranks, so the loss can go to zero."""
    teacher = factorized(network())
    for index, layer in enumerate(teacher):
        if isinstance(layer, FactorizedModule):
            teacher[index] = layer.to_dense()
    student = factorized(teacher)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.2 * parameter.std() * torch.randn_like(parameter)
    statistics = values(student)
    report = quiet(student, teacher, images(32), steps=150, learning_rate=1e-2, batchnorm=batchnorm)
    assert report.steps == 150 and report.first > 0.02
    assert report.last < (0.02 if batchnorm == "frozen" else 0.2) * report.first
    moved = not torch.equal(student[3].running_mean, statistics["3.running_mean"])
    assert moved == (batchnorm == "train")
    assert int(student[3].num_batches_tracked) == int(statistics["3.num_batches_tracked"]) + 150 * moved


def test_labels_are_ignored_and_the_loader_is_read_again(pair: tuple) -> None:
    student, teacher = pair
    other = copy.deepcopy(student)
    labelled = torch.utils.data.TensorDataset(images(), torch.arange(16))
    first = quiet(student, teacher, torch.utils.data.DataLoader(labelled, batch_size=6), steps=7)
    second = quiet(other, teacher, list(images().split(6)), steps=7)
    assert first.losses == second.losses and len(set(first.losses)) == 7
    assert_unchanged(student, values(other))


def test_samplers_are_told_the_epoch(pair: tuple) -> None:
    class Sampler(torch.utils.data.SequentialSampler):
        epochs: ClassVar[list[int]] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    loader = torch.utils.data.DataLoader(images(), batch_size=8, sampler=Sampler(images()))
    quiet(*pair, loader, steps=5)
    assert Sampler.epochs == [0, 1, 2]


class Recording(torch.optim.SGD):
    """Keeps the learning rates of its steps."""

    rates: list[list[float]]

    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        self.__dict__.setdefault("rates", []).append([group["lr"] for group in self.param_groups])
        return super().step(closure)


def test_time_ends_it(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second at each look: one a step, the first before all of them."""
    seconds = itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    student, teacher = pair
    optimizer = Recording(student.parameters(), lr=1e-3)
    assert quiet(student, teacher, images(), minutes=5 / 60, optimizer=optimizer).steps == 5
    expected = [1e-3 * (step + 1) / 20 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]
    assert [rate for (rate,) in optimizer.rates] == pytest.approx(expected)
    assert quiet(student, teacher, images(), minutes=5 / 60, steps=50).steps == 5
    assert quiet(student, teacher, images(), minutes=5 / 60, steps=3).steps == 3
    assert quiet(student, teacher, images(), minutes=1e-9).steps == 1


def test_a_thousand_steps_by_default(pair: tuple, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        distill_(*pair, Interrupted())
    assert "1/1000" in capfd.readouterr().err


def test_schedule_and_groups_of_an_optimizer(pair: tuple) -> None:
    student, teacher = pair
    first, *others = student.parameters()
    optimizer = Recording([{"params": [first], "lr": 2e-3}, {"params": others, "lr": 1e-3}], lr=1.0)
    quiet(student, teacher, images(), steps=40, optimizer=optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 1e-3]
    for step, (large, small) in enumerate(optimizer.rates):
        rise, fall = min(1, (step + 1) / 4), (1 + math.cos(math.pi * step / 40)) / 2
        assert large == pytest.approx(2e-3 * rise * fall) and small == pytest.approx(1e-3 * rise * fall)
    assert len(optimizer.rates) == 40 and optimizer.rates[-1][0] > 0


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        functools.partial(torch.optim.AdamW, lr=1e-3),
        functools.partial(torch.optim.RMSprop, lr=1e-3),
        functools.partial(torch.optim.Adagrad, lr=1e-2),
        functools.partial(torch.optim.LBFGS, lr=0.5, max_iter=3),
    ],
    ids=lambda optimizer: optimizer.func.__name__,
)
def test_any_optimizer(pair: tuple, optimizer: functools.partial) -> None:
    """L-BFGS calls the loss several times a step; torch's takes contiguous parameters only."""
    for model in pair:
        model.to(memory_format=torch.contiguous_format)
    report = quiet(*pair, images(), steps=20, optimizer=optimizer)
    assert report.last < 0.9 * report.first


# What is left behind


def test_all_else_is_as_before(pair: tuple) -> None:
    student, teacher = pair
    student[0].train()
    teacher[3].train()
    student[0].in_factor.requires_grad_(False)
    teacher[7].weight.requires_grad_(False)
    frozen, taught, seen = student[0].in_factor.clone(), values(teacher), []
    handle = student[0].register_forward_hook(lambda *call: seen.append(len(call)))
    flags = [[module.training for module in model.modules()] for model in (student, teacher)]
    hooks = [[len(module._forward_hooks) for module in model.modules()] for model in (student, teacher)]
    needs = [[parameter.requires_grad for parameter in model.parameters()] for model in (student, teacher)]
    data = images()
    with torch.inference_mode():
        quiet(student, teacher, data, steps=3)
    assert seen == [3] * 4  # three steps, and a look at what came of them
    assert flags == [[module.training for module in model.modules()] for model in (student, teacher)]
    assert hooks == [[len(module._forward_hooks) for module in model.modules()] for model in (student, teacher)]
    assert needs == [[parameter.requires_grad for parameter in model.parameters()] for model in (student, teacher)]
    assert torch.equal(student[0].in_factor, frozen) and torch.equal(data, images())
    assert_unchanged(teacher, taught)
    assert all(parameter.grad is None for model in (student, teacher) for parameter in model.parameters())
    handle.remove()


def test_dropout_is_off_and_recurrent_layers_train() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(4, 6, batch_first=True)
            self.stacked = nn.LSTM(6, 6, 2, dropout=0.5, batch_first=True)
            self.out = nn.Linear(6, 5)
            self.modes: list[tuple[bool, bool]] = []

        def forward(self, input: Tensor) -> Tensor:
            self.modes.append((self.inner.training, self.stacked.training))
            return self.out(F.dropout(self.stacked(self.inner(input)[0])[0], 0.5, self.training))

    torch.manual_seed(0)
    teacher = Reader()
    student = copy.deepcopy(teacher)
    student.out = LowRankLinear.from_linear(teacher.out, 5)
    report = quiet(student, teacher, [torch.randn(3, 7, 4)], steps=2)
    assert report.first < 1e-10
    assert student.modes == [(True, False)] * 3 and teacher.modes == [(False, False)] * 3
    assert student.inner.training and student.stacked.training


def test_a_diverging_loss_is_an_error_and_undone(pair: tuple) -> None:
    student, teacher = pair
    before = values(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e200)
    with pytest.raises(RuntimeError, match=r"distill_: the loss is (nan|inf) at step 2; .*lower learning rate"):
        quiet(student, teacher, images(), steps=10, optimizer=optimizer)
    assert_unchanged(student, before)
    assert optimizer.param_groups[0]["lr"] == 1e200
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not student.training and not any(module._forward_hooks for module in (*student, *teacher))
    with pytest.raises(RuntimeError, match="parameters are not finite at step 1;"):
        quiet(student, teacher, images(), steps=1, optimizer=functools.partial(torch.optim.SGD, lr=math.inf))
    assert_unchanged(student, before)


def test_a_loss_that_runs_away_starts_anew_at_a_lower_learning_rate() -> None:
    """A student near its teacher, and steps far too large for it: without restarts it would be lost."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    loader = list(torch.randn(16, 32, 8).unbind())

    def error() -> float:
        with torch.no_grad():
            return float(relative(student(torch.cat(loader)), teacher(torch.cat(loader))))

    before, optimizer = error(), torch.optim.Adam(student.parameters(), lr=0.5)
    report = quiet(student, teacher, loader, steps=300, optimizer=optimizer, layer_weight=0.0)
    assert report.restarts >= 1 and report.kept and error() < before
    assert f"divided by {4**report.restarts} " in str(report)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_the_report_has_the_loss_of_what_it_returns(pair: tuple) -> None:
    """The last step's batch is another one, and so is its loss."""
    student, teacher = pair
    hard = images() * 1e-3 + teacher[0].bias.new_tensor([0.3, -0.2, 0.1]).view(3, 1, 1)
    report = quiet(student, teacher, [images(), *[hard] * 4], steps=5, layer_weight=0.0)
    with torch.no_grad():
        expected = float(relative(student(images()), teacher(images())))
    assert report.kept and report.result == pytest.approx(expected, rel=1e-9)
    assert report.result < report.first and report.result != pytest.approx(report.last, rel=0.1)
    assert f"loss on the first batch {report.first:.4g} > {report.result:.4g}" in str(report)


def test_a_student_that_got_worse_is_as_it_was(pair: tuple) -> None:
    student, teacher = pair
    before = values(student)
    optimizer = functools.partial(torch.optim.SGD, lr=10.0)
    with pytest.warns(UserWarning, match="has its initial parameters again; use a lower learning rate"):
        report = quiet(student, teacher, images(), steps=1, optimizer=optimizer)
    assert not report.kept and str(report).endswith("no better than before, so undone")
    assert report.result == report.first
    assert_unchanged(student, before)


def test_networks_that_are_not_finite_from_the_start(pair: tuple) -> None:
    student, teacher = pair
    with torch.no_grad():
        student[7].bias[0] = math.nan
    with pytest.raises(RuntimeError, match=r"at step 1; .*the student's outputs are not finite before any training"):
        quiet(student, teacher, images(), steps=2)
    with torch.no_grad():
        student[7].bias[0], teacher[7].bias[0] = 0, math.nan
    with pytest.raises(RuntimeError, match=r"at step 1; .*the teacher's outputs are not finite on this batch"):
        quiet(student, teacher, images(), steps=2)


def test_bad_data_is_an_error_and_undone(pair: tuple) -> None:
    student, teacher = pair
    before = values(student)
    broken = [images(), images(), images().fill_(math.nan)]
    with pytest.raises(ValueError, match="distill_: loader: batch 2 holds"):
        quiet(student, teacher, broken, steps=10)
    assert_unchanged(student, before)
    for loader, error, message in (
        ([], ValueError, "distill_: loader has no batch"),
        (iter([images()]), TypeError, "can be read only once"),
        (7, TypeError, "distill_: loader must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            quiet(student, teacher, loader, steps=2)
    with pytest.raises(RuntimeError, match="expected input"):  # the teacher's own error
        quiet(student, teacher, images()[:, :2], steps=2)
    assert_unchanged(student, before)


def test_an_interrupted_student_keeps_what_it_has_learned(pair: tuple) -> None:
    student, teacher = pair
    before = values(student)
    with pytest.raises(KeyboardInterrupt):
        quiet(student, teacher, Interrupted(), steps=5)
    assert not torch.equal(student[7].bias, before["7.bias"])
    assert not any(module._forward_hooks for module in (*student, *teacher))


def test_progress_goes_to_stderr(pair: tuple, capfd: pytest.CaptureFixture) -> None:
    distill_(*pair, images(), steps=2)
    printed = capfd.readouterr()
    assert printed.out == "" and "distill" in printed.err and "loss" in printed.err
    quiet(*pair, images(), steps=2)
    assert capfd.readouterr().err == ""


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be an int or None, got 2.5"),
        ({"steps": True}, TypeError, "steps must be an int"),
        ({"minutes": 0}, ValueError, "minutes must be finite and above 0, got 0"),
        ({"minutes": "3"}, TypeError, "minutes must be a number or None, got '3'"),
        ({"layer_weight": -1.0}, ValueError, "layer_weight must be finite and at least 0, got -1.0"),
        ({"layer_weight": None}, TypeError, "layer_weight must be a number, got None"),
        ({"layer_weight": math.nan}, ValueError, "layer_weight must be finite"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be finite and above 0, got 0.0"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number"),
        ({"learning_rate": 0.1, "optimizer": torch.optim.SGD}, ValueError, "learning_rate is Adam's; .* got 0.1 too"),
        ({"optimizer": "sgd"}, TypeError, "optimizer must be a torch.optim.Optimizer or a callable.*got str"),
        ({"optimizer": list}, TypeError, "optimizer must be a torch.optim.Optimizer or a callable.*got list"),
        ({"batchnorm": "eval"}, ValueError, "batchnorm must be 'frozen' or 'train', got 'eval'"),
    ],
    ids=str,
)
def test_bad_arguments(pair: tuple, options: dict, error: type[Exception], message: str) -> None:
    before = values(pair[0])
    with pytest.raises(error, match=f"distill_: {message}"):
        quiet(*pair, images(), **options)
    assert_unchanged(pair[0], before)


def test_networks_that_do_not_match(pair: tuple) -> None:
    student, teacher = pair
    before = values(student)

    def refused(message: str, student: nn.Module = student, teacher: nn.Module = teacher, **options: object) -> None:
        with pytest.raises(ValueError, match=f"distill_: {message}"):
            quiet(student, teacher, images(), **{"steps": 2, **options})

    with pytest.raises(TypeError, match=r"student must be an nn\.Module, got str"):
        quiet("student", teacher, images())
    refused(r"student and teacher must share no parameter, 13 are in both \(0.in_factor, ...\)", student, student)
    refused("student must have factorized layers, it has none", network())
    elsewhere = nn.ModuleDict({"body": network()})
    refused("teacher must have a layer for each factorized layer .* none named '0', '2'", teacher=elsewhere)
    wider, fewer = network(), network()
    wider[0], wider[2] = nn.Conv2d(3, 9, 3, padding=1).double(), nn.Conv2d(9, 8, 3, stride=2).double()
    fewer[7] = nn.Linear(72, 4).double()
    refused(r"layer '0' must give the same shape in both networks, got \[16, 8, 8, 8\] in the student", teacher=wider)
    shapes = r"student and teacher must give the same shapes, got \[\(16, 5\)\] and \[\(16, 4\)\]"
    refused(shapes, teacher=fewer, layer_weight=0)
    folded = copy.deepcopy(student)
    folded[3] = nn.Identity()
    refused("the teacher has a BatchNorm '3', the student has none there", folded)
    without = copy.deepcopy(teacher)
    without[3] = nn.Identity()
    refused("the student has a BatchNorm '3', the teacher has none there", teacher=without)
    old = torch.optim.SGD(teacher.parameters(), lr=0.1)
    refused("optimizer must hold parameters of the student only, 8 are not: factorize_", optimizer=old)
    frozen = copy.deepcopy(student).requires_grad_(False)
    refused("student must have parameters that require gradients", frozen)
    refused("the networks must return floating-point tensors", Argmax(factorized(teacher)), Argmax(network()))
    refused("temperature takes logits .* got an output of shape", student[:1], network()[:1], temperature=2.0)
    silent = network()
    nn.init.zeros_(silent[7].weight), nn.init.zeros_(silent[7].bias)
    refused("the teacher's outputs are all zeros", teacher=silent)
    assert_unchanged(student, before)


class Argmax(nn.Sequential):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(*model)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).argmax(-1)


def test_layers_called_unequally_often() -> None:
    class Loop(nn.Module):
        def __init__(self, layer: nn.Module, calls: int) -> None:
            super().__init__()
            self.layer, self.calls = layer, calls

        def forward(self, input: Tensor) -> Tensor:
            for _ in range(self.calls):
                input = self.layer(input)
            return input

    for ours, theirs in ((2, 1), (1, 2)):
        teacher = Loop(nn.Linear(4, 4), theirs)
        student = Loop(LowRankLinear.from_linear(teacher.layer, 2), ours)
        before = values(student)
        with pytest.raises(ValueError, match="distill_: layer 'layer' must be called equally often in both networks"):
            quiet(student, teacher, [torch.randn(3, 4)], steps=2)
        assert_unchanged(student, before)
        assert quiet(student, teacher, [torch.randn(3, 4)], steps=2, layer_weight=0).steps == 2


def test_models_outside_of_factorize() -> None:
    """With layer_weight=0 any two networks will do; a CP student is trained as well."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    student = nn.Sequential(CPConv2d(3, 4, 5, 6, dtype=torch.float64, init="kaiming_normal"))
    report = quiet(student, teacher, images(), steps=60, layer_weight=0, learning_rate=0.02)
    assert report.last < 0.7 * report.first and report.layers == ()
