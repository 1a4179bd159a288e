"""Arithmetic that keeps the precision of its tensors, whatever autocast region it is called in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_autocast() -> Iterator[None]:
    """Context manager or decorator: autocast is off inside, on the CPU and on the accelerator. torch.compile can trace
    it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    other = "cpu" if accelerator is None or not torch.amp.is_autocast_available(accelerator.type) else accelerator.type
    # Not an ExitStack: torch.compile cannot trace it.
    with torch.autocast("cpu", enabled=False), torch.autocast(other, enabled=False):
        yield
