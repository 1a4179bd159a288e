"""Distillation: a factorized network learns to give its teacher's outputs; no labels needed."""

from __future__ import annotations

import copy
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from tqdm import tqdm

from lowrank_ops.model.batches import Batch, Batches, device_of, outputs_of
from lowrank_ops.runtime.compiled import takes_compiled
from lowrank_ops.runtime.modes import eval_mode
from lowrank_ops.text.warn import warn
from lowrank_ops.train import processes
from lowrank_ops.train.distill_errors import LayerErrors, layer_pairs, output_errors

WARM_UP = 20  # steps over which the learning rate rises: Adam's second moments are guesses until then
RETREAT = 4  # what the learning rate is divided by where the loss runs away


class _Runaway:
    """Whether a loss runs away from where training began.

    Batches differ, so a mean over some steps is compared with the mean loss of the untrained student; the margin is
    wide, because a false alarm costs little (a smaller learning rate) and a student that is lost costs all.
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


@dataclass(frozen=True)
class DistillReport:
    """What `distill_` did.

    Attributes:
        losses: the loss of each step on its batch, before it; over all processes of torch.distributed. Batches
            differ: their losses do not tell how good the result is.
        seconds: of the whole run.
        layers: qualified names of the layers whose outputs were part of the loss.
        restarts: how often the loss ran away, so that the student began anew at a quarter of the learning rate.
        kept: False: the student is as it was before, because nothing better was found.
        result: the loss of the student as it is now, on the first batch; compares with `first`.
    """

    losses: list[float] = field(repr=False)
    seconds: float
    layers: tuple[str, ...]
    restarts: int = 0
    kept: bool = True
    result: float = math.nan

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def first(self) -> float:
        """The loss before the first step, on the first batch."""
        return self.losses[0]

    @property
    def last(self) -> float:
        """The loss before the last step, on the batch of that step."""
        return self.losses[-1]

    def __str__(self) -> str:
        losses = f"{self.first:.4g} > {self.result:.4g}"
        told = f"{self.steps} steps in {self.seconds:.1f} s, loss on the first batch {losses}"
        if self.restarts:
            told += f", learning rate divided by {RETREAT**self.restarts} where the loss ran away"
        return told if self.kept else f"{told}; no better than before, so undone"


@takes_compiled("student")
@takes_compiled("teacher")
def distill_(
    student: nn.Module,
    teacher: nn.Module,
    loader: Any,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None = None,
    learning_rate: float | None = None,
    layer_weight: float = 1.0,
    temperature: float | None = None,
    batchnorm: Literal["frozen", "train"] = "frozen",
    progress: bool = True,
) -> DistillReport:
    """Trains the student, in place, to give the teacher's outputs on the loader's inputs.

    The loss of a batch is `|student - teacher|^2 / |teacher|^2` of the outputs (the mean over them, if the networks
    return several floating-point tensors) plus `layer_weight` times the mean of the same over the student's
    factorized layers, each against the teacher's layer of the same qualified name. Where an activation was folded
    into a factorized layer it is applied to the teacher's convolution or linear layer first. A layer that a batch does
    not reach, or to which the teacher gives only zeros, adds nothing in that step.

    A student that calibration has brought near its teacher is lost in a few steps that are too large. Where the loss
    runs away (three times that of the untrained student, over some steps) training begins anew, from the initial values
    and at a quarter of the learning rate, up to four times. In the end the loss on the first batch must be lower than
    it was; if not, the student gets its initial values back, with a warning.

    Both networks run in eval mode (dropout off, the student's recurrent layers without dropout in training mode, as
    cuDNN's backward requires), the teacher without gradients. All parameters of the student that require gradients
    are trained. Training flags, hooks and the optimizer's learning rates are as before when it returns; the
    student's gradients are None. After an error the student has its initial parameters and buffers; interrupted
    from the keyboard it keeps what it has learned.

    Networks that torch.compile has compiled run uncompiled here: compiled code calls no hooks that it does not know.

    Under torch.distributed (`torchrun`) every process calls this with a loader of its own, and the result is that
    of one process on the union of the batches: squared errors are normalized over all processes, gradients
    averaged, the time limit is agreed on. A plain student starts from process 0's values. A student in
    DistributedDataParallel or under FSDP2 (`fully_shard`) averages its gradients itself.

    Args:
        student: the factorized network, best in float32 (small steps are lost in bfloat16 parameters).
        teacher: the network that it came from; shares no parameter with it.
        loader: inputs, as `Batches` reads them: a tensor, a list or DataLoader of batches (of a list `[input,
            label]` the input is used). Read again from the start until the run is over; a DistributedSampler is told
            the epoch.
        steps: how many batches to train on. Without `steps` and `minutes`: 1000.
        minutes: stop after the step in which this time is over.
        optimizer: None: Adam. Or a torch.optim.Optimizer over parameters of the student, or a callable that makes
            one from a list of them (`functools.partial(torch.optim.SGD, lr=0.01)`). Its learning rates are the
            peaks of the schedule: a linear rise over 20 steps (a tenth of `steps`, if that is less), then a cosine to
            zero over steps or minutes, whichever ends first.
        learning_rate: of Adam, 2e-3 by default; not together with `optimizer`. Small networks often
            bear 1e-2; where the loss rises, take less.
        layer_weight: of the layers' errors; 0 leaves them out, and any two networks with the same outputs will do.
        temperature: None: squared errors, whatever the outputs mean. A number: the outputs are logits of classes
            along the last axis, `[N, C]` or `[N, T, C]`, and their part of the loss is `temperature^2 KL(p, q)`, the
            mean over rows, with p and q the teacher's and the student's softmax of logits / temperature (Hinton et
            al., arXiv:1503.02531).
        batchnorm: "frozen": BatchNorm normalizes with its running statistics, which stay as they are. "train": with
            those of the batch, and the running statistics move (plain students: averaged over the processes at the
            end). Its weight and bias are trained in either case.
        progress: a bar with the running loss on stderr, of process 0.

    Returns:
        A `DistillReport`: the loss before and after on the first batch, the losses of all steps, seconds.

    Raises:
        ValueError: arguments out of range, parameters shared between the networks or none to train, an optimizer
            with parameters of another model, layers whose names, calls or output shapes do not match, a BatchNorm
            that only one of the networks has, no or non-finite data.
        TypeError: arguments of the wrong kind.
        RuntimeError: the loss or the parameters are no longer finite; the message names the step.
    """
    _check_arguments(student, teacher, steps, minutes, layer_weight, temperature, batchnorm)
    batches = Batches(loader, "distill_: loader", device_of(student))
    trainer = _optimizer(student, optimizer, learning_rate)
    pairs = layer_pairs(student, teacher) if layer_weight else {}
    if steps is None and minutes is None:
        steps = 1000
    warm_up = min(WARM_UP, -(-steps // 10)) if steps else WARM_UP
    peaks = [group["lr"] for group in trainer.param_groups]
    values = [*student.parameters(), *student.buffers()]
    initial = [value.detach().clone() for value in values]
    untrained = copy.deepcopy(trainer.state_dict())
    runaway, kept = _Runaway(), True
    losses: list[float] = []
    elapsed, started = 0.0, time.perf_counter()

    def loss_of(batch: Batch, layers: LayerErrors) -> tuple[Tensor, float]:
        """This process' part of the loss, and the loss over all processes."""
        nonlocal elapsed
        with torch.no_grad():
            expected = outputs_of(batch.run(teacher))
        errors = output_errors(outputs_of(batch.run(student)), expected, temperature)
        weights = [1 / len(errors)] * len(errors)
        if pairs:
            errors += layers.collect(like=errors[0][0])
            weights += [layer_weight / len(pairs)] * len(pairs)
        squares, sizes = (torch.stack(part) for part in zip(*errors, strict=True))
        mine = torch.cat([squares.detach(), sizes, squares.new_tensor([time.perf_counter() - started])])
        all_squares, all_sizes, seconds = processes.mean(mine).split([len(errors), len(errors), 1])
        scales = torch.where(all_sizes > 0, squares.new_tensor(weights) / all_sizes, 0)
        elapsed, loss = float(seconds), float((all_squares * scales).sum())
        if not math.isfinite(loss):
            raise _not_finite(f"the loss is {loss}", len(losses), all_sizes)
        return (squares * scales).sum(), loss

    def loss_and_gradients(batch: Batch, layers: LayerErrors) -> float:
        """The loss of a step; leaves its gradients in the parameters."""
        student.zero_grad(set_to_none=True)
        mine, loss = loss_of(batch, layers)
        mine.backward()  # type: ignore[no-untyped-call]
        processes.average_gradients(student)
        return loss

    def begin_anew() -> None:
        with torch.no_grad():
            for value, start in zip(values, initial, strict=True):
                value.copy_(start)

    try:
        shown = progress and processes.rank() == 0
        bar = tqdm(desc="distill", total=steps, unit="step", file=sys.stderr, leave=False, disable=not shown)
        modes = _modes(student, teacher, batchnorm)
        with torch.inference_mode(False), torch.enable_grad(), modes, LayerErrors(pairs) as layers, bar:
            processes.start_equal(student)
            stream = _forever(batches, loader)
            first = batch = next(stream)
            while (done := max(len(losses) / steps if steps else 0, elapsed / (60 * minutes) if minutes else 0)) < 1:
                rate = min(1, (runaway.steps + 1) / warm_up) * (1 + math.cos(math.pi * done)) / 2
                for group, peak in zip(trainer.param_groups, peaks, strict=True):
                    group["lr"] = peak * rate / RETREAT**runaway.restarts
                if losses:
                    batch = next(stream)
                losses.append(trainer.step(functools.partial(loss_and_gradients, batch, layers)))
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.4g}")
                if runaway.watch(losses[-1]):
                    begin_anew()
                    trainer.load_state_dict(copy.deepcopy(untrained))
            if not processes.all_finite(student):
                raise _not_finite("parameters are not finite", len(losses) - 1)
            with torch.no_grad(), _buffers_kept(student):
                last = loss_of(first, layers)[1]
            if last > losses[0]:
                begin_anew()
                kept = False
            elif batchnorm == "train":
                processes.average_buffers(student)
    except Exception:
        begin_anew()
        raise
    finally:
        for group, peak in zip(trainer.param_groups, peaks, strict=True):
            group["lr"] = peak
        student.zero_grad(set_to_none=True)
    if not kept:
        warn(
            f"distill_: after {len(losses)} steps the loss on the first batch is {last:.4g}, before it was "
            f"{losses[0]:.4g}: the student has its initial parameters again; use a lower learning rate or more steps",
        )
    result = last if kept else losses[0]
    return DistillReport(losses, time.perf_counter() - started, tuple(pairs), runaway.restarts, kept, result)


def _check_arguments(
    student: nn.Module,
    teacher: nn.Module,
    steps: int | None,
    minutes: float | None,
    layer_weight: float,
    temperature: float | None,
    batchnorm: str,
) -> None:
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"distill_: {name} must be an nn.Module, got {type(model).__name__}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
        raise TypeError(f"distill_: steps must be an int or None, got {steps!r}")
    for name, number in (("minutes", minutes), ("layer_weight", layer_weight), ("temperature", temperature)):
        optional = name != "layer_weight"
        if number is None and optional:
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"distill_: {name} must be a number{' or None' if optional else ''}, got {number!r}")
        if not math.isfinite(number) or number < 0 or (number == 0 and optional):
            least = "above 0" if optional else "at least 0"
            raise ValueError(f"distill_: {name} must be finite and {least}, got {number}")
    if steps is not None and steps < 1:
        raise ValueError(f"distill_: steps must be at least 1, got {steps}")
    if batchnorm not in ("frozen", "train"):
        raise ValueError(f"distill_: batchnorm must be 'frozen' or 'train', got {batchnorm!r}")
    taught = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in taught]
    if shared:
        raise ValueError(
            f"distill_: student and teacher must share no parameter, {len(shared)} are in both ({shared[0]}"
            f"{', ...' if len(shared) > 1 else ''}); factorize a copy.deepcopy of the teacher"
        )
    devices = device_of(student), device_of(teacher)
    if None not in devices and devices[0] != devices[1]:
        raise ValueError(f"distill_: student and teacher must be on one device, got {devices[0]} and {devices[1]}")


def _optimizer(
    student: nn.Module,
    optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None,
    learning_rate: float | None,
) -> Optimizer:
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("distill_: student must have parameters that require gradients, it has none")
    if optimizer is None:
        rate = 2e-3 if learning_rate is None else learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            raise TypeError(f"distill_: learning_rate must be a number, got {rate!r}")
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"distill_: learning_rate must be finite and above 0, got {rate}")
        return torch.optim.Adam(parameters, lr=rate)
    if learning_rate is not None:
        raise ValueError(f"distill_: learning_rate is Adam's; the optimizer brings its own, got {learning_rate} too")
    made = (
        optimizer if isinstance(optimizer, Optimizer) else optimizer(parameters) if callable(optimizer) else optimizer
    )
    if not isinstance(made, Optimizer):
        raise TypeError(
            "distill_: optimizer must be a torch.optim.Optimizer or a callable that makes one from a list of "
            f"parameters, got {type(made).__name__}"
        )
    own = {id(parameter) for parameter in student.parameters()}
    strangers = sum(id(parameter) not in own for group in made.param_groups for parameter in group["params"])
    if strangers:
        raise ValueError(
            f"distill_: optimizer must hold parameters of the student only, {strangers} are not: factorize_ and "
            "fully_shard make new parameters, build the optimizer after them"
        )
    return made


@contextmanager
def _modes(student: nn.Module, teacher: nn.Module, batchnorm: str) -> Iterator[None]:
    """Both in eval mode, but for what `distill_` says."""
    with eval_mode(teacher), eval_mode(student):
        for module in student.modules():
            if isinstance(module, _BatchNorm):
                module.training = batchnorm == "train"
            elif isinstance(module, nn.RNNBase):
                module.training = not module.dropout
        yield


@contextmanager
def _buffers_kept(student: nn.Module) -> Iterator[None]:
    """Running statistics do not move: a look is no step."""
    before = [buffer.clone() for buffer in student.buffers()]
    yield
    for buffer, value in zip(student.buffers(), before, strict=True):
        buffer.copy_(value)


def _forever(batches: Batches, loader: Any) -> Iterator[Batch]:
    epoch = 0
    while True:
        tell = getattr(getattr(loader, "sampler", None), "set_epoch", None)
        if tell is not None:  # torch.utils.data.DistributedSampler draws the same order again without it
            tell(epoch)
        yield from batches
        epoch += 1


def _not_finite(what: str, step: int, sizes: Tensor | None = None) -> RuntimeError:
    broken = sizes is not None and not torch.isfinite(sizes).all()
    advice = (
        "the teacher's outputs are not finite on this batch"
        if broken
        else "the student's outputs are not finite before any training"
        if step == 0 and sizes is not None
        else "use a lower learning rate"
    )
    return RuntimeError(f"distill_: {what} at step {step + 1}; the student has its initial parameters again: {advice}")
