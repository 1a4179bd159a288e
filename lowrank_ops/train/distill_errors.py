"""The parts of the loss of `distill_`: how far a student's outputs, and those of its layers, are from the teacher's.

Every error is a pair of scalars `(numerator, denominator)`, which can be summed over calls, batches and processes
before it is divided. The denominators are the teacher's squares for squared errors, and numbers of rows for
divergences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.plain import ACTIVATION_MODULES
from lowrank_ops.runtime.torch_internals import BatchNormBase, ConvBase

Error = tuple[Tensor, Tensor]
Pairs = Mapping[str, tuple[FactorizedModule, nn.Module]]


def layer_pairs(student: nn.Module, teacher: nn.Module) -> Pairs:
    """The student's factorized layers and the teacher's layers of the same names.

    Raises ValueError if there are none, if the teacher lacks one, or if a BatchNorm is in one network only: it may be
    folded into a layer of the other network, whose outputs then differ.
    """
    students, teachers = (
        dict((model.module if isinstance(model, DistributedDataParallel) else model).named_modules())
        for model in (student, teacher)
    )
    layers = {name: layer for name, layer in students.items() if isinstance(layer, FactorizedModule)}
    if not layers:
        raise ValueError(
            "distill_: student must have factorized layers, it has none; layer_weight=0 trains on the outputs alone"
        )
    missing = [name for name in layers if name not in teachers]
    if missing:
        raise ValueError(
            f"distill_: teacher must have a layer for each factorized layer of the student, it has none named "
            f"{', '.join(map(repr, missing[:3]))}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}; "
            "layer_weight=0 trains on the outputs alone"
        )
    norms = [
        {name for name, module in found.items() if isinstance(module, BatchNormBase)} for found in (students, teachers)
    ]
    for name in sorted(norms[0] ^ norms[1]):
        owner, other = ("student", "teacher") if name in norms[0] else ("teacher", "student")
        raise ValueError(
            f"distill_: the {owner} has a BatchNorm {name!r}, the {other} has none there: where it was folded into a "
            "layer, that layer's outputs differ; fold it in both, or layer_weight=0 trains on the outputs alone"
        )
    return {name: (layer, teachers[name]) for name, layer in layers.items()}


def output_errors(outputs: list[Tensor], expected: list[Tensor], temperature: float | None) -> list[Error]:
    """One error per output: squared errors, or divergences if there is a temperature. Raises ValueError where the two
    networks' outputs do not match, or where there are none."""
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (outputs, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"distill_: student and teacher must give the same shapes, got {shapes[0]} and {shapes[1]}")
    if not outputs:
        raise ValueError("distill_: the networks must return floating-point tensors, they return none")
    measure = squared_error if temperature is None else partial(_divergence, temperature=temperature)
    errors = [measure(output, target) for output, target in zip(outputs, expected, strict=True)]
    if temperature is None and not any(bool(size) for _, size in errors):
        raise ValueError("distill_: the teacher's outputs are all zeros on a batch: there is nothing to be relative to")
    return errors


def squared_error(output: Tensor, target: Tensor) -> Error:
    """`(|output - target|^2, |target|^2)`, in float32 at least."""
    wide = torch.promote_types(output.dtype, torch.float32)
    target = target.to(wide)
    return (output.to(wide) - target).square().sum(), target.square().sum()


def _divergence(output: Tensor, target: Tensor, temperature: float) -> Error:
    """`temperature^2 KL(teacher, student)` summed over rows of logits, and the number of rows."""
    if output.dim() not in (2, 3):
        raise ValueError(
            "distill_: temperature takes logits with the classes along the last axis, [N, C] or [N, T, C], got an "
            f"output of shape {list(output.shape)}; temperature=None compares outputs of any kind"
        )
    wide = torch.promote_types(output.dtype, torch.float32)
    student, teacher = ((logits.to(wide) / temperature).log_softmax(-1) for logits in (output, target))
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2
    return divergence, divergence.new_tensor(float(output.shape[:-1].numel()))


class LayerErrors:
    """The errors of the layers' outputs, measured by forward hooks, which are there while it is entered.

    The teacher runs first; each of its layers leaves a copy of its output, since an in-place activation behind the
    layer would change the output itself. When the student's layer returns, its output is compared with the copy at
    once. Calls are matched in order.
    """

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self._handles: list[RemovableHandle] = []
        self._targets: dict[str, deque[Tensor]] = {name: deque() for name in pairs}
        self._errors: dict[str, list[Error]] = {name: [] for name in pairs}

    def __enter__(self) -> LayerErrors:
        for name, (layer, taught) in self._pairs.items():
            plain = isinstance(taught, (ConvBase, nn.Linear))
            activation = _activation(layer.activation if plain else "none")
            self._handles.append(taught.register_forward_hook(partial(self._keep, name, activation)))
            self._handles.append(layer.register_forward_hook(partial(self._compare, name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def collect(self, like: Tensor) -> list[Error]:
        """The errors since the last `collect`, one per layer, summed over its calls; (0, 0) for a layer without calls.

        Args:
            like: a tensor of the dtype and on the device that zeros are to have.
        """
        errors = []
        for name, targets in self._targets.items():
            if targets:
                raise self._miscounted(name)
            found = self._errors[name] or [(like.new_zeros(()), like.new_zeros(()))]
            errors.append((sum(error for error, _ in found), sum(size for _, size in found)))
            self._errors[name] = []
        return errors  # type: ignore[return-value]

    def _keep(
        self, name: str, activation: Callable[[Tensor], Tensor], layer: nn.Module, args: Any, output: Tensor
    ) -> None:
        self._targets[name].append(activation(output))

    def _compare(self, name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        if not self._targets[name]:
            raise self._miscounted(name)
        target = self._targets[name].popleft()
        if target.shape != output.shape:
            raise ValueError(
                f"distill_: layer {name!r} must give the same shape in both networks, got {list(output.shape)} in the "
                f"student and {list(target.shape)} in the teacher; layer_weight=0 trains on the outputs alone"
            )
        self._errors[name].append(squared_error(output, target))

    def _miscounted(self, name: str) -> ValueError:
        return ValueError(
            f"distill_: layer {name!r} must be called equally often in both networks, on one batch it was not; "
            "layer_weight=0 trains on the outputs alone"
        )


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of an op as a function that returns a new tensor and leaves its argument as it is."""
    return torch.clone if name == "none" else ACTIVATION_MODULES[name]()
