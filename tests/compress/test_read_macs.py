"""MACs by weights that a model reads instead of calling the layer: counted in rows, totals and budgets."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_ops import Budget, factorize_

INPUT = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """Layers that are called, read, both, or shared with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96, bias=False)  # as Swin and BEiT do
        self.proj = nn.Linear(32, 32)
        self.conv = nn.Conv2d(16, 16, 3)
        self.both, self.conv_both = nn.Linear(32, 64), nn.Conv2d(16, 24, 3)
        self.embedding, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.sliced, self.cast = nn.Linear(32, 64), nn.Linear(32, 16, dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        value = F.linear(x, self.qkv.weight).chunk(3, -1)[2]
        hidden = self.proj(value) + self.embedding(torch.arange(10))
        image = F.conv2d(hidden[:, None].expand(-1, 16, -1, -1), self.conv.weight, padding=1)
        both = self.both(hidden) + hidden @ self.both.weight.t()
        images = self.conv_both(image) + F.conv2d(image, self.conv_both.weight)
        sliced = torch.einsum("nrs,ts->nrt", hidden, self.sliced.weight[8:])
        cast = F.linear(hidden, self.cast.weight.float())
        return both, images, sliced, cast, self.head(hidden) + F.linear(hidden, self.head.weight)


def reader(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Reader().eval()


def counted(model: nn.Module) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(INPUT)
    return int(counter.get_total_flops())


READ = ("qkv", "conv", "sliced", "cast")


def test_totals_are_those_of_torchs_counter() -> None:
    """Before and after, where the products of the factors count, too."""
    model = reader()
    dense = counted(model)
    report = factorize_(model, rank=8, example_input=INPUT, progress=False)
    assert [row.name for row in report.replaced] == ["proj", "both", "conv_both"]
    assert [row.name for row in report if "instead of calling it" in str(row.reason)] == list(READ)
    assert 2 * report.total("macs_before") == dense  # type: ignore[operator]
    assert 2 * report.total("macs_after") == counted(model)  # type: ignore[operator]
    assert report["qkv"].macs_before == report["qkv"].macs_after == 20 * 32 * 96
    assert report["cast"].macs_before == 20 * 32 * 16 and report["sliced"].macs_before == 20 * 32 * 56
    assert report["head"].macs_before == 2 * 20 * 32 * 50


def test_of_a_model_built_in_inference_mode() -> None:
    with torch.inference_mode():
        model = reader()
    report = factorize_(model, rank=8, example_input=INPUT, progress=False)
    assert 2 * report.total("macs_before") == counted(reader())  # type: ignore[operator]


def test_attention() -> None:
    """The projection that nn.MultiheadAttention reads; its inputs' weights are no layer."""
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    report = factorize_(model, rank=8, example_input=INPUT, progress=False)
    assert {row.name: row.macs_before for row in report} == {
        "self_attn.out_proj": 20 * 32 * 32,
        "linear1": 20 * 32 * 64,
        "linear2": 20 * 32 * 64,
    }
    projections, attention = 20 * 32 * 96, 2 * 2 * 10 * 10 * 32
    counts_attention = report.macs_elsewhere != projections  # torch 2.15 counts its attention on CPUs, 2.13 not
    assert report.macs_elsewhere == projections + counts_attention * attention
    (line,) = (note for note in report.notes if note.startswith("not in the MACs above: "))
    told = "74.24k outside of these layers, 42.0" if counts_attention else "61.44k outside of these layers, 37.5"
    assert line == f"not in the MACs above: {told} % of all"


def test_nothing_elsewhere_is_not_told() -> None:
    report = factorize_(reader(), rank=8, example_input=INPUT, progress=False)
    assert report.macs_elsewhere == 0 and not any("not in the MACs" in note for note in report.notes)
    assert factorize_(reader(), rank=8, progress=False).macs_elsewhere is None


def test_parameters_of_three_axes() -> None:
    """As of a mixture of experts: most of its MACs are in no layer."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(4, 32, 64)), nn.Parameter(torch.randn(4, 64, 32))
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x[:, None] @ self.up).relu() @ self.down)

    report = factorize_(Experts(), rank=8, example_input=INPUT, progress=False)
    assert report.macs_elsewhere == 2 * 2 * 4 * 10 * 32 * 64
    assert report.total("macs_before") == 4 * 20 * 32 * 32


@pytest.mark.parametrize("share", [0.9, 0.8])
def test_a_budget_is_one_of_the_whole_model(share: float) -> None:
    model = reader()
    dense = counted(model)
    report = factorize_(model, rank=Budget(macs=share), example_input=INPUT, progress=False)
    assert report.replaced and counted(model) <= share * dense


def test_a_budget_below_what_is_read_cannot_be_met() -> None:
    with pytest.raises(ValueError, match=r"budget of .* multiplications cannot be met; the closest is"):
        factorize_(reader(), rank=Budget(macs=0.2), example_input=INPUT, progress=False)


class Graph(nn.Module):
    """Its adjacency is sparse, and has no storage."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.adjacency = nn.Linear(32, 64), torch.eye(10).to_sparse()
        self.register_buffer("csr", torch.eye(10).to_sparse_csr())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.csr, torch.sparse.mm(self.adjacency, self.layer(x)))


class PerRow(nn.Module):
    """Transforms of torch.func inside of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: self.layer(row) + row @ self.layer.weight.T)(x)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_tensors_of_other_kinds() -> None:
    (row,) = factorize_(Graph(), rank=8, example_input=INPUT[0], progress=False)
    assert row.replaced_by == "LowRankLinear" and row.macs_before == 10 * 32 * 64
    (row,) = factorize_(PerRow(), rank=8, example_input=INPUT[0], progress=False)
    assert row.macs_before is not None and row.macs_before >= 10 * 32 * 64


class Nested(nn.Module):
    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.layer, self.layout = nn.Linear(32, 64), layout

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.nested.nested_tensor([x[:3], x[3:]], layout=self.layout))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("rank", [8, Budget(macs=0.4)], ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_jagged_tensors_count_by_their_rows(rank: Any, calibrated: bool) -> None:
    model, dense = Nested(torch.jagged), Nested(torch.jagged)
    model.load_state_dict(dense.state_dict())
    rows = torch.randn(100, 32, generator=torch.Generator().manual_seed(3))
    calibration = {"calibration": [rows[:60], rows[60:]]} if calibrated else {}
    report = factorize_(model, rank=rank, example_input=INPUT[0], progress=False, **calibration)
    (row,) = report
    assert row.replaced_by == "LowRankLinear" and row.macs_before == 10 * 32 * 64 and row.output_size == (10, 64)
    assert row.macs_after == 10 * model.layer.rank * (32 + 64) and row.milliseconds_after is not None
    assert row.calibration_rows == (100 if calibrated else None)
    torch.testing.assert_close(model(INPUT[0]).values(), model.layer(INPUT[0]))
    found, exact = model(rows).values(), dense(rows).values()
    assert (found - exact).norm() < 0.9 * exact.norm()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_tensors_are_refused_by_the_layers_name() -> None:
    """No factorized op takes them; the model stays as it was."""
    model = Nested(torch.strided)
    with pytest.raises(RuntimeError, match=r"the factorized model fails .*: .*torch\.jagged.*exclude that layer"):
        factorize_(model, rank=8, example_input=INPUT[0], progress=False)
    assert isinstance(model.layer, nn.Linear)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second((x[..., None, :] * self.first.weight).sum(-1))


@pytest.mark.parametrize("rank", [8, Budget(macs=0.6), Budget(params=0.8)])
def test_what_is_not_counted_is_said(rank: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = factorize_(ByHand(), rank=rank, example_input=INPUT, progress=False)
    assert report["first"].macs_before is None and "its MACs are not known" in str(report["first"].reason)
    assert report.total("macs_before") == 20 * 32 * 32
    said = [str(warning.message) for warning in caught if "does not count" in str(warning.message)]
    assert ["weights of first, which" in text for text in said] == [True] * (rank == Budget(macs=0.6))
