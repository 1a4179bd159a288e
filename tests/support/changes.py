"""Changes of a factorized module that calls of the prepared module must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Change = Callable[[Any], object]

CHANGES: dict[str, Change] = {
    "in place": lambda module: module.out_factor.mul_(2),
    "in inference mode": lambda module: torch.inference_mode()(lambda: module.in_factor.mul_(2))(),
    "new parameter": lambda module: setattr(module, "in_factor", nn.Parameter(module.in_factor * 2)),
    "new data": lambda module: setattr(module.in_factor, "data", module.in_factor * 2),
    "load_state_dict": lambda module: module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()}),
    "dtype": lambda module: module.to(torch.bfloat16),
    "train": lambda module: module.train(),
}
