"""Initial values of factorized layers, described by the initializer that the dense layer would have."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ops.runtime.autocast import no_autocast
from lowrank_ops.runtime.torch_internals import is_sharded

Initializer = Callable[[Tensor], Any]

# torch.nn.init's functions without their underscore: "xavier_uniform", "orthogonal", ...
NAMED: dict[str, Initializer] = {
    name[:-1]: function
    for name, function in vars(nn.init).items()
    if name.endswith("_") and not name.startswith("_") and inspect.isfunction(function)
}


@dataclass(frozen=True)
class Spectral:
    """Spectral initialization: the factors of a decomposed draw of the dense weight.

    Khodak et al., arXiv:2105.01029, take the truncated SVD of a draw of the weight, with the square roots of the
    singular values on both sides. `LowRankLinear` and 1x1 CP blocks do exactly that. Other convolutions are decomposed
    into their own kind of block, from a `[T, S, KH, KW]` draw: Tucker-2 by `tucker_decompose`, CP by `cp_decompose`
    (the paper has another kind of block, which it takes from the draw as a `[T KH, S KW]` matrix). For a matrix the
    product is the best approximation of the draw at that rank, for Tucker and CP a good one; its norm is smaller than
    the draw's by the part that was cut off. A CP decomposition of a large layer can take a minute, a Tucker
    decomposition or an SVD some seconds.

    Args:
        init: the initializer of the dense weight: "default" (the one of nn.Conv2d and nn.Linear), the name of a
            function of torch.nn.init without its underscore, or a callable that fills a tensor in place.
    """

    init: str | Initializer = "default"


Init = str | Initializer | Spectral


def draw_factors(
    name: str,
    factors: Mapping[str, Tensor],
    dense_shape: tuple[int, ...],
    decompose: Callable[[Tensor], Mapping[str, Tensor]],
    init: Init,
) -> None:
    """Draws new values for the factors of a module, as `FactorizedModule.reset_parameters` documents.

    Factors on the meta device are left alone.

    Args:
        name: the module's name in error messages.
        factors: the module's factors, which are written in place.
        dense_shape: shape of the dense weight.
        decompose: gives the factors of a dense weight; that of a 1-D convolution has height 1.
        init: an initializer that `check_init` has accepted.

    Raises:
        ValueError: sharded factors; an initializer that fails or leaves values that are not finite.
    """
    if any(factor.is_meta for factor in factors.values()):
        return
    if any(map(is_sharded, factors.values())):
        raise ValueError(
            f"{name}: init {_shown(init)} needs whole factors, got sharded ones (DTensor); call reset_parameters "
            "before fully_shard, or use init='default'"
        )
    with torch.no_grad(), no_autocast():
        if init == "spectral" or isinstance(init, Spectral):
            source = init.init if isinstance(init, Spectral) else "default"
            weight = _draw(name, source, dense_shape, factors["in_factor"])
            values = dict(decompose(weight.unsqueeze(2) if weight.dim() == 3 else weight))
        elif init in ("eye", "dirac"):
            values = {key: _identity(key, torch.zeros_like(factor)) for key, factor in factors.items()}
        else:
            moment = _mean_square(_draw(name, init, dense_shape, factors["in_factor"]))
            values = {key: _draw(name, init, factor.shape, factor) for key, factor in factors.items()}
            _scale(name, init, values, moment * math.prod(dense_shape))
        for key, factor in factors.items():
            factor.copy_(values[key])


def check_init(name: str, init: Init, matrix: bool) -> None:
    """Raises unless `init` can be used, for a linear layer if `matrix`, otherwise for a convolution.

    Raises:
        ValueError: an unknown name, one that needs arguments or is defined for the other kind of layer only.
        TypeError: neither a name nor a callable.
    """
    source = init.init if isinstance(init, Spectral) else init
    if callable(source):
        return
    if not isinstance(source, str):
        raise TypeError(f"{name}: init must be a name, a callable or Spectral(...), got {type(source).__name__}")
    known = ["default", *([] if isinstance(init, Spectral) else ["spectral"]), *NAMED]
    if source not in known:
        near = difflib.get_close_matches(source, known, 3)
        raise ValueError(
            f"{name}: init must be one of {', '.join(near or known)}{', ...' if near else ''} or a callable that fills "
            f"a tensor in place, got {source!r}"
        )
    if source == ("dirac" if matrix else "eye"):
        raise ValueError(
            f"{name}: init {source!r} is defined for {'convolutions' if matrix else 'matrices'} only, use "
            f"{'eye' if matrix else 'dirac'!r}"
        )
    if source in NAMED:
        _, *options = inspect.signature(NAMED[source]).parameters.values()
        needed = [option.name for option in options if option.default is inspect.Parameter.empty]
        if needed:
            raise ValueError(
                f"{name}: init {source!r} needs {', '.join(needed)}: give "
                f"functools.partial(torch.nn.init.{source}_, {needed[0]}=...)"
            )


def product_norm_squared(factors: Mapping[str, Tensor]) -> Tensor:
    """The squared Frobenius norm of the dense weight, a scalar, from Gram matrices of the factors.

    Tucker: `<G_out core G_in, core>`, summed over the taps, with `G_out = out^T out [R2, R2]` and
    `G_in = in in^T [R1, R1]`. CP and linear: the sum of the elementwise product of all Gram matrices `[R, R]`.
    """
    out_factor = factors["out_factor"]
    core = factors.get("core")
    grams = [factor @ factor.T for name, factor in factors.items() if name not in ("out_factor", "core")]
    grams.append(out_factor.T @ out_factor)
    if core is None:
        return functools.reduce(torch.mul, grams).sum()
    taps = core.flatten(2)
    return (torch.einsum("bc,cdk,da->bak", grams[1], taps, grams[0]) * taps).sum()


def _draw(name: str, init: str | Initializer, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor of this shape that the initializer has filled, on the device of `like`, in float32 or float64."""
    tensor = torch.full(shape, math.nan, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    try:
        if init == "default":
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))  # as nn.Conv2d and nn.Linear do
        else:
            (NAMED[init] if isinstance(init, str) else init)(tensor)
    except Exception as error:
        raise ValueError(f"{name}: init {_shown(init)} cannot fill a tensor of shape {list(shape)}: {error}") from error
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{name}: init {_shown(init)} must fill the tensor that it gets, in place and with finite values; of shape "
            f"{list(shape)} it left {int((~torch.isfinite(tensor)).sum())} values NaN or infinite"
        )
    return tensor


def _identity(key: str, factor: Tensor) -> Tensor:
    """Fills a factor of zeros so that the product is the identity on the first R channels."""
    if key in ("in_factor", "out_factor"):
        return nn.init.eye_(factor)
    if key == "core":
        return nn.init.dirac_(factor)
    factor[:, factor.shape[1] // 2] = 1  # the tap that nn.init.dirac_ sets
    return factor


def _scale(name: str, init: Init, values: dict[str, Tensor], norm_squared: Tensor) -> None:
    """Scales drawn factors in place: each but `out_factor` so that its stage keeps the mean square of its input, and
    `out_factor` so that the product has this squared norm."""
    for key, value in values.items():
        if key != "out_factor" and value.any():
            value /= (_mean_square(value) * value[0].numel()).sqrt()
    drawn = product_norm_squared(values)
    if drawn > 0:
        values["out_factor"] *= (norm_squared / drawn).sqrt()
    elif norm_squared > 0:
        raise ValueError(f"{name}: init {_shown(init)} drew factors whose product is zero, and no zero dense weight")


def _mean_square(tensor: Tensor) -> Tensor:
    return tensor.square().mean()


def _shown(init: Init) -> str:
    """The initializer in an error message."""
    return getattr(init, "__name__", repr(init))
