"""`python -m examples.workflows.rank_sweep`: accuracy and latency against the rank of dense layers, in two plots.

A CNN with dense layers of 3000, 2000, 2000, 1000 and 10 is trained once. Then the rank of every dense layer is lowered
from 1.0 to 0.1 times min(S, T), in two forms that compute the same: truncated dense weights, whose cost does not
change, and factorized space, two thin matrices that run as one op. The two curves of accuracy coincide, those of
latency do not. Writes `accuracy.png`, `latency.png` and `ranks.csv` to `--output`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas
import torch
from torch import nn

import lowrank_ops
from examples.workflows import command, data
from examples.workflows.networks import replace_layer
from examples.workflows.training import accuracy, milliseconds, seeded, train

FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
DENSE = (3000, 2000, 2000, 1000)
FORMS = ("truncated dense weights", "factorized space")


def sweep_network(dense: Sequence[int] = DENSE, channels: int = 32, classes: int = 10) -> nn.Sequential:
    """Two convolutions and the dense layers: input `[N, 3, H, W]`, output `[N, classes]`."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(),
    ]  # fmt: skip
    features = 2 * channels * 16
    for count in dense:
        layers += [nn.Linear(features, count), nn.ReLU()]
        features = count
    return nn.Sequential(*layers, nn.Linear(features, classes))


def full_rank(model: nn.Sequential) -> dict[str, lowrank_ops.LowRankLinear]:
    """The SVD of every linear layer at full rank, by the layer's name."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: lowrank_ops.LowRankLinear.from_linear(layer, 1.0, name=name) for name, layer in layers.items()}


def cut(full: lowrank_ops.LowRankLinear, fraction: float) -> lowrank_ops.LowRankLinear:
    """The layer at a fraction of its rank: singular values come in falling order, so the first columns are kept."""
    rank = max(1, round(fraction * full.rank))
    layer = lowrank_ops.LowRankLinear(full.in_features, full.out_features, rank, dtype=full.in_factor.dtype)
    factors = {"in_factor": full.in_factor[:rank], "out_factor": full.out_factor[:, :rank], "bias": full.bias}
    layer.load_state_dict(factors)
    return layer


def at_rank(
    model: nn.Sequential, full: Mapping[str, lowrank_ops.LowRankLinear], fraction: float
) -> dict[str, nn.Sequential]:
    """The network with all linear layers at a fraction of their rank, in both of `FORMS`.

    `factorize_` is not used, because it leaves layers that would not get smaller, which belong to the curve here.
    """
    truncated, factorized = copy.deepcopy(model), copy.deepcopy(model)
    for name in full:
        layer = cut(full[name], fraction)
        replace_layer(truncated, name, lambda _, layer=layer: layer.to_dense())
        replace_layer(factorized, name, lambda _, layer=layer: layer)
    lowrank_ops.fuse_(factorized)  # folds each ReLU into the op before it
    return dict(zip(FORMS, (truncated, factorized), strict=True))


def run(
    dataset: data.Dataset,
    model: nn.Sequential,
    output: Path,
    *,
    fractions: Sequence[float] = FRACTIONS,
    epochs: int = 10,
    learning_rate: float = 3e-4,
    images: int = 32,
    seconds: float = 0.2,
    progress: bool = True,
) -> pandas.DataFrame:
    """Trains `model` in place on images of 3 channels and sweeps its ranks.

    Returns:
        One row per fraction and form: the fraction, the form, the parameters of the dense layers, accuracy on the test
        images, milliseconds per forward pass of `images` of them.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    train(model, data.batches(dataset.train, 64, shuffle=True), optimizer, epochs, progress=progress)
    test = data.batches(dataset.test, 256)
    input, _ = dataset.test.first(images)[:]
    full = full_rank(model)
    swept = {(fraction, form): made for fraction in fractions for form, made in at_rank(model, full, fraction).items()}
    times = milliseconds({f"{fraction} {form}": made for (fraction, form), made in swept.items()}, input, seconds)
    kinds = (nn.Linear, lowrank_ops.LowRankLinear)
    rows = []
    for (fraction, form), made in swept.items():
        layers = [layer for layer in made.modules() if isinstance(layer, kinds)]
        parameters = sum(value.numel() for layer in layers for value in layer.parameters())
        rows.append([fraction, form, parameters, accuracy(made, test), times[f"{fraction} {form}"]])
    table = pandas.DataFrame(rows, columns=["rank fraction", "form", "parameters", "accuracy", "ms"])
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / "ranks.csv", index=False)
    draw(table, "accuracy", "accuracy on the test images", output / "accuracy.png")
    draw(table, "ms", f"ms per forward pass of {len(input)} images, {torch.get_num_threads()} thread(s)",
         output / "latency.png")  # fmt: skip
    return table


def draw(table: pandas.DataFrame, column: str, label: str, path: Path) -> None:
    """Draws one plot: a column against the rank, one line per form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for form, style in zip(FORMS, ("o--", "s-"), strict=True):
        rows = table[table["form"] == form]
        axes.plot(rows["rank fraction"], rows[column], style, label=form)
    axes.set_xlabel("rank of the dense layers / full rank")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser(__doc__, epochs=10)
    parser.add_argument("--output", type=Path, default=Path("rank_sweep_output"), help="folder of plots and table")
    options = parser.parse_args(arguments)
    dataset = command.dataset(parser, options).fitted(3, 32)
    dense, channels = ([count // 10 for count in DENSE], 8) if options.small else (DENSE, 32)
    with seeded():
        model = sweep_network(dense, channels, dataset.classes)
        seconds = 0.02 if options.small else 0.2
        table = run(dataset, model, options.output, epochs=options.epochs, seconds=seconds)
    command.show(table, f"Ranks of dense layers {'-'.join(map(str, dense))}-{dataset.classes} on {dataset.name}")
    print(f"\nWritten to {options.output}/: accuracy.png, latency.png, ranks.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
