"""Finds pairs that can become one layer: a layer, and the only BatchNorm or activation that its output goes into.

The pairs are found in the graph that torch.fx traces. Where it cannot trace a module (because of a branch on values,
for instance), its children are traced one by one: a child computes the same, however its parent calls it.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx, nn

from lowrank_ops.model.batches import Batches, device_of, outputs_of
from lowrank_ops.model.calls import model_errors
from lowrank_ops.model.sites import HOOKS, has_hooks
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.runtime.modes import eval_mode
from lowrank_ops.runtime.torch_internals import ConvBase, NormBase
from lowrank_ops.text.notes import grouped, listed
from lowrank_ops.text.tables import as_html, as_text, new_table

IsLayer = Callable[[nn.Module], bool]
# The name of the step that a node computes ("batchnorm", "relu"), or None if it is none that can be folded. The module
# is the one that the node calls, or None for a function call.
StepOf = Callable[[fx.Node, nn.Module | None], str | None]


@dataclass(frozen=True)
class Pair:
    """A layer and the step that its output goes into.

    Attributes:
        layer, layer_name: the layer and its qualified name.
        step: "batchnorm", or the name of an activation.
        follower: the module of the step; None for a function that a forward calls.
        follower_name: its qualified name, or a text that says which function is called in which module.
        reason: why the two cannot become one layer; None if they can.
    """

    layer: nn.Module
    layer_name: str
    step: str
    follower: nn.Module | None
    follower_name: str
    reason: str | None


@dataclass(frozen=True)
class Fold:
    """One entry of a `FoldReport`.

    Attributes:
        layer: qualified name of the layer before the step; None if no layer that could take it was found.
        follower: qualified name of the BatchNorm or activation, or a text that says which function is called where.
        step: "batchnorm", or the name of the activation.
        reason: why the step was left; None if it was folded into the layer.
    """

    layer: str | None
    follower: str
    step: str
    reason: str | None = None


@dataclass(frozen=True)
class FoldReport:
    """What `fold_batchnorm_` or `fold_activations_` did, iterable; `print(report)` shows it as a table.

    Attributes:
        model: class name of the model.
        folds: one entry per BatchNorm or activation.
        untraced: qualified name of each module ("" is the model) that torch.fx cannot trace -> the reason. Its children
            were traced one by one, so pairs that its own forward connects were not found.
    """

    model: str
    folds: list[Fold] = field(default_factory=list)
    untraced: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Fold]:
        return iter(self.folds)

    def __len__(self) -> int:
        return len(self.folds)

    @property
    def folded(self) -> list[Fold]:
        """The entries that were folded into the layer before them."""
        return [fold for fold in self.folds if fold.reason is None]

    @property
    def left(self) -> list[Fold]:
        """The entries that were left, each with its reason."""
        return [fold for fold in self.folds if fold.reason is not None]

    def __str__(self) -> str:
        return as_text(*self._parts())

    def _repr_html_(self) -> str:
        return as_html(*self._parts())

    def _parts(self) -> list[Table | str]:
        table = new_table(f"{self.model}: {len(self.folded)} of {len(self)} folded")
        for column in ("layer", "followed by", "step", "left because"):
            table.add_column(column, overflow="fold")
        for fold in self.folds:
            table.add_row(fold.layer or "", fold.follower, fold.step, fold.reason or "")
        lines = [
            f"torch.fx cannot trace {listed(names)}, so its children were: {reason}"
            for reason, names in grouped((reason, name or self.model) for name, reason in self.untraced.items())
        ]
        return [table, *lines]


def find_pairs(model: nn.Module, is_layer: IsLayer, step_of: StepOf) -> tuple[list[Pair], dict[str, str]]:
    """All pairs of a layer and a step in `model`, and the modules that could not be traced, with the reason.

    Only nn.Identity may stand between the two. They can become one layer if, both in train and in eval mode, the
    layer's output has no other user, each of them is called once, neither has hooks, and no forward reads their
    parameters. Nothing is computed and the model is not changed: a copy that shares its parameters is traced.
    """
    names = {id(module): name for name, module in model.named_modules()}
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    untraced: dict[str, str] = {}
    pairs: dict[tuple[int, int | str], Pair] = {}
    for scope in _scopes("", model, untraced):
        several = {} if scope.module is model else places
        graphs = [_Calls(graph, scope, names, several) for graph in scope.graphs]
        found = [graph.pairs(is_layer, step_of) for graph in graphs]
        for this, other in ((0, 1), (1, 0)):
            for key, pair in found[this].items():
                twin = found[other].get(key)
                reason = pair.reason or (None if twin is None else twin.reason)
                if twin is None and graphs[other].calls[id(pair.layer)] + graphs[other].calls[id(pair.follower)]:
                    reason = reason or f"in {('eval', 'train')[other]} mode they are called another way"
                pairs.setdefault(key, replace(pair, reason=reason))
    return list(pairs.values()), untraced


def run_on(model: nn.Module, batches: Batches, where: str) -> list[Tensor]:
    """The tensors in the model's outputs on all batches, in eval mode. Raises RuntimeError if the model fails."""
    results: list[Tensor] = []
    with eval_mode(model), torch.no_grad():
        for batch in batches:
            with model_errors(f"{where}: the model", model, "example_input"):
                output = batch.run(model)
            results += [tensor.clone() for tensor in outputs_of(output)]
    return results


def example_batches(model: nn.Module, example_input: Any, where: str) -> Batches | None:
    """The batches of an argument `example_input`; None if it is None. `where` is the function, for error messages."""
    return None if example_input is None else Batches(example_input, f"{where}: example_input", device_of(model))


def require_same(before: list[Tensor], after: list[Tensor], where: str) -> None:
    """Raises RuntimeError where outputs differ by more than rounding can explain.

    The bound is sqrt(eps) times the output's norm. Rounding in a deep network stays far below it, while a step that was
    left out or folded into the wrong layer changes the output by a noticeable part of its norm.
    """
    for old, new in zip(before, after, strict=True):
        finite = old.isfinite()
        same = old.shape == new.shape and torch.equal(finite, new.isfinite())
        error = (new - old)[finite].double().norm().item() if same else math.inf
        norm = old[finite].double().norm().item()
        if error > math.sqrt(torch.finfo(old.dtype).eps) * norm:
            raise RuntimeError(
                f"{where}: the output on example_input changes by {error:.2e} at a norm of {norm:.2e}, so the model "
                "was left as it was. A forward may call, slice or read parts of it in a way that torch.fx does not see"
            )


class _Tracer(fx.Tracer):
    """Traces layers, and modules with hooks, as one node each: hooks must not run on proxies, which are no tensors."""

    proxy_buffer_attributes = True  # otherwise a forward's in-place changes of buffers would happen while it is traced

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layer = isinstance(m, (FactorizedModule, ConvBase, nn.Linear, NormBase))
        return layer or has_hooks(m) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Scope:
    """A module and the graphs of its forward in eval and in train mode."""

    name: str
    module: nn.Module
    graphs: tuple[fx.Graph, ...]


def _scopes(name: str, module: nn.Module, untraced: dict[str, str]) -> Iterator[_Scope]:
    """The module if it can be traced, otherwise those of its children that can, and so on down. Also the modules with
    hooks inside a traced module: they are single nodes there."""
    inner: Iterable[str]
    if type(module).forward is nn.Module.forward:  # nn.ModuleList and the like are not called
        inner = dict(module.named_children())
    else:
        try:
            scope = _Scope(name, module, _traced(module))
        except Exception as error:  # a forward may raise anything when it gets a proxy
            untraced[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            inner = dict(module.named_children())
        else:
            yield scope
            called = {node.target: None for graph in scope.graphs for node in graph.nodes if node.op == "call_module"}
            inner = [target for target in called if has_hooks(module.get_submodule(target))]
    for key in inner:
        child = module.get_submodule(key)
        if any(True for _ in child.children()):
            yield from _scopes(".".join(filter(None, (name, key))), child, untraced)


def _traced(module: nn.Module) -> tuple[fx.Graph, ...]:
    """Graphs in eval and in train mode, of a copy that shares the tensors: a forward may keep what it is given."""
    if "forward" in module.__dict__:  # torch.fx would trace that of the class
        raise TypeError("its forward was replaced by one of the instance")
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        memo.update({id(getattr(part, hooks)): getattr(part, hooks) for hooks in HOOKS})
    duplicate = copy.deepcopy(module, memo)
    graphs = []
    for training in (False, True):
        for part in duplicate.modules():  # not train(), which a module may override to do more than set the flags
            part.training = training
        graphs.append(_Tracer().trace(duplicate))
    return tuple(graphs)


class _Calls:
    """The calls in one graph, and the pairs among them."""

    def __init__(self, graph: fx.Graph, scope: _Scope, names: dict[int, str], places: dict[int, int]) -> None:
        def module_at(target: Any) -> nn.Module:
            return scope.module.get_submodule(target)

        self._graph, self._scope, self._names, self._places = graph, scope, names, places
        self._modules = {node: module_at(node.target) for node in graph.nodes if node.op == "call_module"}
        self.calls = Counter(map(id, self._modules.values()))
        self._read = {
            id(module_at(str(node.target).rpartition(".")[0])) for node in graph.nodes if node.op == "get_attr"
        }
        self._hidden = {
            id(inner) for module in self._modules.values() for inner in module.modules() if inner is not module
        }

    def pairs(self, is_layer: IsLayer, step_of: StepOf) -> dict[tuple[int, int | str], Pair]:
        found = {}
        for node in self._graph.nodes:
            follower = self._modules.get(node)
            step = step_of(node, follower)
            if step is None:
                continue
            between = [node]
            source = _input(node)
            while source is not None and type(self._modules.get(source)) is nn.Identity:
                between.append(source)
                source = _input(source)
            layer = None if source is None else self._modules.get(source)
            if source is None or layer is None or not is_layer(layer):
                continue
            name = self._names[id(follower)] if follower is not None else self._function(step, node)
            reason = self._obstacle(layer, source, between)
            key = (id(layer), name if follower is None else id(follower))
            found[key] = Pair(layer, self._names[id(layer)], step, follower, name, reason)
        return found

    def _obstacle(self, layer: nn.Module, source: fx.Node, between: list[fx.Node]) -> str | None:
        if any(len(node.users) > 1 for node in (source, *between[1:])):
            return "the layer's output is used elsewhere too"
        modules = [layer, *(self._modules[node] for node in between if node in self._modules)]
        for module in modules:
            called = type(module).__name__ if self._names[id(module)] == "" else self._names[id(module)]
            if has_hooks(module):
                return f"{called} has hooks, which would see other values"
            if "forward" in module.__dict__:
                return f"{called} has a forward that was replaced"
            if type(module) is nn.Identity:
                continue
            if self.calls[id(module)] > 1:
                return f"{called} is called {self.calls[id(module)]} times"
            if id(module) in self._hidden or self._places.get(id(module), 1) > 1:
                return f"{called} stands in several places, and not all calls of it can be seen"
            if id(module) in self._read:
                return f"a forward reads the parameters of {called}"
        return None

    def _function(self, step: str, node: fx.Node) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        owner = ".".join(filter(None, (self._scope.name, stack[-1][0] if stack else "")))
        return f"{step}() in the forward of {owner or type(self._scope.module).__name__}"


def _input(node: fx.Node) -> fx.Node | None:
    """The node whose value is the input of a call with one input."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, fx.Node) else None
