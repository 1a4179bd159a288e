"""What calibration data say about a layer: rows of its input and output, and their second moments.

Every layer that we factorize is a matrix, times a row of its input: `weight.flatten(1)`, `[T, S K]`, times the K taps
of a window in each of S channels (K = 1 for a linear layer). An output position (image and pixel, or row) is one row.
A random part of the positions is enough; only those are ever copied, never a whole activation.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ops.autocast import no_autocast
from lowrank_ops.batches import Batch, Batches, outputs_of
from lowrank_ops.calls import eval_mode
from lowrank_ops.chains import same_padding
from lowrank_ops.roots import Root

Layer = nn.Conv1d | nn.Conv2d | nn.Linear


@dataclass
class Moments:
    """Second moments of one layer over the calibration data.

    Attributes:
        input: `[S, S]`, the mean of `x x^T` over input pixels (all taps of a window together).
        gradient: `[T, T]`, the sum of `g g^T` over output positions, g the gradient of a random projection of the
            model's output with respect to the layer's output: an error `d` there moves the model's output by about
            `sqrt(d^T gradient d)`, so errors of different layers compare. The identity where the model passes no
            gradient.
    """

    input: Tensor
    gradient: Tensor

    @functools.cached_property
    def input_root(self) -> Root:
        """The root of `input`."""
        return Root.of(self.input)

    @functools.cached_property
    def gradient_root(self) -> Root:
        """The root of `gradient`."""
        return Root.of(self.gradient)


class _Enough(Exception):
    """Ends a model's run early."""


def input_rows(layer: Layer, input: Tensor, positions: Tensor) -> Tensor:
    """`[positions, S, K]`: what each of the output positions sees of the input, padding included."""
    if isinstance(layer, nn.Linear):
        return input.reshape(-1, input.shape[-1])[positions].unsqueeze(2)
    image, kernel, stride, dilation, sides = _window(layer, input)
    if any(map(any, sides)):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        if isinstance(layer, nn.Conv1d):  # the other modes pad the last axes only
            image = F.pad(image.squeeze(2), sides[1], mode).unsqueeze(2)
        else:
            image = F.pad(image, [*sides[1], *sides[0]], mode)
    heights, widths = (
        (image.shape[2 + axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1 for axis in (0, 1)
    )
    number, pixel = positions // (heights * widths), positions % (heights * widths)
    taps = [torch.arange(kernel[axis], device=positions.device) * dilation[axis] for axis in (0, 1)]
    rows = (pixel // widths * stride[0])[:, None, None] + taps[0][None, :, None]
    columns = (pixel % widths * stride[1])[:, None, None] + taps[1][None, None, :]
    windows = image.permute(0, 2, 3, 1)[number[:, None, None], rows, columns]  # [positions, KH, KW, S]
    return windows.flatten(1, 2).transpose(1, 2)


def output_rows(layer: Layer, output: Tensor, positions: Tensor | None = None) -> Tensor:
    """`[positions, T]` of a layer's output; of all positions without any given."""
    if isinstance(layer, nn.Linear):
        flat = output.reshape(-1, output.shape[-1])
    else:
        image = output if output.dim() == len(layer.kernel_size) + 2 else output.unsqueeze(0)
        flat = image.movedim(1, -1).reshape(-1, image.shape[1])
    return flat if positions is None else flat[positions]


def draw_positions(layer: Layer, output: Tensor, count: int, key: str) -> Tensor:
    """At most `count` of the output's positions, drawn without replacement, the same ones for the same key."""
    total = output.numel() // output.shape[-1 if isinstance(layer, nn.Linear) else -len(layer.kernel_size) - 1]
    if total <= count:
        return torch.arange(total, device=output.device)
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randperm(total, generator=generator)[:count].to(output.device)


def gather_moments(
    model: nn.Module, layers: Sequence[Layer], batches: Batches, positions: int = 4096, seen: Callable[[], Any] = int
) -> tuple[dict[int, Moments], dict[int, int]]:
    """The moments of layers by id, in the order in which the model calls them first, and how often a run calls each.

    One forward and one backward pass per batch, in eval mode.

    Args:
        model: runs as it is; nothing of it changes.
        layers: of the model.
        batches: calibration data.
        positions: at most so many of a layer's positions are taken of each call for `input`.
        seen: called after each batch (progress).

    A layer that is never called is missing in the results.
    """
    sums: dict[int, _Sums] = {}

    def record(layer: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        size = output_rows(layer, output).shape[1]
        of_layer = sums.setdefault(id(layer), _Sums(torch.zeros(size, size, dtype=torch.float64)))
        of_layer.calls += 1
        chosen = draw_positions(layer, output, positions, "moments")
        rows = input_rows(layer, (args[0] if args else kwargs["input"]).detach(), chosen).transpose(1, 2).flatten(0, 1)
        of_layer.input = of_layer.input + product(rows)
        of_layer.rows += len(rows)
        if not torch.is_grad_enabled():  # the model's own no_grad or inference_mode: no gradient passes here
            return None
        fresh = not output.requires_grad
        if fresh:  # frozen weights behind integer inputs: the graph starts here
            output = output.clone().requires_grad_().clone()

        def add(gradient: Tensor) -> None:
            # not in place: a first call in the model's own inference_mode makes an inference tensor of the zeros
            of_layer.gradient = of_layer.gradient + product(output_rows(layer, gradient))

        output.register_hook(add)
        return output if fresh else None

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    calls: dict[int, int] = {}
    try:
        for parameter in trained:
            parameter.requires_grad_(False)  # no gradients of weights are wanted
        with eval_mode(model), torch.inference_mode(False), torch.enable_grad(), _backward_through_recurrent_layers():
            for batch in batches:
                outputs = [output for output in outputs_of(_tracked(batch).run(model)) if output.requires_grad]
                probes = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
                if outputs:
                    torch.autograd.backward(outputs, probes)
                for key, of_layer in sums.items():
                    calls[key] = max(calls.get(key, 0), of_layer.calls)
                    of_layer.calls = 0
                seen()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return {key: of_layer.moments() for key, of_layer in sums.items()}, calls


@dataclass
class _Sums:
    gradient: Tensor
    input: Tensor | float = 0.0
    rows: int = 0
    calls: int = 0

    def moments(self) -> Moments:
        usable = bool(torch.isfinite(self.gradient).all()) and bool(self.gradient.any())
        gradient = self.gradient if usable else torch.eye(len(self.gradient), dtype=torch.float64)
        assert isinstance(self.input, Tensor)
        return Moments(self.input / self.rows, gradient)


def _backward_through_recurrent_layers() -> Any:
    """cuDNN has no backward pass of recurrent layers in eval mode; PyTorch's own kernels do."""
    return torch.backends.cudnn.flags(enabled=False)


def watch(
    model: nn.Module, layer: nn.Module, batch: Batch, calls: int, record: Callable[[int, Tensor, Tensor], Any]
) -> None:
    """Runs the model on a batch up to the layer's last call; `record(call, input, output)` sees each of its calls,
    outside of the model's autocast."""
    number = 0

    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        nonlocal number
        with no_autocast():
            record(number, args[0] if args else kwargs["input"], output)
        number += 1
        if number == calls:
            raise _Enough

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        with eval_mode(model), torch.no_grad():
            batch.run(model)
    except _Enough:
        pass
    finally:
        handle.remove()


def _tracked(batch: Batch) -> Batch:
    """The batch with floating-point inputs that require gradients."""

    def track(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_()
        return value

    return Batch(tuple(map(track, batch.arguments)), {name: track(value) for name, value in batch.keywords.items()})


@no_autocast()
def product(rows: Tensor) -> Tensor:
    """`rows^T rows` in fp64 on the CPU; the products of 4096 rows at a time in fp32 at least."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.detach().split(4096):
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        total += (part.T @ part).double().cpu()
    return total


def _window(layer: nn.Conv1d | nn.Conv2d, input: Tensor) -> tuple[Tensor, Any, Any, Any, list[tuple[int, int]]]:
    """The input as `[N, S, H, W]`, and kernel, stride, dilation and padding per image axis."""
    axes = len(layer.kernel_size)
    image = input if input.dim() == axes + 2 else input.unsqueeze(0)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        sides = [same_padding(size, step) for size, step in zip(kernel, dilation, strict=True)]
    else:
        sides = [
            (0, 0) if layer.padding == "valid" else (int(size), int(size)) for size in _per_axis(layer.padding, axes)
        ]
    if axes == 1:
        return image.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation), [(0, 0), *sides]
    return image, kernel, stride, dilation, sides


def _per_axis(padding: Any, axes: int) -> Iterable[int]:
    return (0,) * axes if isinstance(padding, str) else padding
