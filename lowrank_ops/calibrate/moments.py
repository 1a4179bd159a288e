"""Rows of layers' inputs and outputs on calibration data, and the second moments of these rows.

Every layer that is factorized multiplies a matrix, `weight.flatten(1)`, `[T, S K]`, by rows of its input: the K taps of
a window in each of S channels (K = 1 for a linear layer). There is one row per output position (image and pixel, or row
of a linear layer). A random part of the positions is enough: only these rows are copied, never a whole activation. A
quarter of the positions is held out (`HeldOut`): factors are made without it, and errors are measured on it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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

    They lie on the CPU, in the dtype of the layer's input and gradient, but fp32 at least. A moment wider than
    `shrinkage.WIDEST` is kept as its diagonal.

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
    """Ends a model's run early. It is no `Exception`: a model that catches errors to compute in another way must not
    catch it."""


class HeldOut:
    """Which output positions of a layer's calls are held out: the last quarter of each call, in the order of positions;
    if calls have fewer than four positions, every fourth position of all calls.

    Where the leading axis is the batch, this holds out whole samples: a pixel and its neighbours are held out together.
    """

    def __init__(self) -> None:
        self._before = 0

    def next_call(self, total: int) -> Callable[[Tensor], Tensor]:
        """For the next call, which has `total` positions: a function that says for each position whether it is held
        out."""
        parts, before = min(4, total), self._before
        self._before += parts
        return lambda positions: (before + positions * parts // max(total, 1)) % 4 == 3


def input_rows(layer: Layer, input: Tensor, positions: Tensor) -> Tensor:
    """`[positions, S, K]`: the window of the input from which each of the output positions is computed, padding
    included."""
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
    """`[positions, T]`: the output at these positions, or at all of them."""
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
    """At most `count` positions of the output, drawn without replacement; the same key gives the same ones."""
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
        positions: the most positions per call of a layer that are taken for `input`.
        seen: called after each batch (progress).

    A layer that is never called, or on no position, is missing in the results. Each batch finds the model's buffers and
    attributes, and the random generators, as this function found them.
    """
    gathering = _Gathering(positions)
    state = ModelState(model)
    handles = [layer.register_forward_hook(gathering.record, with_kwargs=True) for layer in layers]
    try:
        with (
            _without_weight_gradients(model),
            eval_mode(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            _backward_through_recurrent_layers(),
            batches.same_order(),
        ):
            for index, batch in enumerate(batches):
                with ordinary_tensors(model), own_random_numbers(index):
                    gathering.run(model, batch)
                state.restore()
                gathering.end_batch()
                seen()
    finally:
        state.restore()
        for handle in handles:
            handle.remove()
    return gathering.moments_(), gathering.calls


class _Gathering:
    """The sums of all layers over the batches so far.

    Attributes:
        calls: how often a run calls each layer, by id: the most over all batches.
    """

    def __init__(self, positions: int) -> None:
        self.calls: dict[int, int] = {}
        self._positions = positions
        self._sums: dict[int, _Sums] = {}
        self._order: list[int] = []  # ids of the layers in the order of their calls
        self._called: dict[int, int] = {}  # how often each was called in this batch, in the order of the first calls
        self._generator = torch.Generator().manual_seed(0)
        self._running_backward = False

    def run(self, model: nn.Module, batch: Batch) -> None:
        """Runs the model forward on a batch, and backward from a random projection of its outputs."""
        outputs = [output for output in outputs_of(batch.run(model, track=True)) if output.requires_grad]
        probes = [torch.randn(output.shape, generator=self._generator).to(output) for output in outputs]
        self._running_backward = True
        if outputs:
            torch.autograd.backward(outputs, probes)
        self._running_backward = False

    def end_batch(self) -> None:
        """Adds what the batch showed about the calls."""
        add_calls(self._order, list(self._called))
        for key, number in self._called.items():
            self.calls[key] = max(self.calls.get(key, 0), number)
        self._called.clear()

    def moments_(self) -> dict[int, Moments]:
        """The moments by the layer's id, in the order of the calls, in the memory of the sums."""
        return {key: self._sums.pop(key).moments_() for key in self._order if key in self._sums}

    def record(self, layer: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """A forward hook: adds rows of the input, and prepares to add rows of the output's gradient."""
        total = count_positions(layer, output)
        # During the backward pass torch.utils.checkpoint calls layers again, on inputs that were already added.
        again = self._running_backward
        if not again:
            self._called[id(layer)] = self._called.get(id(layer), 0) + 1
        if not total:
            return None
        if id(layer) not in self._sums:
            self._sums[id(layer)] = _Sums(output_rows(layer, output).shape[1])
        sums = self._sums[id(layer)]
        if not again:
            held = sums.held.next_call(total)
            drawn = draw_positions(layer, output, self._positions, "moments").sort().values
            drawn = drawn[~held(drawn)]
            input = (args[0] if args else kwargs["input"]).detach()
            sums.add_input(input_rows(layer, input, drawn).transpose(1, 2).flatten(0, 1), total)
        if not torch.is_grad_enabled():  # the model's own no_grad or inference_mode: no gradient passes here
            return None
        fresh = not output.requires_grad
        if fresh:  # frozen weights behind integer inputs: the graph starts here
            output = output.clone().requires_grad_().clone()
        output.register_hook(lambda gradient: sums.add_gradient(output_rows(layer, gradient)))
        return output if fresh else None


@contextmanager
def _without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Within it no parameter requires a gradient: the backward pass computes those of activations alone."""
    trained = [each for each in model.parameters() if each.requires_grad and not each.is_inference()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def add_calls(order: list[int], called: Sequence[int]) -> None:
    """Adds the layers that a run called, in the order of their calls, to the `order` of earlier runs. A layer that is
    new there (an expert that had no rows so far) is put behind the layer that was called before it."""
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
    """The sums over the rows of one layer so far.

    Attributes:
        held: which of its positions are held out.
        rows: positions that it computed, held-out ones included.
    """

    def __init__(self, outputs: int) -> None:
        self.gradient = SecondMoment(outputs)
        self.input: SecondMoment | None = None
        self.held = HeldOut()
        self.rows = 0

    def add_input(self, rows: Tensor, positions: int) -> None:
        """Adds rows of a call that has `positions` positions. The rows of the first call are added as three groups, so
        that there are groups to compare even if there is no other call: see `SecondMoment.independent_rows`."""
        self.rows += positions
        first = self.input is None
        if self.input is None:
            self.input = SecondMoment(rows.shape[1])
        for group in rows.chunk(3) if first else (rows,):
            self.input.add(group)

    def add_gradient(self, rows: Tensor) -> None:
        """Adds rows of the output's gradient in a call."""
        for group in rows.chunk(3) if not self.gradient.rows else (rows,):
            self.gradient.add(group)

    def moments_(self) -> Moments:
        """The moments, in the memory of the sums, which are lost."""
        total = self.gradient.total
        usable = finite(total) and bool(total.any())
        gradient = self.gradient.shrunk_().mul_(self.gradient.rows) if usable else _identity_(total)
        assert self.input is not None
        return Moments(self.input.shrunk_(), gradient, self.rows)


def finite(moment: Triangle | Tensor) -> bool:
    """Whether all entries are finite. The diagonal shows it: no entry of a sum of `x x^T` is larger than both diagonal
    entries of its row and column."""
    return bool(torch.isfinite(diagonal(moment)).all())


def _identity_(moment: Triangle | Tensor) -> Triangle | Tensor:
    """Overwrites a moment, whose values may not be finite, by the identity, or by its diagonal."""
    if isinstance(moment, Tensor):
        return moment.fill_(1)
    for panel in moment.panels:
        panel.zero_().fill_diagonal_(1)
    return moment


def _backward_through_recurrent_layers() -> Any:
    """A context without cuDNN, which has no backward pass of recurrent layers in eval mode; torch's kernels do."""
    return torch.backends.cudnn.flags(enabled=False)


@dataclass
class Watched:
    """A layer to watch in a run.

    Attributes:
        calls: how many of its calls to record.
        record: called as `record(call, input, output)` for each of them.
        number: how many calls there were so far.
    """

    layer: nn.Module
    calls: int
    record: Callable[[int, Tensor, Tensor], Any]
    number: int = 0


def watch(model: nn.Module, watched: Sequence[Watched], batch: Batch, seed: int = 0) -> None:
    """Runs the model on a batch until all watched calls are recorded, without the model's autocast. The same seed gives
    the model the same random numbers. The run may change the model's state: see `ModelState`."""

    def left() -> bool:
        return any(of_layer.number < of_layer.calls for of_layer in watched)

    def hook(of_layer: Watched, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        if of_layer.number == of_layer.calls:  # a model that catches even _Enough goes on calling layers
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
        if left():  # else all calls were recorded, and the model turned _Enough into an error of its own
            raise
    finally:
        for handle in handles:
            handle.remove()


def _window(layer: nn.Conv1d | nn.Conv2d, input: Tensor) -> tuple[Tensor, Any, Any, Any, list[tuple[int, int]]]:
    """The input as `[N, S, H, W]` (H = 1 for a 1-D convolution), and kernel, stride, dilation and padding of both
    axes."""
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
