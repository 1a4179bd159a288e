"""`python -m benchmarks.plots RESULTS ...`: draws two plots of results of `benchmarks.run`, as PNG.

NAME_speed.png: how many times as fast the fused op is as each of the others, by the size of the layer; below the line
it is slower. NAME_roofline.png: times of the fused op and of its fastest peer against the least possible time, by the
limits measured in the same run; on the line nothing is left to gain. Each plot has one panel per dtype and number of
threads. NAME is that of the first file, and the plots lie beside it unless `--output` says otherwise.

RESULTS are JSON files of `benchmarks.run`, or CSV files with what is drawn, which `--csv FILE` writes.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.core.bench import geometric_mean
from benchmarks.core.cpu_result import CpuResult, cells_of

COLOURS = {
    "chain": "tab:orange", "compile": "tab:green", "onnxruntime": "tab:purple", "openvino": "tab:blue",
    "dense": "tab:gray",
}  # fmt: skip
MARKERS = {"tucker_conv2d": "o", "cp_conv2d": "^", "lowrank_linear": "s"}


class Point(NamedTuple):
    """A cell as it is drawn; times in microseconds."""

    machine: str
    """CPU and version of torch."""
    panel: str
    """dtype and number of threads."""
    op: str
    flops: int
    least: float
    fused: float
    peer: float | None
    """The time of the fastest peer, if there is any."""
    over: dict[str, float]
    """How many times as fast the fused op is as the fastest of each family of contenders."""


Panels = dict[str, list[Point]]


def point(result: CpuResult, machine: str, threads: int) -> Point:
    name = result.fastest("peer")
    ratios = {of: result.over(of) for of in result.families() if of in COLOURS}
    return Point(
        machine,
        f"{result.dtype}, {threads} thread(s)",
        result.cell.op,
        result.cell.flops,
        result.bound * 1e6,
        result.seconds * 1e6,
        None if name is None else result.timings[name].median * 1e6,
        {of: ratio for of, ratio in ratios.items() if ratio is not None},
    )


def points_of(path: Path) -> Iterator[Point]:
    """The cells of a file.

    Raises:
        ValueError: a JSON file without the machine's limits.
    """
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                over = {of: float(row[of]) for of in COLOURS if row[of]}
                numbers = int(row["flops"]), float(row["least"]), float(row["fused"])
                peer = float(row["peer"]) if row["peer"] else None
                yield Point(row["machine"], row["panel"], row["op"], *numbers, peer, over)
        return
    content = json.loads(path.read_text())
    machine = f"{content['machine']['cpu']}, torch {content['versions']['torch']}"
    yield from (point(cell, machine, content["threads"]) for cell in cells_of(content))


def read(paths: Sequence[str | Path]) -> tuple[Panels, str]:
    """The cells of the files by "dtype, threads", and a line that names the machine.

    Raises:
        ValueError: a file without the machine's limits, or of another machine than the first.
    """
    panels: Panels = {}
    first = ""
    for path in paths:
        try:
            points = list(points_of(Path(path)))
        except ValueError as error:
            raise ValueError(f"plots: {path}: {error}") from error
        for made in points:
            first = first or made.machine
            if made.machine != first:
                raise ValueError(f"plots: {path} is of {made.machine}, {paths[0]} of {first}")
            panels.setdefault(made.panel, []).append(made)
    return panels, first


def write(panels: Panels, path: Path) -> None:
    """Writes what is drawn as CSV: times in microseconds, ratios by family of contenders."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Point._fields[:-1], *COLOURS])
        for made in (made for points in panels.values() for made in points):
            peer = "" if made.peer is None else f"{made.peer:.5g}"
            ratios = (f"{made.over[of]:.5g}" if of in made.over else "" for of in COLOURS)
            head = made.machine, made.panel, made.op, made.flops
            writer.writerow([*head, f"{made.least:.5g}", f"{made.fused:.5g}", peer, *ratios])


def speeds(points: Sequence[Point]) -> dict[str, list[tuple[int, float, str]]]:
    """Per family of contenders: (FLOPs of the block, how many times as fast the fused op is, op), sorted by FLOPs."""
    found: dict[str, list[tuple[int, float, str]]] = {}
    for made in sorted(points, key=lambda made: made.flops):
        for of, ratio in made.over.items():
            found.setdefault(of, []).append((made.flops, ratio, made.op))
    return {of: found[of] for of in COLOURS if of in found}


def draw_speeds(panels: Panels, title: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = _panels(panels)
    for axis, (panel, points) in zip(axes, panels.items(), strict=True):
        for of, ratios in speeds(points).items():
            label = f"{of}: {geometric_mean(ratio for _, ratio, _ in ratios):.2f} x"
            _scatter(axis, [(made, flops / 1e6, ratio) for flops, ratio, made in ratios], COLOURS[of], label)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set(title=panel, xscale="log", yscale="log", xlabel="MFLOP of the factorized layer")
        axis.legend(fontsize=8, title="geometric means", title_fontsize=8)
    axes[0].set_ylabel("fused is so many times as fast (below 1: slower)")
    figure.suptitle(f"{title}; circles: Tucker, triangles: CP, squares: linear")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_roofline(panels: Panels, title: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = _panels(panels)
    for axis, (panel, points) in zip(axes, panels.items(), strict=True):
        for name, colour, taken in (
            ("fused", "tab:red", [(p.op, p.least, p.fused) for p in points]),
            ("fastest peer", "tab:blue", [(p.op, p.least, p.peer) for p in points if p.peer is not None]),
        ):
            share = geometric_mean(least / time for _, least, time in taken)
            label = f"{name}: {share:.0%} of the bound"
            _scatter(axis, taken, colour, label, alpha=0.7)
        ends = [min(p.least for p in points), max(p.least for p in points)]
        axis.plot(ends, ends, color="black", linewidth=1)
        axis.set(title=panel, xscale="log", yscale="log", xlabel="us at least, by the machine's limits")
        axis.legend(fontsize=8, title="geometric means", title_fontsize=8)
    axes[0].set_ylabel("us, median")
    figure.suptitle(f"{title}; circles: Tucker, triangles: CP, squares: linear")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _scatter(axis: Any, points: list[tuple[str, float, float]], colour: str, label: str, alpha: float = 1.0) -> None:
    """Draws points (op, x, y), each op with its own marker, with one entry in the legend for all."""
    entry: str | None = label
    for op, marker in MARKERS.items():
        chosen = [(x, y) for made, x, y in points if made == op]
        if chosen:
            axis.scatter(*zip(*chosen, strict=True), s=22, marker=marker, color=colour, label=entry, alpha=alpha)
            entry = None


def _panels(panels: Panels) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (6.5 * columns, 5.0 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for spare in axes.flat[len(panels) :]:
        spare.remove()
    return figure, list(axes.flat[: len(panels)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("results", nargs="+", help="JSON or CSV files of one machine")
    parser.add_argument("--output", metavar="DIR", help="default: beside the first file")
    parser.add_argument("--csv", metavar="FILE", help="also write what is drawn into this file")
    options = parser.parse_args(arguments)
    try:
        panels, title = read(options.results)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not panels:
        print("plots: no cells in there", file=sys.stderr)
        return 2
    if options.csv:
        write(panels, Path(options.csv))
        print(f"wrote {options.csv}")
    first = Path(options.results[0])
    folder = Path(options.output) if options.output else first.parent
    folder.mkdir(parents=True, exist_ok=True)
    for kind, draw in (("speed", draw_speeds), ("roofline", draw_roofline)):
        path = folder / f"{first.stem}_{kind}.png"
        draw(panels, title, path)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
