"""`FactorizedModule`, the base class of the factorized layers: parameters, the dense weight, packed weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.jit import is_tracing

from lowrank_ops.decompose.ranks import Rank
from lowrank_ops.nn.dense_weight import DenseWeight
from lowrank_ops.nn.init import Init, check_init, draw_factors
from lowrank_ops.nn.plain import copy_parameter
from lowrank_ops.ops.extension import _C, DTYPES
from lowrank_ops.runtime.torch_internals import is_exporting, mark_static_address
from lowrank_ops.text.warn import warn

if TYPE_CHECKING:
    from typing_extensions import Self


class Packing(NamedTuple):
    """The packed weights of a module, made by `prepare_for_inference_`."""

    panels: Tensor
    """Argument `packed` of the op: bytes that hold the packed values of the factors, with a record of the factors
    (csrc/cpu/prepared.h; on a GPU csrc/ops/padded_factors.h)."""
    factors: dict[str, Tensor]
    """The factors that were packed, by the names of the op's arguments. The record names their memory; holding them
    here keeps it from being reused."""


def gpu_panels(factors: Mapping[str, Tensor]) -> Tensor:
    """The factors as the kernels of GPUs read them, copied on their device (any device of torch): `Packing.panels`."""
    middle = (factors.get("core"), factors.get("height_factor"), factors.get("width_factor"))
    panels = _C.pad_factors((factors["in_factor"], *middle, factors["out_factor"]))
    if panels.is_cuda:  # calls on other streams may follow
        torch.cuda.current_stream(panels.device).synchronize()
    for tensor in (panels, *factors.values()):  # a 1-D CP block passes one of these factors, which is no parameter
        mark_static_address(tensor)
    return panels


class FactorizedModule(nn.Module):
    """Base class of the factorized layers.

    Attributes:
        rank: `(R1, R2)` for Tucker, `R` otherwise.
        activation: none, relu, relu6, hardswish, silu or gelu; applied to the output.
        relative_error: `||W - W_dense|| / ||W_dense||` (Frobenius norms) of the decomposition that made the factors;
            None if they were drawn at random or read from a chain of layers. Not in the state_dict.
        init: the initializer that `reset_parameters()` uses by default: the constructor's argument.
    """

    rank: int | tuple[int, int]
    activation: str
    relative_error: float | None = None
    init: Init = "default"
    _packing: Packing | None = None
    _read_is_known: bool = False  # True: reading `weight` gives no warning (any more)
    in_factor: nn.Parameter
    out_factor: nn.Parameter
    bias: nn.Parameter | None

    def factors(self) -> dict[str, Tensor]:
        """The factors by parameter name, in the order of the op's arguments, without the bias."""
        return {name: getattr(self, name) for name in self._factor_shapes()}

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer, `[T, S, KH, KW]`, `[T, S, K]` or `[T, S]`: the product of the factors.

        It exists for code that reads a layer's weight instead of calling the layer. It is not a parameter:
        `parameters()` and the state_dict contain the factors. It does not include the activation.

        Reading its shape, dtype and device costs nothing. Every other operation on it multiplies the factors again, in
        float32 or float64 (also under autocast), with gradients for the factors. With K = KH KW that takes
        `T R1 K (R2 + S)` multiplications for Tucker, `T S K R` for CP and `T S R` for a linear layer; during the
        operation it takes the memory of the dense weight, several times that where gradients are kept. A model that
        computes with it, `F.linear(x, layer.weight)`, therefore gains nothing from the factors, and the first such
        operation on a module warns.

        It cannot be set, and operations that change it in place raise RuntimeError (see
        `lowrank_ops.nn.dense_weight`); the weight of `to_dense()` can be changed. Programs that are recorded
        (torch.compile, torch.export, torch.jit.trace, torch.fx) see the product as an ordinary tensor.

        Raises:
            RuntimeError: a factor is missing.
        """
        try:
            factors = list(self.factors().values())
        except AttributeError as error:  # as an AttributeError, nn.Module would report a missing `weight`
            raise RuntimeError(f"{self._name}.weight: a factor is missing: {error}") from error
        recorded = is_compiling() or is_exporting() or is_tracing()
        if recorded or isinstance(factors[0], torch.fx.Proxy):
            return self._dense_weight()
        grad = any(factor.requires_grad for factor in factors)
        return DenseWeight(self._name, self._dense_shape(), factors[0], grad, self._read_weight)

    def _read_weight(self) -> Tensor:
        """The product of the factors, for `weight`; warns the first time."""
        if not self._read_is_known:
            self._read_is_known = True
            warn(
                f"{self}: something computes with the weight of this module instead of calling it, so its factors are "
                "multiplied at each such operation, and nothing is gained from them. A layer that is built from the "
                "weight (by a model's own fuse(), for instance) is dense again: build it before factorize_. Reading "
                "weight.shape, dtype and device costs nothing. This warning appears once per module"
            )
        return self._dense_weight()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{self._name}: weight cannot be set, it is the product of the factors; set the weight of to_dense() "
                "and put that layer in the module's place. Code that folds or fuses layers (for BatchNorm: "
                "fold_batchnorm_) or ties weights must run before factorize_"
            )
        super().__setattr__(name, value)

    @torch.inference_mode(False)  # a 1-D CP block makes a factor here, which serves calls with gradients too
    def _pack(self) -> None:
        """Packs the factors for the kernels of their device, a CPU or a CUDA GPU. `train`, `to`, `load_state_dict` and
        the like drop the result again."""
        factors = self._op_factors()
        if self.in_factor.is_cpu:
            core, unit_window = factors.get("core"), self._has_unit_window()
            panels = _C.prepare(factors["in_factor"], core, factors["out_factor"], unit_window)
        else:
            panels = gpu_panels(factors)
        self._packing = Packing(panels, factors)

    def _packed(self) -> Tensor | None:
        """The packed weights for a call, or None. None also while torch.export or torch.jit.trace record: another
        process may run the program, and its factors are elsewhere in memory."""
        if self._packing is None or is_exporting() or is_tracing():
            return None
        return self._packing.panels

    def _record(self, input: torch.fx.Proxy) -> Any:
        """Records a call of this module in torch.fx as one node, whether or not the tracer treats it as a leaf.

        Tracers treat only torch's own layers as leaves, and the forward cannot be traced: it looks at the number of
        axes of the image, which is unknown then."""
        tracer: Any = input.tracer
        try:
            name = tracer.path_of_module(self)
        # AttributeError: the tracer has no modules; NameError: its root does not contain this one
        except (AttributeError, NameError):
            name = ""
        if not name:
            raise RuntimeError(
                f"{self._name}: torch.fx records a factorized module as one call (call_module), which needs a model "
                "that holds it: trace that model, or nn.Sequential(module)"
            )
        return tracer.create_proxy("call_module", name, (input,), {})

    def __prepare_scriptable__(self) -> Self:
        """torch.jit.script calls this for each module that it would compile."""
        raise RuntimeError(
            f"{self._name}: torch.jit.script cannot compile factorized modules, whose calls are chosen in Python: use "
            "torch.jit.trace, torch.compile or torch.export, or script lowrank_ops.to_chain(model), which has plain "
            "layers in their place"
        )

    def _unpack(self) -> None:
        """Drops the packed weights."""
        self.__dict__.pop("_packing", None)

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._unpack()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._unpack()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles contain no packed weights, and warn again when their `weight` is read."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_packing", "_read_is_known")}

    def reset_parameters(self, init: Init | None = None) -> None:
        """Draws new values for the factors and the bias.

        `init` names the distribution of the dense weight W, `[T, S, KH, KW]` or `[T, S]`, that the product imitates:

        * "default": the one of nn.Conv2d and nn.Linear, with variance `1 / (3 S KH KW)`. Each factor is uniform with
          variance `1 / (its inputs per output)`, so that every stage keeps the mean square of its input; `out_factor`
          has a third of that variance.
        * the name of a function of torch.nn.init without its underscore ("xavier_uniform", "kaiming_normal",
          "trunc_normal", "orthogonal", "ones", ...), with that function's defaults, or a callable that fills a
          tensor in place (`functools.partial(torch.nn.init.normal_, std=0.02)`). It fills each factor as a tensor
          of the factor's shape. Then the factors are scaled: all but `out_factor` to mean square
          `1 / (inputs per output)`, and `out_factor` such that the product has the mean square of one draw of W. (W is
          drawn for this and dropped, which takes its memory for a moment.) So each factor has the initializer's
          distribution up to a scale, and the product has the dense weight's fans, gain and variance. If the
          distribution has a mean other than zero ("uniform" is [0, 1)), the mean square is matched, not the variance.
        * "eye" (linear) and "dirac" (convolutions): the identity on the first R channels; nothing is scaled.
        * "zeros" is accepted, but the gradients of all factors then stay zero. "constant" and "sparse" need an
          argument, and "sparse" is for matrices: `functools.partial(torch.nn.init.sparse_, sparsity=0.9)`.
        * "spectral" or `Spectral(init)`: the decomposition of a draw of W.

        The bias is always uniform in `[-b, b]`, `b = 1 / sqrt(S KH KW)`, as in nn.Conv2d. Random numbers come from
        torch's global generator; bfloat16 and float16 values are drawn in float32 and rounded.

        Args:
            init: the initializer; None (default) uses the constructor's.

        Raises:
            ValueError: an unknown name, a name that needs arguments or is for the other kind of layer, an initializer
                that fails on a shape or leaves values that are not finite, sharded factors (except for "default").
            TypeError: neither a name nor a callable.

        After an error the module is unchanged.
        """
        init = self.init if init is None else init
        check_init(self._name, init, matrix=not hasattr(self, "kernel_size"))
        if init == "default":
            for name, factor in self.factors().items():
                bound = math.sqrt((1 if name == "out_factor" else 3) / factor[0].numel())
                nn.init.uniform_(factor, -bound, bound)
        else:
            draw_factors(self._name, self.factors(), self._dense_shape(), self._decompose_draw, init)
        if self.bias is not None:
            bound = 1 / math.sqrt(self._fan_in())
            nn.init.uniform_(self.bias, -bound, bound)
        self.relative_error = None

    def _decompose_draw(self, weight: Tensor) -> Mapping[str, Tensor]:
        """The factors of a dense weight at this module's rank; the weight of a 1-D convolution comes as
        `[T, S, 1, K]`."""
        return self._decompose(weight, self.rank, 1, 0, self._name, False)[0]

    def _factor_shapes(self) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def _dense_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _dense_weight(self) -> Tensor:
        """The product of the factors, contiguous, in their dtype, formed in float32 at least; differentiable."""
        raise NotImplementedError

    def _op_factors(self) -> dict[str, Tensor]:
        """The factors as the op takes them, by the names of its arguments; detached."""
        return {"in_factor": self.in_factor.detach(), "out_factor": self.out_factor.detach()}

    def _has_unit_window(self) -> bool:
        """Whether stride and dilation are 1 along each axis that has taps, as Winograd's transforms need it."""
        return False

    @classmethod
    def _rank_of(cls, factors: Mapping[str, Tensor]) -> Any:
        return factors["in_factor"].shape[0]

    def _fan_in(self) -> int:
        raise NotImplementedError

    @classmethod
    def _decompose(
        cls, weight: Tensor, rank: Rank, multiple: int, seed: int, name: str, progress: bool
    ) -> tuple[dict[str, Tensor], float]:
        """The factors of a dense weight, a 1-D convolution's with height 1, and their relative error."""
        raise NotImplementedError

    @torch.inference_mode(False)  # inference tensors cannot be trained
    def _create(self, bias: bool, out_size: int, device: Any, dtype: torch.dtype | None, init: Init) -> None:
        """Registers factors and bias, in the order of `_factor_shapes`, and draws their values."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(f"{self._name}: dtype must be one of {DTYPES}, got {dtype}")
        self.init = init
        for name, shape in self._factor_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        empty = torch.empty(out_size, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    @torch.inference_mode(False)
    def _adopt(self, factors: Mapping[str, Tensor], bias: Tensor | None, like: nn.Module, frozen: bool | None) -> None:
        """Makes copies of these factors and this bias the module's parameters; the rank becomes theirs.

        A 4-D core gets the memory format of the weights of `like`, and the module its train/eval mode. `frozen` sets
        requires_grad of all factors; None keeps each factor's own."""
        self._unpack()
        self.rank = self._rank_of(factors)
        grad = None if frozen is None else not frozen
        layout = _format_of(like)
        for name, value in factors.items():
            parameter = copy_parameter(value, grad)
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)
            setattr(self, name, parameter)
        self.bias = None if bias is None else copy_parameter(bias)
        self.train(like.training)

    @property
    def _name(self) -> str:
        return type(self).__name__


def _format_of(layer: nn.Module) -> torch.memory_format:
    """torch.channels_last if a weight of the layer is stored so; a 1x1 kernel does not count, being both formats at
    once."""
    weights = [parameter for parameter in layer.parameters() if parameter.dim() == 4 and not parameter.is_contiguous()]
    nhwc = any(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    return torch.channels_last if nhwc else torch.contiguous_format


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 (float64 stays): the precision in which products of factors are formed."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
