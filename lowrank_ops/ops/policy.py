"""Which path the ops take: the policy, as a function or for the time of a block."""

from __future__ import annotations

from types import TracebackType

from lowrank_ops.ops.extension import _C

POLICIES = ("auto", "fused", "chain", "measure")


class set_policy:
    """Chooses between the fused kernels and the chain of library ops, for the whole process.

    As a function, ``set_policy("fused")`` stays in force; as a context manager, ``with set_policy("fused"):`` puts
    the former policy back at the end.

    Args:
        name: "auto" (default): what the planner's cost model predicts to be faster (on a GPU by the longer of the GPU's
            time and the CPU's launches; in CUDA graphs, which launch nothing, by the GPU's time); "fused": always our
            kernels, where there are any; "chain": always the library ops; "measure": every kernel that can run and the
            chain are timed the first time a shape is met on a device (for this number of threads on a CPU), and the
            fastest is remembered (of 4,096 shapes, the oldest are forgotten first; `forget_measurements` forgets all);
            `save_measurements` and `load_measurements` keep it in a file. Measuring runs the candidates on the caller's
            tensors; it never happens while torch.compile or torch.export traces, nor while a CUDA graph is captured.

    Raises:
        ValueError: an unknown name.
        TypeError: no string.
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
