"""Random blocks, for `benchmarks.run --random N`: they show problems that no list of networks has.

The lists of layers.py are layers of networks. Users have other shapes: odd channels, long and large windows, tiny
images, ranks close to the channels. The cells drawn here are bounded in work, so that hundreds of them take minutes.
The planner's constants are fitted to some of both kinds (fit_cost.py).
"""

from __future__ import annotations

import random

from benchmarks.core.layers import Cell, Pair

MOST_FLOPS = 1.2e9
FEWEST_FLOPS = 5e4
MOST_VALUES = 12_000_000  # of input and output together

_CHANNELS = [1, 3, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024]
_FEATURES = [10, 64, 128, 192, 256, 384, 512, 768, 1000, 1024, 1536, 2048, 3072, 4096]
_LENGTHS = [1, 4, 7, 8, 14, 16, 28, 32, 56, 64, 80, 112, 113, 150, 224]
_SQUARE: list[Pair] = [(3, 3)] * 8 + [(1, 1), (2, 2), (5, 5), (5, 5), (7, 7), (11, 11)]
_LINES: list[Pair] = [(1, 3), (3, 1), (1, 5), (7, 1), (1, 9), (1, 31), (64, 1), (1, 64)]


def random_cells(count: int, seed: int = 0) -> list[Cell]:
    """`count` cells, the same ones for the same seed: four of ten Tucker, three CP, three linear."""
    source = random.Random(seed)
    found: list[Cell] = []
    while len(found) < count:
        op = source.choices(["tucker_conv2d", "cp_conv2d", "lowrank_linear"], [4, 3, 3])[0]
        cell = _linear(source) if op == "lowrank_linear" else _convolution(source, op)
        if cell is not None and FEWEST_FLOPS <= cell.flops <= MOST_FLOPS:
            found.append(cell)
    return found


def _rank(source: random.Random, most: int) -> int:
    """A rank between a sixteenth and half of `most`, often a multiple of 16.

    More than half of the ranks below 16 become 1, so that more than half of all Tucker blocks have a rank of one:
    libraries run such blocks in many different ways, which a planner foresees least.
    """
    rank = max(1, round(most * source.uniform(1 / 16, 1 / 2)))
    kind = source.random()
    return 1 if kind < 0.05 else max(1, rank // 16 * 16) if kind < 0.6 else rank


def _linear(source: random.Random) -> Cell:
    S, T = source.choice(_FEATURES), source.choice(_FEATURES)
    rows = source.choice([1, 2, 8, 16, 49, 64, 128, 197, 256, 512, 1000, 2048])
    return Cell("lowrank_linear", "random", S, T, _rank(source, min(S, T)), batch=rows, kernel=(1, 1), padding=0)


def _convolution(source: random.Random, op: str) -> Cell | None:
    """None where the window does not fit the image, or the tensors are too large."""
    S, T = source.choice(_CHANNELS), source.choice(_CHANNELS)
    kernel = source.choice(_SQUARE if source.random() < 0.75 else _LINES)
    size = (source.choice(_LENGTHS),) * 2 if source.random() < 0.7 else tuple(source.choices(_LENGTHS, k=2))
    if 64 in kernel and source.random() < 0.7:  # a one-dimensional network
        size = tuple(source.choice([64, 128, 512]) if taps == 64 else 1 for taps in kernel)
    dilation = source.choices([1, 2, 3], [8, 1, 1])[0]
    stride = source.choices([1, 2, 4], [7, 3, 1])[0]
    padding = max(kernel) // 2 * dilation if source.random() < 0.85 else 0
    ranks = _rank(source, S), _rank(source, T)
    rank = ranks if op == "tucker_conv2d" else source.choice([max(ranks), min(S, T)])
    batch = source.choice([1, 1, 2, 8, 32])
    cell = Cell(op, "random", S, T, rank, (size[0], size[1]), batch, kernel, stride, padding, dilation)
    outputs = cell.output_size[0] * cell.output_size[1]
    if min(cell.output_size) < 1 or batch * (S * size[0] * size[1] + T * outputs) > MOST_VALUES:
        return None
    return cell
