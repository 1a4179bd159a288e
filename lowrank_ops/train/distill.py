"""Distillation: a factorized network learns to give its teacher's outputs; no labels needed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lowrank_ops.model.batches import Batch, Batches, device_of
from lowrank_ops.runtime.compiled import takes_compiled
from lowrank_ops.runtime.modes import eval_mode
from lowrank_ops.runtime.torch_internals import BatchNormBase
from lowrank_ops.text.progress import progress_bar
from lowrank_ops.text.warn import warn
from lowrank_ops.train import processes
from lowrank_ops.train.distill_errors import layer_pairs
from lowrank_ops.train.training import RETREAT, Loss, Schedule, Training


@dataclass(frozen=True)
class DistillReport:
    """What `distill_` did.

    Attributes:
        losses: the loss of each step on its batch, before the step; over all processes of torch.distributed. Batches
            differ, so these losses do not show how good the result is: compare `first` and `result`.
        seconds: of the whole run.
        layers: qualified names of the layers whose outputs were part of the loss.
        restarts: how often the loss ran away, so that the student began anew at a quarter of the learning rate.
        kept: False: the student is as it was before, because its loss on the first batch had risen.
        result: the loss of the student as it is now, on the first batch; `first` is what it was before.
    """

    losses: list[float] = field(repr=False)
    seconds: float
    layers: tuple[str, ...]
    restarts: int = 0
    kept: bool = True
    result: float = math.nan

    @property
    def steps(self) -> int:
        """How many steps there were."""
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

    A few steps that are too large can spoil a student that calibration has brought near its teacher. Where the loss
    runs away (three times that of the untrained student, over some steps), training begins anew from the initial values
    and at a quarter of the learning rate, at most four times. At the end, if the loss on the first batch is higher than
    it was, the student gets its initial values back, with a warning.

    Both networks run in eval mode, so dropout is off; the student's recurrent layers that have no dropout run in
    training mode, which cuDNN's backward pass requires. The teacher runs without gradients. All parameters of the
    student that require gradients are trained. Training flags, hooks and the optimizer's learning rates are as before
    when it returns; the student's gradients are None. After an error the student has its initial parameters and
    buffers; after an interruption from the keyboard it keeps what it has learned.

    Networks that torch.compile has compiled run uncompiled here, since compiled code does not call new hooks.

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
        batchnorm: "frozen": BatchNorm normalizes with its running statistics, which stay as they are. "train": it
            normalizes with the statistics of the batch, and the running statistics move (those of a plain student are
            averaged over the processes at the end). Its weight and bias are trained in either case.
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
    schedule = Schedule(1000 if steps is None and minutes is None else steps, minutes)
    loss = Loss(student, teacher, pairs, layer_weight, temperature)
    training = Training(loss, trainer, schedule)
    try:
        shown = progress and processes.rank() == 0
        bar = progress_bar("distill", shown, unit="step", total=schedule.steps)
        with torch.inference_mode(False), torch.enable_grad(), _modes(student, teacher, batchnorm), loss, bar:
            processes.start_equal(student)
            result = training.run(_forever(batches, loader), bar)
            kept = result <= training.losses[0]
            if not kept:
                training.undo()
            elif batchnorm == "train":
                processes.average_buffers(student)
    except Exception:
        training.undo()
        raise
    finally:
        training.clean_up()
    losses = training.losses
    if not kept:
        warn(
            f"distill_: after {len(losses)} steps the loss on the first batch is {result:.4g}, before it was "
            f"{losses[0]:.4g}: the student has its initial parameters again; use a lower learning rate or more steps",
        )
        result = losses[0]
    return DistillReport(losses, time.perf_counter() - loss.started, tuple(pairs), training.restarts, kept, result)


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
    """Within it both networks are in eval mode, except for the student's BatchNorm and recurrent layers: see
    `distill_`."""
    with eval_mode(teacher), eval_mode(student):
        for module in student.modules():
            if isinstance(module, BatchNormBase):
                module.training = batchnorm == "train"
            elif isinstance(module, nn.RNNBase):
                module.training = not module.dropout
        yield


def _forever(batches: Batches, loader: Any) -> Iterator[Batch]:
    """The batches, over and over."""
    epoch = 0
    while True:
        set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:  # torch.utils.data.DistributedSampler draws the same order again without it
            set_epoch(epoch)
        yield from batches
        epoch += 1
