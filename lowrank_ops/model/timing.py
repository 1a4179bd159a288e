"""How long runs and the recorded calls of a layer take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_ops.model.calls import LayerCalls
from lowrank_ops.runtime.modes import synchronize


@dataclass(frozen=True)
class Rounds:
    """How often something is timed: at least `least` times, at most `most` times, and in between until `seconds` have
    passed. Iterating starts the clock."""

    least: int
    most: int
    seconds: float

    def __iter__(self) -> Iterator[int]:
        started = time.perf_counter()
        for done in range(self.most):
            if done >= self.least and time.perf_counter() - started >= self.seconds:
                return
            yield done


# Rounds per kind of input of a layer.
LAYER_ROUNDS = Rounds(least=5, most=50, seconds=0.2)


def seconds_of(run: Callable[[], object], device: torch.device | None = None) -> float:
    """The time of `run()` until `device` (None: the current accelerator, if there is one) has done its work. Work that
    was given to the device before is waited for first."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def compare_layers(before: nn.Module, after: nn.Module, calls: LayerCalls) -> tuple[float, float] | None:
    """Milliseconds of the recorded calls through a layer and through its replacement; None if there were no calls."""
    if not calls.inputs:
        return None
    first, second = layer_seconds([before, after], before.weight.dtype, calls)  # type: ignore[arg-type]
    return 1e3 * first, 1e3 * second


def layer_seconds(
    modules: Sequence[nn.Module],
    dtype: torch.dtype,
    calls: LayerCalls,
    rounds: Rounds = LAYER_ROUNDS,
    typical: Callable[[Sequence[float]], float] = statistics.median,
) -> list[float]:
    """Seconds of the recorded calls through each module, without hooks.

    Args:
        modules: run in turn, so that a busy machine slows all of them.
        dtype: of the random inputs. Under autocast the recorded inputs may have another dtype than the layer.
        calls: which kinds of input the layer gets, and how often.
        rounds: for each kind of input, after one run that warms up.
        typical: makes one time of those of all rounds.
    """
    totals = [0.0] * len(modules)
    with torch.no_grad():
        for kind, count in calls.inputs.items():
            input = kind.random().to(dtype)
            measured: list[list[float]] = [[] for _ in modules]
            for module in modules:
                _forward_seconds(module, input)
            for _ in rounds:
                for module, samples in zip(modules, measured, strict=True):
                    samples.append(_forward_seconds(module, input))
            for index, samples in enumerate(measured):
                totals[index] += count * typical(samples)
    return totals


def _forward_seconds(module: nn.Module, input: Tensor) -> float:
    return seconds_of(lambda: module.forward(input), input.device)
