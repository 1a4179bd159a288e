"""Which layers a model does not call, or not only: it computes with their weights itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lowrank_ops.dense_weight import METADATA


class WeightReads(TorchFunctionMode):
    """Watches the runs of a model while it is entered.

    A layer's weight is read where it is an argument of a torch function, outside of the layer's own call. What only
    asks for shape, dtype or device reads nothing. TorchScript is not seen.

    Attributes:
        read: ids of the layers whose weights were read.
        called: ids of the layers that were called.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.called: set[int] = set()
        self._model, self._layers = model, layers
        self._owners: dict[int, int] = {}  # from a weight's id to its layer's, while the model runs
        self._inside: Counter[int] = Counter()
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
                if owner is not None and not self._inside[owner]:
                    self.read.add(owner)
        return func(*args, **kwargs)

    def _enter_model(self, *_: Any) -> None:
        weights = [(layer._parameters.get("weight"), layer) for layer in self._layers]
        self._owners = {id(weight): id(layer) for weight, layer in weights if weight is not None}

    def _leave_model(self, *_: Any) -> None:
        self._owners = {}

    def _enter_layer(self, layer: nn.Module, *_: Any) -> None:
        self.called.add(id(layer))
        self._inside[id(layer)] += 1

    def _leave_layer(self, layer: nn.Module, *_: Any) -> None:
        self._inside[id(layer)] -= 1
