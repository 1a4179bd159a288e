"""`weight` of a factorized module: a tensor whose values are multiplied out when an operation asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from lowrank_ops.runtime.metadata import DEVICE, METADATA
from lowrank_ops.runtime.torch_internals import (
    has_storage,
    is_torch_function_enabled,
    make_wrapper_subclass,
    shares_memory,
    tree_map_only,
    without_torch_function,
)

# What gives the address of a tensor that is freed at once, or waits for a gradient that never comes.
_REFUSED = ("data_ptr", "register_hook", "register_post_accumulate_grad_hook", "retain_grad")


class DenseWeight(Tensor):
    """The dense weight that a factorized module stands for, as a read-only tensor without values of its own.

    Shape, dtype and device are at hand. Any other operation multiplies the factors, as they are then, and works on
    the product, with gradients for the factors. What shares memory with a product (`data`, `detach()`, `view`, a
    slice) is read-only too; all other results are ordinary tensors.

    A change in place, which would change a product that nothing reads, is a RuntimeError that says what to do. So is
    what does not know of `__torch_function__`: operations called from C++, and gradients that a custom
    `torch.autograd.Function` gives. `clone()` is an ordinary tensor for all of these.
    """

    _owner: str
    _like: Tensor
    _values: Callable[[], Tensor]

    def __new__(
        cls, owner: str, shape: Iterable[int], like: Tensor, requires_grad: bool, values: Callable[[], Tensor]
    ) -> DenseWeight:
        """A tensor of this shape, with the dtype and device of `like`, whose values are `values()`; `owner` is for
        errors."""
        # On the meta device: `other.data = weight` asks no __torch_function__, and is an error so.
        device = torch.device("meta")
        weight: DenseWeight = make_wrapper_subclass(
            cls, tuple(shape), dtype=like.dtype, device=device, requires_grad=requires_grad
        )
        weight.__dict__.update(_owner=owner, _like=like, _values=values)
        if requires_grad:
            with without_torch_function():
                weight.register_hook(lambda gradient: _refuse(owner, "the gradient of a custom function"))
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, DenseWeight):
            if func in METADATA:
                with without_torch_function():
                    return func(first._like if func in DEVICE else first, *args[1:], **kwargs)
            name = func.__name__
            if name in _REFUSED or (name.endswith("_") and not name.endswith("__")):  # torch's names of what changes
                _refuse(first._owner, name)
        products: dict[int, tuple[DenseWeight, Tensor]] = {}

        def multiplied(weight: DenseWeight) -> Tensor:
            if id(weight) not in products:
                products[id(weight)] = weight, weight._multiplied()
            return products[id(weight)][1]

        args, kwargs = tree_map_only(DenseWeight, multiplied, (args, kwargs))
        versions = [value._version for _, value in products.values()]
        result = func(*args, **kwargs)
        for version, (weight, value) in zip(versions, products.values(), strict=True):
            if value._version != version:  # `weight[0] = ...`, `out=weight`, `inplace=True`
                _refuse(weight._owner, func.__name__)
            result = tree_map_only(Tensor, partial(_kept, weight, value), result)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        owner = next((value._owner for value in args if isinstance(value, DenseWeight)), "a factorized module")
        _refuse(owner, f"{func}, called from C++,")

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))

    def __setattr__(self, name: str, value: Any) -> None:
        if is_torch_function_enabled():  # else it is torch itself
            _refuse(self._owner, f"setting its {name}")
        super().__setattr__(name, value)

    def _multiplied(self) -> Tensor:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():  # inference tensors have no version: changes would pass unnoticed
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            return self._values()


def _kept(weight: DenseWeight, product: Tensor, tensor: Tensor) -> Tensor:
    """A result as it is; read-only if it shares the product's memory."""
    if isinstance(tensor, DenseWeight) or not (has_storage(tensor) and has_storage(product)):
        return tensor
    if not shares_memory(tensor, product):
        return tensor
    with without_torch_function():
        kept = tensor.as_subclass(DenseWeight)
    kept.__dict__.update(_owner=weight._owner, _like=tensor, _values=lambda: tensor)
    return kept


def _refuse(owner: str, what: str) -> NoReturn:
    raise RuntimeError(
        f"{owner}.weight is read-only, a product of the factors that is formed anew for each operation: {what} would "
        "go to a tensor that is dropped. To change the layer, change the weight of module.to_dense(), put that in the "
        "module's place and factorize it again, or change module.factors(); module.requires_grad_(False) freezes it; "
        "weight.clone() is an ordinary tensor"
    )
