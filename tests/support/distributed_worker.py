"""One of the processes of test_distributed.py, started by torchrun: writes what it computes to FOLDER/RANK.pt.

Its models and batches are those that the tests compute with in one process.
"""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lowrank_ops
from lowrank_ops import CPConv2d, LowRankLinear, TuckerConv2d, distill_, frobenius_decay

PROCESSES = 2
STEPS = 6


def exact_model() -> nn.Sequential:
    """Small integers in fp64: every product and sum on the way to a gradient is one too, whatever the order."""
    model = nn.Sequential(
        TuckerConv2d(3, 4, 3, (2, 3), padding=1, activation="relu"),
        CPConv2d(4, 5, (2, 3), 3, activation="relu"),
        nn.Flatten(),
        LowRankLinear(5 * 4 * 3, 4, 2),
    ).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    return model


def exact_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    input = torch.randint(-3, 4, (4 * PROCESSES, 3, 5, 5), generator=generator).double()
    return input, torch.randint(-3, 4, (4 * PROCESSES, 4), generator=generator).double()


def exact_gradients(model: nn.Module, input: Tensor, factor: Tensor) -> dict[str, Tensor]:
    """Gradients of a mean over the rows (a power of two of them) plus the Frobenius decay."""
    loss = (model(input) * factor).sum() / len(input) + frobenius_decay(model, 2.0)
    loss.backward()
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}


def networks(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A student and its teacher, with a BatchNorm and a convolution that stays dense."""
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3),
        nn.SiLU(),
        nn.Conv2d(8, 6, 2),
        nn.Flatten(),
        nn.Linear(6 * 9, 5),
    ).double()
    student = copy.deepcopy(teacher)
    lowrank_ops.factorize_(student, "tucker", 4, linear=2, include=["0", "3", "7"], progress=False)
    student[3] = CPConv2d.from_conv2d(teacher[3], 5)
    return student.to(dtype), teacher.to(dtype)


def batches(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The batches of all processes together, of different size on purpose, and unequal halves in them."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(rows, 3, 8, 8, dtype=torch.float64, generator=generator).to(dtype) for rows in (8, 6, 10)]


def learn(student: nn.Module, teacher: nn.Module, data: Any, **options: Any) -> list[float]:
    optimizer = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    options = {"steps": STEPS, "optimizer": optimizer, **options}
    return distill_(student, teacher, data, progress=False, **options).losses


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(value).clone() for name, value in model.state_dict().items()}


def sharded(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": copy.deepcopy,
    "ddp": lambda model: DistributedDataParallel(copy.deepcopy(model)),
    "fsdp": sharded,
}


def error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


class Slow(list):
    """A loader that keeps one process waiting."""

    def __iter__(self) -> Iterator[Tensor]:
        for batch in super().__iter__():
            time.sleep(0.03)
            yield batch


def never_stale() -> list[tuple[Tensor, Tensor]]:
    """Outputs of a sharded model before and after a step, with those of unsharded copies of its values."""
    model, pairs = sharded(exact_model()), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for _ in range(2):
        copied = exact_model()
        copied.load_state_dict(state(model))
        output = model(exact_batch()[0])
        pairs.append((output.detach(), copied(exact_batch()[0]).detach()))
        output.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return pairs


def results(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    input, factor = (part.chunk(PROCESSES)[rank] for part in exact_batch())
    for name in ("ddp", "fsdp"):
        found[f"{name} gradients"] = exact_gradients(WRAPPERS[name](exact_model()), input, factor)
    found["outputs"] = never_stale()

    student, teacher = networks()
    mine = [batch[:3] if rank == 0 else batch[3:] for batch in batches()]
    for name, wrap in WRAPPERS.items():
        model = wrap(student)
        losses = learn(model, teacher, mine)
        found[f"{name} student"] = (losses, state(model))

    unequal = copy.deepcopy(student)
    if rank == 1:  # process 0's values count
        for parameter in unequal.parameters():
            parameter.data.mul_(2)
    model = copy.deepcopy(unequal)
    found["unequal start"] = (learn(model, teacher, mine), state(model))
    wild = functools.partial(torch.optim.Adam, lr=1.0)
    for name, model in (("restart", student), ("unequal restart", unequal)):
        found[name] = learn(copy.deepcopy(model), teacher, mine, optimizer=wild, steps=12)
    for name in ("plain", "ddp"):
        model = WRAPPERS[name](student)
        learn(model, teacher, mine, batchnorm="train")
        found[f"{name} statistics"] = state(model)
    waiting = Slow(mine) if rank == 1 else mine
    found["steps in a time"] = len(learn(copy.deepcopy(student), teacher, waiting, steps=None, minutes=0.3 / 60))

    model = copy.deepcopy(student)
    broken = [batch * (1e200 if rank == 1 else 1) for batch in mine]
    found["diverged"] = error_of(lambda: learn(model, teacher, broken))
    found["restored"] = state(model)
    found["sharded init"] = error_of(lambda: sharded(exact_model())[0].reset_parameters("orthogonal"))
    found["channels_last core"] = error_of(lambda: fully_shard(exact_model()[0].to(memory_format=torch.channels_last)))
    return found


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.save(results(distributed.get_rank()), Path(sys.argv[1]) / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()
