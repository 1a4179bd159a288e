"""`python -m benchmarks.plots RESULTS.json ...`: draws two plots of results of `benchmarks.run`, as PNG.

NAME_speed.png: how many times as fast the fused op is as each of the others, by the size of the layer; below the line
it is slower. NAME_roofline.png: times of the fused op and of its fastest peer against the least possible time, by the
limits measured in the same run; on the line nothing is left to gain. Each plot has one panel per dtype and number of
threads. NAME is that of the first file, and the plots lie beside it unless `--output` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.core.bench import geometric_mean
from benchmarks.core.cpu_result import CpuResult, cells_of

COLOURS = {
    "chain": "tab:orange", "compile": "tab:green", "onnxruntime": "tab:purple", "openvino": "tab:blue",
    "dense": "tab:gray",
}  # fmt: skip
MARKERS = {"tucker_conv2d": "o", "cp_conv2d": "^", "lowrank_linear": "s"}
Groups = dict[str, list[CpuResult]]


def read(paths: Sequence[str | Path]) -> tuple[Groups, str]:
    """The cells of the files by "dtype, threads", and a line that names the machine.

    Raises:
        ValueError: a file without the machine's limits, or of another machine than the first.
    """
    groups: Groups = {}
    machines = []
    for path in paths:
        content = json.loads(Path(path).read_text())
        machines.append(f"{content['machine']['cpu']}, torch {content['versions']['torch']}")
        if machines[-1] != machines[0]:
            raise ValueError(f"plots: {path} is of {machines[-1]}, {paths[0]} of {machines[0]}")
        try:
            cells = cells_of(content)
        except ValueError as error:
            raise ValueError(f"plots: {path}: {error}") from error
        for cell in cells:
            groups.setdefault(f"{cell.dtype}, {content['threads']} thread(s)", []).append(cell)
    return groups, machines[0]


def speeds(results: Sequence[CpuResult]) -> dict[str, list[tuple[int, float, str]]]:
    """Per family of contenders: (FLOPs of the block, how many times as fast the fused op is, op), sorted by FLOPs."""
    found: dict[str, list[tuple[int, float, str]]] = {}
    for result in sorted(results, key=lambda result: result.cell.flops):
        for of in result.families():
            ratio = result.over(of)
            if of in COLOURS and ratio is not None:
                found.setdefault(of, []).append((result.cell.flops, ratio, result.cell.op))
    return {of: found[of] for of in COLOURS if of in found}


class Point(NamedTuple):
    """A cell's times in microseconds."""

    least: float
    fused: float
    peer: float | None
    """The time of the fastest peer, if there is any."""
    op: str


def times(results: Sequence[CpuResult]) -> list[Point]:
    found = []
    for result in results:
        name = result.fastest("peer")
        peer = None if name is None else result.timings[name].median * 1e6
        found.append(Point(result.bound * 1e6, result.seconds * 1e6, peer, result.cell.op))
    return found


def draw_speeds(groups: Groups, title: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = _panels(groups)
    for axis, (group, results) in zip(axes, groups.items(), strict=True):
        for of, points in speeds(results).items():
            label = f"{of}: {geometric_mean(ratio for _, ratio, _ in points):.2f} x"
            _scatter(axis, [(made, flops / 1e6, ratio) for flops, ratio, made in points], COLOURS[of], label)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set(title=group, xscale="log", yscale="log", xlabel="MFLOP of the factorized layer")
        axis.legend(fontsize=8, title="geometric means", title_fontsize=8)
    axes[0].set_ylabel("fused is so many times as fast (below 1: slower)")
    figure.suptitle(f"{title}; circles: Tucker, triangles: CP, squares: linear")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_roofline(groups: Groups, title: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = _panels(groups)
    for axis, (group, results) in zip(axes, groups.items(), strict=True):
        points = times(results)
        for name, colour, taken in (
            ("fused", "tab:red", [(p.op, p.least, p.fused) for p in points]),
            ("fastest peer", "tab:blue", [(p.op, p.least, p.peer) for p in points if p.peer is not None]),
        ):
            share = geometric_mean(least / time for _, least, time in taken)
            label = f"{name}: {share:.0%} of the bound"
            _scatter(axis, taken, colour, label, alpha=0.7)
        ends = [min(p.least for p in points), max(p.least for p in points)]
        axis.plot(ends, ends, color="black", linewidth=1)
        axis.set(title=group, xscale="log", yscale="log", xlabel="us at least, by the machine's limits")
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


def _panels(groups: Groups) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    size = (6.5 * columns, 5.0 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for spare in axes.flat[len(groups) :]:
        spare.remove()
    return figure, list(axes.flat[: len(groups)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("results", nargs="+", help="JSON files of one machine")
    parser.add_argument("--output", metavar="DIR", help="default: beside the first file")
    options = parser.parse_args(arguments)
    try:
        groups, title = read(options.results)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not groups:
        print("plots: no cells in there", file=sys.stderr)
        return 2
    first = Path(options.results[0])
    folder = Path(options.output) if options.output else first.parent
    folder.mkdir(parents=True, exist_ok=True)
    for kind, draw in (("speed", draw_speeds), ("roofline", draw_roofline)):
        path = folder / f"{first.stem}_{kind}.png"
        draw(groups, title, path)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
