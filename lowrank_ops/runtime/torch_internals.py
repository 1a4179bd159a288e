"""The private parts of torch that this package uses, under public names: the one file to look at when a new version of
torch breaks something. No other file of the package names them (`tests/repo/test_torch_internals.py`).

Besides the names below, the package relies on attributes of torch's objects that torch does not document as public:

* `nn.Module`: the dicts `_parameters`, `_buffers`, `_modules` and `_non_persistent_buffers_set`, which contain what is
  registered in the module itself (the public `named_parameters()` and the like leave out None and what occurs twice);
  the dicts of hooks (`_forward_hooks`, `_forward_pre_hooks`, ... in `lowrank_ops.model.sites`), because torch has no
  public way to move hooks to another module; the methods `_apply` and `_load_from_state_dict`, which are overridden to
  notice new values; `_conv_forward` of convolutions, to notice that a subclass overrides it.
* `Tensor`: `_version`, which counts changes in place; `_backward_hooks` and `_post_accumulate_grad_hooks`.
* Storages: `_cdata`, the identity of the memory (`data_ptr()` is 0 for every empty and every meta tensor).
* Operators (`torch._ops.OpOverload`): `_schema` and `_overloadpacket`.
* Pruning hooks of `torch.nn.utils.prune`: `_tensor_name`, the parameter that they compute.
* Modules made by `torch.compile(module)`: `_orig_mod`, the module inside.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._prims_common
import torch.utils._python_dispatch
import torch.utils._pytree
from torch import Tensor, nn

# Base classes of layers. torch exports only the classes that derive from them, one by one: a list of those would miss
# lazy layers, SyncBatchNorm and whatever torch adds.

ConvBase = nn.modules.conv._ConvNd
"""Every convolution: nn.Conv1d to nn.Conv3d, transposed and lazy ones."""

ConvTransposeBase = nn.modules.conv._ConvTransposeNd
"""Every transposed convolution."""

NormBase = nn.modules.batchnorm._NormBase
"""Every batch and instance normalization."""

BatchNormBase = nn.modules.batchnorm._BatchNorm
"""Every batch normalization: nn.BatchNorm1d to nn.BatchNorm3d, nn.SyncBatchNorm and lazy ones."""

DropoutBase = nn.modules.dropout._DropoutNd
"""Every dropout layer: nn.Dropout to nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout."""

# Calls and their arguments.

TorchDispatchMode = torch.utils._python_dispatch.TorchDispatchMode
"""Context manager whose `__torch_dispatch__` sees each operation below autograd; the public
`torch.overrides.TorchFunctionMode` sees the calls above autograd, not the operations that each one is made of."""


def no_values() -> AbstractContextManager[Any]:
    """Context manager: inside it tensors are made, and operations run, without values, but with the devices, dtypes and
    memory formats of real ones (meta tensors have their own device, for which a convolution returns contiguous images).
    Real tensors may take part. torch has no public name for it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def mark_static_address(tensor: Tensor) -> None:
    """Makes the CUDA graphs of torch.compile read this tensor where it lies, as they read parameters. They copy other
    tensors at every call."""
    from torch._dynamo import mark_static_address as mark  # not above: this import takes a second

    mark(tensor, guard=False)


tree_leaves = torch.utils._pytree.tree_leaves
"""The leaves of nested tuples, lists and dicts as a list; torch has no public pytree module."""

tree_map_only = torch.utils._pytree.tree_map_only
"""`tree_map_only(kind, function, tree)`: the tree with `function` applied to the leaves of that class."""


def is_exporting() -> bool:
    """Whether torch.export records this call. It reads what the public `torch.compiler.is_exporting()` returns: in
    code that torch.compile traces, torch 2.11 takes that function for True even where nothing is exported."""
    return torch.compiler._is_exporting_flag


# Checks in fake kernels: unlike `if ...: raise`, they work with symbolic sizes.

check_value = torch._check_value
"""`check_value(condition, message)` raises ValueError; the message is a function that returns it."""

check_type = torch._check_type
"""`check_type(condition, message)` raises TypeError."""

# Tensors.

suggest_memory_format = torch._prims_common.suggest_memory_format
"""`Tensor.suggest_memory_format()` of C++, which Python does not have: torch.channels_last for a 4-D tensor that is
stored so, torch.contiguous_format for most others."""

without_torch_function = torch._C.DisableTorchFunctionSubclass
"""Context manager: inside it torch treats tensor subclasses as plain tensors. torch's notes on extending torch name
it, its reference does not; modes that a caller has entered stay on."""

is_torch_function_enabled = torch._C._is_torch_function_enabled
"""False inside `without_torch_function()`, where torch's own code runs on a subclass."""

has_storage = torch._C._has_storage
"""Whether a tensor has one piece of memory (a sparse one has not); the public `untyped_storage()` raises if not."""


def shares_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both with a storage, have the same one; public are only addresses, which are 0 for empty
    and meta tensors."""
    return torch._C._is_alias_of(tensor, other)  # type: ignore[attr-defined, no-any-return]


def make_wrapper_subclass(kind: type[Tensor], shape: tuple[int, ...], **options: Any) -> Any:
    """A tensor of a subclass, with a shape, dtype and device but without memory; torch documents no other way."""
    return Tensor._make_wrapper_subclass(kind, shape, **options)  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 makes of parameters. Its class cannot be asked for: torch may be built without
    torch.distributed."""
    return hasattr(tensor, "full_tensor")


def compiled_class() -> type[nn.Module] | None:
    """The class of what `torch.compile(module)` returns, which torch does not export; None if this process has not
    loaded torch.compile, which takes seconds, so that nothing is compiled."""
    loaded = sys.modules.get("torch._dynamo.eval_frame")
    return None if loaded is None else loaded.OptimizedModule
