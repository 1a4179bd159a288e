"""`Batches`: what calibration data may be, and what is refused."""

from __future__ import annotations

import copy
import math
import random
import threading
import warnings
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lowrank_ops import distill_, factorize_, fold_batchnorm_
from lowrank_ops.model.batches import ROWS, Batches, device_of, outputs_of

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
        (
            SimpleNamespace(x=ROW),
            TypeError,
            r"got SimpleNamespace: if the model takes such an object whole, give a tuple",
        ),
        ([SimpleNamespace(x=ROW)], TypeError, r"batch 0 must be .* got SimpleNamespace: if the model takes"),
        (np.ones((2, 3)), TypeError, r"batch 0 must be .* got ndarray: give tensors, by torch.as_tensor"),
        ({0: ROW}, TypeError, "keys of a mapping must be names of the model's arguments, got 0"),
        ([[{"a": ROW}, {"a": ROW[:1]}]], ValueError, "batch 0 is a list of 2 mappings .* must stack"),
        ([{"a": {"deep": [ROW / 0]}}], ValueError, "batch 0 holds 6 NaN or infinite of 6"),
        ([ROW.to("meta")], ValueError, "batch 0 is on the meta device"),
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


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input: Tensor, mask: Tensor) -> Tensor:
        return (self.query(input) @ input.mT + mask).softmax(-1) @ self.value(input)


def test_masks_hold_minus_infinity() -> None:
    input, mask = torch.randn(40, 6, 16), nn.Transformer.generate_square_subsequent_mask(6)
    report = factorize_(Attends(), rank=0.25, calibration=[(input, mask)], progress=False)
    assert len(report.replaced) == 2 and all(0 < layer.output_error < 1 for layer in report)
    with pytest.raises(ValueError, match="query sees values that are not finite"):
        factorize_(Attends(), rank=0.25, calibration=[(input - math.inf, mask)], progress=False)


@dataclass
class Arguments:
    """As a library's objects with attributes are."""

    input1: Tensor
    input2: Tensor


class Encoding(UserDict):  # type: ignore[type-arg]
    """As transformers' BatchEncoding: the entries are attributes, too."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As transformers': fields and entries at once."""

    input1: Tensor
    input2: Tensor

    def __post_init__(self) -> None:
        self["input1"], self["input2"] = self.input1, self.input2


NAMED = {"input1": ROW, "input2": ROW + 1}


@pytest.mark.parametrize(
    "batch",
    [NAMED, OrderedDict(NAMED), UserDict(NAMED), Encoding(NAMED), Arguments(**NAMED), ModelOutput(**NAMED)],
    ids=lambda batch: type(batch).__name__,
)
def test_mappings_and_objects_are_keyword_arguments(batch: object) -> None:
    model = nn.Bilinear(3, 3, 2)
    for data in (batch, [batch, batch], [[batch, "label"]]):
        for found in Batches(data, "here", torch.device("cpu")):
            assert torch.equal(found.run(model), model(**NAMED))
    assert len(Batches(batch, "here")) == 1
    assert len(outputs_of(batch)) == 2


def test_a_list_of_mappings_is_stacked() -> None:
    rows = [Encoding({"input1": ROW[index], "input2": ROW[index] + 1}) for index in range(2)]
    loader = DataLoader(rows, batch_size=2, collate_fn=list)  # type: ignore[arg-type]
    (batch,) = Batches(loader, "here")
    model = nn.Bilinear(3, 3, 2)
    assert torch.equal(batch.run(model), model(**NAMED))
    (batch,) = Batches([[NAMED, {"boxes": ROW}]], "here")  # other keys: the labels of a detection network
    assert torch.equal(batch.run(model), model(**NAMED))


def test_an_input_and_its_labels_are_one_batch() -> None:
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    batches = Batches([images, labels], "here")
    assert len(batches) == 1
    (batch,) = batches
    assert len(batch.arguments) == 1 and torch.equal(batch.arguments[0], images)
    for two in ([images, images[:2]], [labels, labels], [ROW, ROW[0]], [images, labels[:3]]):
        assert len(Batches(two, "here")) == len(list(Batches(two, "here"))) == 2


def test_an_entry_of_the_inputs_shape_is_not_dropped_without_a_word() -> None:
    tokens = torch.arange(6).reshape(2, 3)
    with pytest.warns(UserWarning, match=r"here: batch 0 is a list: only its first entry .* same shape \[2, 3\]"):
        list(Batches(DataLoader(TensorDataset(tokens, torch.ones_like(tokens)), batch_size=2), "here"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(Batches([[tokens, torch.tensor([0, 1])], [ROW[:, :1], ROW[:, 0]], [ROW, "name"]], "here"))


def test_tokens_and_a_mask_in_a_list_are_two_batches_with_a_warning() -> None:
    tokens = torch.arange(6).reshape(2, 3)
    for mask in (torch.ones_like(tokens), tokens > 3):
        with pytest.warns(UserWarning, match=r"here is a list of two tensors.*Give a tuple \(tokens, mask\)"):
            assert len(list(Batches([tokens, mask], "here"))) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in ([tokens, tokens + 1], [tokens % 2, tokens % 2], [ROW, torch.ones_like(ROW)], (tokens, tokens > 3)):
            list(Batches(data, "here"))


@pytest.mark.parametrize(
    "call",
    [
        lambda model, data: factorize_(model, rank=2, calibration=data, progress=False),
        lambda model, data: fold_batchnorm_(model, data),
        lambda model, data: distill_(copy.deepcopy(model), model, data, steps=5, layer_weight=0, progress=False),
    ],
    ids=["factorize_", "fold_batchnorm_", "distill_"],
)
def test_it_is_said_once_a_call(call: Callable[[nn.Module, object], object]) -> None:
    """However often the data are run over, and however many batches they have."""
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)).eval()
    data = [[torch.randn(40, 16), torch.ones(40, 16)] for _ in range(3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(model, data)
    assert sum("only its first entry" in str(warning.message) for warning in caught) == 1


def test_arguments_in_lists_and_inside_of_arguments() -> None:
    (batch,) = Batches([[[ROW, ROW + 1], torch.tensor([0, 1])]], "here")  # of a dataset of ((a, b), label)
    model = nn.Bilinear(3, 3, 2)
    assert torch.equal(batch.run(model), model(ROW, ROW + 1))
    pair = namedtuple("pair", "a b")(ROW, [ROW, {"deep": SimpleNamespace(x=ROW)}])
    (batch,) = Batches((pair,), "here", torch.device("cpu"))
    assert len(batch.tensors()) == 3
    assert isinstance(batch.arguments[0], type(pair))


def test_a_model_that_takes_other_arguments() -> None:
    model = nn.Linear(3, 2)
    (batch,) = Batches(ROW.split(1), "here")  # a tuple of batches
    with pytest.raises(TypeError, match=r"takes 2 positional .* here 2; several batches are a list"):
        batch.run(model)
    (batch,) = Batches({"input": ROW, "labels": ROW}, "here")
    with pytest.raises(TypeError, match=r"unexpected keyword .* arguments by name, here input, labels"):
        batch.run(model)

    class Broken(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return len(3)  # type: ignore[arg-type]

    (batch,) = Batches((ROW,), "here")
    with pytest.raises(TypeError, match=r"^object of type 'int' has no len\(\)$"):
        batch.run(Broken())


def test_runs_leave_the_data_as_they_are() -> None:
    """Inputs written in place, and caches that grow, start anew in each run."""

    class Writes(nn.Module):
        def forward(self, input: Tensor, cache: list[Tensor], state: SimpleNamespace) -> Tensor:
            assert not cache and state.length == 0
            cache.append(input.add_(1))
            state.length += 1
            state.keys.mul_(2)
            return input.relu_()

    data = {"input": ROW.clone(), "cache": [], "state": SimpleNamespace(length=0, keys=ROW.clone())}
    (batch,) = Batches([data], "here")
    for track in (False, True, False):
        output = batch.run(Writes(), track)
        assert output.requires_grad == track
        assert torch.equal(output, ROW + 1)
    assert torch.equal(data["input"], ROW) and data["cache"] == []
    assert torch.equal(data["state"].keys, ROW) and data["state"].length == 0
    with torch.inference_mode():
        frozen = ROW + 0
    (batch,) = Batches((frozen, [], SimpleNamespace(length=0, keys=frozen)), "here")
    assert batch.run(Writes(), True).requires_grad


def test_what_cannot_be_copied_is_passed_as_it_is() -> None:
    lock = threading.Lock()

    class Takes(nn.Module):
        def forward(self, input: Tensor, lock: object) -> object:
            return lock

    (batch,) = Batches((ROW, lock), "here", torch.device("cpu"))
    assert batch.run(Takes()) is lock


@pytest.mark.parametrize("own", [False, True])
def test_shuffled_loaders_repeat_their_order_and_random_states_stay(own: bool) -> None:
    generator = torch.Generator().manual_seed(5) if own else None
    loader = DataLoader(TensorDataset(torch.arange(20.0)[:, None]), batch_size=4, shuffle=True, generator=generator)
    batches = Batches(loader, "here")
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    own_state = None if generator is None else generator.get_state()
    orders = []
    for _ in range(2):
        with batches.same_order():
            orders.append(torch.cat([batch.arguments[0] for batch in batches]))
    assert torch.equal(orders[0], orders[1]) and len(orders[0].unique()) == 20
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[union-attr]
    assert generator is None or torch.equal(generator.get_state(), own_state)  # type: ignore[arg-type]


def test_a_dataset_is_no_loader() -> None:
    class Rows(Dataset):  # type: ignore[type-arg]
        def __getitem__(self, index: int) -> Tensor:
            return ROW[index]

    with pytest.raises(TypeError, match=r"got Rows: give torch.utils.data.DataLoader\(dataset, batch_size=32\)"):
        Batches(Rows(), "here")


def test_outputs_and_devices() -> None:
    assert len(outputs_of(SimpleNamespace(logits=ROW, extra=[ROW], name="x"))) == 2
    assert outputs_of({"a": ROW, "b": [ROW, (ROW, torch.arange(3))], "c": None}) == [ROW, ROW, ROW]
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu")
    assert device_of(nn.ReLU()) is None
