"""`python -m examples.workflows.course_exercise`: which layers of a CIFAR-10 CNN to factorize, in one table.

The network has 12 convolutions (256 filters, halved every three; max pooling every four) and dense layers of 500 and
10. It is trained once. Starting from the trained network each time, four variants replace its last dense layer, both
dense layers, the last convolution, and the last convolution with both dense layers. Every variant is trained a little
longer; so is the baseline, so that all have seen the data equally often. Sizes are numbers of weights, biases included:
the sum over the factorized layers, for the baseline the sum over the three layers.

The exercise's own Tucker function puts ReLUs between the three convolutions. That is not a factorized convolution: it
cuts off values between the stages, so that no single block computes the same, and it has to be trained. It stays three
convolutions here, in the last row of the table; `fuse_` leaves it alone and says why.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import pandas
import torch
from torch import nn

import lowrank_ops
from examples.workflows import command, data
from examples.workflows.networks import replace_layer
from examples.workflows.training import accuracy, seeded, train
from lowrank_ops.decompose.ranks import Rank

LAYERS = ("conv12", "dense1", "dense2")
VARIANTS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "last dense": ("dense2",),
    "both dense": ("dense1", "dense2"),
    "last conv": ("conv12",),
    "last conv and both dense": LAYERS,
}
WITH_RELUS = "last conv, ReLUs between its stages"
SIZES = ["uncompressed_layer_size", "compressed_layer_size"]
COLUMNS = ["model", "matrix/Tucker rank", *SIZES, f"{SIZES[1]}/{SIZES[0]}", "accuracy"]


def course_network(filters: int = 256, hidden: int = 500, classes: int = 10, size: int = 32) -> nn.Sequential:
    """The exercise's CNN: input `[N, 3, size, size]`, output `[N, classes]`.

    Its layers are conv1 ... conv12, dense1 and dense2, with relu1 ..., pool4 ... between them.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for number in range(1, 13):
        count = filters // 2 ** ((number - 1) // 3)
        layers[f"conv{number}"] = nn.Conv2d(channels, count, 3, padding=1)
        layers[f"relu{number}"] = nn.ReLU()
        channels = count
        if number % 4 == 0:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["dense1"] = nn.Linear(channels * (size // 8) ** 2, hidden)
    layers["relu13"] = nn.ReLU()
    layers["dense2"] = nn.Linear(hidden, classes)
    for layer in layers.values():  # without normalization, signals would fade in 12 layers with PyTorch's default
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    return nn.Sequential(layers)


def with_relus(conv: nn.Conv2d, rank: Rank) -> nn.Sequential:
    """The exercise's own Tucker function: the block's three convolutions with ReLUs between them."""
    first, core, last = lowrank_ops.TuckerConv2d.from_conv2d(conv, rank).to_sequential()
    return nn.Sequential(first, nn.ReLU(), core, nn.ReLU(), last)


def run(
    dataset: data.Dataset,
    model: nn.Sequential,
    ranks: Mapping[str, Rank],
    *,
    epochs: int = 20,
    fine_tune: int = 1,
    learning_rate: float = 1e-3,
    batch: int = 64,
    progress: bool = True,
) -> tuple[pandas.DataFrame, str]:
    """Trains `model` and its variants.

    Args:
        dataset: training and test images.
        model: `course_network()` for images of that size; it is trained in place.
        ranks: of each of `LAYERS`.
        epochs, fine_tune: epochs of training for the network, and afterwards for each variant.

    Returns:
        The exercise's table, and why `fuse_` left the convolution with ReLUs between its stages.
    """
    test = data.batches(dataset.test, 256)

    def trained(model: nn.Module, epochs: int) -> nn.Module:
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        train(model, data.batches(dataset.train, batch, shuffle=True), optimizer, epochs, progress=progress)
        return model

    def row(name: str, variant: nn.Module, layers: Sequence[str]) -> list[object]:
        counted = layers or LAYERS
        before = sum(lowrank_ops.count_layer_weights(model, layer) for layer in counted)
        after = sum(lowrank_ops.count_layer_weights(variant, layer) for layer in counted)
        shown = ", ".join(str(ranks[layer]) for layer in layers) or "-"
        return [name, shown, before, after, after / before, accuracy(trained(variant, fine_tune), test)]

    trained(model, epochs)
    rows = []
    for name, layers in VARIANTS.items():
        variant = copy.deepcopy(model)
        for layer in layers:
            lowrank_ops.factorize_(variant, rank=ranks[layer], include=layer, progress=progress)
        rows.append(row(name, variant, layers))

    variant = copy.deepcopy(model)
    replace_layer(variant, "conv12", lambda conv: with_relus(conv, ranks["conv12"]))
    reason = lowrank_ops.fuse_(variant)["conv12"].reason
    assert reason is not None
    rows.append(row(WITH_RELUS, variant, ["conv12"]))
    return pandas.DataFrame(rows, columns=COLUMNS), reason


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser(__doc__, epochs=20)
    options = parser.parse_args(arguments)
    filters, hidden, size = (32, 60, 16) if options.small else (256, 500, 32)
    dataset = command.dataset(parser, options).fitted(3, size)
    ranks: dict[str, Rank] = {"conv12": (filters // 16, filters // 16), "dense1": hidden // 10, "dense2": 5}
    with seeded():
        model = course_network(filters, hidden, dataset.classes, size)
        table, reason = run(dataset, model, ranks, epochs=options.epochs)
    command.show(table, f"A CNN of 12 convolutions on {dataset.name}")
    print(f"\nfuse_ leaves the convolution with ReLUs between its stages: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
