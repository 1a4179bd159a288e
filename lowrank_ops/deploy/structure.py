"""The structure of a factorized model as plain data, and how a dense model gets that structure (for `save`, `load`)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ops.model.sites import clash, identity_for, keep_attributes, move_hooks
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.conv import FactorizedConv
from lowrank_ops.nn.modules import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.nn.plain import activation_name
from lowrank_ops.runtime.torch_internals import BatchNormBase, ConvBase

VERSION = 1

KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (TuckerConv2d, CPConv2d, TuckerConv1d, CPConv1d, LowRankLinear)
}
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
_LINEAR = ("in_features", "out_features")


@dataclass(frozen=True)
class Block:
    """A factorized module: its class, its qualified names, its constructor's arguments, ranks and activation."""

    type: str
    names: list[str]
    arguments: dict[str, Any]
    rank: int | list[int]
    activation: str
    relative_error: float | None

    @classmethod
    def of(cls, module: FactorizedModule, names: list[str]) -> Block:
        rank = list(module.rank) if isinstance(module.rank, tuple) else module.rank
        arguments = _arguments(module, _CONV if isinstance(module, FactorizedConv) else _LINEAR)
        return cls(type(module).__name__, names, arguments, rank, module.activation, module.relative_error)

    def build(self, bias: bool, dtype: torch.dtype) -> FactorizedModule:
        """The module, on the meta device. Raises ValueError or TypeError for arguments that the class does not take."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in self.arguments.items()}
        module = KINDS[self.type](**values, rank=1, bias=bias, activation=self.activation, device="meta", dtype=dtype)
        pair = isinstance(self.rank, list)
        if pair != isinstance(module.rank, tuple) or (isinstance(self.rank, list) and len(self.rank) != 2):
            raise ValueError(f"{self.names[0]}: rank {self.rank} is no rank of a {self.type}")
        # a fused chain may have a rank above the constructor's limit
        module.rank = tuple(self.rank) if isinstance(self.rank, list) else self.rank
        for name, shape in module._factor_shapes().items():
            setattr(module, name, nn.Parameter(torch.empty(shape, device="meta", dtype=dtype)))
        module.relative_error = self.relative_error
        return module


@dataclass(frozen=True)
class Structure:
    """The JSON object of a file, except for its version: `saving.py` documents the fields. Qualified names are those of
    the saved model."""

    model: str
    blocks: list[Block]
    identities: list[str]
    children: dict[str, list[str]]
    biases: list[str]
    same: dict[str, str]
    strides: dict[str, list[int]]

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """The structure of a model. Raises ValueError for a block that `build` could not make."""
        blocks = []
        names = _names(model)
        for name, module in model.named_modules():
            if isinstance(module, FactorizedModule):
                if KINDS.get(type(module).__name__) is not type(module):
                    raise ValueError(f"save: {name} is a {type(module).__name__}, a subclass that load cannot build")
                blocks.append(Block.of(module, names[id(module)]))
        return cls(
            model=type(model).__name__,
            blocks=blocks,
            identities=[
                name for name, module in model.named_modules(remove_duplicate=False) if type(module) is nn.Identity
            ],
            children={
                name: list(module._modules)
                for name, module in model.named_modules()
                if isinstance(module, nn.Sequential) and any(isinstance(child, FactorizedModule) for child in module)
            },
            biases=[
                name for name, module in model.named_modules() if _may_have_bias(module) and module.bias is not None
            ],
            same=cls.ties(named_tensors(model)),
            strides={
                name: list(tensor.stride())
                for name, tensor in named_tensors(model).items()
                if tensor.stride() != _contiguous_stride(tensor) and _is_dense(tensor)
            },
        )

    @staticmethod
    def ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Tensors with several names: each name except the first -> the first one."""
        first: dict[Any, str] = {}
        same = {}
        for name, tensor in tensors.items():
            held = tensor.numel() > 0 and not tensor.is_meta
            key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if held else id(tensor)
            if first.setdefault(key, name) != name:
                same[name] = first[key]
        return same

    @classmethod
    def from_json(cls, text: str) -> Structure:
        """Reads `to_json`. Raises ValueError for a later version or an unknown class, KeyError or TypeError for text
        that is not this format."""
        data = json.loads(text)
        version = data.pop("version")
        if not isinstance(version, int):
            raise TypeError(f"version {version!r}")
        if version > VERSION:
            raise ValueError(
                f"the file has format {version}, this lowrank_ops reads up to {VERSION}: it was written by a later "
                "version, update lowrank_ops"
            )
        blocks = [Block(**block) for block in data.pop("blocks")]
        for block in blocks:
            if block.type not in KINDS or not block.names:
                raise ValueError(f"{block.names} is a {block.type!r} in the file, which this lowrank_ops does not have")
        structure = cls(blocks=blocks, **data)
        for entry in fields(cls):
            kind = {"model": str, "children": dict, "same": dict, "strides": dict}.get(entry.name, list)
            if not isinstance(getattr(structure, entry.name), kind):
                raise TypeError(f"{entry.name} is no {kind.__name__}")
        return structure

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)})

    def stride_of(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """The strides that the tensor had when it was saved. Raises ValueError for strides that it cannot have had."""
        stride = tuple(self.strides.get(name, _contiguous_stride(tensor)))
        if len(stride) != tensor.dim() or not all(isinstance(step, int) and step >= 0 for step in stride):
            raise ValueError(f"{name} has the strides {stride} in the file at shape {list(tensor.shape)}")
        if not _is_dense(torch.empty_strided(tensor.shape, stride, device="meta")):
            raise ValueError(f"{name} has the strides {stride} in the file, at which its entries overlap")
        return stride


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names in the state_dict, shared ones under each of their names."""
    tensors = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{key}" if prefix else key] = tensor
    return tensors


def note_tree(model: nn.Module, undo: ExitStack) -> None:
    """Makes `undo` restore the modules, parameters and activations that the model has now."""
    for module in model.modules():
        for held in (module._modules, module._parameters):
            undo.callback(held.update, dict(held))  # type: ignore[arg-type]
            undo.callback(held.clear)
        if isinstance(module, FactorizedModule):
            undo.callback(setattr, module, "activation", module.activation)


def restructure(model: nn.Module, structure: Structure) -> dict[FactorizedModule, torch.device]:
    """Puts blocks (on the meta device, without values), identities and biases into the model where the structure has
    them.

    Returns:
        The new blocks, with the device that each one belongs on.

    Raises:
        ValueError: the model does not fit. It is then left half changed: see `note_tree`.
    """
    new: dict[FactorizedModule, torch.device] = {}
    biases = set(structure.biases)
    names = _names(model)
    parts = {block.names[0]: _layers_for(model, structure, block, names) for block in structure.blocks}
    for name, keys in structure.children.items():
        _shorten(model, name, keys, {name for block in structure.blocks for name in block.names})
    for block in structure.blocks:
        layers, old = parts[block.names[0]], _at(model, block.names[0])
        reason = _mismatch(block, layers)
        if reason is not None:
            raise ValueError(f"{block.names[0] or 'the model'} is a {block.type} in the file, but {reason}")
        if len(layers) == 1 and isinstance(layers[0], FactorizedModule):
            module = layers[0]
            module.activation = block.activation
            module.relative_error = block.relative_error
        else:
            tensors = [parameter for layer in layers for parameter in layer.parameters()]
            module = block.build(block.names[0] in biases, tensors[0].dtype)
            module.requires_grad_(any(tensor.requires_grad for tensor in tensors))
            new[module] = tensors[0].device
        if module is not old:
            if block.names[0] == "":
                raise ValueError("the file holds a single block, which cannot take the place of the model itself")
            reason = clash(old, module)
            if reason is not None:
                raise ValueError(f"{block.names[0]} cannot be replaced: {reason}")
            keep_attributes(old, module)
            move_hooks(old, module)
            for name in block.names:
                _put(model, name, module.train(old.training))
    folded = _put_identities(model, structure)
    _add_biases(model, structure.biases, folded)
    return new


def _layers_for(
    model: nn.Module, structure: Structure, block: Block, names: Mapping[int, list[str]]
) -> list[nn.Module]:
    """The layers of the model that the block replaces: a layer or a chain, and an activation after it if it was
    folded."""
    name = block.names[0]
    layer = _at(model, name)
    if names[id(layer)] != block.names:
        raise ValueError(f"{name} stands at {block.names} in the file, at {names[id(layer)]} in the model")
    layers = [layer]
    parent, _, key = name.rpartition(".")
    kept = structure.children.get(parent)
    if name and kept is not None:
        held = _at(model, parent)._modules
        keys = list(held)
        after = itertools.takewhile(lambda entry: entry not in kept, keys[keys.index(key) + 1 :])
        layers += [layer for layer in map(held.get, after) if layer is not None]
    while isinstance(layers[0], nn.Sequential):
        layers = [*layers[0], *layers[1:]]
    return layers


def _shorten(model: nn.Module, name: str, keys: list[str], blocks: set[str]) -> None:
    """Removes from an nn.Sequential the layers that are not among `keys`, because they became part of the block before
    them. Raises ValueError where that cannot be the reason."""
    sequential = _at(model, name)
    held = sequential._modules
    reason = f"{name or 'the model'} is an nn.Sequential of {keys} in the file, a {type(sequential).__name__} of "
    reason += f"{list(held)} in the model"
    before = None
    for key in list(held):
        if key in keys:
            before = key
        elif before is None or ".".join(filter(None, (name, before))) not in blocks:
            raise ValueError(reason)
        else:
            del held[key]
    if list(held) != keys or not isinstance(sequential, nn.Sequential):
        raise ValueError(reason)


def _mismatch(block: Block, layers: list[nn.Module]) -> str | None:
    """Why the block cannot replace these layers of the model; None if it can."""
    kind = KINDS[block.type]
    stages = layers
    if len(layers) > 1 and activation_name(layers[-1]) is not None:
        if activation_name(layers[-1]) != block.activation:
            return f"its activation is {block.activation} in the file, {layers[-1]} in the model"
        stages = layers[:-1]
    dense = nn.Linear if kind is LowRankLinear else nn.Conv1d if kind.axes == 1 else nn.Conv2d
    shown = ", ".join(map(str, stages))
    if len(stages) == 1 and isinstance(stages[0], dense):
        if getattr(stages[0], "groups", 1) != 1 or _arguments(stages[0], tuple(block.arguments)) != block.arguments:
            return f"of {block.arguments}, the model has {shown}"
        return None
    if len(stages) == 1 and isinstance(stages[0], FactorizedModule):
        own = stages[0]
        if own.activation not in ("none", block.activation):
            return f"its activation is {block.activation}, the model has {shown}"
    elif len(stages) > 1:
        try:
            own = kind.from_sequential(nn.Sequential(*stages))
        except ValueError as error:
            return f"the layers in the model are no such chain: {error}"
    else:
        return f"the model has {shown}"
    found = Block.of(own, block.names)
    if (found.type, found.arguments, found.rank) != (block.type, block.arguments, block.rank):
        return f"of rank {block.rank} and {block.arguments}, the model has {shown}"
    return None


def _put_identities(model: nn.Module, structure: Structure) -> int:
    """Puts nn.Identity in the places of folded BatchNorms and activations; returns the number of BatchNorms among
    them."""
    identities: dict[int, nn.Module] = {}
    activations = {block.activation for block in structure.blocks}
    folded = 0
    for name in structure.identities:
        layer = _at(model, name)
        if type(layer) is nn.Identity:
            continue
        if not isinstance(layer, BatchNormBase) and activation_name(layer) not in activations:
            raise ValueError(
                f"{name} is nn.Identity in the file, where a BatchNorm or a block's activation was folded, but {layer} "
                "in the model"
            )
        if id(layer) not in identities:
            identities[id(layer)] = identity_for(layer)
            folded += isinstance(layer, BatchNormBase)
        _put(model, name, identities[id(layer)])
    return folded


def _add_biases(model: nn.Module, names: list[str], folded: int) -> None:
    """Adds biases to layers that had none before a BatchNorm was folded into them: at most one per folded BatchNorm."""
    for name in names:
        layer: Any = _at(model, name)
        if not _may_have_bias(layer):
            raise ValueError(f"{name} is a layer with a bias in the file, {layer} in the model")
        if layer.bias is None:
            folded -= 1
            if folded < 0:
                raise ValueError(f"{name} has a bias in the file, none in the model")
            rows = layer.out_factor if isinstance(layer, FactorizedModule) else layer.weight
            layer.bias = nn.Parameter(rows.detach().new_empty(_outputs(layer)), requires_grad=rows.requires_grad)


def _outputs(layer: Any) -> int:
    return layer.out_channels if isinstance(layer, (ConvBase, FactorizedConv)) else layer.out_features


def _may_have_bias(module: nn.Module) -> bool:
    return isinstance(module, (ConvBase, nn.Linear, FactorizedModule)) and "bias" in module._parameters


def _arguments(layer: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    """Attributes of a layer in the form in which JSON returns them: lists for tuples."""
    values = {name: getattr(layer, name, None) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _names(model: nn.Module) -> dict[int, list[str]]:
    """All qualified names of each module, by its id."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _at(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the model has no module {name!r}") from error


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent)._modules[key] = module


def _contiguous_stride(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta").stride()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a contiguous piece of memory, without gaps or overlap."""
    return torch.ops.aten.is_non_overlapping_and_dense(tensor)
