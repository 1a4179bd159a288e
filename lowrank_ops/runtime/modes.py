"""States for the time of a block: a model in eval mode, torch without nested tensors; waiting for a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def synchronize(device: torch.device | None = None) -> None:
    """Waits until an accelerator has done what it was given: that of `device`, or else the current one, if any."""
    if torch.accelerator.is_available() if device is None else device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def no_nested_tensors() -> Iterator[None]:
    """torch's transformers without their fast path, which packs padded sequences into tensors without a shape."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
