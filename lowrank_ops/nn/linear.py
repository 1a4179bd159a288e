"""Linear layers of low rank as a module: `LowRankLinear`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_ops.decompose import ranks
from lowrank_ops.decompose.ranks import Rank
from lowrank_ops.decompose.svd import svd_decompose
from lowrank_ops.linalg.singular import exactly
from lowrank_ops.nn import chains, plain
from lowrank_ops.nn.base import FactorizedModule, widened
from lowrank_ops.nn.checks import at_least, check_activation, check_replaceable, layers_of, refuse_energy
from lowrank_ops.nn.init import Init
from lowrank_ops.ops import reference
from lowrank_ops.ops.functional import call_op
from lowrank_ops.runtime.nested import is_nested, on_values

if TYPE_CHECKING:
    from typing_extensions import Self


class LowRankLinear(FactorizedModule):
    """A linear layer of rank R as one op: `activation((input in_factor^T) out_factor^T + bias)`.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        rank: an int, or a fraction in (0, 1] of min(S, T).
        activation: none, relu, relu6, hardswish, silu or gelu (exact).
        init: as in `TuckerConv2d`.

    Parameters: `in_factor [R, S]`, `out_factor [T, R]`, `bias [T]` or None. Input `[..., S]`, output
    `[..., T]`; a nested input `[B, ragged, ..., S]` of the layout torch.jagged gives a nested output. Errors as
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
        """A module that replaces `linear`: its weight decomposed by `svd_decompose`, its bias kept.

        Arguments and errors as `TuckerConv2d.from_conv2d`. `seed` is for the randomized SVD, which is used for low
        ranks of large weights only, and never if `exact`.
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
        """The module that equals a chain (Linear without bias, Linear), with an activation after them or none.

        It holds copies of the weights.

        Raises:
            ValueError: the chain is not equal to one op (`NotOneOp`, with the reason).
            TypeError: `seq` is no nn.Sequential.
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
        tensors = (input, self.in_factor, self.out_factor, self.bias)
        return call_op("lowrank_linear", tensors, (self.activation,), self._packed())

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A plain nn.Linear with a copy of the product of the factors, formed in float32 or float64.

        With an activation: an nn.Sequential of that layer and the activation's module.
        """
        linear = plain.linear_layer(self._dense_weight(), self.bias)
        linear.weight.requires_grad_(self.out_factor.requires_grad)
        dense = linear if self.activation == "none" else plain.with_activation([linear], self.activation)
        return dense.train(self.training)

    def to_sequential(self) -> nn.Sequential:
        """The chain of two plain nn.Linear, and the activation if there is one, with copies of the values."""
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
