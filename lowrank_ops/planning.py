"""Which path runs, and why: `explain`, `set_policy`, `policy`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_ops._ops import _C

POLICIES = ("auto", "fused", "chain", "measure")

Shape = Sequence[int]
Device = str | torch.device


class set_policy:
    """Chooses between the fused kernels and the chain of library ops, for the whole process.

    As a function, ``set_policy("fused")`` stays in force; as a context manager, ``with set_policy("fused"):`` puts
    the former policy back at the end.

    Args:
        name: "auto" (default): the planner's cost model decides; "fused": always our kernels, where there are any;
            "chain": always the library ops; "measure": both are timed the first time a shape is met (in this process,
            for this number of threads), and the faster one is remembered. Measuring runs both on the caller's tensors
            three times; it never happens while torch.compile or torch.export traces.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
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


@dataclass(frozen=True)
class Explanation:
    """What the planner decides for one call of one op.

    Attributes:
        op: tucker_conv2d, cp_conv2d or lowrank_linear.
        problem: the call in words: shapes, ranks, dtype, layout, window.
        policy: the policy in force.
        device: the device planned for.
        path: "fused" or "chain".
        chosen: the plan: kernel, tile, scratch bytes a thread, FLOPs, bytes, predicted seconds (0: no figure).
        others: the plans not taken.
        rejections: (kernel, reason) for each of them.
    """

    op: str
    problem: str
    policy: str
    device: str
    path: str
    chosen: dict[str, Any]
    others: list[dict[str, Any]]
    rejections: list[tuple[str, str]]

    def __str__(self) -> str:
        table = Table(title=f"{self.op}: {self.problem}", caption=f'{self.device}; policy "{self.policy}"')
        for heading in ("", "kernel", "tile", "scratch", "GFLOP", "MB moved", "predicted", "why not"):
            table.add_column(heading)
        reasons = dict(self.rejections)
        for plan in (self.chosen, *self.others):
            kernel = plan["kernel"]
            tile = " x ".join(str(plan[key]) for key in ("tile_rows", "tile_columns") if key in plan)
            table.add_row(
                "" if kernel in reasons else "runs",
                kernel,
                tile,
                f"{plan['scratch_bytes'] / 1024:.0f} KiB" if "scratch_bytes" in plan else "",
                f"{plan['flops'] / 1e9:.4g}",
                f"{plan['bytes'] / 1e6:.4g}",
                f"{plan['predicted_seconds'] * 1e6:.4g} us" if plan["predicted_seconds"] else "",
                reasons.pop(kernel, ""),
            )
        for kernel, reason in reasons.items():
            table.add_row("", kernel, "", "", "", "", "", reason)
        text = io.StringIO()
        Console(file=text, width=150).print(table)
        return text.getvalue().rstrip()


class Explanations(tuple[Explanation, ...]):
    """One `Explanation` for each call of an op of ours, in order; prints as tables."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self)) if self else "no op of lowrank_ops is called"


class _Recorder(TorchDispatchMode):
    """Notes every call of our ops; what runs are the fake kernels, on meta tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        schema = func._schema
        namespace, _, name = schema.name.partition("::")
        if namespace == "lowrank_ops" and not name.endswith("_backward"):
            arguments = {a.name: a.default_value for a in schema.arguments}
            arguments.update(zip((a.name for a in schema.arguments), args, strict=False), **(kwargs or {}))
            self.calls.append((name, arguments))
        return func(*args, **(kwargs or {}))


def explain(
    op_or_module: Callable[..., Any] | nn.Module,
    input_or_shapes: Tensor | Shape | Sequence[Tensor | Shape | None],
    dtype: torch.dtype | None = None,
    device: Device | None = None,
    *,
    memory_format: torch.memory_format | None = None,
    verbose: bool = True,
    **arguments: Any,
) -> Explanations:
    """Tells which path a call takes, with the plan, the rejections and the predicted times. Nothing is computed.

    Args:
        op_or_module: one of our ops (`tucker_conv2d`, `cp_conv2d`, `lowrank_linear`), one of our modules, or any
            model that holds some: it is run on meta tensors, and every op of ours that it calls is explained.
        input_or_shapes: for a module its input, as a tensor or a shape; for an op the sequence of its tensor
            arguments, each a tensor, a shape, or None.
        dtype: plan for this dtype instead of the tensors' (shapes alone: float32).
        device: plan for this device instead of the input's: "cpu", "cuda", or the name of a GPU ("A100",
            "RTX 4090", "H100", ...). Devices without kernels of ours in this build run the chain.
        memory_format: of inputs given as shapes (default: torch.contiguous_format).
        verbose: also print the result.
        arguments: further arguments of the op: stride, padding, dilation, activation.

    Returns:
        A tuple of `Explanation`, one for each call.

    Raises:
        ValueError: whatever the op itself would raise for these shapes.
    """

    def meta(value: Tensor | Shape | None, axes: int | None = None) -> Tensor | None:
        if value is None:
            return None
        if isinstance(value, Tensor):
            wanted = dtype if value.is_floating_point() else None
            return value.detach().to(device="meta", dtype=wanted)
        made = torch.empty(tuple(value), device="meta", dtype=dtype or torch.float32)
        return made.to(memory_format=memory_format) if memory_format and made.dim() == axes else made

    if isinstance(op_or_module, nn.Module):
        found = input_or_shapes.device if isinstance(input_or_shapes, Tensor) else _device_of(op_or_module)
        if dtype is None and not isinstance(input_or_shapes, Tensor):
            dtype = next((p.dtype for p in op_or_module.parameters() if p.is_floating_point()), None)
        state = {name: meta(value) for name, value in _state(op_or_module)}
        single = meta(input_or_shapes, 4)  # type: ignore[arg-type]
        with torch.no_grad(), _Recorder() as recorder:
            torch.func.functional_call(op_or_module, state, (single,))  # type: ignore[arg-type]
    else:
        first = input_or_shapes[0]
        found = first.device if isinstance(first, Tensor) else torch.device("cpu")
        tensors = [meta(value, 4 if index == 0 else None) for index, value in enumerate(input_or_shapes)]
        with torch.no_grad(), _Recorder() as recorder:
            op_or_module(*tensors, **arguments)
    planned = str(device) if device is not None else found.type
    result = Explanations(_explain(name, call, planned) for name, call in recorder.calls)
    if verbose:
        print(result)
    return result


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _explain(op: str, call: dict[str, Any], device: str) -> Explanation:
    x, out_factor = call["input"], call["out_factor"]
    t, rank = out_factor.shape
    dtype = str(x.dtype).removeprefix("torch.")
    if op == "lowrank_linear":
        sizes = [x.numel() // max(x.shape[-1], 1), x.shape[-1], 1, 1, t, rank, rank, 1, 1]
        window = [1, 1, 0, 0, 1, 1]
        channels_last = False
        words = f"{sizes[0]} rows, {x.shape[-1]} to {t}, rank {rank}, {dtype}"
    else:
        if op == "tucker_conv2d":
            r1, (kh, kw) = call["in_factor"].shape[0], call["core"].shape[2:]
            ranks = f"ranks ({r1}, {rank})"
        else:
            r1, kh, kw = rank, call["height_factor"].shape[1], call["width_factor"].shape[1]
            ranks = f"rank {rank}"
        values: list[Any] = [call[name] for name in ("stride", "padding", "dilation")]
        pairs = [[v] * 2 if isinstance(v, int) else list(v) for v in values]
        window = [value for pair in pairs for value in (pair * 2)[:2]]
        sizes = [*x.shape, t, r1, rank, kh, kw]
        channels_last = torch._prims_common.suggest_memory_format(x) == torch.channels_last
        layout = "channels_last" if channels_last else "NCHW"
        words = (
            f"{list(x.shape)} to {t} channels, {kh}x{kw}, {ranks}, stride {pairs[0]}, padding {pairs[1]}, "
            f"dilation {pairs[2]}, {dtype}, {layout}"
        )
    found = _C.explain(op, dtype, channels_last, sizes, window, call["activation"], device)
    return Explanation(
        op,
        words,
        found["policy"],
        found["device"],
        found["chosen"]["path"],
        found["chosen"],
        found["others"],
        found["rejections"],
    )
