"""`FactorizedConv`, the base class of the factorized convolutions: nn.Conv2d's arguments, padding modes, and
one-dimensional convolutions as images of height 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ops.decompose.ranks import Rank
from lowrank_ops.nn import chains, plain
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.checks import at_least, check_activation, check_replaceable, groups_reason, refuse_energy
from lowrank_ops.nn.init import Init
from lowrank_ops.runtime.nested import refuse_nested

if TYPE_CHECKING:
    from typing_extensions import Self

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

Size = int | tuple[int, ...]


class FactorizedConv(FactorizedModule):
    """Base class of the four convolutions. It keeps nn.Conv2d's arguments per axis, and splits them into what the op
    takes and what is done to the input before it."""

    axes: ClassVar[int] = 2
    groups: ClassVar[int] = 1
    transposed: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        rank: Rank,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        activation: str = "none",
        device: Any = None,
        dtype: torch.dtype | None = None,
        init: Init = "default",
    ) -> None:
        super().__init__()
        if groups != 1:
            raise ValueError(f"{self._name}: {groups_reason(groups)}")
        self.in_channels = at_least(self._name, "in_channels", in_channels, 1)
        self.out_channels = at_least(self._name, "out_channels", out_channels, 1)
        self.kernel_size = self._per_axis("kernel_size", kernel_size, 1)
        self.stride = self._per_axis("stride", stride, 1)
        self.dilation = self._per_axis("dilation", dilation, 1)
        self.padding: tuple[int, ...] | str
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"{self._name}: padding must be 'same', 'valid' or sizes, got {padding!r}")
            if padding == "same" and any(step != 1 for step in self.stride):
                raise ValueError(
                    f"{self._name}: padding='same' requires stride 1, got {self.stride}; give the padding in pixels"
                )
            self.padding = padding
        else:
            self.padding = self._per_axis("padding", padding, 0)
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"{self._name}: padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}")
        self.padding_mode = padding_mode
        self.output_padding = (0,) * self.axes  # nn.Conv2d has this attribute too
        self.activation = check_activation(self._name, activation)
        refuse_energy(self._name, rank)
        self.rank = self._resolve_rank(rank)
        self._plan_window()
        self._create(bias, self.out_channels, device, dtype, init)

    def forward(self, input: Tensor) -> Tensor:
        """`[N, S, H, W]` or `[S, H, W]` to `[N, T, OH, OW]` or `[T, OH, OW]`; without H for the 1-D
        modules."""
        if isinstance(input, torch.fx.Proxy):
            return self._record(input)  # type: ignore[no-any-return]
        refuse_nested(self._name, input)
        batched = self.axes + 2
        if input.dim() not in (batched - 1, batched):
            shapes = "[N, S, H, W] or [S, H, W]" if self.axes == 2 else "[N, S, W] or [S, W]"
            raise ValueError(f"{self._name}: input must be {shapes}, got shape {list(input.shape)}")
        image = input if input.dim() == batched else input.unsqueeze(0)
        if self.axes == 1:
            image = image.unsqueeze(2)
        if self._outer_padding is not None:
            image = F.pad(image, self._outer_padding, self._outer_mode)
        if self._steps != (1, 1):
            image = image[:, :, :: self._steps[0], :: self._steps[1]]
        output = self._op(image)
        if self.axes == 1:
            output = output.squeeze(2)
        return output if input.dim() == batched else output.squeeze(0)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A plain nn.Conv2d (nn.Conv1d) with a copy of the product of the factors, formed in float32 or float64.

        With an activation: an nn.Sequential of that convolution and the activation's module.
        """
        conv = plain.conv_layer(
            self._dense_weight(),
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
        )
        conv.weight.requires_grad_(self.out_factor.requires_grad)
        dense = conv if self.activation == "none" else plain.with_activation([conv], self.activation)
        return dense.train(self.training)

    def dropped_steps(self) -> tuple[int, ...]:
        """Per axis, the stride with which pixels of the input are dropped before the op (1: none are dropped)."""
        return self._steps[2 - self.axes :]

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"]
        parts.append(f"stride={self.stride}")
        if self.padding != (0,) * self.axes:
            parts.append(f"padding={self.padding!r}")
        if self.dilation != (1,) * self.axes:
            parts.append(f"dilation={self.dilation}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        if self.activation != "none":
            parts.append(f"activation={self.activation}")
        return ", ".join(parts)

    def _op(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def _resolve_rank(self, rank: Rank) -> int | tuple[int, int]:
        raise NotImplementedError

    def _dense_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def _fan_in(self) -> int:
        return self.in_channels * math.prod(self.kernel_size)

    def _meta_weight(self) -> Tensor:
        """The dense weight's shape `[T, S, KH, KW]`, without values."""
        return torch.empty(self.out_channels, self.in_channels, *self._kernel2d(), device="meta")

    def _kernel2d(self) -> tuple[int, int]:
        return _image_axes(self.kernel_size, 1)

    def _per_axis(self, argument: str, value: Size, smallest: int) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * self.axes
        if len(values) != self.axes:
            raise ValueError(f"{self._name}: {argument} must be an int or {self.axes} ints, got {value}")
        return tuple(at_least(self._name, argument, entry, smallest) for entry in values)

    def _plan_window(self) -> None:
        """Splits the convolution's arguments into the op's window and what is done to the input before the op.

        The op pads with zeros, equally on both sides; F.pad does all other padding. Along an axis where the kernel has
        one tap and no padding, a stride only drops pixels: they are dropped before the op, which then computes less.
        """
        kernel, stride, dilation = (
            self._kernel2d(),
            _image_axes(self.stride, 1),
            _image_axes(self.dilation, 1),
        )
        if self.padding == "same":
            sides = [plain.same_padding(size, step) for size, step in zip(kernel, dilation, strict=True)]
        else:
            pixels = (0,) * self.axes if self.padding == "valid" else self.padding
            sides = [(size, size) for size in _image_axes(pixels, 0)]  # type: ignore[arg-type]
        inner = [min(side) if self.padding_mode == "zeros" else 0 for side in sides]
        outer = [(before - own, after - own) for (before, after), own in zip(sides, inner, strict=True)]
        drops = [size == 1 and side == (0, 0) for size, side in zip(kernel, sides, strict=True)]
        self._outer_padding = [*outer[1], *outer[0]] if any(map(any, outer)) else None
        self._outer_mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        self._steps = (stride[0] if drops[0] else 1, stride[1] if drops[1] else 1)
        op_stride = (stride[0] // self._steps[0], stride[1] // self._steps[1])
        self._window = (op_stride, (inner[0], inner[1]), dilation)

    @classmethod
    def _empty_like(cls, conv: Any, weight: Tensor, activation: str, bias: bool) -> Self:
        """A module without values (on the meta device) with the convolution arguments of `conv`."""
        return cls(
            weight.shape[1],
            weight.shape[0],
            conv.kernel_size,
            1,  # `_adopt` sets the rank
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            bias=bias,
            padding_mode=conv.padding_mode,
            activation=activation,
            device="meta",
            dtype=weight.dtype,
        )

    @classmethod
    def _from_conv(
        cls, conv: nn.Module, rank: Rank, multiple: int, seed: int, activation: str, name: str, progress: bool = False
    ) -> Self:
        kind = nn.Conv2d if cls.axes == 2 else nn.Conv1d
        check_replaceable(cls.__name__, conv, kind, name)
        assert isinstance(conv, (nn.Conv1d, nn.Conv2d))
        check_activation(cls.__name__, activation)
        weight = conv.weight.detach()
        image = weight if cls.axes == 2 else weight.unsqueeze(2)
        factors, error = cls._decompose(image, rank, multiple, seed, name, progress)
        module = cls._empty_like(conv, weight, activation, conv.bias is not None)
        module._adopt(factors, conv.bias, conv, frozen=not conv.weight.requires_grad)
        module.relative_error = error
        return module

    @classmethod
    def _from_chain(cls, chain: chains.Chain, like: nn.Module) -> Self:
        channels = torch.empty(
            chain.factors["out_factor"].shape[0],
            chain.factors["in_factor"].shape[1],
            device="meta",
            dtype=chain.factors["in_factor"].dtype,
        )
        module = cls._empty_like(chain, channels, chain.activation, chain.bias is not None)
        module._adopt(chain.factors, chain.bias, like, frozen=None)
        for name, stage in zip(chain.factors, chain.stages, strict=True):
            getattr(module, name).requires_grad_(stage.weight.requires_grad)
        return module


def _image_axes(values: Sequence[int], height: int) -> tuple[int, int]:
    """`(height, width)` of a per-axis argument: a 1-D one gets `height` for its missing axis."""
    return (height, values[0]) if len(values) == 1 else (values[0], values[1])
