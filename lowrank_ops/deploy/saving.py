"""Factorized models in safetensors files: `save` and `load`. The structure is JSON beside the tensors; no pickle.

The file's metadata entry "lowrank_ops" is a JSON object:

    version       of this format
    model         class name, for messages
    blocks        the factorized modules: type, qualified names, arguments, ranks, activation
    identities    where nn.Identity stands (a BatchNorm or activation was folded)
    children      qualified name of an nn.Sequential with a block in it -> the keys of its children
    biases        plain convolutions and linear layers with a bias (folding a BatchNorm gives one)
    same          name of a tensor -> the name that the same tensor is stored under
    strides       of tensors that are not contiguous (channels_last, for instance)

`structure.py` checks this object and gives a model that structure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank_ops.deploy.structure import Structure, named_tensors, note_tree, restructure
from lowrank_ops.runtime.compiled import takes_compiled
from lowrank_ops.runtime.files import written_whole

KEY = "lowrank_ops"


@takes_compiled()
def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the parameters, buffers and factorized structure of `model` to a safetensors file.

    The file holds tensors and JSON, no pickle. Other readers of safetensors see the tensors under their names in the
    state_dict. Tensors that the model shares are stored once, non-persistent buffers not at all. The file is written
    under another name first, so that it never exists in part.

    Names are those of the uncompiled model: a file of `torch.compile(model)` loads into the model, and the reverse.

    A file of the state_dict alone (torch.save, safetensors' save_file) contains no structure. `load_state_dict` of such
    a file into the dense model reports `in_factor`, `out_factor` and so on as unexpected keys.

    Args:
        model: any model; its factorized modules, and what `fold_batchnorm_`, `fold_activations_` and `fuse_` did, are
            restored by `load`. Dtypes and memory formats are kept; hooks, requires_grad, train/eval mode and the
            `init` of blocks are not.
        path: the file, by convention ending in ".safetensors". An existing one is replaced.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: a tensor without values (meta, lazy), a tensor that is not plain and strided (DTensor, sparse,
            quantized) or has a dtype that safetensors lacks; a module with extra state (`get_extra_state`); a subclass
            of a factorized module.
        OSError: the file cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"save: {name or type(module).__name__} has extra state, which safetensors cannot hold")
    tensors = named_tensors(model)
    for name, tensor in tensors.items():
        reason = _unsavable(tensor)
        if reason is not None:
            raise ValueError(f"save: {name} {reason}")
    structure = Structure.of(model)
    stored = {name: tensor.detach().contiguous() for name, tensor in tensors.items() if name not in structure.same}
    path = Path(path)
    try:
        with written_whole(path) as written:
            save_file(stored, written, metadata={KEY: structure.to_json()})
    except KeyError as error:
        raise ValueError(f"save: safetensors has no dtype {error}: convert the tensors that are of it") from error
    except SafetensorError as error:  # the writer raises it for "no such folder", "no space left"
        raise OSError(f"save: {path} cannot be written: {error}") from error


@takes_compiled()
def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Gives `model` the structure and the values of a file that `save` wrote.

    Args:
        path: the file.
        model: a new dense instance of the class that was factorized, or a model that already has the structure. It may
            be on any device, and must have the dtype that was saved. It keeps its train/eval mode, hooks and
            requires_grad; a block takes over those of the layer that it replaces.

    Returns:
        The same model. Its values and strides equal the saved ones bit for bit; so do the outputs of its fused layers,
        on the same machine with the same number of threads. Outputs of torch's own layers, and of the chain where the
        planner chooses it, are equal up to rounding.

    Raises:
        ValueError: the file is truncated, is no safetensors file (but one of torch.save, for instance), was not written
            by `save`, or was written by a later version of it; blocks, tensors, shapes or dtypes do not fit the model
            (the message says which).
        TypeError: `model` is no nn.Module.
        OSError: the file cannot be read.

    After an error the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load: model must be an nn.Module, got {type(model).__name__}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, `file` is not a dict
    except (SafetensorError, ValueError) as error:
        if is_zipfile(path):
            raise ValueError(
                f"load: {path} is a file of torch.save, which holds no structure: factorize {type(model).__name__} as "
                "it was when the file was written, then load_state_dict; lowrank_ops.save keeps the structure"
            ) from error
        raise ValueError(f"load: {path} is no complete safetensors file: {error}") from error
    if KEY not in metadata:
        raise ValueError(
            f"load: {path} holds tensors but no structure of a factorized model: it was not written by "
            "lowrank_ops.save; read it with safetensors.torch.load_file and load_state_dict, into a model that is "
            "factorized as the one it was saved from"
        )
    try:
        structure = Structure.from_json(metadata[KEY])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"load: {path}: the structure in it cannot be read: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"load: {path}: {error}") from error
    with ExitStack() as undo:
        note_tree(model, undo)
        try:
            new = restructure(model, structure)
            _check_tensors(model, new, stored, structure)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"load: {path} holds a model of class {structure.model}, and does not fit this "
                f"{type(model).__name__}: {error}"
            ) from error
        undo.pop_all()  # nothing to undo
    for block, device in new.items():
        block.to_empty(device=device)
    _fill(model, stored, structure)
    return model


def _unsavable(tensor: Tensor) -> str | None:
    """Why a tensor cannot be saved, as the end of a sentence; None if it can."""
    if is_lazy(tensor):
        return "is lazy: its shape is unknown until the model has run once"
    if tensor.is_meta:
        return "is on the meta device and has no values"
    if type(tensor.detach()) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        kind = type(tensor.detach()).__name__
        return f"is no plain strided tensor but a {kind} ({tensor.layout}, {tensor.dtype}): gather or convert it first"
    return None


def _check_tensors(model: nn.Module, new: Iterable[nn.Module], stored: dict[str, Tensor], structure: Structure) -> None:
    """Raises ValueError unless names, shared tensors, shapes, dtypes and strides of the file fit the model."""
    tensors = named_tensors(model)
    without_values = {id(parameter) for block in new for parameter in block.parameters()}
    for name, tensor in tensors.items():
        if is_lazy(tensor) or (tensor.is_meta and id(tensor) not in without_values):
            raise ValueError(f"{name} has no memory in the model (meta or lazy): build it on a device first")
    missing = [name for name in tensors if name not in stored and name not in structure.same]
    unexpected = [name for name in (*stored, *structure.same) if name not in tensors]
    if missing or unexpected:
        raise ValueError(
            f"{_listed('the file has no', missing)}{'; ' if missing and unexpected else ''}"
            f"{_listed('the model has no', unexpected)}"
        )
    own = Structure.ties(tensors)
    for name in tensors:
        kept, expected = structure.same.get(name, name), own.get(name, name)
        if kept != expected:
            raise ValueError(
                f"{name} is the same tensor as {kept if kept != name else expected} in the "
                f"{'file' if kept != name else 'model'} only"
            )
    for name, tensor in stored.items():
        target = tensors[name]
        if tensor.shape != target.shape or tensor.dtype != target.dtype:
            raise ValueError(
                f"{name} is {list(tensor.shape)} {tensor.dtype} in the file, {list(target.shape)} {target.dtype} in "
                f"the model{'' if tensor.shape != target.shape else '; convert the model with model.to(dtype) first'}"
            )
        structure.stride_of(name, tensor)


def _listed(what: str, names: list[str]) -> str:
    """`what`, followed by the first five names and the number of the others; "" if there are no names."""
    return f"{what} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}" if names else ""


@torch.no_grad()
def _fill(model: nn.Module, stored: dict[str, Tensor], structure: Structure) -> None:
    """Copies the values into the model, with the strides that were saved: strides decide which kernel runs a layer."""
    for name, tensor in named_tensors(model).items():
        if name in structure.same:
            continue
        value, stride = stored[name], structure.stride_of(name, stored[name])
        if tensor.stride() != stride:
            tensor.data = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
        tensor.copy_(value)
