"""Which path runs, and why: `explain`, `set_policy`, `policy`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from lowrank_ops.ops.extension import _C
from lowrank_ops.runtime.compiled import takes_compiled
from lowrank_ops.runtime.modes import no_nested_tensors
from lowrank_ops.runtime.torch_internals import TorchDispatchMode, no_values, suggest_memory_format
from lowrank_ops.text.tables import HTML_WIDTH, as_html, as_text, figure, fits, new_table, terminal_width

Shape = Sequence[int]
Inputs = Tensor | Shape | Sequence[Tensor | Shape | None] | Mapping[str, Tensor | Shape | None]
Device = str | torch.device


@dataclass(frozen=True, repr=False)
class Explanation:
    """What the planner decides for one call of one op; shows as a table.

    Attributes:
        op: tucker_conv2d, cp_conv2d or lowrank_linear.
        problem: the call in words: shapes, ranks, dtype, layout, window.
        policy: the policy in force.
        device: the device planned for.
        path: "fused" or "chain".
        chosen: the plan: kernel, tile, FLOPs, bytes, predicted seconds (0: no figure), the seconds that the policy
            "measure" has measured for this problem (`measured_seconds`; absent: none), notes; on a CPU scratch bytes a
            thread, strips (tasks along the height of an image) and team (threads that share each stage of a task; 1:
            every thread has tasks of its own), on a GPU images x height x width of a tile, stages, splits, CTAs of a
            cluster, threads, CTAs, waves, shared bytes.
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
        return as_text(self._table(terminal_width()), *self._remarks())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self._table(HTML_WIDTH), *self._remarks())

    def _table(self, width: int) -> Table:
        """One line per plan: its figures in columns where they fit, otherwise in one sentence."""
        plans = (self.chosen, *self.others)
        known = _GPU_COLUMNS if any("ctas" in plan for plan in plans) else _CPU_COLUMNS
        columns = {heading: show for heading, show in known.items() if any(_cell(plan, show) for plan in plans)}
        reasons = dict(self.rejections)
        table, narrow = (new_table(f"{self.op}: {self.problem}") for _ in range(2))
        for heading in ("", "kernel", "plan"):
            narrow.add_column(heading, overflow="fold")
        rows = []
        for plan in plans:
            why_not = reasons.get(plan["kernel"], "")
            figures = {heading: _cell(plan, show) for heading, show in columns.items()}
            head = "" if plan["kernel"] in reasons else "runs", plan["kernel"]
            rows.append((*head, *figures.values(), why_not))
            told = [f"{heading} {figure}" for heading, figure in figures.items() if figure]
            narrow.add_row(*head, ", ".join([*told, *filter(None, [why_not])]))
        *figured, last = zip(("", "kernel", *columns, "why not"), *rows, strict=True)
        for heading, *cells in figured:  # without a least width rich takes that of the longest word
            table.add_column(heading, no_wrap=True, min_width=max(map(len, (heading, *cells))))
        if any(last[1:]):
            table.add_column(last[0], overflow="fold")
        for row in rows:
            table.add_row(*row[: len(table.columns)])
        return table if fits(table, width) else narrow

    def _remarks(self) -> list[str]:
        """The lines below the table."""
        plans = (self.chosen, *self.others)
        planned = {plan["kernel"] for plan in plans}
        remarks: dict[str, list[str]] = {}  # remark -> the kernels that it holds for
        for kernel, reason in self.rejections:
            if kernel not in planned:
                remarks.setdefault(f"cannot run: {reason}", []).append(kernel)
        for plan in plans:
            for note in plan["notes"]:
                remarks.setdefault(note, []).append(plan["kernel"])
        noted = {plan["kernel"] for plan in plans if plan["notes"]}
        lines = [f'{self.device}; policy "{self.policy}"']
        for remark, kernels in remarks.items():
            who = "every kernel above" if len(kernels) > 1 and noted == set(kernels) else ", ".join(kernels)
            lines.append(f"{who}: {remark}")
        return lines


def _cell(plan: dict[str, Any], show: Callable[[dict[str, Any]], str]) -> str:
    """A figure of a plan, empty where the plan has none of that kind."""
    try:
        return show(plan)
    except KeyError:
        return ""


_WORK: dict[str, Callable[[dict[str, Any]], str]] = {
    "GFLOP": lambda plan: figure(plan["flops"] / 1e9),
    "MB": lambda plan: figure(plan["bytes"] / 1e6),
    "predicted": lambda plan: f"{figure(plan['predicted_seconds'] * 1e6)} us" if plan["predicted_seconds"] else "",
    "measured": lambda plan: f"{figure(plan['measured_seconds'] * 1e6)} us",
}
_CPU_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tile": lambda plan: " x ".join(str(plan[key]) for key in ("tile_rows", "tile_columns") if key in plan),
    "threads": lambda plan: f"team of {plan['team']}" if plan["team"] > 1 else f"strips: {plan['strips']}",
    "scratch": lambda plan: f"{plan['scratch_bytes'] / 1024:.0f} KiB",
    **_WORK,
}
_GPU_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tile": lambda plan: "x".join(map(str, plan["tile"])),  # images, height, width
    "stages": lambda plan: str(plan["stages"]),
    "splits": lambda plan: str(plan["splits"]),
    "cluster": lambda plan: str(plan["cluster"]),
    "threads": lambda plan: str(plan["threads"]),
    "CTAs": lambda plan: str(plan["ctas"]),
    "waves": lambda plan: f"{plan['waves']:.2f}",
    "KiB": lambda plan: f"{plan['shared_bytes'] / 1024:.0f}",
    **_WORK,
}


class Explanations(tuple[Explanation, ...]):
    """One `Explanation` for each call of an op of ours, in order; shows as tables."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self)) if self else _NONE

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(explanation._repr_html_() for explanation in self) if self else as_html(_NONE)


_NONE = "no op of lowrank_ops is called"


class _Recorder(TorchDispatchMode):
    """Records every call of our ops while their fake kernels run.

    Attributes:
        calls: name and arguments of each.
    """

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
            self.calls.append((name.removesuffix("_prepared"), arguments))
        return func(*args, **(kwargs or {}))


@takes_compiled("op_or_module")
def explain(
    op_or_module: Callable[..., Any] | nn.Module,
    input_or_shapes: Inputs,
    dtype: torch.dtype | None = None,
    device: Device | None = None,
    *,
    memory_format: torch.memory_format | None = None,
    verbose: bool = False,
    **arguments: Any,
) -> Explanations:
    """Explains which path a call takes, with the plan, the rejections and the predicted times. Nothing is computed.

    Args:
        op_or_module: one of our ops (`tucker_conv2d`, `cp_conv2d`, `lowrank_linear`), one of our modules, or any
            model that holds some: it is run on tensors without values, and every op of ours that it calls is
            explained. Forward hooks run. Control flow that depends on values does not work there.
        input_or_shapes: for a module its input, a tensor or a shape (a sequence of ints); several inputs as a
            tuple or list of them, keyword arguments as a dict. For an op the tuple, list or dict of its tensor
            arguments. None stands for an argument that is None.
        dtype: plan for this dtype instead of the tensors' (shapes alone: the module's, or float32). Inside
            torch.autocast the default is the region's dtype, but for float64; a region that a model opens itself
            is not seen.
        device: plan for this device instead of the input's: "cpu", "cuda" (the current GPU), "cuda:1", or, on any
            machine, the name of a GPU: "A100", "RTX 3090", "RTX 4090", "H100", "H200", "B200". What is then predicted
            comes from that GPU's public figures. Other devices of torch run the chain. float32 is planned as tf32
            where torch's settings allow it now.
        memory_format: of 4-D inputs given as shapes (default: torch.contiguous_format).
        verbose: also print the result. It shows itself at a prompt and in a notebook; in a script, print it.
        arguments: further arguments of the op: stride, padding, dilation, activation.

    Calls under a transform of torch.func (vmap, grad, jacrev, ...) and forward-mode derivatives are not foreseen: where
    they touch an argument of the op they run the chain, whatever is planned here.

    Returns:
        A tuple of `Explanation`, one for each call, whose text is their tables: `print(explain(...))`.

    Raises:
        ValueError: whatever the op itself would raise for these shapes; an unknown device.
        TypeError: arguments of the wrong kind, further arguments for a module.
        RuntimeError: the model fails on tensors without values.
    """

    module = op_or_module if isinstance(op_or_module, nn.Module) else None
    if not callable(op_or_module):
        raise TypeError(f"explain: op_or_module must be an op of lowrank_ops or an nn.Module, got {op_or_module!r}")
    if module is not None and arguments:
        raise TypeError(
            f"explain: unexpected keyword arguments for a module: {', '.join(arguments)}; arguments of its forward "
            "go into input_or_shapes, as a dict"
        )
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"explain: dtype must be a torch.dtype, got {dtype!r}")
    positional, named = _inputs(input_or_shapes, single=module is not None)
    state = {} if module is None else {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = [*(value for value in (*positional, *named.values()) if isinstance(value, Tensor)), *state.values()]
    found = tensors[0].device if tensors else torch.device("cpu")
    region = _autocast_dtype(found.type)
    default = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)

    def wanted(own: torch.dtype) -> torch.dtype:
        if not own.is_floating_point:
            return own
        return dtype or (region if region is not None and own != torch.float64 else own)

    on = "cpu" if found.type == "meta" else found.type

    def empty(value: Tensor | Shape | None) -> Tensor | None:
        if value is None:
            return None
        if not isinstance(value, Tensor):
            made = torch.empty(tuple(value), device=on, dtype=wanted(default))
            return made.to(memory_format=memory_format) if memory_format and made.dim() == 4 else made
        if value.is_nested:
            return value.detach().to(device=on, dtype=wanted(value.dtype))
        like = value.detach().to(device="meta", dtype=wanted(value.dtype))
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=on)

    with torch.no_grad(), no_nested_tensors(), no_values(), _Recorder() as recorder:
        args = [empty(value) for value in positional]
        kwargs = {name: empty(value) for name, value in named.items()}
        if module is None:
            op_or_module(*args, **kwargs, **arguments)
        else:
            _run(module, {name: empty(value) for name, value in state.items()}, args, kwargs)
    planned = _with_index(str(found if device is None else device))
    result = Explanations(_explain(name, call, planned) for name, call in recorder.calls)
    if verbose:
        print(result)
    return result


def _with_index(device: str) -> str:
    """ "cuda" as torch means it: the current GPU. Until torch has started CUDA that is the first one."""
    if device == "cuda" and torch.cuda.is_initialized():
        return f"cuda:{torch.cuda.current_device()}"
    return device


def _inputs(given: Inputs, single: bool) -> tuple[Sequence[Tensor | Shape | None], Mapping[str, Tensor | Shape | None]]:
    """Positional and keyword arguments; `single`: one tensor or shape is the only argument."""
    positional: Sequence[Any] = ()
    named: Mapping[str, Any] = {}
    if isinstance(given, Mapping):
        named = given
    elif isinstance(given, (tuple, list)) and not (single and _is_shape(given)):
        positional = given
    else:
        positional = (given,)
    if not all(
        value is None or isinstance(value, Tensor) or _is_shape(value) for value in (*positional, *named.values())
    ):
        one = "a tensor, a shape, or " if single else ""
        raise TypeError(
            f"explain: input_or_shapes must be {one}a tuple, list or dict of tensors, shapes and None, got "
            f"{given if not isinstance(given, Tensor) else 'a tensor'!r}"
        )
    return positional, named


def _autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of the autocast region that we are in, if any."""
    available = torch.amp.is_autocast_available(device)
    return torch.get_autocast_dtype(device) if available and torch.is_autocast_enabled(device) else None


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(size, int) for size in value)


def _run(module: nn.Module, state: dict[str, Any], args: list[Any], kwargs: dict[str, Any]) -> None:
    try:
        torch.func.functional_call(module, state, tuple(args), kwargs)
    except RuntimeError as error:
        raise RuntimeError(
            f"explain: {type(module).__name__} failed: {error}. explain runs the model on tensors without values, on "
            "which control flow that depends on values does not work; explain the parts that do work"
        ) from error


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
        channels_last = suggest_memory_format(x) == torch.channels_last
        layout = "channels_last" if channels_last else "NCHW"
        words = (
            f"{list(x.shape)} to {t} channels, {kh}x{kw}, {ranks}, stride {pairs[0]}, padding {pairs[1]}, "
            f"dilation {pairs[2]}, {dtype}, {layout}"
        )
    found = _C.explain(op, dtype, channels_last, sizes, window, call["activation"], device, "packed" in call)
    if found["tf32"]:
        words += " (as tf32)"
    chosen = found["chosen"]
    return Explanation(
        op=op,
        problem=words,
        policy=found["policy"],
        device=found["device"],
        path=chosen["path"],
        chosen=chosen,
        others=found["others"],
        rejections=found["rejections"],
    )
