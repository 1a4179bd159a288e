"""Data that a model is run on: what `calibration=` and the loaders of `distill_` may be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 32  # of a tensor that is cut into batches


@dataclass(frozen=True)
class Batch:
    """One call of a model: its positional and keyword arguments."""

    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module) -> Any:
        """`model(...)` on this batch."""
        return model(*self.arguments, **self.keywords)

    def tensors(self) -> list[Tensor]:
        """The floating-point tensors among the arguments."""
        values = (*self.arguments, *self.keywords.values())
        return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


class Batches:
    """Data as batches; iterable any number of times.

    Args:
        data: one of

            * a tensor `[rows, ...]`: batches of at most 32 rows;
            * a tuple of positional or a dict of keyword arguments: one batch, as with `example_input`;
            * an iterable that starts anew each time (a list, a DataLoader), each item a batch: a tensor, a tuple of
              positional arguments, a dict of keyword arguments, or a list, of which the first entry is the input and
              the rest (labels: PyTorch's DataLoader makes such lists of its samples) is not used.
        where: the argument's name, for errors ("factorize_: calibration").
        device: where the tensors go; None leaves them where they are.

    Raises:
        TypeError: data of another kind, an iterator that can be read only once.
        ValueError: when iterated: no batch at all, values that are not finite.
    """

    def __init__(self, data: Any, where: str, device: torch.device | None = None) -> None:
        if isinstance(data, Iterator) or not isinstance(data, (Tensor, Iterable)) or isinstance(data, (str, bytes)):
            again = " that can be read only once" if isinstance(data, Iterator) else ""
            raise TypeError(
                f"{where} must be a tensor, a tuple or dict of the model's arguments, or a list or DataLoader of "
                f"batches, got {type(data).__name__}{again}"
            )
        self._data, self._where, self._device = data, where, device

    def __iter__(self) -> Iterator[Batch]:
        index = -1
        for index, item in enumerate(self._items()):
            yield self._batch(item, index)
        if index < 0:
            raise ValueError(f"{self._where} has no batch")

    def __len__(self) -> int:
        """How many batches there are. Raises TypeError for data without a length."""
        if isinstance(self._data, Tensor):
            return -(-len(self._data) // ROWS)
        return 1 if isinstance(self._data, (tuple, dict)) else len(self._data)  # type: ignore[arg-type]

    def _items(self) -> Iterable[Any]:
        if isinstance(self._data, Tensor):
            return self._data.split(ROWS) if self._data.dim() and len(self._data) else []
        return [self._data] if isinstance(self._data, (tuple, dict)) else self._data

    def _batch(self, item: Any, index: int) -> Batch:
        if isinstance(item, list):
            if not item:
                raise ValueError(f"{self._where}: batch {index} is an empty list")
            item = item[0]
        if not isinstance(item, (Tensor, tuple, dict)):
            raise TypeError(
                f"{self._where}: batch {index} must be a tensor, a tuple, a dict or a list whose first entry is the "
                f"input, got {type(item).__name__}"
            )
        if isinstance(item, dict):
            batch = Batch(keywords={name: self._moved(value) for name, value in item.items()})
        else:
            batch = Batch(tuple(map(self._moved, item if isinstance(item, tuple) else (item,))))
        for tensor in batch.tensors():
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            if bad:
                raise ValueError(
                    f"{self._where}: batch {index} holds {bad} NaN or infinite of {tensor.numel()} values; "
                    "leave such samples out"
                )
        return batch

    def _moved(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, Tensor) and self._device is not None else value


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the model's parameters; None if it has none or they lie on several."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def outputs_of(value: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returned: a tensor, or tuples, lists and dicts of them."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for entry in value for tensor in outputs_of(entry)]
    return []
