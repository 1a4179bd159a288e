"""The factorized layers as nn.Modules: constructors like nn.Conv2d and nn.Linear plus `rank`.

Every module calls one op of `lowrank_ops.ops.functional`. What the ops leave to the modules (padding modes,
padding="same", unbatched inputs, one-dimensional convolutions as images of height 1) is in `conv_base.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_ops.decompose import ranks
from lowrank_ops.decompose.cp import cp_decompose
from lowrank_ops.decompose.ranks import Rank
from lowrank_ops.decompose.svd import svd_decompose
from lowrank_ops.decompose.tucker import tucker_decompose
from lowrank_ops.linalg.singular import exactly
from lowrank_ops.nn import chains, plain
from lowrank_ops.nn.base import FactorizedModule, widened
from lowrank_ops.nn.checks import at_least, check_activation, check_replaceable, layers_of, refuse_energy
from lowrank_ops.nn.conv import FactorizedConv
from lowrank_ops.nn.init import Init
from lowrank_ops.ops import reference
from lowrank_ops.ops.extension import ops_for
from lowrank_ops.ops.functional import cp_conv2d, lowrank_linear, tucker_conv2d
from lowrank_ops.runtime.nested import is_nested, on_values

if TYPE_CHECKING:
    from typing_extensions import Self


class _TuckerConv(FactorizedConv):
    core: nn.Parameter
    rank: tuple[int, int]

    @classmethod
    def from_sequential(cls, seq: nn.Sequential) -> Self:
        """Fuses a chain (1x1, KxK, 1x1) with an optional activation; the module holds copies of the weights.

        Raises ValueError with the reason if the chain is not equal to one op (see `lowrank_ops.nn.chains`).
        """
        return cls._from_chain(chains.read_tucker(layers_of(cls.__name__, seq), cls.axes), seq)

    def to_sequential(self) -> nn.Sequential:
        """The plain chain of three convolutions and the activation, with copies of the values."""
        pointwise = (slice(None), slice(None), *(None,) * self.axes)
        core = plain.conv_layer(
            self.core,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
        )
        first = plain.conv_layer(self.in_factor[pointwise])
        last = plain.conv_layer(self.out_factor[pointwise], self.bias)
        return plain.with_activation([first, core, last], self.activation).train(self.training)

    def _op(self, image: Tensor) -> Tensor:
        core, panels = self._core(), self._panels(image)
        # Compiled, a view has a version counter of its own: a change of the core would pass unnoticed.
        if panels is not None and not (self.axes == 1 and torch.compiler.is_compiling()):
            tensors = (image, self.in_factor, core, self.out_factor, self.bias)
            return ops_for(*tensors).tucker_conv2d_prepared(*tensors, *self._window, self.activation, panels)
        return tucker_conv2d(image, self.in_factor, core, self.out_factor, self.bias, *self._window, self.activation)

    def _core(self) -> Tensor:
        return self.core if self.axes == 2 else self.core.unsqueeze(2)

    def _op_factors(self) -> dict[str, Tensor]:
        return {**super()._op_factors(), "core": self._core().detach()}

    def _has_unit_window(self) -> bool:
        stride, _, dilation = self._window
        return all(k == 1 or s == d == 1 for k, s, d in zip(self._core().shape[2:], stride, dilation, strict=True))

    def _factor_shapes(self) -> dict[str, tuple[int, ...]]:
        r1, r2 = self.rank
        return {
            "in_factor": (r1, self.in_channels),
            "core": (r2, r1, *self.kernel_size),
            "out_factor": (self.out_channels, r2),
        }

    def _resolve_rank(self, rank: Rank) -> tuple[int, int]:
        return ranks.tucker_ranks(rank, self._meta_weight(), name=self._name)

    def _dense_weight(self) -> Tensor:
        core = self.core.flatten(2).unsqueeze(2)
        weight = reference.tucker_weight(*map(widened, (self.in_factor, core, self.out_factor)))
        return weight.reshape(self._dense_shape()).to(self.core.dtype).contiguous()

    @classmethod
    def _decompose(
        cls, weight: Tensor, rank: Rank, multiple: int, seed: int, name: str, progress: bool
    ) -> tuple[dict[str, Tensor], float]:
        found = tucker_decompose(weight, rank, multiple=multiple, seed=seed, name=name)
        core = found.core if cls.axes == 2 else found.core.squeeze(2)
        factors = {"in_factor": found.in_factor, "core": core, "out_factor": found.out_factor}
        return factors, found.relative_error

    @classmethod
    def _rank_of(cls, factors: Mapping[str, Tensor]) -> tuple[int, int]:
        return factors["in_factor"].shape[0], factors["out_factor"].shape[1]


class TuckerConv2d(_TuckerConv):
    """A Tucker-2 convolution: 1x1 (S to R1), KHxKW (R1 to R2), 1x1 (R2 to T) as one op (Kim et al.,
    arXiv:1511.06530).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode: as nn.Conv2d,
            the convolution that the factors stand for.
        rank: an int for both ranks, `(R1, R2)` (input side first), or fractions of the channels.
        groups: only 1.
        activation: applied to the output: none, relu, relu6, hardswish, silu or gelu (exact).
        device, dtype: of the parameters.
        init: what the values are drawn from, as it would be for the dense layer: "default", "spectral", a name of
            torch.nn.init without the underscore, a callable, `Spectral(...)`; see `reset_parameters`. A callable is
            kept, and pickled, with the module (a lambda cannot be).

    Parameters: `in_factor [R1, S]`, `core [R2, R1, KH, KW]`, `out_factor [T, R2]`, `bias [T]` or None. Input
    `[N, S, H, W]` or `[S, H, W]`, output `[N, T, OH, OW]` or `[T, OH, OW]`.

    The core's memory format is a matter of speed alone, and is that of the layer or chain that the module came from,
    contiguous for a new one: `module.to(memory_format=torch.channels_last)` gives what is packed fastest (see
    `prepare_for_inference_` as well). FSDP2 (`fully_shard`), safetensors' `save_file` and tools of torch.nn.utils that
    flatten parameters take contiguous parameters only, as for nn.Conv2d.

    Raises:
        ValueError: an argument out of range, groups other than 1, a rank of 0 or above the limit, an `init` that
            is unknown or cannot fill the factors.
        TypeError: a dtype or a kind of rank that is not supported.
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
    ) -> Self:
        """Decomposes the weight of `conv` (`tucker_decompose`) and keeps everything else of it.

        `rank`, `multiple` and `seed` as in `tucker_decompose`; `name` stands for the layer in errors. The
        module's parameters are copies; requires_grad of the weight goes to every factor. Raises ValueError or
        TypeError if the convolution cannot be replaced (groups, an overridden forward, a computed weight,
        non-finite values).
        """
        return cls._from_conv(conv, rank, multiple, seed, activation, name)


class TuckerConv1d(_TuckerConv):
    """`TuckerConv2d` in one dimension, run as an image of height 1. Arguments as nn.Conv1d plus `rank`.

    Parameters: `in_factor [R1, S]`, `core [R2, R1, K]`, `out_factor [T, R2]`, `bias [T]` or None. Input `[N,
    S, W]` or `[S, W]`. Errors as `TuckerConv2d`.
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
    ) -> Self:
        """As `TuckerConv2d.from_conv2d`, from an nn.Conv1d."""
        return cls._from_conv(conv, rank, multiple, seed, activation, name)


class _CPConv(FactorizedConv):
    height_factor: nn.Parameter  # not in one dimension
    width_factor: nn.Parameter
    rank: int

    @classmethod
    def from_sequential(cls, seq: nn.Sequential) -> Self:
        """Fuses a chain (1x1, Kx1 depthwise, 1xK depthwise, 1x1) with an optional activation; 1-D: (1, K
        depthwise, 1). The depthwise pair may stand in either order, with stride, padding and dilation on
        either of them. Two pointwise convolutions are a block of one tap, its height and width factors ones.
        The module holds copies of the weights.

        Raises ValueError with the reason if the chain is not equal to one op (see `lowrank_ops.nn.chains`).
        """
        return cls._from_chain(chains.read_cp(layers_of(cls.__name__, seq), cls.axes), seq)

    def to_sequential(self) -> nn.Sequential:
        """The plain chain of pointwise and depthwise convolutions and the activation; holds copies.

        A block of one tap becomes two pointwise convolutions: its height and width factors are multiplied into the
        first, which takes the window.
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
        factors = (self.in_factor, self._height_factor(), self.width_factor, self.out_factor)
        if (panels := self._panels(image)) is not None:
            tensors = (image, *factors, self.bias)
            return ops_for(*tensors).cp_conv2d_prepared(*tensors, *self._window, self.activation, panels)
        return cp_conv2d(image, *factors, self.bias, *self._window, self.activation)

    def _height_factor(self) -> Tensor:
        return self.height_factor if self.axes == 2 else self.width_factor.new_ones(self.rank, 1)

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
        if weight.shape[2:] == (1, 1):  # a matrix: its SVD is the best CP decomposition of any rank
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
    `bias [T]` or None. A 1x1 convolution is a matrix: its best rank-R form is the SVD, with height and width
    factors of ones.
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
        """As `TuckerConv2d.from_conv2d`, by `cp_decompose`; a 1x1 convolution by `svd_decompose`, without a randomized
        SVD if `exact`. With `progress`, a bar on stderr where that takes more than two seconds."""
        with exactly(exact):
            return cls._from_conv(conv, rank, multiple, seed, activation, name, progress)


class CPConv1d(_CPConv):
    """`CPConv2d` in one dimension, run as an image of height 1. Arguments as nn.Conv1d plus `rank`.

    Parameters: `in_factor [R, S]`, `width_factor [R, K]`, `out_factor [T, R]`, `bias [T]` or None. Input `[N,
    S, W]` or `[S, W]`. Errors as `TuckerConv2d`.
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
        """As `CPConv2d.from_conv2d`, from an nn.Conv1d."""
        with exactly(exact):
            return cls._from_conv(conv, rank, multiple, seed, activation, name, progress)


class LowRankLinear(FactorizedModule):
    """A linear layer of rank R as one op: `activation((input in_factor^T) out_factor^T + bias)`.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        rank: an int or a fraction of min(S, T).
        activation: none, relu, relu6, hardswish, silu or gelu (exact).
        init: as `TuckerConv2d`.

    Parameters: `in_factor [R, S]`, `out_factor [T, R]`, `bias [T]` or None. Input `[..., S]`, output `[...,
    T]`; a nested input `[B, ragged, ..., S]` of the layout torch.jagged gives a nested output. Errors as
    `TuckerConv2d`.
    """

    rank: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Rank,
        bias: bool = True,
        activation: str = "none",
        device: Any = None,
        dtype: torch.dtype | None = None,
        init: Init = "default",
    ) -> None:
        super().__init__()
        self.in_features = at_least(self._name, "in_features", in_features, 1)
        self.out_features = at_least(self._name, "out_features", out_features, 1)
        self.activation = check_activation(self._name, activation)
        refuse_energy(self._name, rank)
        self.rank = ranks.linear_rank(rank, torch.empty(out_features, in_features, device="meta"), name=self._name)
        self._create(bias, out_features, device, dtype, init)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: Rank,
        *,
        multiple: int = 8,
        seed: int = 0,
        activation: str = "none",
        name: str = "linear",
        exact: bool = False,
    ) -> Self:
        """Decomposes the weight of `linear` (`svd_decompose`) and keeps everything else of it.

        Arguments and errors as `TuckerConv2d.from_conv2d`; `seed` is that of the randomized SVD, for low ranks only,
        which `exact` excludes.
        """
        check_replaceable(cls.__name__, linear, nn.Linear, name)
        check_activation(cls.__name__, activation)
        with exactly(exact):
            factors, error = cls._decompose(linear.weight.detach(), rank, multiple, seed, name, False)
        module = cls._empty(factors, linear.bias is not None, activation)
        module._adopt(factors, linear.bias, linear, frozen=not linear.weight.requires_grad)
        module.relative_error = error
        return module

    @classmethod
    def from_sequential(cls, seq: nn.Sequential) -> Self:
        """Fuses (Linear without bias, Linear) with an optional activation; holds copies of the weights.

        Raises ValueError with the reason if the chain is not equal to one op.
        """
        chain = chains.read_linear(layers_of(cls.__name__, seq))
        module = cls._empty(chain.factors, chain.bias is not None, chain.activation)
        module._adopt(chain.factors, chain.bias, seq, frozen=None)
        return module

    def forward(self, input: Tensor) -> Tensor:
        """`[..., S]` to `[..., T]`."""
        if isinstance(input, torch.fx.Proxy):
            return self._record(input)  # type: ignore[no-any-return]
        if is_nested(input):
            return on_values(self._name, self.forward, input)
        if (panels := self._panels(input)) is not None:
            tensors = (input, self.in_factor, self.out_factor, self.bias)
            return ops_for(*tensors).lowrank_linear_prepared(*tensors, self.activation, panels)
        return lowrank_linear(input, self.in_factor, self.out_factor, self.bias, self.activation)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A plain nn.Linear with the product of the factors, formed in float32 at least; with an activation,
        followed by its module in an nn.Sequential."""
        linear = plain.linear_layer(self._dense_weight(), self.bias)
        linear.weight.requires_grad_(self.out_factor.requires_grad)
        dense = linear if self.activation == "none" else plain.with_activation([linear], self.activation)
        return dense.train(self.training)

    def to_sequential(self) -> nn.Sequential:
        """The plain chain of two nn.Linear and the activation, with copies of the values."""
        layers = [plain.linear_layer(self.in_factor), plain.linear_layer(self.out_factor, self.bias)]
        return plain.with_activation(layers, self.activation).train(self.training)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        text += "" if self.bias is not None else ", bias=False"
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    @classmethod
    def _empty(cls, factors: Mapping[str, Tensor], bias: bool, activation: str) -> Self:
        in_factor, out_factor = factors["in_factor"], factors["out_factor"]
        return cls(in_factor.shape[1], out_factor.shape[0], 1, bias, activation, "meta", in_factor.dtype)

    @classmethod
    def _decompose(
        cls, weight: Tensor, rank: Rank, multiple: int, seed: int, name: str, progress: bool
    ) -> tuple[dict[str, Tensor], float]:
        found = svd_decompose(weight, rank, multiple=multiple, seed=seed, name=name)
        return {"in_factor": found.in_factor, "out_factor": found.out_factor}, found.relative_error

    def _factor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"in_factor": (self.rank, self.in_features), "out_factor": (self.out_features, self.rank)}

    def _dense_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def _dense_weight(self) -> Tensor:
        return reference.linear_weight(widened(self.in_factor), widened(self.out_factor)).to(self.in_factor.dtype)

    def _fan_in(self) -> int:
        return self.in_features
