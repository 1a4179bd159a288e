"""What torch tells by private names or attributes alone: here, and nowhere else in the package."""

from __future__ import annotations

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 makes of parameters; torch may be built without torch.distributed."""
    return hasattr(tensor, "full_tensor")
