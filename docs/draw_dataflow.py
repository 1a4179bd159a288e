"""`python docs/draw_dataflow.py [FILE]` draws dataflow.png: a dense layer, a chain and a fused op, and their data."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

INPUT, HIDDEN, OUTPUT = "#4C86C6", "#E8923A", "#5BA55B"
TEXT, MEMORY, CACHE, CACHE_EDGE, OP = "#222222", "#ECEEF1", "#FFF6DC", "#D9B64A", "#FFFFFF"
TRAFFIC, WASTE = "#555555", "#C23B3B"

WIDTH = 11.0
INPUT_X, OUTPUT_X = 1.15, 9.85
OPS_X = (2.65, 5.5, 8.35)
STAGES = tuple(name.replace("x", "\N{MULTIPLICATION SIGN}") for name in ("1x1", "KxK", "1x1"))
HIDDEN_X = (4.075, 6.925)
OP_Y, MAP_Y = 1.72, 0.62  # centres, from a panel's bottom
LIFT = 0.07  # of the operations in the cache


def image(axes: Axes, x: float, y: float, layers: int, colour: str, side: float = 0.5) -> None:
    """A feature map: a square with one sheet behind it per few channels."""
    step = 0.05
    for layer in reversed(range(layers)):
        shift = step * (layer - (layers - 1) / 2)
        corner = (x - side / 2 + shift, y - side / 2 + shift)
        axes.add_patch(Rectangle(corner, side, side, facecolor=colour, edgecolor="white", linewidth=0.7, zorder=3))


def tile(axes: Axes, x: float, y: float, layers: int, colour: str) -> None:
    """A tile of a feature map, in the cache."""
    image(axes, x, y, layers, colour, side=0.24)


def tile_of(axes: Axes, x: float, y: float, layers: int) -> None:
    """Marks the tile on the front of a feature map."""
    shift = -0.05 * (layers - 1) / 2
    corner = (x - 0.2 + shift, y - 0.08 + shift)
    axes.add_patch(Rectangle(corner, 0.2, 0.2, facecolor="none", edgecolor="white", linewidth=1.6, zorder=4))


def operation(axes: Axes, x: float, y: float, name: str) -> None:
    box = FancyBboxPatch(
        (x - 0.42, y - 0.2), 0.84, 0.4, boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=OP, edgecolor=TEXT, linewidth=1.1, zorder=3,
    )  # fmt: skip
    axes.add_patch(box)
    axes.text(x, y, name, ha="center", va="center", fontsize=10, color=TEXT, zorder=4)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1.6) -> None:
    made = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=11, linewidth=width, color=colour, shrinkA=0, shrinkB=0, zorder=5
    )
    axes.add_patch(made)


def label(axes: Axes, x: float, y: float, text: str, colour: str = TEXT, **options: object) -> None:
    axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 8.5, "color": colour, **options})  # type: ignore[arg-type]


def panel(axes: Axes, bottom: float, title: str, remark: str, channels: dict[float, str]) -> None:
    """A title, the band of memory, and the names of the maps that lie in it."""
    axes.text(0.1, bottom + 2.42, title, fontsize=11.5, fontweight="bold", color=TEXT, va="center")
    axes.text(WIDTH - 0.1, bottom + 2.42, remark, fontsize=9, color=TEXT, va="center", ha="right")
    axes.add_patch(Rectangle((0.1, bottom), WIDTH - 0.2, 1.08, facecolor=MEMORY, edgecolor="none", zorder=0))
    label(axes, OPS_X[1], bottom + 0.14, "memory", "#666666", style="italic")
    for x, name in channels.items():
        label(axes, x, bottom + 0.14, name)


def read(axes: Axes, bottom: float, source: float, op: float, colour: str = TRAFFIC, lift: float = 0.0) -> None:
    """From a map in memory up into an operation."""
    arrow(axes, (source + 0.45, bottom + MAP_Y + 0.2), (op - 0.25, bottom + OP_Y + lift - 0.22), colour)


def write(axes: Axes, bottom: float, op: float, target: float, colour: str = TRAFFIC, lift: float = 0.0) -> None:
    """From an operation down into a map in memory."""
    arrow(axes, (op + 0.25, bottom + OP_Y + lift - 0.22), (target - 0.45, bottom + MAP_Y + 0.2), colour)


def dense(axes: Axes, bottom: float) -> None:
    panel(
        axes,
        bottom,
        "Dense layer",
        "many multiplications",
        {INPUT_X: "input, S channels", OUTPUT_X: "output, T channels"},
    )
    image(axes, INPUT_X, bottom + MAP_Y, 6, INPUT)
    image(axes, OUTPUT_X, bottom + MAP_Y, 6, OUTPUT)
    operation(axes, OPS_X[1], bottom + OP_Y, STAGES[1])
    read(axes, bottom, INPUT_X, OPS_X[1])
    write(axes, bottom, OPS_X[1], OUTPUT_X)


def chain(axes: Axes, bottom: float) -> None:
    names = {INPUT_X: "input, S", HIDDEN_X[0]: "rank R1", HIDDEN_X[1]: "rank R2", OUTPUT_X: "output, T"}
    panel(axes, bottom, "Chain of three layers", "few multiplications, but intermediates go to memory and back", names)
    image(axes, INPUT_X, bottom + MAP_Y, 6, INPUT)
    for x, layers in zip(HIDDEN_X, (2, 3), strict=True):
        image(axes, x, bottom + MAP_Y, layers, HIDDEN)
    image(axes, OUTPUT_X, bottom + MAP_Y, 6, OUTPUT)
    for x, name in zip(OPS_X, STAGES, strict=True):
        operation(axes, x, bottom + OP_Y, name)
    read(axes, bottom, INPUT_X, OPS_X[0])
    write(axes, bottom, OPS_X[0], HIDDEN_X[0], WASTE)
    read(axes, bottom, HIDDEN_X[0], OPS_X[1], WASTE)
    write(axes, bottom, OPS_X[1], HIDDEN_X[1], WASTE)
    read(axes, bottom, HIDDEN_X[1], OPS_X[2], WASTE)
    write(axes, bottom, OPS_X[2], OUTPUT_X)


def fused(axes: Axes, bottom: float) -> None:
    names = {INPUT_X: "input, S", OUTPUT_X: "output, T"}
    panel(axes, bottom, "Fused op", "few multiplications; a tile passes through all stages in the cache", names)
    left, right = OPS_X[0] - 0.62, OPS_X[2] + 0.62
    cache = FancyBboxPatch(
        (left, bottom + 1.24), right - left, 0.92, boxstyle="round,pad=0,rounding_size=0.14",
        facecolor=CACHE, edgecolor=CACHE_EDGE, linewidth=1.3, zorder=1,
    )  # fmt: skip
    axes.add_patch(cache)
    label(axes, OPS_X[1], bottom + 1.37, "cache, one tile at a time", "#8A6D1B", style="italic", zorder=4)
    image(axes, INPUT_X, bottom + MAP_Y, 6, INPUT)
    image(axes, OUTPUT_X, bottom + MAP_Y, 6, OUTPUT)
    tile_of(axes, INPUT_X, bottom + MAP_Y, 6)
    tile_of(axes, OUTPUT_X, bottom + MAP_Y, 6)
    for x, name in zip(OPS_X, STAGES, strict=True):
        operation(axes, x, bottom + OP_Y + LIFT, name)
    for x, layers, name in zip(HIDDEN_X, (2, 3), ("R1", "R2"), strict=True):
        tile(axes, x, bottom + OP_Y + LIFT, layers, HIDDEN)
        label(axes, x, bottom + OP_Y - 0.2, name, zorder=4)
    stops = (OPS_X[0], HIDDEN_X[0], OPS_X[1], HIDDEN_X[1], OPS_X[2])
    for start, end in itertools.pairwise(stops):
        near, far = (0.46, 0.24) if start in OPS_X else (0.24, 0.46)
        arrow(axes, (start + near, bottom + OP_Y + LIFT), (end - far, bottom + OP_Y + LIFT), HIDDEN)
    read(axes, bottom, INPUT_X, OPS_X[0], lift=LIFT)
    write(axes, bottom, OPS_X[2], OUTPUT_X, lift=LIFT)


def draw(path: Path) -> None:
    figure = pyplot.figure(figsize=(8, 6.1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(-0.2, 8.3)
    axes.axis("off")
    for draw_panel, bottom in ((dense, 5.6), (chain, 2.75), (fused, -0.1)):
        draw_panel(axes, bottom)
    figure.savefig(path, dpi=200, facecolor="white")
    pyplot.close(figure)
    with Image.open(path) as drawn:  # a palette: a third of the bytes
        few = drawn.convert("RGB").quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("dataflow.png"))
