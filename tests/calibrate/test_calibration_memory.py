"""Memory that calibration takes for wide layers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PEAK = """
import torch
from torch import nn
from lowrank_ops import factorize_
torch.set_num_threads(1)
def factorize(width, rows):
    model = nn.Sequential(nn.Linear(width // 4, width), nn.ReLU(), nn.Linear(width, width // 4))
    batches = list(torch.randn(rows, width // 4).split(rows // 4))
    before = status("VmRSS")
    factorize_(model, rank=0.25, calibration=batches, progress=False)
    return before
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
factorize(600, 64)  # more than a panel: the libraries' own buffers
before = factorize(2048, 128)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_few_wide_layers_take_twice_the_model_and_the_moments_of_one() -> None:
    """The model is half of a square matrix of 2048 features, the triangles of a layer's moments are another half; rows,
    factors and the libraries' own buffers take about as much as the square."""
    # Every large tensor is a mapping of its own, given back when freed: the peak is what lives at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-W", "ignore", "-c", _PEAK]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    square = 4 * 2048**2
    assert square <= int(result.stdout) < 3.5 * square
