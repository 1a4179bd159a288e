"""The policy, by which each call is run by a fused kernel or by the chain of library ops: `set_policy`, `policy`."""

from __future__ import annotations

from types import TracebackType

from lowrank_ops.ops.extension import _C

POLICIES = ("auto", "fused", "chain", "measure")


class set_policy:
    """Chooses between the fused kernels and the chain of library ops, for the whole process.

    As a function, `set_policy("fused")` stays in force; as a context manager, `with set_policy("fused"):` puts
    the former policy back at the end.

    Args:
        name: one of

            * "auto" (default): whichever the planner's cost model predicts to be faster. On a GPU it compares the
              longer of the GPU's time and the CPU's time for launches; inside a CUDA graph, whose replay launches no
              single kernels, the GPU's time alone.
            * "fused": always this package's kernels, where one can run the call.
            * "chain": always the library ops.
            * "measure": the first time that a shape is met on a device (on a CPU: with this number of threads), every
              kernel that can run it and the chain are timed on the caller's tensors, and the fastest is remembered, for
              the last 4,096 shapes. Nothing is measured while torch.compile or torch.export traces or a CUDA graph is
              captured. See `save_measurements`, `load_measurements`, `forget_measurements`.

    Raises:
        ValueError: an unknown name.
        TypeError: `name` is no str.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"set_policy: name must be a str, one of {', '.join(POLICIES)}, got {name!r}")
        self._former: str = _C.get_policy()
        _C.set_policy(name)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _C.set_policy(self._former)


def policy() -> str:
    """The policy in force: one of auto, fused, chain, measure."""
    name: str = _C.get_policy()
    return name
