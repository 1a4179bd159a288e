"""Data to run a model on: `calibration=`, the loaders of `distill_`, and example inputs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from lowrank_ops.model.state import own_random_numbers
from lowrank_ops.runtime.nested import values_of
from lowrank_ops.text.warn import warn

ROWS = 32  # per batch, where data are one tensor


@dataclass(frozen=True)
class Batch:
    """One call of a model: its positional and keyword arguments."""

    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module, track: bool = False) -> Any:
        """`model(...)` on a copy of this batch, so that the next run finds it as it is, even if the model changes its
        arguments (a cache, an input in place). `track`: floating-point tensors of the copy require gradients."""

        def fresh(tensor: Tensor) -> Tensor:
            if track and tensor.is_floating_point():
                with torch.inference_mode(False):
                    source = tensor.clone() if tensor.is_inference() else tensor
                return source.detach().requires_grad_().clone()
            return tensor.detach().clone()

        arguments, keywords = with_tensors(self.arguments, fresh), with_tensors(dict(self.keywords), fresh)
        try:
            return model(*arguments, **keywords)
        except TypeError as error:
            try:
                inspect.signature(model.forward).bind(*arguments, **keywords)
            except TypeError:
                raise TypeError(f"{error}. {self._given()}") from error
            except ValueError:  # forward has no signature
                pass
            raise

    def _given(self) -> str:
        """The part of the message for a model that does not take these arguments."""
        if self.keywords:
            return f"A mapping holds the model's arguments by name, here {', '.join(self.keywords)}"
        return (
            f"A tuple holds the model's positional arguments, here {len(self.arguments)}; several batches are a list, "
            "an input with labels is a list [input, labels]"
        )

    def tensors(self) -> list[Tensor]:
        """The floating-point tensors among the arguments and inside of them."""
        return [tensor for tensor in tensors_in((self.arguments, self.keywords)) if tensor.is_floating_point()]


class Batches:
    """Data as batches, which can be iterated over any number of times.

    Args:
        data: one of

            * a tensor `[rows, ...]`: batches of at most 32 rows;
            * one batch, as below, unless it is a list;
            * an iterable that starts anew each time (a list, a DataLoader), whose items are batches. An exception is a
              list of an input and its labels (a floating-point tensor `[rows, ...]` and integers `[rows]`), which is
              one batch. A list of tokens and their mask is two batches, with a warning; `(tokens, mask)` is one.

            A batch is

            * a tensor: the model's only argument;
            * a tuple: its positional arguments, of any kind: `(images,)` passes a list `images` whole;
            * a mapping (dict, OrderedDict, UserDict, transformers' BatchEncoding and ModelOutput) or a dataclass
              object: its keyword arguments, by their names;
            * a list: the first entry is the input, as above (a list there holds positional arguments); the other
              entries are not used (PyTorch's DataLoader makes such lists of inputs and labels). There is one warning if
              another entry has the shape of the input, as a mask has;
            * a list of several mappings with the same keys: samples, which torch.utils.data.default_collate stacks.
        where: the argument's name, for errors ("factorize_: calibration").
        device: where the tensors go; None leaves them where they are.

    Raises:
        TypeError: data of another kind, or an iterator that can be read only once.
        ValueError: while iterating: no batch at all, values that are NaN or infinite (except minus infinity, which is
            in masks) or on the meta device, mappings that do not stack.
    """

    def __init__(self, data: Any, where: str, device: torch.device | None = None) -> None:
        self._data, self._where, self._device = data, where, device
        self._warned = False
        if _are_tokens_and_mask(data):
            warn(
                f"{where} is a list of two tensors, which are two batches, though the second looks like a mask of the "
                "first. Give a tuple (tokens, mask), or a mapping, if they are the model's arguments"
            )
        if _is_batch(data):
            return
        if isinstance(data, Iterator) or not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
            raise TypeError(
                f"{where} must be a tensor, a tuple or mapping of the model's arguments, or a list or DataLoader of "
                f"batches, got {type(data).__name__}{_advice(data)}"
            )

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
        return 1 if self._is_one() else len(self._data)  # type: ignore[arg-type]

    @contextmanager
    def same_order(self) -> Iterator[None]:
        """Within it a DataLoader that shuffles gives its batches in the same order as within every other such context.
        Its generator and the global generators are as before afterwards."""
        holders = (self._data, getattr(self._data, "sampler", None))
        generators = [getattr(holder, "generator", None) for holder in holders]
        states = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]
        with own_random_numbers():
            try:
                yield
            finally:
                for generator, state in states:
                    generator.set_state(state)

    def _is_one(self) -> bool:
        return _is_batch(self._data) or _are_input_and_labels(self._data)

    def _items(self) -> Iterable[Any]:
        if isinstance(self._data, Tensor):
            return self._data.split(ROWS) if self._data.dim() and len(self._data) else []
        return [self._data] if self._is_one() else self._data

    def _batch(self, item: Any, index: int) -> Batch:
        place = f"{self._where}: batch {index}"
        arguments = self._arguments(item, place)
        for key in arguments if isinstance(arguments, dict) else ():
            if not isinstance(key, str):
                raise TypeError(f"{place}: the keys of a mapping must be names of the model's arguments, got {key!r}")
        for tensor in tensors_in(arguments):
            if tensor.is_meta and tensor.is_floating_point():
                raise ValueError(f"{place} is on the meta device, which has no values; give real data")
            # Attention masks hold minus infinity. If it reaches a layer, that raises an error later.
            bad = int((tensor.isnan() | (tensor == math.inf)).sum()) if tensor.is_floating_point() else 0
            if bad:
                raise ValueError(
                    f"{place} holds {bad} NaN or infinite of {tensor.numel()} values; leave such samples out"
                )
        if self._device is not None:
            arguments = with_tensors(arguments, lambda tensor: tensor.to(self._device))
        return Batch(keywords=arguments) if isinstance(arguments, dict) else Batch(arguments)

    def _arguments(self, item: Any, place: str) -> tuple[Any, ...] | dict[str, Any]:
        """The positional or keyword arguments that an item stands for."""
        if isinstance(item, list):
            item = self._input_of(item, place)
        if isinstance(item, Mapping):
            return dict(item)
        if _is_batch(item):
            if isinstance(item, (Tensor, tuple)):
                return item if isinstance(item, tuple) else (item,)
            return {entry.name: getattr(item, entry.name) for entry in dataclasses.fields(item)}
        raise TypeError(
            f"{place} must be a tensor, a tuple, a mapping, a dataclass object or a list whose first entry is the "
            f"input, got {type(item).__name__}{_advice(item)}"
        )

    def _input_of(self, item: list[Any], place: str) -> Any:
        """The input in a batch that is a list."""
        if not item:
            raise ValueError(f"{place} is an empty list")
        first, *rest = item
        if rest and isinstance(first, Mapping) and all(_same_keys(first, entry) for entry in rest):
            try:
                return default_collate([dict(entry) for entry in item])
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"{place} is a list of {len(item)} mappings with the same keys, which must stack to one batch: "
                    f"{error}. Pad them, or give a mapping of stacked tensors for each batch"
                ) from error
        shapes = [entry.shape for entry in rest if isinstance(entry, Tensor)]
        if not self._warned and isinstance(first, Tensor) and first.dim() > 1 and first.shape in shapes:
            self._warned = True
            warn(
                f"{place} is a list: only its first entry is given to the model, though another one has the same shape "
                f"{list(first.shape)}. Give a tuple or a mapping if it is an argument, the input alone if it is not",
            )
        return tuple(first) if isinstance(first, list) else first


def _same_keys(first: Mapping[Any, Any], other: Any) -> bool:
    return isinstance(other, Mapping) and other.keys() == first.keys()


def _is_batch(value: Any) -> bool:
    """Whether the type of a value shows that it is one batch."""
    if isinstance(value, (Tensor, tuple, Mapping)):
        return True
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, nn.Module, Dataset))


def _are_input_and_labels(value: Any) -> bool:
    """Whether a value is a list of an input and its labels, which is one batch."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(entry, Tensor) for entry in value):
        return False
    input, labels = value
    integers = not labels.is_floating_point() and not labels.is_complex()
    return input.dim() > 1 and input.is_floating_point() and integers and labels.shape == input.shape[:1]


def _are_tokens_and_mask(value: Any) -> bool:
    """Whether a value is a list of integers, and of zeros and ones of the same shape."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(entry, Tensor) for entry in value):
        return False
    tokens, mask = value
    if tokens.shape != mask.shape or any(entry.is_floating_point() or entry.is_complex() for entry in value):
        return False
    return not _is_mask(tokens) and _is_mask(mask)


def _is_mask(value: Tensor) -> bool:
    return value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all())


def _advice(value: Any) -> str:
    """The end of a message about a value of the wrong kind: what to give instead."""
    if isinstance(value, Iterator):
        return " that can be read only once: give a list of it"
    if isinstance(value, Dataset):
        return ": give torch.utils.data.DataLoader(dataset, batch_size=32)"
    if hasattr(value, "__array__"):
        return ": give tensors, by torch.as_tensor"
    if hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        return ": if the model takes such an object whole, give a tuple (object,); else a dict of its arguments"
    return ""


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value: in entries of tuples, lists, sets and mappings, in attributes of other objects."""
    found: list[Tensor] = []
    seen: set[int] = set()
    pending = [value]
    while pending:
        entry = pending.pop()
        if isinstance(entry, Tensor):
            found.append(entry)
        elif id(entry) not in seen:
            seen.add(id(entry))
            pending += _parts(entry)[::-1]
    return found


def _parts(value: Any) -> list[Any]:
    """The values that a value is made of."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list, set, frozenset)):
        return list(value)
    if isinstance(value, (nn.Module, type)) or callable(value):
        return []
    return list(getattr(value, "__dict__", {}).values())


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A deep copy of a value in which `change(tensor)` replaces each tensor. An object that cannot be copied (an open
    file) is shared with the copy."""
    memo: dict[int, Any] = {id(tensor): change(tensor) for tensor in tensors_in(value)}

    def copied(entry: Any) -> Any:
        try:
            return copy.deepcopy(entry, memo)
        except Exception:
            return entry

    if isinstance(value, dict):
        return {name: copied(entry) for name, entry in value.items()}
    return tuple(map(copied, value))


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the model's parameters; None if it has none or they lie on several."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def outputs_of(value: Any) -> list[Tensor]:
    """The floating-point tensors in the value that a model returned: a tensor, or tuples, lists, mappings and objects
    with tensors. Instead of a jagged nested tensor there are its values."""
    return [values_of(tensor) for tensor in tensors_in(value) if tensor.is_floating_point()]
