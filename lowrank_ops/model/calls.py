"""How a model calls its layers on an example input, and the time that those calls take."""

from __future__ import annotations

import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ops.model.batches import Batch
from lowrank_ops.model.state import in_inference_mode
from lowrank_ops.model.weight_reads import ReadProducts, WeightReads
from lowrank_ops.runtime.modes import eval_mode, no_nested_tensors, synchronize
from lowrank_ops.runtime.nested import values_of

_SECONDS_PER_SHAPE = 0.2
_ROUNDS = (5, 50)  # at least, at most


@dataclass(frozen=True)
class InputKind:
    """What decides how long a call takes: all of the input but its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    @classmethod
    def of(cls, tensor: Tensor) -> InputKind:
        channels_last = (
            tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
        )
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device, channels_last)

    def random(self) -> Tensor:
        """An input of this kind, drawn without touching the global random state."""
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(self.shape, generator=generator).to(self.device, self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values


@dataclass
class LayerCalls:
    """The calls of one layer during a run of the model: inputs by kind, and the first output's shape; and what the
    model computed with its weight besides: multiply-accumulates, in so many operations, or unknown ones."""

    inputs: Counter[InputKind] = field(default_factory=Counter)
    output_size: tuple[int, ...] | None = None
    read_macs: int = 0
    reads: int = 0
    unknown_reads: bool = False
    nested: bool = False  # it was called with a strided nested tensor, which has no shape to count or time

    def total(self, count: Callable[[tuple[int, ...]], int | None]) -> int | None:
        """Sum over all calls; None if one is not known, 0 for a layer that was not called."""
        parts = [(count(kind.shape), calls) for kind, calls in self.inputs.items()]
        if any(part is None for part, _ in parts):
            return None
        return sum(part * calls for part, calls in parts if part is not None)


class Calls:
    """The calls of several layers, the reads of their weights, and what the model multiplies outside of them."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.reads = WeightReads(model, layers)
        self.macs_elsewhere = 0
        self._layers = list(layers)
        self._by_id = {id(layer): LayerCalls() for layer in layers}

    def layers(self) -> list[nn.Module]:
        """All of them."""
        return self._layers

    def of(self, layer: nn.Module) -> LayerCalls:
        """The calls of one of the layers."""
        return self._by_id[id(layer)]


class CalledLayers:
    """Watches which of some layers are called while it is entered: of layers that have left the model those that it
    holds elsewhere.

    Attributes:
        called: their ids.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.called: set[int] = set()
        self._handles = [layer.register_forward_pre_hook(lambda each, _: self.called.add(id(each))) for layer in layers]

    def __enter__(self) -> CalledLayers:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def run_example(model: nn.Module, example_input: Any) -> None:
    """Runs the model on a copy of a tensor, of a tuple or list of arguments or of a mapping of keyword arguments;
    without gradients and in eval mode, so that no statistics move. The training flags of all modules are restored."""
    if isinstance(example_input, Mapping):
        batch = Batch(keywords=example_input)
    else:
        batch = Batch(tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,))
    with eval_mode(model), torch.inference_mode(in_inference_mode(model)), torch.no_grad():
        batch.run(model)


@contextmanager
def model_errors(subject: str, model: nn.Module, data: str, hint: str = "") -> Iterator[None]:
    """Makes an error inside a run of the model a RuntimeError that names the layer in which it happened.

    Args:
        subject: whose model it is, the beginning of the message ("factorize_: the model").
        model: what is run in the context. ValueErrors that are not raised inside of it pass through as they are: they
            are about the data.
        data: what it is run on, for the message.
        hint: the end of the message.
    """
    try:
        yield
    except Exception as error:
        name = _failing_module(model, error)
        if name is None and isinstance(error, ValueError):
            raise
        where = f"in {name}, run on {data}" if name else f"on {data}"
        message = f"{subject} fails {where}: {type(error).__name__}: {error}"
        raise RuntimeError(f"{message}. {hint}" if hint else message) from error


def _failing_module(model: nn.Module, error: Exception) -> str | None:
    """The innermost module of the model in whose methods the error was raised; "" for the model itself, None where it
    was raised in none."""
    known = {id(module): (name, module) for name, module in model.named_modules()}
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [known[id(module)] for module in frames if id(module) in known]
    if not found:
        return None
    name, module = found[-1]
    return f"{name} ({type(module).__name__})" if name else ""


def recorded_calls(model: nn.Module, example_input: Any, layers: Sequence[nn.Module]) -> Calls:
    """Runs the model and records how it calls the layers, which see padded sequences as ordinary tensors.

    Raises RuntimeError if the model fails.
    """
    calls = Calls(model, layers)

    def record(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        tensor = args[0] if args else kwargs.get("input")
        if isinstance(tensor, Tensor) and isinstance(output, Tensor):
            tensor, output = values_of(tensor), values_of(output)
            seen = calls.of(layer)
            if tensor.is_nested:
                seen.nested = True
                return
            seen.inputs[InputKind.of(tensor)] += 1
            seen.output_size = seen.output_size or tuple(output.shape)

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        errors = model_errors("factorize_: the model", model, "example_input")
        with errors, no_nested_tensors(), calls.reads, ReadProducts(calls.reads, layers) as products:
            run_example(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    calls.macs_elsewhere = products.elsewhere
    for layer in layers:
        seen = calls.of(layer)
        seen.read_macs, seen.reads = products.macs[id(layer)], products.uses[id(layer)]
        seen.unknown_reads = id(layer) in calls.reads.read and not seen.reads and not seen.inputs
    return calls


def compare_times(before: nn.Module, after: nn.Module, calls: LayerCalls) -> tuple[float, float] | None:
    """Milliseconds of the recorded calls through either module: medians of interleaved runs, without hooks.

    None if there were no calls.
    """
    if not calls.inputs:
        return None
    first, second = times([before, after], before.weight.dtype, calls)  # type: ignore[arg-type]
    return first, second


def times(
    modules: Sequence[nn.Module],
    dtype: torch.dtype,
    calls: LayerCalls,
    seconds: float = _SECONDS_PER_SHAPE,
    typical: Callable[[Sequence[float]], float] = statistics.median,
) -> list[float]:
    """Milliseconds of the recorded calls through each module: typical ones of interleaved runs, without hooks.

    Under autocast a layer may see another dtype than its own: the inputs have `dtype`. Each kind of input takes about
    `seconds`, or five rounds.
    """
    totals = [0.0] * len(modules)
    with torch.no_grad():
        for kind, count in calls.inputs.items():
            input = kind.random().to(dtype)
            measured: list[list[float]] = [[] for _ in modules]
            for module in modules:
                _seconds(module, input)
            started = time.perf_counter()
            while len(measured[0]) < _ROUNDS[0] or (
                len(measured[0]) < _ROUNDS[1] and time.perf_counter() - started < seconds
            ):
                for module, samples in zip(modules, measured, strict=True):
                    samples.append(_seconds(module, input))
            for index, samples in enumerate(measured):
                totals[index] += 1e3 * count * typical(samples)
    return totals


def _seconds(module: nn.Module, input: Tensor) -> float:
    started = time.perf_counter()
    module.forward(input)
    synchronize(input.device)
    return time.perf_counter() - started
