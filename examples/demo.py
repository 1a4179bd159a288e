"""`python -m examples.demo`: a trained network, dense against factorized, as `make demo` runs it.

The environment variable DEMO chooses the network: text (default: the recogniser english_g2), craft (the detector) or
digits (a CNN that is trained here in seconds, used also if the trained weights are not installed).

The demo prints the metric of the dense and of the factorized network, the table of layers, and latencies, measured in
turns in one run: of the dense network, of the factorized one as a chain of library layers, and of the factorized one on
the fused ops, the last two with the same factors. It writes the tables and a bar chart to `demo_output/`.

If torch finds a GPU, the networks run there, both called from Python and replayed from a CUDA graph.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lowrank_ops
from benchmarks.core.bench import Timing, machine, time_interleaved
from benchmarks.core.graphs import Captured
from benchmarks.gpu import timing as gpu
from examples.tasks import Task, load

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Latency:
    """One line of the latency table."""

    network: str
    """dense, chain or fused."""
    layout: str
    """NCHW or channels_last; followed by "graph" if it was replayed from a CUDA graph."""
    dtype: str
    timing: Timing

    @property
    def milliseconds(self) -> float:
        return self.timing.median * 1e3


def unfused(model: nn.Module) -> nn.Module:
    """A copy of a factorized model that runs each fused module as its chain of library layers."""
    chain = copy.deepcopy(model)
    kinds = (
        lowrank_ops.TuckerConv2d, lowrank_ops.CPConv2d, lowrank_ops.LowRankLinear,
        lowrank_ops.TuckerConv1d, lowrank_ops.CPConv1d,
    )  # fmt: skip
    for name, module in list(chain.named_modules()):
        if isinstance(module, kinds):
            parent, _, child = name.rpartition(".")
            setattr(chain.get_submodule(parent), child, module.to_sequential())
    return chain


def measure_latency(dense: nn.Module, factorized: nn.Module, input: Tensor, seconds: float = 0.5) -> list[Latency]:
    """Times dense and chain in both layouts and fused in channels_last, in turns, in fp32 and then in bf16.

    On a GPU, the time of a call on an idle GPU, launches included; in channels_last also the time as a CUDA graph.
    """
    lines = []
    for dtype_name, dtype in DTYPES.items():
        runs: dict[str, Callable[[], Tensor]] = {}
        for network, model, layouts in (
            ("dense", dense, FORMATS),
            ("chain", unfused(factorized), FORMATS),
            ("fused", factorized, ("channels_last",)),
        ):
            for layout in layouts:
                placed = copy.deepcopy(model).to(dtype=dtype)
                placed = placed.to(memory_format=FORMATS[layout])  # type: ignore[call-overload]
                image = input.to(dtype).contiguous(memory_format=FORMATS[layout])
                run = functools.partial(placed, image)
                runs[f"{network}, {layout}"] = run
                if input.is_cuda and layout == "channels_last":
                    runs[f"{network}, {layout} graph"] = Captured(run)
        with torch.inference_mode():
            timings = time_calls(runs, seconds, input.device)
        for name, timing in timings.items():
            network, layout = name.split(", ")
            lines.append(Latency(network, layout, dtype_name, timing))
    return lines


def time_calls(runs: dict[str, Callable[[], Tensor]], seconds: float, device: torch.device) -> dict[str, Timing]:
    """Times the calls in turns, for `seconds` per call on a CPU and half of that on a GPU."""
    if device.type == "cpu":
        return time_interleaved(runs, seconds=seconds)
    found = gpu.time_on(gpu.CudaDevice(), runs, seconds=seconds * len(runs) / 2)
    return {name: timing.call for name, timing in found.items()}


def fastest(lines: Sequence[Latency], network: str, dtype: str) -> Latency:
    """The faster layout of a network in a dtype."""
    found = [line for line in lines if (line.network, line.dtype) == (network, dtype)]
    return min(found, key=lambda line: line.milliseconds)


def verdict(lines: Sequence[Latency], other: str, dtype: str) -> str:
    """The speed of the fused network relative to another one, as a phrase."""
    ratio = fastest(lines, other, dtype).milliseconds / fastest(lines, "fused", dtype).milliseconds
    return f"{ratio:.2f} times as fast as the {other}" + (" (slower)" if ratio < 1 else "")


def latency_rows(lines: Sequence[Latency]) -> list[list[str]]:
    """The rows of the latency table, under `LATENCY_TITLES`; ratios are between lines of the same dtype."""
    rows = []
    for line in lines:
        over = [fastest(lines, other, line.dtype).milliseconds / line.milliseconds for other in ("dense", "chain")]
        figures = [f"{value:.2f}" for value in (line.milliseconds, *over)]
        rows.append([line.network, line.layout, line.dtype, *figures])
    return rows


LATENCY_TITLES = ["network", "layout", "dtype", "ms", "x fastest dense", "x fastest chain"]


def markdown(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in markdown, its columns padded so that it also reads well in a terminal."""
    texts = [[str(value) for value in row] for row in (titles, *rows)]
    widths = [max(len(row[index]) for row in texts) for index in range(len(titles))]
    padded = [[value.ljust(width) for value, width in zip(row, widths, strict=True)] for row in texts]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def draw_chart(path: Path, task: Task, report: lowrank_ops.Report, lines: Sequence[Latency], threads: int) -> None:
    """Draws bars: the latency of the whole network on the left, milliseconds per layer on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    place_name = "GPU" if task.example_input.is_cuda else f"{threads} thread(s)"
    colours = {"dense": "tab:gray", "chain": "tab:orange", "fused": "tab:blue"}
    for place, (network, colour) in enumerate(colours.items()):
        heights = [fastest(lines, network, dtype).milliseconds for dtype in DTYPES]
        positions = [x + 0.27 * (place - 1) for x in range(len(DTYPES))]
        bars = left.bar(positions, heights, 0.25, color=colour, label=network)
        left.bar_label(bars, fmt="%.1f")
    left.set_xticks(range(len(DTYPES)), list(DTYPES))
    left.set_ylabel("ms per call, median")
    left.set_title(f"whole network, {place_name}, the fastest way of each")
    left.legend()
    layers = [layer for layer in report.layers if layer.milliseconds_before is not None]
    for network, shift, column in (
        ("dense", -0.2, "milliseconds_before"),
        ("fused", 0.2, "milliseconds_after"),
    ):
        heights = [getattr(layer, column) for layer in layers]
        positions = [y + shift for y in range(len(layers))]
        right.barh(positions, heights, 0.38, color=colours[network], label=network)
    right.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
    right.invert_yaxis()
    right.set_xlabel("ms per call, fp32")
    right.set_title("layer by layer")
    right.legend()
    figure.suptitle(task.title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def run(task: Task, output: Path, seconds: float = 0.5) -> dict[str, float]:
    """Runs the whole demo on a task, prints it, and writes `layers.md`, `layers.csv`, `latency.md`, `latency.csv` and
    `chart.png` to `output`.

    Returns:
        By name, the metric of the dense network and of the factorized one in fp32 and in bf16.
    """
    threads = torch.get_num_threads()
    on_gpu = task.example_input.is_cuda
    place = torch.cuda.get_device_name() if on_gpu else f"{machine()['cpu']}, {threads} thread(s)"
    print(f"{task.title}\n{place}, torch {torch.__version__}\n", flush=True)
    dense = copy.deepcopy(task.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    factorized = copy.deepcopy(dense)
    report = lowrank_ops.factorize_(factorized, example_input=task.example_input, **task.options)
    options = ", ".join(f"{name}={value}" for name, value in task.options.items())
    print(f"{report}\nfactorize_ with {options}; no fine-tuning\n", flush=True)

    metrics = {
        "dense, fp32": task.evaluate(dense),
        "factorized, fp32": task.evaluate(factorized),
        "factorized, bf16": task.evaluate(copy.deepcopy(factorized).bfloat16()),
    }
    metrics_table = markdown(["network", task.metric], [[name, task.shown(x)] for name, x in metrics.items()])
    print(f"{metrics_table}\n", flush=True)

    lines = measure_latency(dense, factorized, task.example_input, seconds)
    shape = "x".join(map(str, task.example_input.shape))
    caption = f"Latency of the whole network, input {shape}, {place}, interleaved, medians:"
    latency_table = markdown(LATENCY_TITLES, latency_rows(lines))
    print(f"{caption}\n{latency_table}")
    for dtype in DTYPES:
        print(f"{dtype}: fused is {verdict(lines, 'dense', dtype)} and {verdict(lines, 'chain', dtype)}.")

    output.mkdir(parents=True, exist_ok=True)
    frame = report.to_pandas()
    frame.to_csv(output / "layers.csv", index=False)
    (output / "layers.md").write_text(f"# {task.title}\n\n{markdown(list(frame.columns), frame.values.tolist())}\n")
    (output / "latency.md").write_text(f"# {task.title}\n\n{metrics_table}\n\n{caption}\n\n{latency_table}\n")
    csv = [",".join(LATENCY_TITLES), *(",".join(row) for row in latency_rows(lines))]
    (output / "latency.csv").write_text("\n".join(csv) + "\n")
    draw_chart(output / "chart.png", task, report, lines, threads)
    print(f"\nWritten to {output}/: layers.md, layers.csv, latency.md, latency.csv, chart.png")
    return metrics


def main() -> int:
    try:
        task, note = load(os.environ.get("DEMO", "text"))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if note:
        print(f"{note}\n")
    run(task.on("cuda") if torch.cuda.is_available() else task, Path("demo_output"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
