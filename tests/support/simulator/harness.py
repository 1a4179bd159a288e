"""Runs the CUDA kernels on the simulator with torch tensors.

`Kernel` names one of the kernels of the planner's table, `Cut` is the way in which it cuts a problem. `run` launches
the kernel and returns the output and a report: the error if there was one, bytes and sectors read and written, bank
conflicts, barriers.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.paths import REPOSITORY
from tests.support.problems import FACTORS
from tests.support.simulator.building import build

OPS = ("tucker_conv2d", "cp_conv2d", "lowrank_linear")
FAMILIES = ("simt", "sm80", "sm90a")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu", "gelu")


# ---- The structs of the interface (module.h)


def _struct(name: str, fields: list[tuple[str, Any]]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_INT = ctypes.c_int64
_FACTOR = _struct(
    "FactorCall",
    [
        *((name, _INT) for name in ("data", "row_stride", "column_stride")),
        ("tap_stride", _INT * 2),
        *((name, _INT) for name in ("vector", "bytes")),
    ],
)
_BLOCK = _struct(
    "BlockCall",
    [(name, _INT) for name in ("op", "family", "config", "dtype", "activation")]
    + [(name, _INT) for name in ("n", "s", "h", "w", "t", "oh", "ow", "r1", "r2", "kh", "kw")]
    + [(name, _INT * 2) for name in ("stride", "padding", "dilation")]
    + [(name, _INT) for name in ("tile_n", "tile_h", "tile_w", "stages", "splits", "cluster")]
    + [("input", _INT), ("input_bytes", _INT), ("input_stride", _INT * 4), ("input_vector", _INT)]
    + [("output", _INT), ("output_bytes", _INT), ("output_stride", _INT * 4), ("output_vector", _INT)]
    + [(name, _FACTOR) for name in FACTORS]
    + [("bias", _INT), ("bias_bytes", _INT)],
)


@dataclass(frozen=True)
class Settings:
    """Settings of the simulated machine (simulator.h). From `skip_barrier` on they break the launch on purpose."""

    order: int = 0
    seed: int = 0
    count: bool = True
    shared_limit: int = 232448
    held_ctas: int = 1
    skip_barrier: int = -1
    skip_zero_fill: bool = False
    shift_load_matrices: int = 0
    shift_buffer: int = -1
    ignore_waits: bool = False


_SETTINGS = _struct("Settings", [(name, _INT) for name in Settings.__dataclass_fields__])


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build()))
    loaded.simulator_report.restype = ctypes.c_char_p
    loaded.simulator_plan.restype = loaded.hopper_fault.restype = ctypes.c_char_p
    loaded.simulator_sizes.restype = loaded.hopper_loaded.restype = _INT
    sizes = loaded.simulator_sizes(0), loaded.simulator_sizes(1)
    assert sizes == (ctypes.sizeof(_BLOCK), ctypes.sizeof(_SETTINGS)), f"structs differ from module.cpp: {sizes}"
    return loaded


# ---- Running


@dataclass(frozen=True)
class Kernel:
    op: str
    family: str
    config: int

    def __str__(self) -> str:
        return f"{self.op}_{self.family}_{self.config}"


@dataclass(frozen=True)
class Cut:
    """A cut (planner.h): images, rows and columns of a tile of the output, slots of the ring buffer, splits, CTAs of a
    cluster."""

    n: int = 1
    h: int = 8
    w: int = 16
    stages: int = 2
    splits: int = 1
    cluster: int = 1


@dataclass
class Result:
    output: Tensor
    code: int  # cudaError_t
    report: dict[str, Any] = field(repr=False)

    @property
    def error(self) -> str:
        return self.report["error"]

    def traffic(self, tensor: str, kind: str = "read") -> dict[str, int]:
        return self.report["buffers"][tensor][kind]

    def worst_conflict(self, primitive: str, file: str = "") -> int:
        """The largest degree of bank conflict among a primitive's calls in files whose names end with ``file``."""
        found = [entry for entry in self.report["conflicts"] if entry["primitive"] == primitive]
        return max((entry["most"] for entry in found if entry["file"].endswith(file)), default=0)


def span_bytes(tensor: Tensor) -> int:
    """The bytes from a tensor's first element to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def copy_width(tensor: Tensor, channels: int, channel_stride: int, other_strides: list[int]) -> int:
    """The widest copies along the channels that pointer, strides and size allow: `vector` in BlockParams."""
    element = tensor.element_size()
    if channel_stride == 1:
        for width in (16, 8, 4):
            numbers = [tensor.data_ptr(), channels * element, *(stride * element for stride in other_strides)]
            if width > element and all(number % width == 0 for number in numbers):
                return width
    return element


def _factor_strides(name: str, tensor: Tensor) -> tuple[int, int, int, int]:
    """The strides of rows, columns and the two axes of taps (Factor in launch.h)."""
    stride = tensor.stride()
    if name == "core":
        return stride
    if name == "height_factor":
        return stride[0], 1, stride[1], 0
    if name == "width_factor":
        return stride[0], 1, 0, stride[1]
    return *stride, 0, 0


def block_call(
    kernel: Kernel,
    cut: Cut,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    output: Tensor,
    vectors: dict[str, int],
) -> Any:
    """The BlockCall of a launch on ``tensors``, which are named like the op's arguments. A linear layer's input and
    output have two axes."""
    call = _BLOCK()
    call.op, call.family, call.config = OPS.index(kernel.op), FAMILIES.index(kernel.family), kernel.config
    x, in_factor, out_factor = tensors["input"], tensors["in_factor"], tensors["out_factor"]
    call.dtype, call.activation = DTYPES.index(x.dtype), ACTIVATIONS.index(options.get("activation", "none"))
    if kernel.op == "lowrank_linear":  # the planner's n are the rows; for the kernel they lie along one image's width
        x, output = x.T[None, :, None], output.T[None, :, None]
        call.n, call.h, call.w, call.oh, call.ow = x.shape[3], 1, 1, 1, 1
    else:
        (call.n, _, call.h, call.w), (call.oh, call.ow) = x.shape, output.shape[2:]
    call.s, call.t, call.r1, call.r2 = x.shape[1], output.shape[1], in_factor.shape[0], out_factor.shape[1]
    call.kh = call.kw = 1
    if kernel.op == "tucker_conv2d":
        call.kh, call.kw = tensors["core"].shape[2:]
    elif kernel.op == "cp_conv2d":
        call.kh, call.kw = tensors["height_factor"].shape[1], tensors["width_factor"].shape[1]
    for name, default in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1))):
        setattr(call, name, (_INT * 2)(*options.get(name, default)))
    call.tile_n, call.tile_h, call.tile_w, call.stages, call.splits = cut.n, cut.h, cut.w, cut.stages, cut.splits
    call.cluster = cut.cluster
    for name, tensor in (("input", x), ("output", output)):
        stride, channels = tensor.stride(), tensor.shape[1]
        other = [stride[axis] for axis in (0, 2, 3) if tensor.shape[axis] > 1]
        setattr(call, name, tensor.data_ptr())
        setattr(call, f"{name}_bytes", span_bytes(tensor))
        setattr(call, f"{name}_stride", (_INT * 4)(*stride))
        setattr(call, f"{name}_vector", vectors.get(name) or copy_width(tensor, channels, stride[1], other))
    for name in FACTORS:
        if name not in tensors:
            continue
        tensor, strides = tensors[name], _factor_strides(name, tensors[name])
        other = [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if stride != 1 and size > 1]
        width = vectors.get(name) or copy_width(tensor, tensor.shape[1], strides[1], other)
        factor = _FACTOR(tensor.data_ptr(), *strides[:2], (_INT * 2)(*strides[2:]), width, span_bytes(tensor))
        setattr(call, name, factor)
    if tensors.get("bias") is not None:
        call.bias, call.bias_bytes = tensors["bias"].data_ptr(), span_bytes(tensors["bias"])
    return call


def run(
    kernel: Kernel,
    cut: Cut,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    output: Tensor,
    settings: Settings | None = None,
    vectors: dict[str, int] | None = None,
) -> Result:
    """Launches the kernel into ``output``, which is filled with NaN before. ``vectors``: widths of copies by tensor."""
    output.fill_(float("nan"))
    call = block_call(kernel, cut, tensors, options, output, vectors or {})
    code = library().simulator_run(ctypes.byref(call), ctypes.byref(_settings(settings)))
    return Result(output, code, json.loads(library().simulator_report().decode()))


def hopper_fault() -> str:
    """The fault that the emulator of Hopper found in the last launch of an sm90a kernel, or ""."""
    return str(library().hopper_fault().decode())


def hopper_mutate(**values: int) -> None:
    """Breaks the next launches of sm90a kernels as Mutation in emulator_threads.h says; without values: mends them."""
    names = ("skip_fence_proxy", "skip_group_barrier", "early_release", "skip_store_wait", "short_expect",
             "skip_both_barrier", "skip_cluster_barrier", "skip_init_fence", "single_count", "skip_remote_arrive",
             "wrong_mask", "half_expect", "short_patience")  # fmt: skip
    assert set(values) <= set(names), values
    library().hopper_mutate((_INT * len(names))(*(values.get(name, 0) for name in names)))


def hopper_selftest(data: Tensor, output: Tensor, mistake: int) -> str:
    """Runs the kernel of hopper_selftest.cpp. Returns its fault, or ""."""
    library().hopper_selftest(_INT(data.data_ptr()), _INT(output.data_ptr()), _INT(mistake))
    return hopper_fault()


def hopper_loaded(tensor: Tensor) -> int:
    """The bytes of a tensor that TMA has read from global memory in the last launch of an sm90a kernel."""
    return int(library().hopper_loaded(_INT(tensor.data_ptr())))


def is_common_case(
    kernel: Kernel, cut: Cut, tensors: dict[str, Tensor], options: dict[str, Any], output: Tensor
) -> bool:
    """Whether the launcher of an sm80 kernel takes its lean variant. The arguments are those of `run`."""
    return bool(library().simulator_is_common_case(ctypes.byref(block_call(kernel, cut, tensors, options, output, {}))))


def _settings(settings: Settings | None) -> Any:
    return _SETTINGS(*(int(getattr(settings or Settings(), name)) for name in Settings.__dataclass_fields__))


def selftest(
    name: str,
    data: Tensor,
    output: Tensor,
    *arguments: int,
    threads: int = 32,
    shared_bytes: int = 0,
    settings: Settings | None = None,
) -> Result:
    """Runs a kernel of selftest.cpp or primitive_kernels.cuh, in one CTA."""
    numbers = (_INT * 6)(*arguments)
    places = [_INT(number) for tensor in (data, output) for number in (tensor.data_ptr(), span_bytes(tensor))]
    sizes = _INT(threads), _INT(shared_bytes)
    code = library().simulator_selftest(name.encode(), *places, numbers, *sizes, ctypes.byref(_settings(settings)))
    return Result(output, code, json.loads(library().simulator_report().decode()))


def planned(
    kernel: Kernel, tensors: dict[str, Tensor], options: dict[str, Any], output: Tensor, gpu: str
) -> tuple[Cut, int]:
    """The planner's cut of the problem for a named GPU, and the bytes of shared memory that a CTA can have there."""
    call = block_call(kernel, Cut(), tensors, options, output, {})
    numbers = (_INT * 7)()
    reason = library().simulator_plan(ctypes.byref(call), gpu.encode(), numbers).decode()
    assert reason == "", reason
    *cut, shared_limit = numbers
    return Cut(*cut), shared_limit


def sanitized(
    launches: list[tuple[Kernel, Cut, dict[str, Tensor], dict[str, Any], Tensor]], claimed_bias_bytes: int = 0
) -> list[Result]:
    """Runs the launches in a program under AddressSanitizer and UndefinedBehaviorSanitizer.

    ``launches``: the arguments of `run`, one tuple each. ``claimed_bias_bytes``: the length of the bias that the
    simulator's own check of bounds is told, so that a test can pass that check with a shorter one.
    """
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/launches", "wb") as file:
            for kernel, cut, tensors, options, output in launches:
                output.fill_(float("nan"))
                call = block_call(kernel, cut, tensors, options, output, {})
                call.bias_bytes = claimed_bias_bytes or call.bias_bytes
                file.write(bytes(call))
                file.write(bytes(_settings(None)))
                for name in ("input", "output", *FACTORS, "bias"):
                    tensor = output if name == "output" else tensors.get(name)
                    if tensor is None:
                        file.write(struct.pack("qq", 0, 0))
                        continue
                    file.write(struct.pack("qq", span_bytes(tensor), tensor.data_ptr() % 64))
                    file.write(ctypes.string_at(tensor.data_ptr(), span_bytes(tensor)))
        command = [str(build(sanitize=True)), f"{folder}/launches", f"{folder}/outputs"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the sanitizers stopped launch {done.stdout.count(chr(10))}:\n{done.stderr[-8000:]}")
        outputs = Path(f"{folder}/outputs").read_bytes()
    results, place = [], 0
    for (_, _, _, _, output), report in zip(launches, done.stdout.splitlines(), strict=True):
        ctypes.memmove(output.data_ptr(), outputs[place : place + span_bytes(output)], span_bytes(output))
        place += span_bytes(output)
        results.append(Result(output, 0, json.loads(report)))
    return results


# ---- The kernels of the planner's table


@dataclass(frozen=True)
class Shape:
    """The sizes of a configuration (geometry.h)."""

    threads: int
    halo_rows: int
    pixels: int
    columns: int
    persistent: bool


@functools.cache
def shape_of(kernel: Kernel) -> Shape:
    numbers = (_INT * 5)()
    places = _INT(FAMILIES.index(kernel.family)), _INT(kernel.config), _INT(kernel.op != "lowrank_linear")
    library().simulator_config(*places, numbers)
    *sizes, persistent = numbers
    return Shape(*sizes, bool(persistent))


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of the planner's table, without those that the emulator of Hopper runs (hopper.cpp)."""
    return tuple(kernel for kernel in all_kernels() if kernel.family != "sm90a")


@functools.cache
def all_kernels() -> tuple[Kernel, ...]:
    """All kernels of the planner's table."""
    text = (REPOSITORY / "csrc/plan/gpu/kernel_table.inc").read_text()
    names = {"tucker": "tucker_conv2d", "cp": "cp_conv2d", "linear": "lowrank_linear"}
    found = re.findall(r"^GPU_KERNEL\((\w+), (\w+), (\d+),", text, re.MULTILINE)
    return tuple(Kernel(names[op], family, int(config)) for op, family, config in found)


@functools.cache
def barriers() -> dict[str, int]:
    """The barriers of the kernels by name, from the enum in primitives.cuh."""
    text = (REPOSITORY / "csrc/cuda/kernels/primitives.cuh").read_text()
    body = re.search(r"enum class Barrier : int \{(.*?)\}", text, re.DOTALL)
    assert body is not None
    names = re.findall(r"^\s*(k\w+),", body.group(1), re.MULTILINE)
    return {name: number for number, name in enumerate(names)}
