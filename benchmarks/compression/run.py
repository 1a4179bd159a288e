"""`python -m benchmarks.compression.run`: the accuracy and the speed of trained networks after factorization.

Two questions per network, answered on data that no fit has seen:

* "cut", at a given number of times fewer multiplications: one ratio everywhere from the weights alone; ranks for a
  `Budget`; the same calibrated; the same also distilled, in those of the given minutes that calibration left. Each row
  has its minutes and the 95 % interval (paired bootstrap over samples) of the difference to the dense network.
* "latency", at equal measured latency: `Budget(latency=...)` against one ratio everywhere and against VBMF's ranks, all
  calibrated on the same data.

Latencies are medians, of dense and compressed networks interleaved in one run, with the given number of threads.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lowrank_ops
from benchmarks.compression.subjects import Subject, load
from benchmarks.core import bench
from lowrank_ops import Budget
from lowrank_ops.budget.menu import Block, empty_module
from lowrank_ops.compress.selection import is_narrow
from lowrank_ops.decompose.ranks import linear_rank, tucker_ranks
from lowrank_ops.model.example import Example
from lowrank_ops.nn.counts import count_macs, count_parameters
from lowrank_ops.nn.plain import is_matrix

KINDS: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("one ratio everywhere", "o", lambda method: method.startswith("ratio")),
    ("VBMF", "s", lambda method: method == "VBMF"),
    ("Budget(latency)", "^", lambda method: method.startswith("budget")),
)


@dataclass(frozen=True)
class Row:
    """One compressed network.

    Attributes:
        network, question, method: names.
        metric, dense: the metric on the judged data, of this network and of the dense one; low is good.
        low, high: 95 % interval of `metric - dense`.
        macs, parameters: how many times fewer than the dense network's.
        speedup: dense latency over this one's.
        minutes: time that factorization and distillation took.
    """

    network: str
    question: str
    method: str
    metric: float
    dense: float
    low: float
    high: float
    macs: float
    parameters: float
    speedup: float
    minutes: float


class Study:
    """The rows of one network."""

    def __init__(self, subject: Subject, seconds: float) -> None:
        self.subject, self.seconds = subject, seconds
        self.rows: list[Row] = []
        self.errors, self.weights = subject.score(subject.dense)

    def at_equal_multiplications(self, minutes: float) -> None:
        """Answers the first question, with `minutes` for calibration and distillation together."""
        subject = self.subject
        ratio = self._ratio_for(subject.cut)
        budget = Budget(macs=1 / subject.cut, example_input=subject.example_input)
        self._judge("cut", f"weights, ratio {ratio:.3f}", *self._compressed(rank=ratio))
        self._judge("cut", "weights, budget", *self._compressed(rank=budget))
        self._judge(
            "cut", f"calibrated, ratio {ratio:.3f}", *self._compressed(rank=ratio, calibration=subject.calibration)
        )
        student, spent = self._compressed(rank=budget, calibration=subject.calibration)
        self._judge("cut", "calibrated, budget", student, spent)
        if spent >= minutes:
            print(f"{subject.name}: calibration took {spent:.2f} minutes and left none for distillation", flush=True)
            return
        started = time.perf_counter()
        student.requires_grad_(True)
        options: Any = {"minutes": minutes - spent, "progress": False, **subject.distillation}
        lowrank_ops.distill_(student, subject.dense, subject.training, **options)
        spent += (time.perf_counter() - started) / 60
        self._judge("cut", "calibrated, budget, distilled", student.requires_grad_(False), spent)

    def at_equal_latency(self, ratios: Sequence[float]) -> None:
        """Answers the second question. A rival and the budget that must be as fast are timed in one run."""
        subject = self.subject
        rivals = {"VBMF": lowrank_ops.VBMF(), **{f"ratio {ratio}": ratio for ratio in ratios}}
        for name, rank in rivals.items():
            made = {name: self._compressed(rank=rank, calibration=subject.calibration)}
            speedup = self._speedups({name: made[name][0]})[name]
            if speedup <= 1:
                print(f"{subject.name}: {name} is no faster than the dense network", flush=True)
            else:
                budget = Budget(latency=1 / speedup, example_input=subject.example_input)
                try:
                    made[f"budget, as fast as {name}"] = self._compressed(
                        rank=budget, method="auto", calibration=subject.calibration
                    )
                except ValueError as error:  # the replaceable layers do not suffice; the message says by how much
                    print(f"{subject.name}: as fast as {name}: {error}", flush=True)
            speedups = self._speedups({method: model for method, (model, _) in made.items()})
            for method, (model, minutes) in made.items():
                self._judge("latency", method, model, minutes, speedups[method])

    def _speedups(self, models: Mapping[str, nn.Module]) -> dict[str, float]:
        """The dense network's latency over each model's, all interleaved in one run."""
        example = self.subject.example_input
        functions = {name: functools.partial(model, example) for name, model in models.items()}
        with torch.inference_mode():
            times = bench.time_interleaved(
                {"dense": functools.partial(self.subject.dense, example), **functions}, seconds=self.seconds
            )
        return {name: times["dense"].median / times[name].median for name in models}

    def _compressed(self, **options: Any) -> tuple[nn.Module, float]:
        """A compressed copy of the network, and the minutes that it took."""
        model = copy.deepcopy(self.subject.dense)
        started = time.perf_counter()
        lowrank_ops.factorize_(model, progress=False, **options)
        return model, (time.perf_counter() - started) / 60

    def _judge(
        self, question: str, method: str, model: nn.Module, minutes: float, speedup: float | None = None
    ) -> None:
        dense, example = self.subject.dense, self.subject.example_input
        errors, weights = self.subject.score(model)
        low, high = interval(errors - self.errors, weights)
        row = Row(
            self.subject.name,
            question,
            method,
            float(errors.sum() / weights.sum()),
            float(self.errors.sum() / self.weights.sum()),
            low,
            high,
            macs_of(dense, example) / macs_of(model, example),
            count_parameters(dense) / count_parameters(model),
            speedup or self._speedups({method: model})[method],
            minutes,
        )
        self.rows.append(row)
        print(
            f"{row.network:8}{row.method:36} {row.metric:.4f} (dense {row.dense:.4f}, "
            f"{row.low:+.4f} to {row.high:+.4f}) {row.macs:5.2f}x fewer MACs {row.speedup:5.2f}x faster "
            f"{row.minutes:5.2f} min",
            flush=True,
        )

    def _ratio_for(self, cut: float) -> float:
        """The share of the channels, in all layers but narrow ones, that leaves 1 / `cut` of the multiplications."""
        dense = self.subject.dense
        layers = [layer for layer in dense.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        calls = Example(dense, self.subject.example_input).record(layers)

        def macs(ratio: float) -> float:
            total = 0
            for layer in layers:
                module = _block(layer, ratio)
                smaller = all(count(module) < count(layer) for count in (count_macs, count_parameters))  # type: ignore[operator]
                chosen = module if smaller and not is_narrow(layer) else layer
                total += calls.of(layer).total(lambda shape, chosen=chosen: count_macs(chosen, shape)) or 0  # type: ignore[misc]
            return total

        low, high, target = 0.02, 1.0, macs_of(dense, self.subject.example_input) / cut
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (low, middle) if macs(middle) > target else (middle, high)
        return round(low, 3)


def _block(layer: Any, ratio: float) -> nn.Module:
    """The module that `factorize_(rank=ratio)` replaces a layer by, without values."""
    if is_matrix(layer):
        return empty_module(layer, Block("svd", linear_rank(ratio, layer.weight.flatten(1))))
    return empty_module(layer, Block("tucker", tucker_ranks(ratio, layer.weight)))


def interval(differences: np.ndarray, weights: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of (sum of differences / sum of weights), by bootstrap over samples."""
    picks = np.random.default_rng(0).integers(0, len(differences), (draws, len(differences)))
    low, high = np.quantile(differences[picks].sum(1) / weights[picks].sum(1), (0.025, 0.975))
    return float(low), float(high)


def macs_of(model: nn.Module, example_input: torch.Tensor) -> float:
    """Multiply-accumulates of the convolution, linear and factorized layers in a forward pass."""
    layers = [layer for layer in model.modules() if count_macs(layer) is not None]
    calls = Example(model, example_input).record(layers)
    total = 0
    for layer in layers:
        total += calls.of(layer).total(lambda shape, layer=layer: count_macs(layer, shape)) or 0  # type: ignore[misc]
    return float(total)


def table_of(rows: Sequence[Row]) -> Table:
    table = Table(title="compressed networks, judged on data that no fit has seen")
    for column in (
        "network",
        "method",
        "metric",
        "dense",
        "difference (95 %)",
        "MACs",
        "parameters",
        "faster",
        "minutes",
    ):
        table.add_column(column, justify="left" if column in ("network", "method") else "right")
    for row in rows:
        table.add_row(
            row.network, row.method, f"{row.metric:.4f}", f"{row.dense:.4f}", f"{row.low:+.4f} to {row.high:+.4f}",
            f"{row.macs:.2f}x", f"{row.parameters:.2f}x", f"{row.speedup:.2f}x", f"{row.minutes:.1f}",
        )  # fmt: skip
    return table


def kept(
    path: Path | None, networks: Sequence[str], asked: Sequence[str], threads: int
) -> tuple[list[Row], dict[str, str]]:
    """The rows of a results file about other networks or in answer to other questions, and its samples.

    Raises:
        ValueError: it was measured on another machine or with another number of threads.
    """
    if path is None or not path.exists():
        return [], {}
    content = json.loads(path.read_text())
    found, here = (content["machine"]["cpu"], content["threads"]), (bench.machine()["cpu"], threads)
    if found != here:
        raise ValueError(f"--json: {path} was measured on {found[0]} with {found[1]} thread(s); give another file")
    rows = [Row(**row) for row in content["rows"]]
    return [row for row in rows if row.network not in networks or row.question not in asked], content["samples"]


def draw(rows: Sequence[Row], samples: Mapping[str, str], title: str, path: Path) -> None:
    """Draws the metric against the measured speed-up of the rows at equal latency, one panel per network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.question == "latency"]
    networks = list(dict.fromkeys(row.network for row in shown))
    # 8 inches for three networks: the letters must be legible where a README shows it 800 pixels wide.
    figure, axes = pyplot.subplots(
        1, len(networks), figsize=(8 / 3 * len(networks), 3.3), layout="constrained", squeeze=False
    )
    for axis, network in zip(axes[0], networks, strict=True):
        for label, marker, chosen in KINDS:
            points = sorted((row.speedup, row.metric) for row in shown if row.network == network and chosen(row.method))
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, label=label)
        dense = next(row.dense for row in shown if row.network == network)
        axis.axhline(dense, color="black", linewidth=1, label="dense")
        axis.set_title("\n".join(textwrap.wrap(f"{network}: {samples[network]}", 38)), fontsize=8)
        axis.set_xlabel("times as fast as the dense network", fontsize=9)
        axis.set_ylim(bottom=-0.03 * axis.get_ylim()[1])
        axis.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("error: low is good", fontsize=9)
    known = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=len(known), fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=200)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compression.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=["text", "craft", "fashion"], help="text, craft, fashion")
    parser.add_argument("--question", choices=["cut", "latency", "both"], default="both")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, default=3.0, help="for calibration and distillation together")
    parser.add_argument("--ratios", type=float, nargs="+", help="of the channels, tried at equal latency")
    parser.add_argument("--seconds", type=float, default=1.0, help="measured per network")
    parser.add_argument("--json", type=Path, help="write the rows there, beside those of other networks and questions")
    parser.add_argument("--plot", type=Path, help="draw the metric against the speed-up there (PNG)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    asked = [question for question in ("cut", "latency") if arguments.question in (question, "both")]
    rows, samples = kept(arguments.json, arguments.networks, asked, arguments.threads)
    for name in arguments.networks:
        subject = load(name, arguments.data)
        samples[name] = f"{subject.metric} on {subject.samples}"
        print(f"{name}: {samples[name]}", flush=True)
        study = Study(subject, arguments.seconds)
        if "cut" in asked:
            study.at_equal_multiplications(arguments.minutes)
        if "latency" in asked:
            study.at_equal_latency(arguments.ratios or subject.ratios)
        rows += study.rows
        if arguments.json is not None:
            content = {"machine": bench.machine(), "versions": bench.versions(), "threads": arguments.threads,
                       "samples": samples, "rows": [asdict(row) for row in rows]}  # fmt: skip
            bench.write_json(arguments.json, content)
    Console(width=150).print(table_of(rows))
    if arguments.plot is not None and any(row.question == "latency" for row in rows):
        title = f"{bench.machine()['cpu']}, {arguments.threads} thread(s), torch {torch.__version__}"
        draw(rows, samples, title, arguments.plot)


if __name__ == "__main__":
    main()
