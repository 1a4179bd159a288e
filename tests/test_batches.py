"""`Batches`: what calibration data may be, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lowrank_ops.batches import ROWS, Batches, device_of, outputs_of

ROW = torch.arange(6.0).reshape(2, 3)


def _arguments(data: object) -> list[tuple[torch.Tensor, ...]]:
    return [batch.arguments for batch in Batches(data, "here")]


def test_a_tensor_is_cut_into_batches() -> None:
    rows = torch.randn(2 * ROWS + 1, 3)
    batches = Batches(rows, "here")
    assert [len(batch.arguments[0]) for batch in batches] == [ROWS, ROWS, 1]
    assert torch.equal(torch.cat([batch.arguments[0] for batch in batches]), rows)
    assert len(batches) == 3


def test_tuples_and_dicts_are_arguments() -> None:
    model = nn.Bilinear(3, 3, 2)
    (batch,) = Batches((ROW, ROW + 1), "here")
    assert torch.equal(batch.run(model), model(ROW, ROW + 1))
    (batch,) = Batches({"input2": ROW, "input1": ROW + 1}, "here")
    assert torch.equal(batch.run(model), model(ROW + 1, ROW))


def test_a_list_holds_batches_and_a_batch_that_is_a_list_its_labels() -> None:
    assert [tuple(map(torch.Tensor.tolist, entry)) for entry in _arguments([ROW, (ROW, ROW), [ROW, "label"]])] == [
        (ROW.tolist(),),
        (ROW.tolist(), ROW.tolist()),
        (ROW.tolist(),),
    ]


def test_a_loader_drops_labels_and_starts_anew() -> None:
    rows = torch.randn(5, 3)
    batches = Batches(DataLoader(TensorDataset(rows, torch.arange(5)), batch_size=2), "here")
    for _ in range(2):
        seen = [batch.arguments for batch in batches]
        assert all(len(entry) == 1 for entry in seen)
        assert torch.equal(torch.cat([entry[0] for entry in seen]), rows)


def test_integers_pass_and_tensors_are_moved() -> None:
    tokens = torch.arange(4)
    (batch,) = Batches([tokens], "here", torch.device("meta"))
    assert batch.arguments[0].device.type == "meta"
    (batch,) = Batches([tokens], "here")
    assert batch.arguments[0] is tokens and batch.tensors() == []


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (iter([ROW]), TypeError, "can be read only once"),
        ((row for row in [ROW]), TypeError, "can be read only once"),
        (3, TypeError, "here must be a tensor"),
        ("folder", TypeError, "got str"),
        (["folder"], TypeError, "batch 0 must be a tensor"),
        ([[]], ValueError, "batch 0 is an empty list"),
        ([], ValueError, "here has no batch"),
        (torch.empty(0, 3), ValueError, "here has no batch"),
        ([ROW, torch.tensor([[1.0, float("nan"), float("inf")]])], ValueError, "batch 1 holds 2 NaN or infinite of 3"),
    ],
)
def test_bad_data(data: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        list(Batches(data, "here"))


def test_outputs_and_devices() -> None:
    assert outputs_of({"a": ROW, "b": [ROW, (ROW, torch.arange(3))], "c": None}) == [ROW, ROW, ROW]
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu")
    assert device_of(nn.ReLU()) is None
