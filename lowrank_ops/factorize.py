"""Whole models: `factorize_` replaces convolution and linear layers by factorized modules, in place."""

from __future__ import annotations

import difflib
import fnmatch
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from lowrank_ops import ranks
from lowrank_ops.calls import Calls, compare_times, recorded_calls, run_example
from lowrank_ops.cp import sensitivity
from lowrank_ops.fuse import fuse_
from lowrank_ops.module_base import FactorizedModule, refusal
from lowrank_ops.modules import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.ranks import Rank
from lowrank_ops.report import LayerReport, Report, count_macs, count_parameters
from lowrank_ops.surgery import Owners, Site, find_sites, move_hooks

__all__ = ["factorize_", "fuse_"]

Selector = str | type | Callable[[str, nn.Module], bool]
Selectors = Selector | Iterable[Selector] | None

_CP = (CPConv1d, CPConv2d)

# Layers whose parent reads their weight itself instead of calling them.
_READ_BY_PARENT: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.MultiheadAttention, ("out_proj",)),
    (nn.TransformerEncoderLayer, ("linear1", "linear2")),
)


def factorize_(
    model: nn.Module,
    method: Literal["tucker", "cp"] = "tucker",
    rank: Rank = 0.5,
    *,
    linear: Rank | Literal[False] | None = None,
    include: Selectors = None,
    exclude: Selectors = None,
    example_input: Any = None,
    multiple: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Replaces the convolution and linear layers of `model`, in place, by factorized modules.

    nn.Conv2d and nn.Conv1d become Tucker-2 or CP blocks, nn.Linear becomes `LowRankLinear`. A 1x1 convolution
    is a matrix: with either method it becomes a `CPConv2d` (`CPConv1d`) holding the SVD of its weight and
    spatial factors of ones. Train/eval mode, requires_grad, forward and backward hooks (their handles too)
    are kept; a layer that stands in several places is replaced once, everywhere. Parameters are new ones:
    build the optimizer afterwards.

    Everything is decomposed before anything is replaced: after an error the model is as it was.

    Args:
        model: the network. A model that is itself one layer has no place to put the replacement:
            `from_conv2d`, `from_linear`.
        method: "tucker" (Tucker-2) or "cp".
        rank: as in `tucker_decompose` / `cp_decompose`. For 1x1 convolutions it is the rank of the matrix; of
            a pair `(R1, R2)` the smaller one.
        linear: the rank of linear layers as in `svd_decompose`; None takes `rank` (of a pair the smaller
            one), False leaves them.
        include: only these layers; None means all. A glob pattern of qualified names ("features.*"), a module
            type, a callable `(name, layer) -> bool`, or several of them. A pattern or type also stands for
            everything inside a module that it matches.
        exclude: not these, in the same terms.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments for the model. With it
            the report has output sizes, MACs of a forward pass and milliseconds before and after, and the
            factorized model is run once to see that it works. The model is in eval mode for these runs.
        multiple: ranks that are no ints are rounded up to a multiple of it (see `lowrank_ops.ranks`).
        seed: of the decompositions.
        progress: a progress bar on stderr.

    Layers are left as they are, with the reason in the report, where a block would have no fewer parameters
    or multiplications, where an integer rank is above the layer's limit, and where a replacement would not be
    safe: groups, transposed and 3-D convolutions, subclasses with a forward of their own, computed
    (parametrized) weights, weights shared with another module, weights that the parent module reads itself
    (nn.MultiheadAttention.out_proj, the linear layers of nn.TransformerEncoderLayer).

    Returns:
        A `Report` with an entry for each convolution, linear and factorized layer.

    Raises:
        ValueError: non-finite weights (naming the layer), a rank out of range or above the limit of every layer
            that could be replaced, an `include` or `exclude` that matches nothing, a model that is one layer or
            already factorized itself, an unknown method.
        TypeError: arguments of the wrong kind.
        RuntimeError: the model fails on `example_input`, before or after (then it is as it was).
    """
    rank = (rank[0], rank[1]) if isinstance(rank, list) and len(rank) == 2 else rank
    _check_arguments(model, method, rank, linear, multiple)
    sites = find_sites(model, lambda layer: isinstance(layer, (_ConvNd, nn.Linear, FactorizedModule)))
    chosen = _select(model, sites, include, exclude)
    before = count_parameters(model)
    calls = None if example_input is None else recorded_calls(model, example_input, [site.layer for site in sites])

    owners = Owners(model)
    replacements: dict[int, nn.Module] = {}
    reasons: dict[int, str] = {}
    tried = 0
    with _progress(sites, "decompose", progress) as bar:
        for site, reason in zip(bar, chosen, strict=True):
            bar.set_postfix_str(site.names[0])
            reason = reason or _unsafe(site, owners) or refusal(site.layer)
            if linear is False and isinstance(site.layer, nn.Linear):
                reason = reason or "linear=False leaves linear layers"
            tried += reason is None
            outcome = reason or _replacement(site, method, rank, linear, multiple, seed)
            if isinstance(outcome, str):
                reasons[id(site.layer)] = outcome
            else:
                replacements[id(site.layer)] = outcome

    above = [reason for reason in reasons.values() if isinstance(reason, _AboveLimit)]
    if above and len(above) == tried:
        raise ValueError(
            f"factorize_: rank {rank if linear in (None, False) else (rank, linear)} is above the limit of every "
            f"layer that could be replaced ({above[0]}{'; ...' if tried > 1 else ''}); give a lower rank or a fraction"
        )

    times: dict[int, tuple[float, float]] = {}
    if calls is not None:
        with _progress([site for site in sites if id(site.layer) in replacements], "measure", progress) as bar:
            for site in bar:
                bar.set_postfix_str(site.names[0])
                pair = compare_times(site.layer, replacements[id(site.layer)], calls.of(site.layer))
                if pair is not None:
                    times[id(site.layer)] = pair

    _swap(model, [site for site in sites if id(site.layer) in replacements], replacements, example_input)
    entries = [
        _entry(
            site,
            replacements.get(id(site.layer)),
            reasons.get(id(site.layer)),
            calls,
            times.get(id(site.layer)),
        )
        for site in sites
    ]
    return Report(type(model).__name__, entries, calls is not None, before, count_parameters(model))


def _check_arguments(
    model: nn.Module, method: str, rank: Rank, linear: Rank | Literal[False] | None, multiple: int
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"factorize_: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, FactorizedModule):
        raise ValueError(f"factorize_: model is already factorized, a {type(model).__name__}; to_dense() undoes it")
    if isinstance(model, (_ConvNd, nn.Linear)):
        raise ValueError(
            f"factorize_: model is a single {type(model).__name__}, which has no parent to hold the "
            "replacement; use TuckerConv2d.from_conv2d, CPConv2d.from_conv2d or LowRankLinear.from_linear, "
            "or wrap it in nn.Sequential"
        )
    if method not in ("tucker", "cp"):
        raise ValueError(f"factorize_: method must be 'tucker' or 'cp', got {method!r}")
    if method == "cp" and isinstance(rank, (tuple, list)):
        raise ValueError(f"factorize_: rank must be a single number for method 'cp', got {rank}")
    if isinstance(rank, (tuple, list)) and len(rank) != 2:
        raise ValueError(f"factorize_: rank must be a single rank or a pair (R1, R2), got {rank}")
    if isinstance(linear, (tuple, list)):
        raise ValueError(f"factorize_: linear must be a single rank, got {linear}")
    ranks.check_multiple(multiple, "factorize_")
    for entry in rank if isinstance(rank, (tuple, list)) else (rank,):
        ranks.check_rank(entry, "factorize_: rank")
    if linear is not None and linear is not False:
        ranks.check_rank(linear, "factorize_: linear")


def _select(model: nn.Module, sites: list[Site], include: Selectors, exclude: Selectors) -> list[str | None]:
    """For each site why the user left it out, or None. Raises ValueError for a selector without a match."""
    modules = dict(model.named_modules(remove_duplicate=False))
    excluding = [(selector, _matches(selector, "exclude", sites, modules)) for selector in _listed("exclude", exclude)]
    including = [_matches(selector, "include", sites, modules) for selector in _listed("include", include)]
    reasons: list[str | None] = []
    for index in range(len(sites)):
        by = next((selector for selector, found in excluding if found[index]), None)
        if by is not None:
            reasons.append(f"excluded by {_shown(by)}")
        elif include is not None and not any(found[index] for found in including):
            reasons.append("not in include")
        else:
            reasons.append(None)
    return reasons


def _listed(argument: str, selectors: Selectors) -> list[Selector]:
    if selectors is None:
        return []
    several = isinstance(selectors, Iterable) and not isinstance(selectors, (str, type, nn.Module))
    listed: list[Any] = list(selectors) if several else [selectors]  # type: ignore[arg-type]
    for selector in listed:
        if isinstance(selector, nn.Module) or not (isinstance(selector, (str, type)) or callable(selector)):
            raise TypeError(
                f"factorize_: {argument} takes patterns, types and callables (name, layer) -> bool, got "
                f"{type(selector).__name__}; a module goes by its qualified name"
            )
    return listed


def _shown(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, str) else getattr(selector, "__name__", str(selector))


def _matches(selector: Selector, argument: str, sites: list[Site], modules: Mapping[str, nn.Module]) -> list[bool]:
    found = [any(_selected(selector, name, site.layer, modules) for name in site.names) for site in sites]
    if not any(found):
        names = [name for site in sites for name in site.names]
        near = difflib.get_close_matches(selector, names, 3) if isinstance(selector, str) else []
        raise ValueError(
            f"factorize_: {argument} {_shown(selector)} matches no convolution or linear layer; the model "
            f"has {', '.join(near or names[:8]) or 'none'}{'' if near or len(names) <= 8 else ', ...'}"
        )
    return found


def _selected(selector: Selector, name: str, layer: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    parts = name.split(".")
    within = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    if isinstance(selector, str):
        return any(fnmatch.fnmatchcase(outer, selector) for outer in within)
    if isinstance(selector, type):
        return isinstance(layer, selector) or any(isinstance(modules.get(outer), selector) for outer in within)
    return bool(selector(name, layer))


def _unsafe(site: Site, owners: Owners) -> str | None:
    """Why this layer cannot be taken out of this model, whatever its own kind allows."""
    for parent, key in site.places:
        for kind, keys in _READ_BY_PARENT:
            if isinstance(parent, kind) and key in keys:
                return f"nn.{kind.__name__} reads {key}.weight itself instead of calling {key}"
    shared = owners.sharing(site.layer)
    return None if shared is None else f"it shares a parameter with {shared}; untie them first"


class _AboveLimit(str):
    """The reason to leave a layer: the integer rank is above its limit."""


def _replacement(
    site: Site, method: str, rank: Rank, linear: Rank | Literal[False] | None, multiple: int, seed: int
) -> nn.Module | str:
    """The factorized module for a layer, or the reason why the layer is left."""
    layer = site.layer
    if isinstance(layer, nn.Linear) and linear is not None:
        rank = linear
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))
    ranks.require_finite(layer.weight.detach(), site.names[0])
    tucker = method == "tucker" and not _is_matrix(layer)
    options: dict[str, Any] = {"multiple": multiple, "name": site.names[0]}
    try:  # arguments and values were checked: what is left is a rank above this layer's limit
        own_rank = _layer_rank(layer, rank, tucker, options)
    except ValueError as error:
        return _AboveLimit(error)
    options["seed"] = seed
    module: FactorizedModule
    if isinstance(layer, nn.Linear):
        module = LowRankLinear.from_linear(layer, own_rank, **options)
    elif isinstance(layer, nn.Conv2d):
        module = (TuckerConv2d if tucker else CPConv2d).from_conv2d(layer, own_rank, **options)
    else:
        module = (TuckerConv1d if tucker else CPConv1d).from_conv1d(layer, own_rank, **options)
    for what, count in (("parameters", count_parameters), ("multiplications per output pixel", count_macs)):
        dense, factorized = count(layer), count(module)
        assert dense is not None and factorized is not None
        if factorized >= dense:
            return f"would not shrink: rank {module.rank} has {factorized} {what}, the dense layer {dense}"
    return module


def _is_matrix(layer: nn.Conv1d | nn.Conv2d | nn.Linear) -> bool:
    return isinstance(layer, nn.Linear) or all(size == 1 for size in layer.kernel_size)


def _layer_rank(
    layer: nn.Conv1d | nn.Conv2d | nn.Linear, rank: Rank, tucker: bool, options: Mapping[str, Any]
) -> int | tuple[int, int]:
    weight = layer.weight.detach()
    if _is_matrix(layer):
        pair = rank if isinstance(rank, tuple) else (rank,)
        return min(ranks.linear_rank(entry, weight.flatten(1), **options) for entry in pair)
    image = weight if weight.dim() == 4 else weight.unsqueeze(2)
    return (ranks.tucker_ranks if tucker else ranks.cp_rank)(rank, image, **options)


def _swap(model: nn.Module, sites: list[Site], replacements: Mapping[int, nn.Module], example_input: Any) -> None:
    """Puts the replacements in; takes them out again if the model then fails on the example input."""
    for site in sites:
        site.put(replacements[id(site.layer)])
    if example_input is not None:
        try:
            run_example(model, example_input)
        except Exception as error:
            for site in sites:
                site.put(site.layer)
            raise RuntimeError(
                f"factorize_: the factorized model fails on example_input ({error}); it was left as it was. "
                "A module may read a layer's weight instead of calling it: exclude that layer"
            ) from error
    for site in sites:
        move_hooks(site.layer, replacements[id(site.layer)])


def _entry(
    site: Site,
    module: nn.Module | None,
    reason: str | None,
    calls: Calls | None,
    times: tuple[float, float] | None,
) -> LayerReport:
    layer = site.layer
    kernel = getattr(layer, "kernel_size", None)
    size = count_parameters(layer)
    made_of = layer if module is None else module
    rank = getattr(made_of, "rank", None)
    seen = None if calls is None else calls.of(layer)

    def macs(which: nn.Module) -> int | None:
        return count_macs(which) if seen is None else seen.total(lambda shape: count_macs(which, shape))

    return LayerReport(
        name=site.names[0],
        type=type(layer).__name__,
        replaced_by=None if module is None else type(module).__name__,
        kernel=None if kernel is None else tuple(kernel),
        ranks=None if rank is None else rank if isinstance(rank, tuple) else (rank,),
        parameters_before=size,
        parameters_after=size if module is None else count_parameters(module),
        macs_before=macs(layer),
        macs_after=macs(made_of),
        weight_error=getattr(made_of, "relative_error", None),
        sensitivity=sensitivity(list(made_of.factors().values())) if isinstance(made_of, _CP) else None,
        reason=reason,
        output_size=None if seen is None else seen.output_size,
        milliseconds_before=None if times is None else times[0],
        milliseconds_after=None if times is None else times[1],
        aliases=tuple(site.names[1:]),
    )


def _progress(sites: list[Site], what: str, shown: bool) -> tqdm:
    return tqdm(sites, desc=what, unit="layer", file=sys.stderr, disable=not shown, leave=False)
