"""Context managers that put a model into eval mode and switch torch's nested tensors off; waiting for an
accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def synchronize(device: torch.device | None = None) -> None:
    """Waits until an accelerator has finished its work: the one of `device`, or the current one (if any) for None."""
    if torch.accelerator.is_available() if device is None else device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each module has the mode it had before."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def no_nested_tensors() -> Iterator[None]:
    """Switches off the fast path of torch's transformers, which packs padded sequences into nested tensors: those have
    no shape."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
