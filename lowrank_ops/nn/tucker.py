"""Tucker-2 convolutions as modules: `TuckerConv2d` and `TuckerConv1d`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.compiler import is_compiling

from lowrank_ops.decompose import ranks
from lowrank_ops.decompose.ranks import Rank
from lowrank_ops.decompose.tucker import tucker_decompose
from lowrank_ops.nn import chains, plain
from lowrank_ops.nn.base import widened
from lowrank_ops.nn.checks import layers_of
from lowrank_ops.nn.conv import FactorizedConv
from lowrank_ops.ops import reference
from lowrank_ops.ops.functional import call_op

if TYPE_CHECKING:
    from typing_extensions import Self


class _TuckerConv(FactorizedConv):
    core: nn.Parameter
    rank: tuple[int, int]

    @classmethod
    def from_sequential(cls, seq: nn.Sequential) -> Self:
        """The module that equals a chain of convolutions (1x1, KxK, 1x1), with an activation after them or none.

        It holds copies of the weights.

        Raises:
            ValueError: the chain is not equal to one op (`NotOneOp`, with the reason; see `lowrank_ops.nn.chains`).
            TypeError: `seq` is no nn.Sequential.
        """
        return cls._from_chain(chains.read_tucker(layers_of(cls.__name__, seq), cls.axes), seq)

    def to_sequential(self) -> nn.Sequential:
        """The chain of three plain convolutions, and the activation if there is one, with copies of the values."""
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
        packed = self._packed()
        if packed is not None and self.axes == 1 and is_compiling():
            packed = None  # compiled, the view `_core()` counts versions of its own: a changed core would go unnoticed
        tensors = (image, self.in_factor, self._core(), self.out_factor, self.bias)
        return call_op("tucker_conv2d", tensors, (*self._window, self.activation), packed)

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
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode: as in nn.Conv2d, for the
            convolution that the factors replace.
        rank: an int for both ranks, a pair `(R1, R2)` (input side first), or a fraction of the channels instead of an
            int: see `lowrank_ops.decompose.ranks`.
        groups: must be 1.
        activation: applied to the output: none, relu, relu6, hardswish, silu or gelu (exact).
        device, dtype: of the parameters.
        init: the initializer that a dense layer would have: "default", "spectral", the name of a function of
            torch.nn.init without its underscore, a callable, or `Spectral(...)`; see `reset_parameters`. A callable is
            stored in the module and pickled with it (which a lambda cannot be).

    Parameters: `in_factor [R1, S]`, `core [R2, R1, KH, KW]`, `out_factor [T, R2]`, `bias [T]` or None; float32,
    float64, bfloat16 or float16. Input `[N, S, H, W]` or `[S, H, W]` of the same dtype, output `[N, T, OH, OW]` or
    `[T, OH, OW]`.

    The memory format of the core affects speed only. A module made from a layer or chain takes over its format, a new
    one is contiguous. `module.to(memory_format=torch.channels_last)` gives the format that is packed fastest; with
    `prepare_for_inference_` weights are packed only once. FSDP2 (`fully_shard`), safetensors' `save_file` and tools of
    torch.nn.utils that flatten parameters need contiguous parameters, as for nn.Conv2d.

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
        """A module that replaces `conv`: its weight decomposed by `tucker_decompose`, its other arguments kept.

        The parameters are copies in the weight's dtype and on its device; every factor gets the weight's requires_grad.

        Args:
            conv: the layer; it is not changed.
            rank, multiple, seed: as in `tucker_decompose`.
            activation: of the module.
            name: the layer's name in error messages.

        Raises:
            ValueError: the convolution cannot be replaced (groups, an overridden forward, a computed weight, values
                that are not finite), or its weight does not allow the rank.
            TypeError: `conv` is no nn.Conv2d; a rank of an unknown type.
        """
        return cls._from_conv(conv, rank, multiple, seed, activation, name)


class TuckerConv1d(_TuckerConv):
    """`TuckerConv2d` in one dimension, computed as an image of height 1. Arguments as nn.Conv1d plus `rank`.

    Parameters: `in_factor [R1, S]`, `core [R2, R1, K]`, `out_factor [T, R2]`, `bias [T]` or None. Input
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
    ) -> Self:
        """As `TuckerConv2d.from_conv2d`, for an nn.Conv1d."""
        return cls._from_conv(conv, rank, multiple, seed, activation, name)
