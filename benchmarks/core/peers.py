"""The ways to run a cell's factorized block, and the dense layer, on one set of tensors.

A "peer" is another way to run the same factorized block; the dense layer is a contender of another kind. Weights and
inputs are brought into their contender's memory format before anything is timed: eager PyTorch lets its user prepare
no more. torch.compile runs frozen, so that inductor may pack the weights, as ONNX Runtime and OpenVINO (engines.py) do
when they compile their graph of the same factors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.core import engines
from benchmarks.core.engines import ENGINES
from benchmarks.core.graphs import Captured
from benchmarks.core.layers import Cell
from lowrank_ops import reference
from lowrank_ops.ops import functional
from lowrank_ops.ops.extension import _C, ops_for

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
EVERYWHERE = ("chain", "merged", "compile", "dense", "forced")
PEERS = (*EVERYWHERE, *ENGINES, "prepared")
GPU_PEERS = (*EVERYWHERE, "graph", "kernels")
ALL_PEERS = (*EVERYWHERE, *ENGINES, "prepared", "graph", "kernels")
DEFAULT_PEERS = ("chain", "merged", "dense")

LayerT = TypeVar("LayerT", bound=nn.Module)


@dataclass(frozen=True)
class Contender:
    """One way to run a cell. `policy` is set before its turns.

    `kind` is fused (the op under "auto"), ours (the same, captured in a CUDA graph), forced (the op under another
    policy), prepared (the op with weights packed before, as engines have them), kernel (one CUDA kernel, cuts.py), peer
    or dense.
    """

    name: str
    kind: str
    run: Callable[[], Tensor]
    policy: str = "auto"

    @property
    def precision(self) -> str:
        """The precision in which an engine reports to multiply, "f32" or "bf16"; empty for other contenders."""
        return str(getattr(self.run, "precision", ""))

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that an engine reports to run."""
        return tuple(getattr(self.run, "kernels", ()))


@dataclass(frozen=True)
class Problem:
    """A cell's tensors: random input and bias, factors scaled so that each stage keeps the variance."""

    cell: Cell
    input: Tensor
    factors: tuple[Tensor, ...]
    bias: Tensor
    layout: str
    """Memory format of the fused op's input, nchw or channels_last; without meaning for a linear layer."""
    options: dict[str, Any] = field(default_factory=dict)
    """stride, padding and dilation; empty for a linear layer."""
    tf32: bool = False
    """Whether products of a float32 problem may round to tf32. The caller sets torch's own switches."""

    @property
    def dtype(self) -> str:
        return "tf32" if self.tf32 else str(self.input.dtype).removeprefix("torch.")

    @property
    def dense_weight(self) -> Tensor:
        """The dense layer's weight in the problem's dtype, multiplied out in fp64."""
        weights: dict[str, Callable[..., Tensor]] = {
            "tucker_conv2d": reference.tucker_weight,
            "cp_conv2d": reference.cp_weight,
            "lowrank_linear": reference.linear_weight,
        }
        return weights[self.cell.op](*(factor.double() for factor in self.factors)).to(self.input.dtype)


def make_problem(
    cell: Cell,
    dtype: torch.dtype,
    layout: str = "channels_last",
    seed: int = 0,
    device: str = "cpu",
    tf32: bool = False,
) -> Problem:
    """Random tensors for a cell, the same for the same arguments. On device "meta" they have no values.

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in FORMATS:
        raise ValueError(f"make_problem: layout must be one of {', '.join(FORMATS)}, got {layout!r}")
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def random(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) / math.sqrt(fan_in)).to(dtype)

    S, T, (KH, KW) = cell.S, cell.T, cell.kernel
    bias = random(T)
    if cell.is_linear:
        assert isinstance(cell.rank, int)
        factors: tuple[Tensor, ...] = (random(cell.rank, S, fan_in=S), random(T, cell.rank, fan_in=cell.rank))
        return Problem(cell, random(cell.batch, S), factors, bias, layout, tf32=tf32)
    if isinstance(cell.rank, tuple):
        R1, R2 = cell.rank
        core = random(R2, R1, KH, KW, fan_in=R1 * KH * KW).to(memory_format=torch.channels_last)
        factors = (random(R1, S, fan_in=S), core, random(T, R2, fan_in=R2))
    else:
        R = cell.rank
        depthwise = random(R, KH, fan_in=KH), random(R, KW, fan_in=KW)
        factors = (random(R, S, fan_in=S), *depthwise, random(T, R, fan_in=R))
    input = random(cell.batch, S, *cell.size).to(memory_format=FORMATS[layout])
    options = {"stride": cell.stride, "padding": cell.paddings, "dilation": cell.dilation}
    return Problem(cell, input, factors, bias, layout, options, tf32)


def contenders(problem: Problem, peers: Iterable[str] = DEFAULT_PEERS) -> list[Contender]:
    """The fused op under policy "auto", then those of `peers` (a selection of `ALL_PEERS`) that cell and dtype allow.

    Raises:
        ValueError: an unknown name in `peers`.
    """
    dtype = problem.input.dtype
    asked = [name for name in peers if name not in ENGINES or not engines.unsupported(name, dtype)]
    return [Contender(way.name, way.kind, way.make(problem), way.policy) for way in ways(problem.cell, asked)]


@dataclass(frozen=True)
class Way:
    """A contender before it has tensors."""

    name: str
    kind: str
    make: Callable[[Problem], Callable[[], Tensor]]
    policy: str = "auto"


def ways(cell: Cell, peers: Iterable[str]) -> list[Way]:
    """The contenders of a cell, as `contenders` makes them.

    Raises:
        ValueError: an unknown name in `peers`.
    """
    chosen = set(peers)
    if not chosen <= set(ALL_PEERS):
        raise ValueError(f"contenders: peers must be among {ALL_PEERS}, got {sorted(chosen)}")
    found = [Way("fused", "fused", _fused)]
    if "graph" in chosen:
        found.append(Way("fused graph", "ours", lambda problem: Captured(_fused(problem))))
    if "prepared" in chosen:
        found.append(Way("prepared", "prepared", _prepared))
    if "forced" in chosen:
        found += [Way(f"{policy} (forced)", "forced", _fused, policy) for policy in ("fused", "chain")]
    formats = {"": torch.contiguous_format} if cell.is_linear else FORMATS
    merges = {"chain": False, **({"merged": True} if cell.op == "cp_conv2d" else {})}
    for name, memory_format in formats.items():
        suffix = f" {name}" if name else ""
        for kind, merged in merges.items():
            if kind in chosen:
                found.append(Way(kind + suffix, "peer", functools.partial(_chain, memory_format, merged)))
        if "dense" in chosen:
            found.append(Way("dense" + suffix, "dense", functools.partial(_dense, memory_format)))
    if "compile" in chosen:
        found.append(Way("compile", "peer", _compiled))
    found += _engine_ways(cell, chosen)
    if "graph" in chosen:
        for kind, merged in merges.items():
            found.append(Way(f"{kind} graph", "peer", functools.partial(_captured_chain, merged)))
    return found


def _engine_ways(cell: Cell, chosen: set[str]) -> list[Way]:
    """Chain, merged chain and dense layer in ONNX Runtime (NCHW alone) and in OpenVINO (in both layouts)."""
    found = []
    for engine in ENGINES:
        if engine not in chosen:
            continue
        kinds = {"": "peer"}
        if cell.op == "cp_conv2d" and "merged" in chosen:
            kinds["merged"] = "peer"
        if "dense" in chosen:
            kinds["dense"] = "dense"
        formats = {"": torch.contiguous_format} if cell.is_linear or engine == "onnxruntime" else FORMATS
        for name, memory_format in formats.items():
            for what, kind in kinds.items():
                make = functools.partial(_in_engine, engine, what, memory_format)
                found.append(Way(" ".join(filter(None, (engine, what, name))), kind, make))
    return found


def _in_engine(engine: str, what: str, memory_format: torch.memory_format, problem: Problem) -> Callable[[], Tensor]:
    layers = [dense_layer(problem)] if what == "dense" else stages(problem, what == "merged")
    input = _formatted(problem.input, memory_format)
    run = engines.onnxruntime_layers if engine == "onnxruntime" else engines.openvino_layers
    return run(layers, input, torch.get_num_threads())


def _chain(memory_format: torch.memory_format, merged: bool, problem: Problem) -> Callable[[], Tensor]:
    return _eager(stages(problem, merged), problem.input, memory_format)


def _captured_chain(merged: bool, problem: Problem) -> Callable[[], Tensor]:
    return Captured(_chain(torch.channels_last, merged, problem))


def _fused(problem: Problem) -> Callable[[], Tensor]:
    op = getattr(functional, problem.cell.op)
    input, factors, bias, options = problem.input, problem.factors, problem.bias, problem.options
    return lambda: op(input, *factors, bias, **options)


def _prepared(problem: Problem) -> Callable[[], Tensor]:
    """The op as a module of `prepare_for_inference_` calls it, without the overhead of nn.Module's call."""
    cell, (first, *middle, last) = problem.cell, problem.factors
    core = middle[0] if cell.op == "tucker_conv2d" else None
    packed = _C.prepare(first, core, last, cell.stride == cell.dilation == 1)
    window = () if cell.is_linear else ([cell.stride] * 2, cell.paddings, [cell.dilation] * 2)
    tensors = (problem.input, *problem.factors, problem.bias)
    op = f"{cell.op}_prepared"
    return lambda: getattr(ops_for(*tensors), op)(*tensors, *window, "none", packed)


def stages(problem: Problem, merged: bool = False) -> list[nn.Module]:
    """The block as library layers: 1x1, core or depthwise, 1x1 (as decomposition scripts usually build it).

    `merged` replaces the two depthwise stages of CP by one KHxKW depthwise convolution with their product.
    """
    cell, factors = problem.cell, problem.factors
    if cell.is_linear:
        return [_linear(factors[0]), _linear(factors[1], problem.bias)]
    first, *middle, last = factors
    pointwise = _conv(first[:, :, None, None]), _conv(last[:, :, None, None], problem.bias)
    s, (ph, pw), d = cell.stride, cell.paddings, cell.dilation
    if cell.op == "tucker_conv2d":
        inner = [_conv(middle[0], stride=(s, s), padding=(ph, pw), dilation=(d, d))]
    elif merged:
        height, width = (factor.double() for factor in middle)
        weight = (height[:, None, :, None] * width[:, None, None, :]).to(first.dtype)
        inner = [_conv(weight, stride=(s, s), padding=(ph, pw), dilation=(d, d), groups=len(first))]
    else:
        height, width = middle[0][:, None, :, None], middle[1][:, None, None, :]
        inner = [
            _conv(height, stride=(s, 1), padding=(ph, 0), dilation=(d, 1), groups=len(first)),
            _conv(width, stride=(1, s), padding=(0, pw), dilation=(1, d), groups=len(first)),
        ]
    return [pointwise[0], *inner, pointwise[1]]


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype, device="meta")
    return _with_parameters(layer, weight, bias)


def _conv(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> nn.Conv2d:
    T, S, KH, KW = weight.shape
    layer = nn.Conv2d(
        S * groups, T, (KH, KW), stride, padding, dilation, groups, bias is not None,
        dtype=weight.dtype, device="meta",
    )  # fmt: skip
    return _with_parameters(layer, weight, bias)


def _with_parameters(layer: LayerT, weight: Tensor, bias: Tensor | None) -> LayerT:
    # A clone: contiguous() would keep the odd strides of a one-channel weight, from which torch infers a memory format.
    layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        layer.register_parameter("bias", nn.Parameter(bias.clone(), requires_grad=False))
    return layer.eval()


def dense_layer(problem: Problem) -> nn.Module:
    """The layer before factorization."""
    cell, weight = problem.cell, problem.dense_weight
    if cell.is_linear:
        return _linear(weight, problem.bias)
    return _conv(weight, problem.bias, (cell.stride,) * 2, cell.paddings, (cell.dilation,) * 2)


def _dense(memory_format: torch.memory_format, problem: Problem) -> Callable[[], Tensor]:
    return _eager([dense_layer(problem)], problem.input, memory_format)


def _eager(layers: Sequence[nn.Module], input: Tensor, memory_format: torch.memory_format) -> Callable[[], Tensor]:
    """The layers as plain function calls: calls of nn.Module would cost a peer some microseconds."""
    input = _formatted(input, memory_format)
    calls = [_call(layer, memory_format) for layer in layers]

    def run() -> Tensor:
        hidden = input
        for call in calls:
            hidden = call(hidden)
        return hidden

    return run


def _call(layer: nn.Module, memory_format: torch.memory_format) -> Callable[[Tensor], Tensor]:
    if isinstance(layer, nn.Linear):
        return functools.partial(F.linear, weight=layer.weight, bias=layer.bias)
    assert isinstance(layer, nn.Conv2d)
    kernel, bias = _formatted(layer.weight, memory_format), layer.bias
    stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups
    return lambda x: F.conv2d(x, kernel, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]


def _formatted(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    return tensor if tensor.dim() != 4 else tensor.detach().clone().contiguous(memory_format=memory_format)


def _compiled(problem: Problem) -> Callable[[], Tensor]:
    import torch._inductor.config as inductor
    from torch._inductor import select_algorithm

    inductor.freezing = True
    # max-autotune would print every candidate to stderr, in the middle of the table.
    select_algorithm.PRINT_AUTOTUNE = False
    torch._dynamo.reset()
    model = nn.Sequential(*stages(problem))
    input = problem.input
    if not problem.cell.is_linear:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        input = _formatted(input, torch.channels_last)
    if input.is_cuda:
        # max-autotune replays a CUDA graph; without this mark each call first copies the input to the graph's memory.
        torch._dynamo.mark_static_address(input)
    compiled = torch.compile(model, mode="max-autotune", dynamic=False)
    return lambda: compiled(input)


def check(problem: Problem, output: Tensor, lenient: bool = False) -> str:
    """Empty if `output` is right, otherwise a sentence with its error and the allowed one.

    The output is compared with the chain in fp64, on the first and the last image (linear: all rows), in the Frobenius
    norm. The allowed error, with u = eps / 2: in fp32 and fp64 ``2 u ||A||``, where A is the same chain on absolute
    values; in bf16 and fp16 twice the error of PyTorch's chain in that dtype, PyTorch's error capped at 2 eps, plus one
    rounding of the output; in tf32 twice the error of the chain with operands rounded to tf32, plus one rounding.
    `lenient` allows a tf32 product to cut its operands off instead of rounding them, as some libraries do: then six
    times the error of rounding is allowed.
    """
    cell, input = problem.cell, problem.input
    op = getattr(reference, cell.op)
    chosen = slice(None) if cell.is_linear or cell.batch <= 2 else slice(0, cell.batch, cell.batch - 1)
    part, got = input[chosen], output[chosen].double()

    def chain(change: Callable[[Tensor], Tensor]) -> Tensor:
        return op(change(part), *map(change, problem.factors), change(problem.bias), **problem.options)

    expected = chain(torch.Tensor.double)
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    unit = torch.finfo(input.dtype).eps / 2
    norm, error = expected.norm(), (got - expected).norm()
    if problem.tf32:
        allowed = (6 if lenient else 2) * (_tf32_chain(problem, part) - expected).norm() + unit * norm
    elif input.dtype in (torch.float32, torch.float64):
        allowed = 2 * unit * chain(lambda tensor: tensor.double().abs()).norm()
    else:
        library = (chain(lambda tensor: tensor).double() - expected).norm()
        allowed = 2 * torch.minimum(library.nan_to_num(torch.inf), 4 * unit * norm) + unit * norm
    if norm > 0 and error <= allowed:
        return ""
    return f"relative error {float(error / norm):.2e}, allowed {float(allowed / norm):.2e}"


def round_to_tf32(values: Tensor) -> Tensor:
    """Float32 values rounded to the 10 bits of mantissa that tf32 keeps, ties away from zero (cvt.rna.tf32)."""
    bits = values.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _tf32_chain(problem: Problem, input: Tensor) -> Tensor:
    """The chain in fp64, with the operands of every stage rounded to tf32."""
    hidden = input
    for layer in stages(problem):
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        layer.weight = nn.Parameter(round_to_tf32(layer.weight), requires_grad=False)
        hidden = layer.double()(round_to_tf32(hidden).double())
    return hidden
