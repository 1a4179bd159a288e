"""How a model calls its layers in a run: on which inputs, how often, and in which layer the run fails."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowrank_ops.model.weight_reads import ReadProducts, WeightReads


@dataclass(frozen=True)
class InputKind:
    """Everything about an input that decides how long a call takes; its values are left out."""

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
    """The calls of one layer during a run of the model, and the operations that the model itself computed with the
    layer's weight ("reads").

    Attributes:
        inputs: how often the layer was called with each kind of input.
        output_size: shape of the output of its first call.
        reads, read_macs: how many reads torch can count, and their multiply-accumulates.
        unknown_reads: whether the weight was read in a way that torch does not count.
        nested: whether it was called with a strided nested tensor, which has no shape to count or to time by.
    """

    inputs: Counter[InputKind] = field(default_factory=Counter)
    output_size: tuple[int, ...] | None = None
    read_macs: int = 0
    reads: int = 0
    unknown_reads: bool = False
    nested: bool = False

    def total(self, count: Callable[[tuple[int, ...]], int | None]) -> int | None:
        """Sum over all calls; None if one is not known, 0 for a layer that was not called."""
        parts = [(count(kind.shape), calls) for kind, calls in self.inputs.items()]
        if any(part is None for part, _ in parts):
            return None
        return sum(part * calls for part, calls in parts if part is not None)


class Calls:
    """What is recorded in one run of a model.

    Attributes:
        reads: watches which layers are called, and whose weights the model reads itself.
        macs_elsewhere: multiply-accumulates neither in a layer's call nor with a layer's weight.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.reads = WeightReads(model, layers)
        self.macs_elsewhere = 0
        self._layers = list(layers)
        self._by_id = {id(layer): LayerCalls() for layer in layers}

    def layers(self) -> list[nn.Module]:
        """The layers that were watched."""
        return self._layers

    def of(self, layer: nn.Module) -> LayerCalls:
        """The calls of one of the layers."""
        return self._by_id[id(layer)]

    def add_products(self, products: ReadProducts) -> None:
        """Adds the multiplications that were counted in the run."""
        self.macs_elsewhere = products.elsewhere
        for layer in self._layers:
            seen = self.of(layer)
            seen.read_macs, seen.reads = products.macs[id(layer)], products.uses[id(layer)]
            seen.unknown_reads = id(layer) in self.reads.read and not seen.reads and not seen.inputs


class CalledLayers:
    """Watches, while it is entered, which of some layers are called. Layers that were replaced are called only where
    the model holds them outside of its modules.

    Attributes:
        called: ids of the layers that were called.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.called: set[int] = set()
        self._handles = [layer.register_forward_pre_hook(lambda each, _: self.called.add(id(each))) for layer in layers]

    def __enter__(self) -> CalledLayers:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def model_errors(subject: str, model: nn.Module, data: str, hint: str = "") -> Iterator[None]:
    """Turns an error inside a run of the model into a RuntimeError that names the layer in which it happened.

    Args:
        subject: the beginning of the message ("factorize_: the model").
        model: the model that runs within the context. ValueErrors that are raised outside of its modules pass through
            as they are: they are about the data.
        data: the name of the data that it runs on, for the message ("example_input").
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
    """The innermost module of the model in whose methods the error was raised: "" for the model itself, None if the
    error was raised outside of the model."""
    known = {id(module): (name, module) for name, module in model.named_modules()}
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [known[id(module)] for module in frames if id(module) in known]
    if not found:
        return None
    name, module = found[-1]
    return f"{name} ({type(module).__name__})" if name else ""
