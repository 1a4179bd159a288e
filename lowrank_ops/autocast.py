"""Arithmetic of ours that keeps its tensors' precision in whatever autocast region it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def no_autocast() -> Iterator[None]:
    """Switches autocast off, on the CPU and the accelerator; as a decorator, for a function."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    with ExitStack() as stack:
        for device in ("cpu", *([] if accelerator is None else [accelerator.type])):
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
