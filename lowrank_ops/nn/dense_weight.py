"""`DenseWeight`, the type of a factorized module's `weight`: a tensor whose values are computed from the factors by
each operation that needs them."""

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

# Methods that would give the address of a product that is freed at once, or wait for a gradient that never comes.
_REFUSED = ("data_ptr", "register_hook", "register_post_accumulate_grad_hook", "retain_grad")


class DenseWeight(Tensor):
    """The dense weight of a factorized module, as a read-only tensor that stores no values.

    It knows its shape, dtype and device. Every other operation multiplies the factors, with the values that they have
    at that time, and works on the product, with gradients for the factors. Results that share memory with the product
    (`data`, `detach()`, `view`, a slice) are read-only too; all other results are ordinary tensors.

    A change in place would change a product that is dropped at once: it raises a RuntimeError that says what to do
    instead. So do operations that bypass `__torch_function__`: those called from C++, and gradients that a custom
    `torch.autograd.Function` returns. `clone()` gives an ordinary tensor for these cases.
    """

    _owner: str
    _like: Tensor
    _values: Callable[[], Tensor]

    def __new__(
        cls, owner: str, shape: Iterable[int], like: Tensor, requires_grad: bool, values: Callable[[], Tensor]
    ) -> DenseWeight:
        """A tensor of this shape, with the dtype and device of `like`, whose values are `values()`; `owner` is for
        errors."""
        # On the meta device, so that `other.data = weight`, which bypasses __torch_function__, is an error.
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
            # torch's name for a change in place
            if name in _REFUSED or (name.endswith("_") and not name.endswith("__")):
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
        if is_torch_function_enabled():  # otherwise torch itself sets it
            _refuse(self._owner, f"setting its {name}")
        super().__setattr__(name, value)

    def _multiplied(self) -> Tensor:
        with ExitStack() as stack:
            # inference tensors have no version counter, by which changes are noticed
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            return self._values()


def _kept(weight: DenseWeight, product: Tensor, tensor: Tensor) -> Tensor:
    """The result of an operation on the product: unchanged, or read-only if it shares the product's memory."""
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
