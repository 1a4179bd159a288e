"""Arithmetic of ours that keeps its tensors' precision in whatever autocast region it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_autocast() -> Iterator[None]:
    """Switches autocast off, on the CPU and the accelerator; as a decorator, for a function. torch.compile reads it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    other = "cpu" if accelerator is None or not torch.amp.is_autocast_available(accelerator.type) else accelerator.type
    with torch.autocast("cpu", enabled=False), torch.autocast(other, enabled=False):  # no ExitStack: it is not read
        yield
