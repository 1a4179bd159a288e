"""The pieces of `distill_`: its loss, its schedule, the watch on losses that run away, and the loop over the steps."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from lowrank_ops.model.batches import Batch, outputs_of
from lowrank_ops.train import processes
from lowrank_ops.train.distill_errors import LayerErrors, Pairs, output_errors

WARM_UP = 20  # steps in which the learning rate rises: until then Adam's second moments are guesses
RETREAT = 4  # divides the learning rate each time that the loss runs away


@dataclass(frozen=True)
class Schedule:
    """The share of training that is done, and the learning rate: a linear rise, then a cosine to zero.

    Attributes:
        steps, minutes: whichever ends first; at least one of them is given.
    """

    steps: int | None
    minutes: float | None

    def done(self, steps: int, seconds: float) -> float:
        """The share that is done after a number of steps and seconds; 1 or more: training is over."""
        by_steps = steps / self.steps if self.steps else 0
        return max(by_steps, seconds / (60 * self.minutes) if self.minutes else 0)

    def rate(self, step: int, done: float) -> float:
        """The learning rate of a step, counted from 0, as a share of its peak."""
        warm_up = min(WARM_UP, -(-self.steps // 10)) if self.steps else WARM_UP
        return min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * done)) / 2


class Runaway:
    """Whether a loss runs away from where training began.

    The losses of batches differ, so a mean over some steps is compared with the mean loss of the untrained student. The
    margin is wide: a false alarm costs little (a smaller learning rate), but a student that has run away is lost.

    Attributes:
        restarts: how often training began anew.
        steps: how many steps there were since training began, or began anew.
    """

    MEAN_OVER, LEAST_STEPS, MARGIN, MOST_RESTARTS = 4.0, 3, 3.0, 4

    def __init__(self) -> None:
        self.untrained: list[float] = []
        self.restarts = self.steps = 0
        self._recent = 0.0

    def watch(self, loss: float) -> bool:
        """Takes the loss of a step; True: begin anew."""
        if self.steps == 0:
            self.untrained.append(loss)
            self._recent = loss
        self._recent += (loss - self._recent) / self.MEAN_OVER
        self.steps += 1
        start = sum(self.untrained) / len(self.untrained)
        if self.steps < self.LEAST_STEPS or self._recent <= self.MARGIN * start or self.restarts == self.MOST_RESTARTS:
            return False
        self.restarts += 1
        self.steps = 0
        return True


class Loss:
    """The loss of a student on a batch, see `distill_`; a context that watches the layers' outputs.

    Args:
        pairs: the student's factorized layers and the teacher's layers; none: the loss has no part of layers.
        layer_weight: of the layers' part.
        temperature: see `distill_`.

    Attributes:
        started: the time at which training began, by `time.perf_counter`.
        elapsed: seconds from then to the last loss, the mean over the processes.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, pairs: Pairs, layer_weight: float, temperature: float | None
    ) -> None:
        self.student, self._teacher = student, teacher
        self._count, self._layer_weight, self._temperature = len(pairs), layer_weight, temperature
        self._layers = LayerErrors(pairs)
        self.elapsed, self.started = 0.0, time.perf_counter()

    def __enter__(self) -> Loss:
        self._layers.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._layers.__exit__(*exception)

    def of(self, batch: Batch, step: int) -> tuple[Tensor, float]:
        """This process' part of the loss, and the loss over all processes. Raises RuntimeError, which names the step,
        if the latter is not finite."""
        with torch.no_grad():
            expected = outputs_of(batch.run(self._teacher))
        errors = output_errors(outputs_of(batch.run(self.student)), expected, self._temperature)
        weights = [1 / len(errors)] * len(errors)
        if self._count:
            errors += self._layers.collect(like=errors[0][0])
            weights += [self._layer_weight / self._count] * self._count
        squares, sizes = (torch.stack(part) for part in zip(*errors, strict=True))
        mine = torch.cat([squares.detach(), sizes, squares.new_tensor([time.perf_counter() - self.started])])
        all_squares, all_sizes, seconds = processes.mean(mine).split([len(errors), len(errors), 1])
        scales = torch.where(all_sizes > 0, squares.new_tensor(weights) / all_sizes, 0)
        self.elapsed, loss = float(seconds), float((all_squares * scales).sum())
        if not math.isfinite(loss):
            raise _not_finite(f"the loss is {loss}", step, all_sizes)
        return (squares * scales).sum(), loss

    def gradients(self, batch: Batch, step: int) -> float:
        """The loss over all processes; leaves its gradients in the student's parameters."""
        self.student.zero_grad(set_to_none=True)
        mine, loss = self.of(batch, step)
        mine.backward()  # type: ignore[no-untyped-call]
        processes.average_gradients(self.student)
        return loss


class Training:
    """Steps of an optimizer that lessen a loss, and the way back to where they began.

    Attributes:
        losses: of all steps, before each of them.
        restarts: how often training began anew because the loss ran away.
    """

    def __init__(self, loss: Loss, optimizer: Optimizer, schedule: Schedule) -> None:
        self._loss, self._optimizer, self._schedule = loss, optimizer, schedule
        self._student = loss.student
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._values = [*self._student.parameters(), *self._student.buffers()]
        self._initial = [value.detach().clone() for value in self._values]
        self._untrained = copy.deepcopy(optimizer.state_dict())
        self._runaway = Runaway()
        self.losses: list[float] = []

    @property
    def restarts(self) -> int:
        return self._runaway.restarts

    def run(self, batches: Iterator[Batch], bar: tqdm) -> float:
        """Trains until the schedule is over; returns the loss of the trained student on the first batch."""
        first = batch = next(batches)
        while (done := self._schedule.done(len(self.losses), self._loss.elapsed)) < 1:
            if self.losses:
                batch = next(batches)
            self._step(batch, done)
            bar.update()
            bar.set_postfix(loss=f"{self.losses[-1]:.4g}")
            if self._runaway.watch(self.losses[-1]):
                self.undo()
                processes.start_equal(self._student)
                self._optimizer.load_state_dict(copy.deepcopy(self._untrained))
        if not processes.all_finite(self._student):
            raise _not_finite("parameters are not finite", len(self.losses) - 1)
        with torch.no_grad(), _buffers_kept(self._student):
            return self._loss.of(first, len(self.losses))[1]

    def _step(self, batch: Batch, done: float) -> None:
        rate = self._schedule.rate(self._runaway.steps, done)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate / RETREAT**self._runaway.restarts
        closure = functools.partial(self._loss.gradients, batch, len(self.losses))
        self.losses.append(self._optimizer.step(closure))  # type: ignore[arg-type]

    def undo(self) -> None:
        """Gives the student its initial parameters and buffers."""
        with torch.no_grad():
            for value, start in zip(self._values, self._initial, strict=True):
                value.copy_(start)

    def clean_up(self) -> None:
        """Gives the optimizer its learning rates back, and drops the student's gradients."""
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak
        self._student.zero_grad(set_to_none=True)


@contextmanager
def _buffers_kept(student: nn.Module) -> Iterator[None]:
    """Afterwards the student's buffers are as before: measuring a loss must not move running statistics."""
    before = [buffer.clone() for buffer in student.buffers()]
    yield
    for buffer, value in zip(student.buffers(), before, strict=True):
        buffer.copy_(value)


def _not_finite(what: str, step: int, sizes: Tensor | None = None) -> RuntimeError:
    """The error for a loss or parameters that are not finite.

    Args:
        step: counted from 0.
        sizes: the denominators of the loss' errors, which come from the teacher alone; None for parameters.
    """
    broken = sizes is not None and not torch.isfinite(sizes).all()
    advice = (
        "the teacher's outputs are not finite on this batch"
        if broken
        else "the student's outputs are not finite before any training"
        if step == 0 and sizes is not None
        else "use a lower learning rate"
    )
    return RuntimeError(f"distill_: {what} at step {step + 1}; the student has its initial parameters again: {advice}")
