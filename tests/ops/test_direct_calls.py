"""Eager calls skip torch.ops and go to the dispatcher; whatever traces or overrides calls still sees torch.ops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import lowrank_ops
from lowrank_ops import _C
from lowrank_ops.ops import functional
from lowrank_ops.ops.extension import ops_for
from tests.support.problems import OPS, Problem

CONVS = ("tucker_conv2d", "cp_conv2d")


class Fresh(tuple):
    """A tuple whose items are made by __getitem__ at each access: ones."""

    def __getitem__(self, place: Any) -> Any:
        return int("1")


def make(op: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    call = Problem(op, padding=(1, 1)).make() if op in CONVS else Problem(op).make()
    return getattr(lowrank_ops, op), tuple(call.tensors.values())


def test_eager_calls_go_straight_to_the_dispatcher() -> None:
    assert ops_for(torch.zeros(1), None) is _C


@pytest.mark.parametrize("op", OPS)
def test_both_ways_compute_the_same_bits(op: str) -> None:
    function, tensors = make(op)
    window = ([1, 1], [1, 1], [1, 1]) if op in CONVS else ()
    wanted = getattr(torch.ops.lowrank_ops, op)(*tensors, *window, "gelu")
    options: dict[str, Any] = {"padding": 1} if op in CONVS else {}
    assert torch.equal(function(*tensors, **options, activation="gelu"), wanted)


@pytest.mark.parametrize(
    "padding", [1, (1, 1), [1, 1], np.int64(1), (np.int32(1), True), np.array([1, 1]), Fresh((0, 0))], ids=str
)
@pytest.mark.parametrize("op", CONVS)
def test_windows_are_ints_or_pairs(op: str, padding: Any) -> None:
    function, tensors = make(op)
    assert torch.equal(function(*tensors, padding=padding), function(*tensors, padding=(1, 1)))


@pytest.mark.parametrize("padding", [(1, 1, 1), (), [1]], ids=str)
@pytest.mark.parametrize("op", CONVS)
def test_windows_of_another_length_are_refused_by_name(op: str, padding: Any) -> None:
    function, tensors = make(op)
    with pytest.raises(ValueError, match=f"{op}: padding must "):
        function(*tensors, padding=padding)


@pytest.mark.parametrize("padding", [1.5, "1", (1, 0.5), None, 2**70], ids=str)
def test_other_windows_are_type_errors(padding: Any) -> None:
    function, tensors = make("cp_conv2d")
    with pytest.raises(TypeError, match="cp_conv2d"):
        function(*tensors, padding=padding)


KINDS: dict[str, tuple[str, Any, str]] = {
    "a word for the padding": ("padding", "same", "an int or a pair of ints, got 'same'"),
    "half a stride": ("stride", 1.5, "an int or a pair of ints, got 1.5"),
    "half a dilation": ("dilation", (1, 0.5), "an int or a pair of ints, got tuple"),
    "no activation": ("activation", None, "a str, got None"),
    "a number for the bias": ("bias", 3, "a torch.Tensor or None, got int"),
    "an array": ("input", np.ones((1, 3, 4, 4)), "a torch.Tensor, got ndarray"),
    "no factor": ("out_factor", None, "a torch.Tensor, got None"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_arguments_of_another_kind_are_refused_by_name(op: str, kind: str) -> None:
    name, value, wanted = KINDS[kind]
    if op not in CONVS and name in ("padding", "stride", "dilation"):
        pytest.skip("no argument of this op")
    call = Problem(op).make()
    with pytest.raises(TypeError) as raised:
        getattr(lowrank_ops, op)(**{**call.tensors, name: value})
    assert str(raised.value) == f"{op}: {name} must be {wanted}"


@pytest.mark.parametrize("op", OPS)
def test_tracing_records_the_op(op: str) -> None:
    function, tensors = make(op)
    traced = torch.jit.trace(lambda *given: function(*given), tensors)
    assert f"lowrank_ops::{op}" in str(traced.graph)


class Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Logged(Tensor):
    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("op", OPS)
def test_modes_and_subclasses_see_the_call(op: str) -> None:
    function, tensors = make(op)
    with Recorder() as recorder:
        wanted = function(*tensors)
    assert any(op in name for name in recorder.seen)

    Logged.seen.clear()
    found = function(tensors[0].as_subclass(Logged), *tensors[1:])
    assert any(op in name for name in Logged.seen)
    assert isinstance(found, Logged) and torch.equal(found.as_subclass(Tensor), wanted)


class Noted:
    """Ops whose names are noted when they are called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        self.called.append(op)
        return getattr(_C, op)


@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
def test_modules_call_the_ops_by_the_same_function(monkeypatch: pytest.MonkeyPatch, prepared: bool) -> None:
    noted = Noted()
    monkeypatch.setattr(functional, "ops_for", lambda *tensors: noted)
    calls: list[tuple[torch.nn.Module, tuple[int, ...], str]] = [
        (lowrank_ops.TuckerConv2d(4, 5, 3, 2), (1, 4, 5, 5), "tucker_conv2d"),
        (lowrank_ops.TuckerConv1d(4, 5, 3, 2), (1, 4, 5), "tucker_conv2d"),
        (lowrank_ops.CPConv2d(4, 5, 3, 2), (1, 4, 5, 5), "cp_conv2d"),
        (lowrank_ops.CPConv1d(4, 5, 3, 2), (1, 4, 5), "cp_conv2d"),
        (lowrank_ops.LowRankLinear(4, 5, 2), (3, 4), "lowrank_linear"),
    ]
    with torch.no_grad():
        for module, shape, op in calls:
            module.eval()
            if prepared:
                lowrank_ops.prepare_for_inference_(module)
            module(torch.ones(shape))
            assert noted.called.pop() == (f"{op}_prepared" if prepared else op)
    assert not noted.called


def test_other_threads_run_meanwhile() -> None:
    """The interpreter's lock is released during a call."""
    started, ticks = threading.Event(), [0]
    stop = threading.Event()

    def count() -> None:
        started.set()
        while not stop.is_set():
            ticks[0] += 1

    factors = torch.randn(64, 64), torch.randn(64, 64, 3, 3), torch.randn(64, 64)
    image = torch.randn(4, 64, 128, 128)
    thread = threading.Thread(target=count)
    thread.start()
    started.wait()
    before = ticks[0]
    lowrank_ops.tucker_conv2d(image, *factors, padding=1)
    during = ticks[0] - before
    stop.set()
    thread.join()
    assert during > 0
