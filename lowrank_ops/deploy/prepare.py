"""Packing weights once instead of at every call: `prepare_for_inference_`, `unprepare_`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.ops.extension import build_info
from lowrank_ops.runtime.compiled import takes_compiled
from lowrank_ops.runtime.computed import remedy
from lowrank_ops.text.tables import as_text


@dataclass(frozen=True)
class PreparedLayer:
    """What `prepare_for_inference_` did with one factorized module.

    Attributes:
        name: qualified name in the model; "" for the model itself.
        type: class name of the module.
        bytes: memory of its packed weights; 0 if there are none.
        reason: why its weights were not packed; None if they were.
    """

    name: str
    type: str
    bytes: int = 0
    reason: str | None = None

    def __str__(self) -> str:
        return as_text(self._told())

    def _told(self) -> str:
        told = f"{self.bytes / 1024:.0f} KiB packed" if self.reason is None else f"not prepared: {self.reason}"
        return f"{self.name or 'the model'} ({self.type}): {told}"


class Preparation(tuple[PreparedLayer, ...]):
    """A tuple with one `PreparedLayer` per factorized module, in the model's order; `print` shows one line per
    module."""

    @property
    def bytes(self) -> int:
        """Memory of all packed weights, in bytes."""
        return sum(layer.bytes for layer in self)

    def __str__(self) -> str:
        return as_text(*map(PreparedLayer._told, self)) if self else "the model has no factorized modules"


@takes_compiled()
def prepare_for_inference_(model: nn.Module) -> Preparation:
    """Packs the weights of every factorized module once, in place, so that calls do not prepare them again.

    On a CPU, packing at each call takes 2 to 10 % of most calls, and a quarter of calls on few pixels (7x7). A kernel
    computes the same bits with weights packed before; but the planner, which then counts no time for packing, chooses
    the fused kernel and Winograd's transform for some more shapes.

    On a CUDA GPU the factors are copied into the layout that the fused kernels read fastest: ranks are padded with
    zeros to whole vectors of 16 bytes (8 elements of bfloat16), so that the kernels that need whole vectors take every
    rank, and a Tucker block's core is in channels_last. So our kernels' calls copy no factor, and no call waits for the
    GPU. The chain of library calls reads the ordinary factors, and of a CP block the product of its two depthwise ones.

    Call this last: in evaluation mode, with the final device, dtype and values.

    A call uses the packed weights if it needs no gradient, is outside of autocast, and its factors have the same memory
    and version counters as when they were packed. Otherwise it uses the factors themselves. `load_state_dict`, in-place
    operations, new parameters and `.to()` are noticed in this way. Not noticed are changes that autograd does not see:
    `.data` edits, steps of optimizers with `fused=True` (in torch 2.13 they do not raise the version counters), writes
    to the memory of `torch.from_numpy`. Call this again after those. A CUDA graph notices nothing: it reads what the
    call read that it captured. Capture it anew after changes and after `unprepare_`, which frees the packed weights;
    with `torch.compile(mode="reduce-overhead")`, which captures by itself, compile the model anew
    (`torch.compiler.reset()`).

    Code of torch.compile uses packed weights too, except for `TuckerConv1d`, which uses its factors; exported and
    traced programs contain the ordinary ops. `train()`, `to()` and `load_state_dict` drop the packed weights;
    `state_dict`, `copy.deepcopy` and pickles leave them out.

    Args:
        model: any module; it may be a factorized one itself.

    Returns:
        A `Preparation`: per factorized module the bytes of its packed weights, or the reason why they were not packed:
        training mode, a device other than a CPU or a CUDA GPU, a build without CUDA kernels, inference tensors (they
        have no version counter), computed parameters, subclasses of Tensor such as the shards of FSDP2. Packed weights
        take about as much memory as the factors. On a CPU fp16 takes twice that, being packed as fp32; a Tucker block
        with a 3x3 core in fp32 takes 2 to 6 times as much, because each way to run the core has its own packing. Ranks
        and channels are padded to multiples of 16 there, so small layers take more: `TuckerConv2d(3, 8, 3, 1)` 28 times
        as much.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    return Preparation(_prepare(name, module) for name, module in _factorized("prepare_for_inference_", model))


@takes_compiled()
def unprepare_(model: nn.Module) -> nn.Module:
    """Drops the weights that `prepare_for_inference_` has packed, and returns the model.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    for _, module in _factorized("unprepare_", model):
        module._unpack()
    return model


def _factorized(function: str, model: nn.Module) -> Iterator[tuple[str, FactorizedModule]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FactorizedModule))


def _prepare(name: str, module: FactorizedModule) -> PreparedLayer:
    reason = _refusal(module)
    if reason is not None:
        module._unpack()
        return PreparedLayer(name, type(module).__name__, reason=reason)
    module._pack()
    assert module._packing is not None
    return PreparedLayer(name, type(module).__name__, module._packing.panels.nbytes)


def _refusal(module: FactorizedModule) -> str | None:
    if module.training:
        return "it is in training mode; call eval() first"
    parameters = [module._parameters.get(name) for name in module._factor_shapes()]
    if any(parameter is None for parameter in parameters):
        return f"a factor is computed at each call: {remedy(module)}"
    kinds = {type(parameter.detach()) for parameter in parameters if parameter is not None}
    if kinds != {Tensor}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        return f"its factors are of type {names}, and only plain tensors are packed (FSDP2's shards: unshard() first)"
    if any(parameter.is_inference() for parameter in parameters if parameter is not None):
        return "its parameters are inference tensors, whose changes cannot be noticed; create it outside inference_mode"
    device = module.in_factor.device.type
    if device not in ("cpu", "cuda"):
        return f"it is on {device}; only the kernels of CPUs and of CUDA GPUs read packed weights"
    if device == "cuda" and build_info()["cuda"] is None:
        return "it is on cuda, and lowrank_ops was built without CUDA kernels; install a build that has them"
    return None
