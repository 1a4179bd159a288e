"""`python -m benchmarks.studies.calibration_memory [--network wide|blocks]`: the memory that calibration takes in
`factorize_`, against the size of the model. Takes minutes of one core (wide), or a quarter of an hour (blocks)."""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops
from benchmarks.core import bench
from benchmarks.core.resident import reset_peak, resident

ROWS = 1024


class Block(nn.Module):
    """A transformer block without norms: six linear layers, 12 width^2 weights. `[tokens, width]` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(0, 1) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1))
        return x + self.down(F.gelu(self.up(x)))


def network(name: str, blocks: int) -> tuple[nn.Sequential, int]:
    """The model and the number of its input features."""
    if name == "wide":
        return nn.Sequential(nn.Linear(2048, 8192), nn.GELU(), nn.Linear(8192, 2048)), 2048
    return nn.Sequential(*(Block(1024, heads=16) for _ in range(blocks))), 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=("wide", "blocks"), default="wide")
    parser.add_argument("--blocks", type=int, default=8, help="of 48 MiB each (default: 8)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, features = network(arguments.network, arguments.blocks)
    model.eval().requires_grad_(False)
    rows = torch.randn(ROWS, features)
    with torch.inference_mode():
        model(rows)  # what the first call of a process allocates is not counted
    layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    size = sum(parameter.nbytes for parameter in model.parameters())
    reset_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    lowrank_ops.factorize_(model, linear=0.25, calibration=[rows], progress=False)
    seconds, growth = time.perf_counter() - start, resident("VmHWM") - before
    machine, versions = bench.machine(), bench.versions()
    print(f"{machine['cpu']}, torch {versions['torch']}, 1 thread, {ROWS} rows, fp32")
    print(f"{layers} layers, {size / 2**20:.0f} MiB: grew by {growth / 2**20:.0f} MiB at most, {seconds:.0f} s")


if __name__ == "__main__":
    main()
