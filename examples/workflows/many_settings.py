"""`python -m examples.workflows.many_settings`: factorized networks under many settings, in three tables.

initializers: AlexNet with BatchNorm, factorized from the start, with ten initializers, each with weight decay and with
Frobenius decay (of the product of the factors: Khodak et al., arXiv:2105.01029).
optimizers: ResNet-50 with RMSprop and with Adagrad: dense, factorized, and trained further.
transfer: LeNet, trained on the digits, then on another data set; factorized before all training or after it.
`--part` selects one of the three.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas
import torch
from torch import Tensor, nn

import lowrank_ops
from examples.workflows import command, data
from examples.workflows.networks import AlexNet, LeNet, ResNet50
from examples.workflows.training import accuracy, seeded, train
from lowrank_ops.nn.counts import count_parameters
from lowrank_ops.nn.init import Init

INITIALIZERS: Mapping[str, Init] = {
    **{name: name for name in ("default", "spectral", "xavier_uniform", "xavier_normal", "kaiming_uniform",
                               "kaiming_normal", "orthogonal")},
    # torch.nn.init's own N(0, 1) and U(0, 1) are far too large for three dense layers without normalization.
    "normal, 0.02": functools.partial(nn.init.normal_, std=0.02),
    "trunc_normal, 0.02": functools.partial(nn.init.trunc_normal_, std=0.02, a=-0.04, b=0.04),
    "uniform, 0.05": functools.partial(nn.init.uniform_, a=-0.05, b=0.05),
}  # fmt: skip
FACTORIZED = (lowrank_ops.TuckerConv2d, lowrank_ops.LowRankLinear)
DECAYS = ("weight", "frobenius")
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-4),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}


def initializers(
    dataset: data.Dataset,
    *,
    inits: Mapping[str, Init] = INITIALIZERS,
    width: int = 96,
    rank: int | float = 0.25,
    decay: float = 1e-4,
    epochs: int = 10,
    batch: int = 64,
    progress: bool = True,
) -> pandas.DataFrame:
    """Trains a factorized AlexNet on 3x32x32 images once for each initializer and decay.

    Returns:
        One row per initializer and decay: both names, cross entropy of the first and of the last epoch, accuracy on the
        test images.
    """
    test = data.batches(dataset.test, 256)
    rows = []
    for name, init in inits.items():
        for kind in DECAYS:
            with seeded():
                model = AlexNet(dataset.classes, rank, init, width)
                optimizer = torch.optim.SGD(decayed(model, decay, kind), lr=0.02, momentum=0.9)
                penalty: Callable[[nn.Module], Tensor] | None = None
                if kind == "frobenius":
                    penalty = functools.partial(lowrank_ops.frobenius_decay, weight=decay)
                loader = data.batches(dataset.train, batch, shuffle=True)
                losses = train(model, loader, optimizer, epochs, penalty=penalty, progress=progress)
            rows.append([name, kind, losses[0], losses[-1], accuracy(model, test)])
    return pandas.DataFrame(rows, columns=["initializer", "decay", "first loss", "last loss", "accuracy"])


def decayed(model: nn.Module, decay: float, kind: str) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer; under Frobenius decay the factors have no weight decay of their own."""
    layers = [layer for layer in model.modules() if isinstance(layer, FACTORIZED)]
    factors = [factor for layer in layers for factor in layer.factors().values()]
    known = set(map(id, factors))
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [
        {"params": factors, "weight_decay": decay if kind == "weight" else 0.0},
        {"params": others, "weight_decay": decay},
    ]


def optimizers(
    dataset: data.Dataset,
    *,
    width: int = 64,
    rank: float = 0.5,
    epochs: int = 10,
    batch: int = 64,
    progress: bool = True,
) -> pandas.DataFrame:
    """Trains a ResNet-50 on 3x32x32 images with each optimizer, factorizes it, and trains it further.

    Returns:
        One row per optimizer and network ("dense", "factorized", "and trained"): parameters and accuracy.
    """
    test = data.batches(dataset.test, 256)
    rows = []
    for name, make in OPTIMIZERS.items():

        def trained(model: nn.Module, epochs: int, make: Callable[..., torch.optim.Optimizer] = make) -> None:
            loader = data.batches(dataset.train, batch, shuffle=True)
            train(model, loader, make(model.parameters()), epochs, progress=progress)

        with seeded():
            model = ResNet50(dataset.classes, width)
            trained(model, epochs)
            rows.append([name, "dense", count_parameters(model), accuracy(model, test)])
            lowrank_ops.factorize_(model, rank=rank, exclude=["conv1", "fc"], progress=progress)
            rows.append([name, "factorized", count_parameters(model), accuracy(model, test)])
            trained(model, -(-epochs // 2))
            rows.append([name, "and trained", count_parameters(model), accuracy(model, test)])
    return pandas.DataFrame(rows, columns=["optimizer", "network", "parameters", "accuracy"])


def transfer(
    source: data.Dataset,
    target: data.Dataset,
    *,
    rank: float = 0.5,
    epochs: int = 10,
    batch: int = 64,
    progress: bool = True,
) -> pandas.DataFrame:
    """Trains a LeNet on the 1x28x28 images of `source`, then with a new last layer on those of `target`.

    Returns:
        One row each for the dense network, for one factorized before all training, and for the dense one factorized
        after it, before and after one more epoch: parameters, accuracy on `source` before the move, on `target` after
        it.
    """

    def trained(model: nn.Module, dataset: data.Dataset, epochs: int) -> float:
        loader = data.batches(dataset.train, batch, shuffle=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        train(model, loader, optimizer, epochs, progress=progress)
        return accuracy(model, data.batches(dataset.test, 256))

    def factorized(model: LeNet) -> None:
        lowrank_ops.factorize_(model, rank=rank, multiple=1, include=["conv2", "dense1", "dense2"], progress=progress)

    def moved(model: LeNet) -> list[float]:
        at_source = trained(model, source, epochs)
        model.head = nn.Linear(84, target.classes)
        return [at_source, trained(model, target, epochs)]

    def row(name: str, model: LeNet, reached: Sequence[float | None]) -> list[Any]:
        return [name, count_parameters(model), *reached]

    with seeded():
        dense = LeNet(source.classes)
        before = copy.deepcopy(dense)
        factorized(before)
        reached = moved(dense)
        rows = [row("dense", dense, reached), row("factorized before training", before, moved(before))]
        after = copy.deepcopy(dense)
        factorized(after)
        found = accuracy(after, data.batches(target.test, 256))
        rows.append(row("factorized after training", after, [None, found]))
        rows.append(row("and one more epoch", after, [None, trained(after, target, 1)]))
    return pandas.DataFrame(
        rows, columns=["network", "parameters", f"accuracy on {source.name}", f"accuracy on {target.name}"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser(__doc__, epochs=10)
    parser.add_argument("--part", choices=["initializers", "optimizers", "transfer"], help="only this table")
    options = parser.parse_args(arguments)
    dataset = command.dataset(parser, options)
    small, epochs = options.small, options.epochs
    if options.part in (None, "initializers"):
        table = initializers(dataset.fitted(3, 32), width=12 if small else 96, epochs=epochs)
        command.show(table, f"Factorized AlexNet on {dataset.name}, trained from scratch")
    if options.part in (None, "optimizers"):
        table = optimizers(dataset.fitted(3, 32), width=8 if small else 64, epochs=epochs)
        command.show(table, f"ResNet-50 on {dataset.name}")
    if options.part in (None, "transfer"):
        other = dataset if options.data else data.gratings()
        table = transfer(data.digits().fitted(1, 28), other.fitted(1, 28), epochs=epochs)
        command.show(table, f"LeNet moved from digits to {other.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
