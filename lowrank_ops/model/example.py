"""A model and an example input: the model is run on it, timed on it, and its layers' calls are recorded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ops.model.batches import Batch
from lowrank_ops.model.calls import Calls, InputKind, model_errors
from lowrank_ops.model.sites import Site, put_in, without_hooks
from lowrank_ops.model.state import in_inference_mode
from lowrank_ops.model.timing import Rounds, seconds_of
from lowrank_ops.model.weight_reads import ReadProducts
from lowrank_ops.runtime.modes import eval_mode, no_nested_tensors, synchronize
from lowrank_ops.runtime.nested import values_of

# Runs for the report's milliseconds, of the dense and of the factorized model each; the first one warms up.
_COMPARED = Rounds(least=4, most=51, seconds=0.5)
# Runs of which the fastest counts, where candidates for a budget are measured.
_FASTEST_OF = Rounds(least=2, most=20, seconds=0.2)
# How often the dense and the factorized model are measured in turn for one ratio of their times.
_TURNS = 5


class Example:
    """A model and the input that it is measured on.

    Every run is one in eval mode and without gradients, on a copy of the input, so that neither statistics nor the
    input change; the training flags of all modules are restored.

    Args:
        model: the network.
        input: `example_input` of the caller: a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments.

    Attributes:
        calls: of the layers that `record` was given.
    """

    def __init__(self, model: nn.Module, input: Any) -> None:
        self.model = model
        self.calls = Calls(model, [])
        if isinstance(input, Mapping):
            self._batch = Batch(keywords=input)
        else:
            self._batch = Batch(tuple(input) if isinstance(input, (tuple, list)) else (input,))

    def run(self) -> None:
        """Runs the model once."""
        with eval_mode(self.model), torch.inference_mode(in_inference_mode(self.model)), torch.no_grad():
            self._batch.run(self.model)

    def errors(self, subject: str, hint: str = "") -> AbstractContextManager[None]:
        """Within it an error in a run names the layer that fails, see `model_errors`."""
        return model_errors(subject, self.model, "example_input", hint)

    def record(self, layers: Sequence[nn.Module]) -> Calls:
        """Runs the model once and records how it calls the layers, which see padded sequences as ordinary tensors."""
        calls = self.calls = Calls(self.model, layers)

        def record(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            tensor = args[0] if args else kwargs.get("input")
            if not isinstance(tensor, Tensor) or not isinstance(output, Tensor):
                return
            tensor, output = values_of(tensor), values_of(output)
            seen = calls.of(layer)
            if tensor.is_nested:
                seen.nested = True
                return
            seen.inputs[InputKind.of(tensor)] += 1
            seen.output_size = seen.output_size or tuple(output.shape)

        handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
        try:
            with no_nested_tensors(), calls.reads, ReadProducts(calls.reads, layers) as products:
                self.run()
        finally:
            for handle in handles:
                handle.remove()
        calls.add_products(products)
        return calls

    def compare(self, sites: Sequence[Site], replacements: Mapping[int, nn.Module]) -> tuple[float, float]:
        """Milliseconds of the model with the layers of `sites` and with their replacements (by the layers' ids):
        medians of runs in turn.

        The hooks of these layers do not run, those of other modules do. The layers are in their places when it returns.
        Without a site both times are the same.
        """
        dense = {id(site.layer): without_hooks(site.layer) for site in sites}
        times: tuple[list[float], list[float]] = ([], [])
        for _ in _COMPARED:
            for modules, measured in zip((dense, replacements), times, strict=True):
                with put_in(sites, modules):
                    measured.append(self._seconds())
        before, after = (1e3 * statistics.median(measured[1:]) for measured in times)
        return before, after if sites else before

    def seconds(self) -> float:
        """The least time of a few runs: whatever else the machine does must not look like a slow model."""
        self.run()
        return min(self._seconds() for _ in _FASTEST_OF)

    def ratio(self, sites: Sequence[Site], replacements: Mapping[int, nn.Module]) -> float:
        """The time of the model with replacements (by the layers' ids) over that of the dense model, which is in place
        when it returns. Both are measured in turn, the median of the ratios counts."""
        ratios = []
        for _ in range(_TURNS):
            dense = self.seconds()
            with put_in(sites, replacements), self.errors("factorize_: the factorized model"):
                ratios.append(self.seconds() / dense)
        return statistics.median(ratios)

    def share_of(self, layers: Sequence[nn.Module]) -> float:
        """The share of the model's time that passes in calls of the layers."""
        inside = 0.0
        started: list[float] = []

        def enter(*_: Any) -> None:
            synchronize()
            started.append(time.perf_counter())

        def leave(*_: Any) -> None:
            nonlocal inside
            synchronize()
            inside += time.perf_counter() - started.pop()

        handles = [layer.register_forward_pre_hook(enter) for layer in layers]
        handles += [layer.register_forward_hook(leave) for layer in layers]
        shares = []
        try:
            for _ in range(_TURNS):
                inside = 0.0
                begun = time.perf_counter()
                self.run()
                synchronize()
                shares.append(inside / (time.perf_counter() - begun))
        finally:
            for handle in handles:
                handle.remove()
        return statistics.median(shares)

    def _seconds(self) -> float:
        return seconds_of(self.run)
