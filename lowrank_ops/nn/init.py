"""Values for new factorized layers, in terms of the initializer that the dense layer would have got."""

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

    Khodak et al., arXiv:2105.01029, who take the truncated SVD of a draw of the weight, with the square roots of
    the singular values on both sides. `LowRankLinear` and 1x1 CP blocks are exactly that. A convolution is
    decomposed into its own kind of block: Tucker-2 by `tucker_decompose`, CP by `cp_decompose` of the
    `[T, S, KH, KW]` draw (the paper's own block, another one, comes from the draw as a `[T KH, S KW]` matrix). The
    product is the best, for Tucker and CP a good, approximation of the draw at that rank: its norm is below the
    draw's by what was cut off. A CP decomposition of a large layer can take a minute, a Tucker decomposition or
    an SVD some seconds.

    Args:
        init: what the dense weight is drawn from: "default" (nn.Conv2d's and nn.Linear's own), the name of a
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
    """Gives the factors of a module new values; `FactorizedModule.reset_parameters` says which.

    Nothing happens to factors on the meta device.

    Args:
        name: of the module, for errors.
        factors: the module's, written in place.
        dense_shape: of the dense weight.
        decompose: factors of a dense weight, a 1-D convolution's with height 1.
        init: checked by `check_init` before.
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
    """Raises unless `init` can be used for a matrix (or else for a convolution); `name` is the module, for errors.

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
    """The squared Frobenius norm of the dense weight, from Gram matrices of the factors, a scalar.

    With `G_out = out^T out [R2, R2]` and `G_in = in in^T [R1, R1]`: Tucker `<G_out core G_in, core>`, summed over
    the taps; CP and linear: the sum of the elementwise product of all Gram matrices `[R, R]`.
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
    """A tensor that the initializer has filled, on the device of `like`, in float32 at least."""
    tensor = torch.full(shape, math.nan, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    try:
        if init == "default":
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))  # nn.Conv2d's and nn.Linear's
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
    if key in ("in_factor", "out_factor"):
        return nn.init.eye_(factor)
    if key == "core":
        return nn.init.dirac_(factor)
    factor[:, factor.shape[1] // 2] = 1  # the tap that dirac_ takes
    return factor


def _scale(name: str, init: Init, values: dict[str, Tensor], norm_squared: Tensor) -> None:
    """Scales drawn factors in place, so that each stage keeps the size of its input, as far as the product's norm,
    which is met exactly by the last one, allows."""
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
    return getattr(init, "__name__", repr(init))
