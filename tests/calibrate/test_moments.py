"""Rows and moments of layers against the layers themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_ops
from lowrank_ops.calibrate import shrinkage
from lowrank_ops.calibrate.moments import (
    HeldOut,
    Watched,
    draw_positions,
    gather_moments,
    input_rows,
    output_rows,
    watch,
)
from lowrank_ops.model.batches import Batches
from lowrank_ops.nn.plain import Layer
from tests.support.triangles import symmetric

LAYERS = [
    nn.Conv2d(5, 4, 3, padding=1),
    nn.Conv2d(5, 4, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 3)),
    nn.Conv2d(5, 4, 3, padding="same", dilation=2),
    nn.Conv2d(5, 4, 2, padding="same"),
    nn.Conv2d(5, 4, 3, padding="valid"),
    nn.Conv2d(5, 4, 3, padding=(1, 2), padding_mode="reflect"),
    nn.Conv2d(5, 4, 3, padding=1, padding_mode="circular", bias=False),
    nn.Conv2d(5, 4, 1, stride=2),
    nn.Conv1d(5, 4, 3, padding=2, stride=2),
    nn.Conv1d(5, 4, 4, padding="same", padding_mode="replicate"),
    nn.Linear(5, 4),
]


def _input(layer: Layer) -> Tensor:
    torch.manual_seed(0)
    shape = {nn.Conv2d: (3, 5, 9, 8), nn.Conv1d: (3, 5, 11), nn.Linear: (2, 7, 5)}[type(layer)]
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_is_its_weight_times_rows(layer: Layer) -> None:
    layer = layer.double()
    input = _input(layer)
    output = layer(input)
    positions = draw_positions(layer, output, 10**6, "all")
    bias = 0 if layer.bias is None else layer.bias
    product = input_rows(layer, input, positions).flatten(1) @ layer.weight.flatten(1).T + bias
    # at most 15 products of numbers around 1 in fp64, summed in another order
    torch.testing.assert_close(
        product, output_rows(layer, output), rtol=0, atol=64 * torch.finfo(torch.float64).eps * 15
    )
    some = draw_positions(layer, output, 6, "some")
    assert len(some.unique()) == 6
    assert torch.equal(some, draw_positions(layer, output, 6, "some"))
    assert not torch.equal(some, draw_positions(layer, output, 6, "others"))
    assert torch.equal(output_rows(layer, output, some), output_rows(layer, output)[some])
    assert torch.equal(input_rows(layer, input, some), input_rows(layer, input, positions)[some])


def test_unbatched_inputs() -> None:
    layer = LAYERS[0].double()
    image = _input(layer)[0]
    positions = torch.arange(72)
    assert torch.equal(input_rows(layer, image, positions), input_rows(layer, image[None], positions))
    assert torch.equal(output_rows(layer, layer(image)), output_rows(layer, layer(image[None])))


class _Twice(nn.Module):
    """Calls one layer twice, rectifies its output in place, and has a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.shared = nn.Conv2d(3, 3, 1)
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(3, 2)

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.relu_(self.first(input))
        hidden = self.shared(torch.relu_(self.shared(hidden)))
        return self.last(hidden.mean((2, 3)))


@pytest.fixture
def plain_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrinkage, "_shrinkage", lambda covariance, count: 0.0)


def test_every_fourth_position_is_held_out_whole_samples_where_there_are_four() -> None:
    held = HeldOut()
    assert held.next_call(8)(torch.arange(8)).tolist() == [False] * 6 + [True] * 2
    assert held.next_call(4 * 30)(torch.arange(120)).nonzero().flatten().tolist() == list(range(90, 120))
    single = [bool(held.next_call(1)(torch.arange(1))) for _ in range(8)]
    assert single == [False, False, False, True] * 2
    pairs = [held.next_call(2)(torch.arange(2)).tolist() for _ in range(2)]
    assert pairs == [[False, False], [False, True]]
    assert held.next_call(8)(torch.tensor([7, 0])).tolist() == [True, False]


@pytest.mark.usefixtures("plain_moments")
def test_moments_are_those_of_all_inputs_and_of_the_gradients_of_a_projection() -> None:
    torch.manual_seed(0)
    model = _Twice().double()
    batches = [torch.randn(4, 2, 5, 6, dtype=torch.float64), torch.randn(2, 2, 5, 6, dtype=torch.float64)]
    layers: list[Layer] = [model.last, model.first, model.shared, model.unused]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, calls = gather_moments(model, layers, Batches(batches, "here"), positions=10**6)
    assert list(found) == list(map(id, (model.first, model.shared, model.last)))  # in the order of the calls
    assert calls == {id(model.first): 1, id(model.shared): 2, id(model.last): 1}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training

    parts = []
    for batch in batches:
        hidden = torch.relu(model.first(batch))
        for seen in (hidden, torch.relu(model.shared(hidden))):
            all_rows = seen.permute(0, 2, 3, 1).flatten(0, 2)
            parts.append(all_rows[: len(all_rows) * 3 // 4])  # the last quarter is held out
    rows = torch.cat(parts)
    assert found[id(model.shared)].rows == 2 * 6 * 30
    # fp64 sums of 270 products, in fp64 throughout
    expected = rows.T @ rows / len(rows)
    torch.testing.assert_close(symmetric(found[id(model.shared)].input), expected, rtol=1e-12, atol=1e-12)

    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(3, 3, dtype=torch.float64)
    for batch in batches:
        output = model.first(batch)
        rest = model.last(model.shared(torch.relu(model.shared(torch.relu(output)))).mean((2, 3)))
        (gradient,) = torch.autograd.grad(rest, output, torch.randn(rest.shape, generator=generator).to(rest))
        rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)
        total += rows.T @ rows
    torch.testing.assert_close(symmetric(found[id(model.first)].gradient), total, rtol=1e-12, atol=1e-14)


def test_frozen_weights_behind_integers_and_models_without_gradients() -> None:
    embedding = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    embedding.requires_grad_(False)
    tokens = torch.arange(7)[None]
    found, _ = gather_moments(embedding, [embedding[1], embedding[3]], Batches([tokens], "here"))
    assert not torch.equal(symmetric(found[id(embedding[1])].gradient), torch.eye(3, dtype=torch.float64))

    class Detached(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).detach()

    model = Detached(nn.Linear(4, 3))
    found, _ = gather_moments(model, [model[0]], Batches(torch.randn(5, 4), "here"))
    assert torch.equal(symmetric(found[id(model[0])].gradient), torch.eye(3, dtype=torch.float64))


class _FrozenBackbone(nn.Module):
    """Runs the backbone without gradients and once more with them."""

    def __init__(self, region: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self.region = region
        self.backbone = nn.Conv2d(3, 4, 3)
        self.both = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        with self.region():
            hidden = self.both(self.backbone(input).mean((2, 3)))
        return self.head(self.both(hidden))


@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
def test_regions_without_gradients_pass_none(region: Callable[[], AbstractContextManager]) -> None:
    torch.manual_seed(0)
    model = _FrozenBackbone(region)
    layers: list[Layer] = [model.backbone, model.both, model.head]
    found, calls = gather_moments(model, layers, Batches(torch.randn(8, 3, 6, 6), "here"))
    assert calls == {id(model.backbone): 1, id(model.both): 2, id(model.head): 1}
    assert torch.equal(symmetric(found[id(model.backbone)].gradient), torch.eye(4, dtype=torch.float64))
    assert not torch.equal(symmetric(found[id(model.both)].gradient), torch.eye(4, dtype=torch.float64))
    assert not torch.equal(symmetric(found[id(model.head)].gradient), torch.eye(2, dtype=torch.float64))
    names = ["backbone", "both", "head"]
    report = lowrank_ops.factorize_(model, rank=1, calibration=torch.randn(8, 3, 6, 6), include=names, progress=False)
    assert [layer.name for layer in report.replaced] == names


@pytest.mark.usefixtures("plain_moments")
def test_moments_inside_autocast_are_sums_in_fp32_of_what_the_model_computes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    batches, layers = Batches(torch.randn(32, 6), "here"), [model[0], model[2]]
    outside, _ = gather_moments(model, layers, batches)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model[1](model[0](next(iter(batches)).arguments[0]))
        inside, _ = gather_moments(model, layers, batches)
    assert torch.equal(symmetric(inside[id(model[0])].input), symmetric(outside[id(model[0])].input))
    assert hidden.dtype == torch.bfloat16
    rows = hidden.detach().double()[:24]
    # fp32 sums of 24 products
    torch.testing.assert_close(symmetric(inside[id(model[2])].input).double(), rows.T @ rows / 24, rtol=1e-5, atol=1e-6)
    gradient = torch.randn(32, 3, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    found = symmetric(inside[id(model[2])].gradient).double()
    torch.testing.assert_close(found, gradient.T @ gradient, rtol=1e-5, atol=1e-5)


def test_watch_records_outside_of_autocast() -> None:
    model = _Twice()
    (batch,) = Batches((torch.randn(1, 2, 4, 4),), "here")
    seen: list[tuple[torch.dtype, bool]] = []
    with torch.autocast("cpu", torch.bfloat16):
        watched = Watched(model.shared, 1, lambda *call: seen.append((call[2].dtype, torch.is_autocast_enabled("cpu"))))
        watch(model, [watched], batch)
    assert seen == [(torch.bfloat16, False)]


def test_watch_stops_after_the_last_call() -> None:
    model = _Twice()
    seen: list[int] = []
    reached: list[str] = []
    model.last.register_forward_hook(lambda *_: reached.append("last"))
    (batch,) = Batches((torch.randn(1, 2, 4, 4),), "here")
    watch(model, [Watched(model.shared, 2, lambda call, input, output: seen.append(call))], batch)
    assert seen == [0, 1]
    assert reached == []
    assert model.training


class _Checkpointed(nn.Module):
    """Two layers whose forward pass torch.utils.checkpoint runs again in the backward pass; None: it does not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.reentrant = reentrant

    def _both(self, input: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(input)))

    def forward(self, input: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.last(self._both(input))
        return self.last(checkpoint(self._both, input, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_a_checkpoint_computes_twice_are_seen_once(reentrant: bool) -> None:
    plain, model = _Checkpointed(None).double(), _Checkpointed(reentrant).double()
    model.load_state_dict(plain.state_dict())
    batches = Batches(torch.randn(20, 5, dtype=torch.float64), "here")
    results = [gather_moments(each, [each.first, each.second, each.last], batches) for each in (plain, model)]
    for name in ("first", "second", "last"):
        (before, calls), (after, again) = (
            (found[id(getattr(each, name))], n[id(getattr(each, name))])
            for each, (found, n) in zip((plain, model), results, strict=True)
        )
        assert (after.rows, again) == (before.rows, calls) == (20, 1)
        assert torch.equal(symmetric(after.input), symmetric(before.input))
        assert torch.equal(symmetric(after.gradient), symmetric(before.gradient))


class _Stubborn(_Twice):
    """Catches whatever its layers raise and goes on, or fails with an error of its own."""

    def __init__(self, kind: type[BaseException], own: bool) -> None:
        super().__init__()
        self.kind, self.own, self.caught = kind, own, 0

    def forward(self, input: Tensor) -> Tensor:
        try:
            hidden = self.shared(self.first(input))
        except self.kind:
            self.caught += 1
            hidden = self.shared(self.first(input))
            if self.own:
                raise RuntimeError("fallback failed") from None
        return self.last(hidden.mean((2, 3)))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("kind", "caught"), [(Exception, 0), (BaseException, 1)])
def test_watch_sees_each_call_once_whatever_the_model_catches(
    kind: type[BaseException], caught: int, own: bool
) -> None:
    model = _Stubborn(kind, own)
    (batch,) = Batches((torch.randn(1, 2, 4, 4),), "here")
    seen: list[int] = []
    watch(model, [Watched(model.shared, 1, lambda call, input, output: seen.append(call))], batch)
    assert seen == [0] and model.caught == caught


def test_an_error_before_the_last_call_is_the_models_own() -> None:
    model = _Stubborn(Exception, True)
    model.first = nn.Conv2d(5, 3, 3)  # fails
    (batch,) = Batches((torch.randn(1, 2, 4, 4),), "here")
    with pytest.raises(RuntimeError, match="channels"):
        watch(model, [Watched(model.shared, 1, lambda *_: None)], batch)


_PEAK = """
import torch
from torch import nn
from lowrank_ops.model.batches import Batches
from lowrank_ops.calibrate.whitening import Whitening
from lowrank_ops.calibrate.moments import gather_moments
torch.set_num_threads(1)
def whiten(width):
    layer = nn.Linear(16, width)
    batches = Batches([torch.randn(64, 16) for _ in range(2)], "data", torch.device("cpu"))
    moments, _ = gather_moments(nn.Sequential(layer), [layer], batches)
    return Whitening.of_(moments.pop(id(layer)))
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
whiten(1100)  # a block and a bit: the libraries' own buffers
before = status("VmRSS")
whiten(4096)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_a_moment_and_its_root_take_half_a_square_matrix() -> None:
    """For 4096 outputs in fp32, panels of 256 columns in fp64 besides, and their products."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}
    result = subprocess.run([sys.executable, "-c", _PEAK], env=environment, capture_output=True, text=True, check=True)
    half, panel = 4 * 4096**2 // 2, 8 * 4096 * 256
    assert half <= int(result.stdout) < half + 4 * panel
