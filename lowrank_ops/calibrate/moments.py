"""What calibration data say about a layer: rows of its input and output, and their second moments.

Every layer that we factorize is a matrix, times a row of its input: `weight.flatten(1)`, `[T, S K]`, times the K taps
of a window in each of S channels (K = 1 for a linear layer). An output position (image and pixel, or row) is one row.
A random part of the positions is enough; only those are ever copied, never a whole activation. Every fourth position is
held out (`HeldOut`): what the factors are made from never sees it, and errors are measured there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ops.calibrate.shrinkage import SecondMoment, diagonal
from lowrank_ops.linalg.triangle import Triangle
from lowrank_ops.model.batches import Batch, Batches, outputs_of
from lowrank_ops.model.state import ModelState, in_inference_mode, ordinary_tensors, own_random_numbers
from lowrank_ops.nn.plain import Layer, same_padding
from lowrank_ops.runtime.autocast import no_autocast
from lowrank_ops.runtime.modes import eval_mode
from lowrank_ops.runtime.nested import values_of


@dataclass
class Moments:
    """Second moments of one layer over the calibration data, shrunk where rows are few (`calibrate.shrinkage`).

    On the CPU, in the dtype of what the layer sees, fp32 at least. Of one wider than `shrinkage.WIDEST`: its diagonal.

    Attributes:
        input: `[S, S]`, the mean of `x x^T` over input pixels (all taps of a window together), without those of
            held-out positions.
        gradient: `[T, T]`, the sum of `g g^T` over output positions, g the gradient of a random projection of the
            model's output with respect to the layer's output: an error `d` there moves the model's output by about
            `sqrt(d^T gradient d)`, so errors of different layers compare. The identity where the model passes no
            gradient.
        rows: output positions that the layer has computed, held-out ones included.
    """

    input: Triangle | Tensor
    gradient: Triangle | Tensor
    rows: int = 0


class _Enough(BaseException):
    """Ends a model's run early. No Exception: a model that falls back to another way of computing must not catch it."""


class HeldOut:
    """Which output positions of a layer's calls are held out: of the quarters of each call, in the order of positions,
    the last one; of calls of fewer than four positions every fourth position.

    Where the leading axis is the batch, these are whole samples: neighbours of a held-out pixel are held out, too.
    """

    def __init__(self) -> None:
        self._before = 0

    def next_call(self, total: int) -> Callable[[Tensor], Tensor]:
        """For the next call, of so many positions: a function from positions to whether they are held out."""
        parts, before = min(4, total), self._before
        self._before += parts
        return lambda positions: (before + positions * parts // max(total, 1)) % 4 == 3


def input_rows(layer: Layer, input: Tensor, positions: Tensor) -> Tensor:
    """`[positions, S, K]`: what each of the output positions sees of the input, padding included."""
    input = values_of(input)
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
    output = values_of(output)
    if isinstance(layer, nn.Linear):
        flat = output.reshape(-1, output.shape[-1])
    else:
        image = output if output.dim() == len(layer.kernel_size) + 2 else output.unsqueeze(0)
        flat = image.movedim(1, -1).reshape(-1, image.shape[1])
    return flat if positions is None else flat[positions]


def count_positions(layer: Layer, output: Tensor) -> int:
    """How many positions a layer's output has."""
    output = values_of(output)
    return output.numel() // output.shape[-1 if isinstance(layer, nn.Linear) else -len(layer.kernel_size) - 1]


def draw_positions(layer: Layer, output: Tensor, count: int, key: str) -> Tensor:
    """At most `count` of the output's positions, drawn without replacement, the same ones for the same key."""
    total = count_positions(layer, output)
    if total <= count:
        return torch.arange(total, device=output.device)
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randperm(total, generator=generator)[:count].to(output.device)


def gather_moments(
    model: nn.Module, layers: Sequence[Layer], batches: Batches, positions: int = 4096, seen: Callable[[], Any] = int
) -> tuple[dict[int, Moments], dict[int, int]]:
    """The moments of layers by id, in the order in which the model calls them, and how often a run calls each.

    One forward and one backward pass per batch, in eval mode.

    Args:
        model: runs as it is; nothing of it changes.
        layers: of the model.
        batches: calibration data.
        positions: at most so many of a layer's positions are taken of each call for `input`.
        seen: called after each batch (progress).

    A layer that is never called, or on no position, is missing in the results. Each batch finds the model's buffers and
    attributes, and the random generators, as this function found them.
    """
    sums: dict[int, _Sums] = {}
    found: dict[int, int] = {}

    running_backward = False

    def record(layer: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        total = count_positions(layer, output)
        if not running_backward:
            found[id(layer)] = found.get(id(layer), 0) + 1
        if not total:
            return None
        if id(layer) not in sums:
            sums[id(layer)] = _Sums(output_rows(layer, output).shape[1])
        of_layer = sums[id(layer)]
        if not running_backward:  # otherwise torch.utils.checkpoint computes again what was seen in the forward pass
            held = of_layer.held.next_call(total)
            chosen = draw_positions(layer, output, positions, "moments").sort().values
            chosen = chosen[~held(chosen)]
            input = (args[0] if args else kwargs["input"]).detach()
            of_layer.add_input(input_rows(layer, input, chosen).transpose(1, 2).flatten(0, 1), total)
        if not torch.is_grad_enabled():  # the model's own no_grad or inference_mode: no gradient passes here
            return None
        fresh = not output.requires_grad
        if fresh:  # frozen weights behind integer inputs: the graph starts here
            output = output.clone().requires_grad_().clone()
        output.register_hook(lambda gradient: of_layer.add_gradient(output_rows(layer, gradient)))
        return output if fresh else None

    generator = torch.Generator().manual_seed(0)
    trained = [
        parameter for parameter in model.parameters() if parameter.requires_grad and not parameter.is_inference()
    ]
    calls: dict[int, int] = {}
    order: list[int] = []
    state = ModelState(model)
    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)  # no gradients of weights are wanted
        with (
            eval_mode(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            _backward_through_recurrent_layers(),
            batches.same_order(),
        ):
            for index, batch in enumerate(batches):
                with ordinary_tensors(model), own_random_numbers(index):
                    outputs = [output for output in outputs_of(batch.run(model, track=True)) if output.requires_grad]
                    probes = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
                    running_backward = True
                    if outputs:
                        torch.autograd.backward(outputs, probes)
                    running_backward = False
                state.restore()
                add_calls(order, list(found))
                for key, number in found.items():
                    calls[key] = max(calls.get(key, 0), number)
                found.clear()
                seen()
    finally:
        state.restore()
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return {key: sums.pop(key).moments_() for key in order if key in sums}, calls


def add_calls(order: list[int], called: Sequence[int]) -> None:
    """Adds the layers of one more run, in the order of its calls, to that of the runs before it: one that is new (an
    expert that had no rows so far) comes after the one that was called before it."""
    if set(called) <= set(order):
        return
    place = 0
    for key in called:
        if key in order:
            place = order.index(key) + 1
        else:
            order.insert(place, key)
            place += 1


class _Sums:
    """What `gather_moments` knows of a layer."""

    def __init__(self, outputs: int) -> None:
        self.gradient = SecondMoment(outputs)
        self.input: SecondMoment | None = None
        self.held = HeldOut()
        self.rows = 0

    def add_input(self, rows: Tensor, positions: int) -> None:
        """Rows of a call of so many positions. The first call is taken as three, so that there is something to compare:
        see `SecondMoment.independent_rows`."""
        self.rows += positions
        first = self.input is None
        if self.input is None:
            self.input = SecondMoment(rows.shape[1])
        for group in rows.chunk(3) if first else (rows,):
            self.input.add(group)

    def add_gradient(self, rows: Tensor) -> None:
        for group in rows.chunk(3) if not self.gradient.rows else (rows,):
            self.gradient.add(group)

    def moments_(self) -> Moments:
        """In the memory of the sums, which are lost."""
        total = self.gradient.total
        usable = finite(total) and bool(total.any())
        gradient = self.gradient.shrunk_().mul_(self.gradient.rows) if usable else _identity_(total)
        assert self.input is not None
        return Moments(self.input.shrunk_(), gradient, self.rows)


def finite(moment: Triangle | Tensor) -> bool:
    """Whether all entries are: where one is not, one on the diagonal is not, as no entry is above both of its own."""
    return bool(torch.isfinite(diagonal(moment)).all())


def _identity_(moment: Triangle | Tensor) -> Triangle | Tensor:
    """The identity, or its diagonal, in the moment's place, whose values may not be finite."""
    if isinstance(moment, Tensor):
        return moment.fill_(1)
    for panel in moment.panels:
        panel.zero_().fill_diagonal_(1)
    return moment


def _backward_through_recurrent_layers() -> Any:
    """cuDNN has no backward pass of recurrent layers in eval mode; PyTorch's own kernels do."""
    return torch.backends.cudnn.flags(enabled=False)


@dataclass
class Watched:
    """A layer to watch: its next `calls` calls; `record(call, input, output)` sees each of them."""

    layer: nn.Module
    calls: int
    record: Callable[[int, Tensor, Tensor], Any]
    number: int = 0


def watch(model: nn.Module, watched: Sequence[Watched], batch: Batch, seed: int = 0) -> None:
    """Runs the model on a batch up to the last of the watched calls, which are recorded outside of the model's
    autocast. The same seed gives the same random numbers to the model. What the run changes in the model stays changed:
    see `ModelState`."""

    def left() -> bool:
        return any(of_layer.number < of_layer.calls for of_layer in watched)

    def hook(of_layer: Watched, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        if of_layer.number == of_layer.calls:  # also where the model caught _Enough and goes on
            return
        with no_autocast():
            of_layer.record(of_layer.number, args[0] if args else kwargs["input"], output)
        of_layer.number += 1
        if not left():
            raise _Enough

    handles = [
        of_layer.layer.register_forward_hook(
            lambda _, *call, of_layer=of_layer: hook(of_layer, *call),  # type: ignore[misc]
            with_kwargs=True,
        )
        for of_layer in watched
    ]
    try:
        with (
            eval_mode(model),
            torch.inference_mode(in_inference_mode(model)),
            torch.no_grad(),
            own_random_numbers(seed),
        ):
            batch.run(model)
    except _Enough:
        pass
    except Exception:
        if left():  # else the model made another error of _Enough, and all calls were seen
            raise
    finally:
        for handle in handles:
            handle.remove()


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
