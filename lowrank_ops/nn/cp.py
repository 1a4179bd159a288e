"""CP convolutions as modules: `CPConv2d` and `CPConv1d`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowrank_ops.decompose import ranks
from lowrank_ops.decompose.cp import cp_decompose
from lowrank_ops.decompose.ranks import Rank
from lowrank_ops.decompose.svd import svd_decompose
from lowrank_ops.linalg.singular import exactly
from lowrank_ops.nn import chains, plain
from lowrank_ops.nn.base import widened
from lowrank_ops.nn.checks import layers_of
from lowrank_ops.nn.conv import FactorizedConv
from lowrank_ops.ops import reference
from lowrank_ops.ops.functional import call_op

if TYPE_CHECKING:
    from typing_extensions import Self


class _CPConv(FactorizedConv):
    height_factor: nn.Parameter  # not in one dimension
    width_factor: nn.Parameter
    rank: int

    @classmethod
    def from_sequential(cls, seq: nn.Sequential) -> Self:
        """The module that equals a chain of convolutions (1x1, Kx1 depthwise, 1xK depthwise, 1x1), in one dimension
        (1, K depthwise, 1), with an activation after them or none.

        The two depthwise convolutions may come in either order, and either may have stride, padding and dilation. Two
        pointwise convolutions become a block of one tap, whose height and width factors are ones. The module holds
        copies of the weights.

        Raises:
            ValueError: the chain is not equal to one op (`NotOneOp`, with the reason; see `lowrank_ops.nn.chains`).
            TypeError: `seq` is no nn.Sequential.
        """
        return cls._from_chain(chains.read_cp(layers_of(cls.__name__, seq), cls.axes), seq)

    def to_sequential(self) -> nn.Sequential:
        """The chain of plain pointwise and depthwise convolutions, and the activation if there is one, with copies of
        the values.

        A block of one tap becomes two pointwise convolutions. The first one's weight includes the height and width
        factors, and it has the stride and padding.
        """
        pointwise = (slice(None), slice(None), *(None,) * self.axes)
        if max(self.kernel_size) == 1:
            return self._pointwise_pair(pointwise)
        layers = [plain.conv_layer(self.in_factor[pointwise])]
        for axis, factor in enumerate(list(self.factors().values())[1:-1]):
            kernel = [1] * self.axes
            kernel[axis] = self.kernel_size[axis]

            def own(values: Sequence[int], other: int, axis: int = axis) -> tuple[int, ...]:
                return tuple(value if place == axis else other for place, value in enumerate(values))

            layers.append(
                plain.conv_layer(
                    factor.reshape(self.rank, 1, *kernel),
                    stride=own(self.stride, 1),
                    padding=self.padding if isinstance(self.padding, str) else own(self.padding, 0),
                    dilation=own(self.dilation, 1),
                    groups=self.rank,
                    padding_mode=self.padding_mode,
                )
            )
        layers.append(plain.conv_layer(self.out_factor[pointwise], self.bias))
        return plain.with_activation(layers, self.activation).train(self.training)

    @torch.no_grad()
    def _pointwise_pair(self, pointwise: tuple[slice | None, ...]) -> nn.Sequential:
        taps = widened(self._height_factor()) * widened(self.width_factor)
        first = plain.conv_layer(
            (widened(self.in_factor) * taps).to(self.in_factor.dtype)[pointwise],
            stride=self.stride,
            padding=self.padding,
            padding_mode=self.padding_mode,
        )
        first.weight.requires_grad_(self.in_factor.requires_grad)
        last = plain.conv_layer(self.out_factor[pointwise], self.bias)
        return plain.with_activation([first, last], self.activation).train(self.training)

    def _op(self, image: Tensor) -> Tensor:
        tensors = (image, self.in_factor, self._height_factor(), self.width_factor, self.out_factor, self.bias)
        return call_op("cp_conv2d", tensors, (*self._window, self.activation), self._packed())

    def _height_factor(self) -> Tensor:
        if self.axes == 2:
            return self.height_factor
        width_factor = self.width_factor
        if self._packing is not None and self._packed() is not None:  # what was packed names this tensor's memory
            packed = self._packing.factors["height_factor"]
            wanted = (len(width_factor), width_factor.dtype, width_factor.device)
            if (len(packed), packed.dtype, packed.device) == wanted:
                return packed
        return width_factor.new_ones(self.rank, 1)

    def _op_factors(self) -> dict[str, Tensor]:
        depthwise = {"height_factor": self._height_factor(), "width_factor": self.width_factor}
        return {**super()._op_factors(), **{name: factor.detach() for name, factor in depthwise.items()}}

    def _factor_shapes(self) -> dict[str, tuple[int, ...]]:
        names = ("height_factor", "width_factor")[2 - self.axes :]
        spatial = {name: (self.rank, size) for name, size in zip(names, self.kernel_size, strict=True)}
        return {
            "in_factor": (self.rank, self.in_channels),
            **spatial,
            "out_factor": (self.out_channels, self.rank),
        }

    def _resolve_rank(self, rank: Rank) -> int:
        return ranks.cp_rank(rank, self._meta_weight(), name=self._name)

    def _dense_weight(self) -> Tensor:
        factors = (self.in_factor, self._height_factor(), self.width_factor, self.out_factor)
        weight = reference.cp_weight(*map(widened, factors))
        return weight.reshape(self._dense_shape()).to(self.in_factor.dtype).contiguous()

    @classmethod
    def _decompose(
        cls, weight: Tensor, rank: Rank, multiple: int, seed: int, name: str, progress: bool
    ) -> tuple[dict[str, Tensor], float]:
        if weight.shape[2:] == (1, 1):  # a matrix: its truncated SVD is the best CP decomposition of each rank
            matrix = svd_decompose(weight.flatten(1), rank, multiple=multiple, seed=seed, name=name)
            ones = weight.new_ones(matrix.in_factor.shape[0], 1)
            in_factor, out_factor, height, width = matrix.in_factor, matrix.out_factor, ones, ones
            error = matrix.relative_error
        else:
            found = cp_decompose(weight, rank, multiple=multiple, seed=seed, name=name, progress=progress)
            in_factor, out_factor = found.in_factor, found.out_factor
            height, width, error = found.height_factor, found.width_factor, found.relative_error
        if cls.axes == 2:
            spatial = {"height_factor": height, "width_factor": width}
        else:
            in_factor, spatial = in_factor * height, {"width_factor": width}
        return {"in_factor": in_factor, **spatial, "out_factor": out_factor}, error


class CPConv2d(_CPConv):
    """A CP convolution: 1x1 (S to R), KHx1 depthwise, 1xKW depthwise, 1x1 (R to T) as one op (Lebedev et al.,
    arXiv:1412.6553). Arguments, input, output and errors as `TuckerConv2d`, with a single `rank`.

    Parameters: `in_factor [R, S]`, `height_factor [R, KH]`, `width_factor [R, KW]`, `out_factor [T, R]`,
    `bias [T]` or None. The weight of a 1x1 convolution is a matrix, whose best approximation of rank R is its truncated
    SVD; height and width factor are then ones.
    """

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        rank: Rank,
        *,
        multiple: int = 8,
        seed: int = 0,
        activation: str = "none",
        name: str = "conv",
        progress: bool = False,
        exact: bool = False,
    ) -> Self:
        """As `TuckerConv2d.from_conv2d`, by `cp_decompose`; a 1x1 convolution by `svd_decompose`.

        Args:
            progress: shows a bar on stderr where the decomposition takes more than two seconds.
            exact: no randomized SVD of a 1x1 convolution.
        """
        with exactly(exact):
            return cls._from_conv(conv, rank, multiple, seed, activation, name, progress)


class CPConv1d(_CPConv):
    """`CPConv2d` in one dimension, computed as an image of height 1. Arguments as nn.Conv1d plus `rank`.

    Parameters: `in_factor [R, S]`, `width_factor [R, K]`, `out_factor [T, R]`, `bias [T]` or None. Input
    `[N, S, W]` or `[S, W]`. Errors as `TuckerConv2d`.
    """

    axes = 1

    @classmethod
    def from_conv1d(
        cls,
        conv: nn.Conv1d,
        rank: Rank,
        *,
        multiple: int = 8,
        seed: int = 0,
        activation: str = "none",
        name: str = "conv",
        progress: bool = False,
        exact: bool = False,
    ) -> Self:
        """As `CPConv2d.from_conv2d`, for an nn.Conv1d."""
        with exactly(exact):
            return cls._from_conv(conv, rank, multiple, seed, activation, name, progress)
