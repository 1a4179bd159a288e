"""`fuse_` finds chains of plain layers that equal one op, as other tools leave them in a model, and replaces them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from lowrank_ops.compress.report import LayerReport, Report
from lowrank_ops.model.sites import Owners, Site, find_sites, has_hooks, keep_attributes, move_hooks
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.chains import NotOneOp
from lowrank_ops.nn.counts import count_macs, count_parameters
from lowrank_ops.nn.modules import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.nn.plain import ACTIVATION_MODULES, activation_name
from lowrank_ops.runtime.compiled import takes_compiled
from lowrank_ops.runtime.torch_internals import DropoutBase, NormBase

# Layers that recipes put between the stages of a chain. The search passes over them, so that the report can say why the
# chain is not one op.
_BETWEEN = (*ACTIVATION_MODULES.values(), nn.LeakyReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.PReLU, nn.Identity)
_BETWEEN_BASES = (NormBase, nn.GroupNorm, nn.LayerNorm, DropoutBase)


_Fusable = type[TuckerConv2d] | type[CPConv2d] | type[TuckerConv1d] | type[CPConv1d] | type[LowRankLinear]


@dataclass(frozen=True)
class _Find:
    """`length` children of an nn.Sequential that look like a chain: the fused module, or the reason why it is not one
    op."""

    length: int
    fused: FactorizedModule | None
    reason: str | None


@takes_compiled()
def fuse_(model: nn.Module) -> Report:
    """Replaces, in place, every chain in an nn.Sequential that equals one op by the module of that op.

    The chains are those that `from_sequential` of the five modules takes, as a whole nn.Sequential (which the
    module then replaces, hooks and all) or as consecutive children of a longer one: the module gets the first
    child's name, the other children of the chain are removed, the rest keep their names. An activation after
    the chain (ReLU, ReLU6, Hardswish, SiLU, exact GELU) becomes the module's, also after a module that was
    factorized before. Two pointwise convolutions in a row are taken where fewer channels lie between them than on
    either side. Parameters are copies: build the optimizer afterwards.

    In an nn.Sequential that was shortened, children have other positions. A model whose forward indexes or slices one
    (`self.features[3]`, `self.features[:5]`) may then compute something else, which this function cannot see: try such
    a model afterwards.

    Returns:
        A `Report` with an entry per chain. There is also an entry, with the reason, for layers that look like a chain
        but are not equal to one op: an activation, normalization or bias between the stages, groups, a stride on a
        pointwise stage, hooks on a stage, a stage that is used elsewhere.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: `model` is itself a factorized module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, FactorizedModule):
        raise ValueError(f"fuse_: model is already factorized, a {type(model).__name__}: there is nothing to fuse")
    before = count_parameters(model)
    sites = find_sites(model, _is_sequential)
    if _is_sequential(model):
        sites.insert(0, Site(model, names=[""]))
    used = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    owners = Owners(model)

    def obstacle(layer: nn.Module) -> str | None:
        if used[id(layer)] > 1 and layer._parameters:
            return f"a stage ({type(layer).__name__}) stands in several places"
        shared, held = owners.sharing(layer), owners.held(layer)
        if shared is None:
            return None if held is None else f"a stage cannot be taken out: {held}"
        return f"a stage shares a parameter with {shared}"

    order = [name for name, _ in model.named_modules(remove_duplicate=False)]
    entries: dict[str, LayerReport] = {}
    for site in reversed(sites):  # inner ones first: a module in there may take the activation behind it
        _fuse_sequential(site, obstacle, entries)
    layers = [entries[name] for name in order if name in entries]
    return Report(type(model).__name__, layers, False, before, count_parameters(model))


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _fuse_sequential(site: Site, obstacle: Callable[[nn.Module], str | None], entries: dict[str, LayerReport]) -> None:
    sequential = site.layer
    keys = [key for key, child in sequential._modules.items() if child is not None]
    layers = [sequential.get_submodule(key) for key in keys]
    position = 0
    while position < len(layers):
        found = _find(layers[position:], obstacle)
        if found is None:
            position += 1
            continue
        end = position + found.length
        whole = found.length == len(layers) and bool(site.places) and type(sequential) is nn.Sequential
        name = site.names[0] if whole else ".".join(filter(None, (site.names[0], keys[position])))
        entry = _entry(name, layers[position:end], found)
        earlier = entries.get(name)  # that of a chain that was fused before and now takes the activation behind it
        entries[name] = (
            entry if earlier is None else replace(entry, type=f"{earlier.type}, {type(layers[end - 1]).__name__}")
        )
        if found.fused is None:
            position += 1
            continue
        found.fused.train(sequential.training)
        if whole:
            keep_attributes(sequential, found.fused)
            move_hooks(sequential, found.fused)
            site.put(found.fused)
        else:
            sequential._modules[keys[position]] = found.fused
            for key in keys[position + 1 : end]:
                del sequential._modules[key]
        position = end


def _find(layers: list[nn.Module], obstacle: Callable[[nn.Module], str | None]) -> _Find | None:
    """The chain that the layers begin with, or layers that look like one; None if there is neither."""
    first = layers[0]
    if isinstance(first, FactorizedModule):
        return _absorb(first, layers[1:2], obstacle)
    looks = _look(layers)
    if looks is None:
        return None
    kind, length = looks
    after = layers[length : length + 1]
    if after and activation_name(after[0]) is not None and not has_hooks(after[0]):
        length += 1
    reason = next(filter(None, map(obstacle, layers[:length])), None)
    if reason is None:
        try:
            return _Find(length, kind.from_sequential(nn.Sequential(*layers[:length])), None)
        except NotOneOp as error:
            reason = str(error)
    return _Find(length, None, reason)


def _absorb(
    module: FactorizedModule, after: list[nn.Module], obstacle: Callable[[nn.Module], str | None]
) -> _Find | None:
    name = activation_name(after[0]) if after else None
    if name is None or module.activation != "none":
        return None
    if has_hooks(module) or has_hooks(after[0]) or any(obstacle(part) is not None for part in (module, after[0])):
        return _Find(2, None, "the module or the activation after it has hooks or is held in several places")
    module.activation = name
    return _Find(2, module, None)


def _look(layers: list[nn.Module]) -> tuple[_Fusable, int] | None:
    """The module that the first layers could become, by the kinds and kernels of their convolutions, and their number;
    None if they do not look like a chain."""
    if isinstance(layers[0], nn.Linear):
        return (LowRankLinear, 2) if len(layers) > 1 and isinstance(layers[1], nn.Linear) else None
    if not isinstance(layers[0], (nn.Conv1d, nn.Conv2d)):
        return None
    two = isinstance(layers[0], nn.Conv2d)
    convs: list[tuple[int, nn.Conv2d]] = []
    for position, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d if two else nn.Conv1d):
            convs.append((position, layer))  # type: ignore[arg-type]
        elif type(layer) not in _BETWEEN and not isinstance(layer, _BETWEEN_BASES):
            break
    depthwise = 2 if two else 1
    cp = [conv for _, conv in convs[: depthwise + 2]]
    tucker = [conv for _, conv in convs[:3]]
    if len(cp) == depthwise + 2 and _is_cp_like(cp):
        return (CPConv2d if two else CPConv1d), convs[depthwise + 1][0] + 1
    places = [position for position, _ in convs[:3]]
    if places[:2] == [0, 1] and places != [0, 1, 2] and _is_bottleneck(tucker[0], tucker[1]):
        return (CPConv2d if two else CPConv1d), 2
    if len(tucker) == 3 and _is_pointwise(tucker[0]) and _is_pointwise(tucker[2]):
        if _is_pointwise(tucker[1]) and tucker[1].groups > 1:
            return None
        return (TuckerConv2d if two else TuckerConv1d), convs[2][0] + 1
    return None


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return all(size == 1 for size in conv.kernel_size)


def _is_bottleneck(first: nn.Conv2d, last: nn.Conv2d) -> bool:
    """Whether two convolutions are a factorized pointwise one: pointwise, with fewer channels between them than on
    either side."""
    return (
        _is_pointwise(first)
        and _is_pointwise(last)
        and first.groups == last.groups == 1
        and first.out_channels < min(first.in_channels, last.out_channels)
    )


def _is_cp_like(convs: list[nn.Conv2d]) -> bool:
    first, *depthwise, last = convs
    return (
        _is_pointwise(first)
        and _is_pointwise(last)
        and all(conv.groups == conv.in_channels for conv in depthwise)
        and (len(depthwise) == 1 or all(min(conv.kernel_size) == 1 for conv in depthwise))
    )


def _entry(name: str, layers: list[nn.Module], found: _Find) -> LayerReport:
    module = found.fused
    parameters = sum(count_parameters(layer) for layer in layers)
    rank = None if module is None else module.rank
    macs = None if module is None else count_macs(module)
    return LayerReport(
        name=name,
        type=", ".join(type(layer).__name__ for layer in layers),
        replaced_by=None if module is None else type(module).__name__,
        kernel=getattr(module, "kernel_size", None),
        ranks=rank if rank is None or isinstance(rank, tuple) else (rank,),
        parameters_before=parameters,
        parameters_after=parameters if module is None else count_parameters(module),
        macs_before=macs,
        macs_after=macs,
        reason=found.reason,
    )
