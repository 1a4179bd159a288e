"""`python -m examples.workflows.small_networks`: small networks with unusual pieces, factorized and trained.

Four cases: min-max normalization between the convolutions; inputs rounded to one decimal and clipped; mixup; the
coarse labels of CIFAR-100 (without that data set, pairs of digits replace them). Each network is trained, factorized,
and trained again. Pieces that are neither convolutions nor linear layers stay as they are, between the factorized ones.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas
import torch
from torch import Tensor, nn

import lowrank_ops
from examples.workflows import command, data
from examples.workflows.training import accuracy, seeded, train
from lowrank_ops.nn.counts import count_parameters

COLUMNS = ["network", "parameters", "factorized", "accuracy", "factorized, as it is", "and trained"]


class MinMax(nn.Module):
    """Scales each image to [0, 1] over all its channels and pixels; a constant image becomes 0. `[N, C, H, W]`."""

    def forward(self, image: Tensor) -> Tensor:
        low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
        return (image - low) / (high - low).clamp(min=1e-6)


class RoundAndClip(nn.Module):
    """Rounds to one decimal and clips to [-1, 1]; for inputs only, because it passes no gradient on."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.round(image, decimals=1).clamp(-1, 1)


@dataclass(frozen=True)
class Case:
    """One network and how it is trained."""

    name: str
    before: Callable[[], nn.Module] | None = None
    """Makes the module before the first convolution."""
    between: Callable[[], nn.Module] | None = None
    """Makes the module after each convolution except the last."""
    mixup: bool = False
    coarse: bool = False


CASES = (
    Case("min-max between convolutions", between=MinMax),
    Case("inputs rounded and clipped", before=RoundAndClip),
    Case("mixup", mixup=True),
    Case("coarse labels", coarse=True),
)


def small_network(case: Case, width: int = 32, classes: int = 10, size: int = 32) -> nn.Sequential:
    """Three convolutions and a dense layer with the case's pieces.

    Input `[N, 3, size, size]`, output `[N, classes]`.
    """
    layers: list[nn.Module] = [] if case.before is None else [case.before()]
    channels = [3, width, 2 * width, 4 * width]
    for index in range(3):
        layers += [nn.Conv2d(channels[index], channels[index + 1], 3, padding=1), nn.ReLU()]
        if case.between is not None and index < 2:
            layers.append(case.between())
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[3] * (size // 8) ** 2, classes))


def layer_names(model: nn.Sequential) -> list[str]:
    """The names of all convolutions and linear layers. `factorize_` skips layers with few channels unless they are
    named."""
    return [name for name, layer in model.named_children() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def run(
    dataset: data.Dataset,
    *,
    width: int = 32,
    epochs: int = 10,
    rank: float = 0.5,
    batch: int = 64,
    progress: bool = True,
) -> pandas.DataFrame:
    """Trains each case on square images of 3 channels, factorizes it, and trains it for half as long again.

    Returns:
        One row per case: parameters of the dense and of the factorized network; accuracy of the dense one, of the
        factorized one before training, and after it. If the data set has no coarse labels, their row is missing.
    """
    rows = []
    for case in CASES:
        if case.coarse and dataset.coarse is None:
            continue
        labelled = dataset.with_coarse_labels() if case.coarse else dataset
        loader, test = data.batches(labelled.train, batch, shuffle=True), data.batches(labelled.test, 256)
        options: dict[str, Any] = {"progress": progress}
        if case.mixup:
            options["augment"] = functools.partial(data.mixup, classes=labelled.classes)

        dense = small_network(case, width, labelled.classes, dataset.train.images.shape[-1])
        train(dense, loader, torch.optim.Adam(dense.parameters()), epochs, **options)
        model = copy.deepcopy(dense)
        lowrank_ops.factorize_(model, rank=rank, multiple=1, include=layer_names(model), progress=progress)
        as_it_is = accuracy(model, test)
        train(model, loader, torch.optim.Adam(model.parameters()), -(-epochs // 2), **options)
        sizes = [count_parameters(dense), count_parameters(model)]
        rows.append([case.name, *sizes, accuracy(dense, test), as_it_is, accuracy(model, test)])
    return pandas.DataFrame(rows, columns=COLUMNS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser(__doc__, epochs=10)
    options = parser.parse_args(arguments)
    dataset = command.dataset(parser, options).fitted(3, 32)
    if dataset.coarse is None:
        print(f"{dataset.name} has no coarse labels: that case is left out")
    with seeded():
        table = run(dataset, width=8 if options.small else 32, epochs=options.epochs)
    command.show(table, f"Small networks on {dataset.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
