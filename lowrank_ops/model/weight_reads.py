"""Layers whose weights a model reads: it computes with them itself, instead of calling the layer or besides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from lowrank_ops.runtime.metadata import METADATA
from lowrank_ops.runtime.nested import is_nested
from lowrank_ops.runtime.torch_internals import TorchDispatchMode, has_storage, tree_leaves


class WeightReads(TorchFunctionMode):
    """Watches the runs of a model while it is entered.

    A layer's weight is read where it is an argument of a torch function outside of the layer's own call, except for
    functions that only ask for its shape, dtype or device. Reads inside TorchScript are not seen.

    Attributes:
        read: ids of the layers whose weights were read.
        called: ids of the layers that were called.
        inside: how many calls of each layer are running at this moment, by id.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.called: set[int] = set()
        self._model, self._layers = model, layers
        self._owners: dict[int, int] = {}  # from a weight's id to its layer's, while the model runs
        self.inside: Counter[int] = Counter()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> WeightReads:
        for module, enter, leave in (
            *((layer, self._enter_layer, self._leave_layer) for layer in self._layers),
            (self._model, self._enter_model, self._leave_model),
        ):
            self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._owners and func not in METADATA:
            for value in tree_leaves((args, kwargs)):
                owner = self._owners.get(id(value))
                if owner is not None and not self.inside[owner]:
                    self.read.add(owner)
        return func(*args, **kwargs)

    def _enter_model(self, *_: Any) -> None:
        weights = [(layer._parameters.get("weight"), layer) for layer in self._layers]
        self._owners = {id(weight): id(layer) for weight, layer in weights if weight is not None}

    def _leave_model(self, *_: Any) -> None:
        self._owners = {}

    def _enter_layer(self, layer: nn.Module, *_: Any) -> None:
        self.called.add(id(layer))
        self.inside[id(layer)] += 1

    def _leave_layer(self, layer: nn.Module, *_: Any) -> None:
        self.inside[id(layer)] -= 1


class ReadProducts(TorchDispatchMode):
    """Counts multiplications outside of the layers' calls, in a run that `WeightReads` watches: those with weights that
    the model reads, and all others.

    They are counted for the operations that torch can count (`torch.utils.flop_counter`: matrix products,
    convolutions). An operation is one with a weight if an argument is the weight, a view of it, or a tensor that was
    made from it alone (a copy in another dtype).

    Attributes:
        macs: multiply-accumulates with a layer's weight, by the layer's id.
        uses: the number of these operations, by the layer's id.
        elsewhere: multiply-accumulates neither in a layer's call nor with a layer's weight.
    """

    def __init__(self, reads: WeightReads, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.macs: Counter[int] = Counter()
        self.uses: Counter[int] = Counter()
        self.elsewhere = 0
        self._reads = reads
        self._layers: dict[int, list[int]] = {}  # from a storage to the layers whose weight it holds
        self._copies: list[Tensor] = []  # keeps the storages of copies from being used again
        for layer in layers:
            weight = layer._parameters.get("weight")
            storage = None if weight is None or is_lazy(weight) else _storage(weight)
            if storage is not None:
                self._layers.setdefault(storage, []).append(id(layer))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not all(kind in (Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # the subclass turns it into other operations, which come here again
        count = flop_registry.get(func._overloadpacket)
        if count is None and not any(map(is_nested, tree_leaves((args, kwargs)))):  # these have kernels of their own
            with self:  # under inference_mode linear layers arrive here before they become matrix products
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        storages = set(map(_storage, tree_leaves((args, kwargs)))) - {None}
        known = [self._layers[storage] for storage in storages if storage in self._layers]
        if count is not None:
            self._count(known, count(*args, **kwargs, out_val=result) // 2)
        elif known and len(storages) == 1:
            for made in tree_leaves(result):
                storage = _storage(made)
                if storage is not None and storage not in self._layers:
                    self._copies.append(made)
                    self._layers[storage] = known[0]
        return result

    def _count(self, read: Sequence[list[int]], macs: int) -> None:
        """Adds an operation with the weights of these layers."""
        if any(self._reads.inside.values()):  # a layer's own call
            return
        if not read:
            self.elsewhere += macs
        for layers in read[:1]:
            self.macs[layers[0]] += macs
            self.uses[layers[0]] += 1


def _storage(value: Any) -> int | None:
    """Identifies the memory of a tensor; None for other values, and for tensors without storage (sparse ones)."""
    if not isinstance(value, Tensor) or not has_storage(value):
        return None
    return int(value.untyped_storage()._cdata)
