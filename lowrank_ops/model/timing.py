"""What a whole model takes on an example input, before and after its layers are replaced."""

from __future__ import annotations

import copy
import statistics
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lowrank_ops.model.calls import run_example
from lowrank_ops.model.sites import HOOKS, Site
from lowrank_ops.runtime.modes import synchronize

# Rounds of one run each, at least and at most; between the two they take about so many seconds.
_ROUNDS, _SECONDS = (3, 50), 0.5


def compare_models(
    model: nn.Module, sites: Sequence[Site], replacements: Mapping[int, nn.Module], example_input: Any
) -> tuple[float, float]:
    """Milliseconds of the model with the layers of `sites` and with their replacements: medians of interleaved runs.

    The hooks of these layers do not run, those of other modules do. The layers are in their places when it returns.
    Without a site both times are the same.
    """
    before = {id(site.layer): _without_hooks(site.layer) for site in sites}
    samples: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    try:
        while len(samples[0]) <= _ROUNDS[0] or (
            len(samples[0]) <= _ROUNDS[1] and time.perf_counter() - started < _SECONDS
        ):
            for layers, measured in zip((before, replacements), samples, strict=True):
                for site in sites:
                    site.put(layers[id(site.layer)])
                measured.append(_seconds(model, example_input))
    finally:
        for site in sites:
            site.put(site.layer)
    first, second = (1e3 * statistics.median(measured[1:]) for measured in samples)  # the first run warms up
    return first, second if sites else first


def _without_hooks(layer: nn.Module) -> nn.Module:
    """The layer with the same parameters, but none of its hooks."""
    bare = copy.copy(layer)
    for hooks in HOOKS:
        object.__setattr__(bare, hooks, OrderedDict())
    return bare


def _seconds(model: nn.Module, example_input: Any) -> float:
    synchronize()
    started = time.perf_counter()
    run_example(model, example_input)
    synchronize()
    return time.perf_counter() - started
