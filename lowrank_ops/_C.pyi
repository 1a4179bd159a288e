# Written by csrc/python/write_stub.py (make stub) from the built extension. Do not edit.
from __future__ import annotations

import collections.abc
import typing

import torch

def activations() -> list[str]: ...
def build_info() -> dict: ...
def cached_gpu_plan(
    problem: tuple[
        str,
        str,
        bool,
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(9)"],
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(6)"],
        bool,
    ],
    gpu: str,
    device: typing.SupportsInt | typing.SupportsIndex,
    prepared: bool = False,
) -> tuple: ...
def chain_gpu_features(
    arg0: tuple[
        str,
        str,
        bool,
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(9)"],
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(6)"],
        bool,
    ],
    arg1: str,
) -> list[float]: ...
@typing.overload
def cp_conv2d(
    arg0: torch.Tensor,
    arg1: torch.Tensor,
    arg2: torch.Tensor,
    arg3: torch.Tensor,
    arg4: torch.Tensor,
    arg5: torch.Tensor | None,
    arg6: int | tuple[int, int],
    arg7: int | tuple[int, int],
    arg8: int | tuple[int, int],
    arg9: str,
) -> torch.Tensor: ...
@typing.overload
def cp_conv2d(*args: typing.Any) -> torch.Tensor: ...
@typing.overload
def cp_conv2d_prepared(
    arg0: torch.Tensor,
    arg1: torch.Tensor,
    arg2: torch.Tensor,
    arg3: torch.Tensor,
    arg4: torch.Tensor,
    arg5: torch.Tensor | None,
    arg6: int | tuple[int, int],
    arg7: int | tuple[int, int],
    arg8: int | tuple[int, int],
    arg9: str,
    arg10: torch.Tensor,
) -> torch.Tensor: ...
@typing.overload
def cp_conv2d_prepared(*args: typing.Any) -> torch.Tensor: ...
def cpu_isa() -> str: ...
def cpu_plans_made() -> int: ...
def cpu_prediction(
    arg0: str,
    arg1: str,
    arg2: bool,
    arg3: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(9)"],
    arg4: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(6)"],
    arg5: str,
    arg6: typing.SupportsInt | typing.SupportsIndex,
    arg7: typing.SupportsInt | typing.SupportsIndex,
) -> dict: ...
def explain(
    op: str,
    dtype: str,
    channels_last: bool,
    sizes: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(9)"],
    window: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(6)"],
    activation: str,
    device: str,
    prepared: bool = False,
) -> dict: ...
def force_gpu_kernel(arg0: str) -> None: ...
def forced_gpu_kernel() -> str: ...
def forget_measurements() -> int: ...
def fused_gpu_features(
    arg0: tuple[
        str,
        str,
        bool,
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(9)"],
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(6)"],
        bool,
    ],
    arg1: str,
    arg2: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(6)"],
    arg3: str,
) -> tuple[list[float], bool]: ...
def get_policy() -> str: ...
def gpu_kernels() -> list: ...
def gpu_tiles(
    arg0: tuple[
        str,
        str,
        bool,
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(9)"],
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(6)"],
        bool,
    ],
    arg1: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(3)"],
) -> tuple: ...
def kept_memory() -> int: ...
@typing.overload
def lowrank_linear(
    arg0: torch.Tensor, arg1: torch.Tensor, arg2: torch.Tensor, arg3: torch.Tensor | None, arg4: str
) -> torch.Tensor: ...
@typing.overload
def lowrank_linear(*args: typing.Any) -> torch.Tensor: ...
@typing.overload
def lowrank_linear_prepared(
    arg0: torch.Tensor, arg1: torch.Tensor, arg2: torch.Tensor, arg3: torch.Tensor | None, arg4: str, arg5: torch.Tensor
) -> torch.Tensor: ...
@typing.overload
def lowrank_linear_prepared(*args: typing.Any) -> torch.Tensor: ...
def measured_choice(
    arg0: str, arg1: collections.abc.Sequence[tuple[str, typing.SupportsFloat | typing.SupportsIndex]]
) -> int: ...
def measurements() -> list: ...
def merged_cp_backward(
    arg0: torch.Tensor,
    arg1: torch.Tensor,
    arg2: torch.Tensor,
    arg3: torch.Tensor,
    arg4: torch.Tensor,
    arg5: torch.Tensor,
    arg6: torch.Tensor | None,
    arg7: int | tuple[int, int],
    arg8: int | tuple[int, int],
    arg9: int | tuple[int, int],
    arg10: str,
    arg11: typing.Annotated[collections.abc.Sequence[bool], "FixedSize(6)"],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]: ...
def merged_cp_chain(
    arg0: torch.Tensor,
    arg1: torch.Tensor,
    arg2: torch.Tensor,
    arg3: torch.Tensor,
    arg4: torch.Tensor,
    arg5: torch.Tensor | None,
    arg6: int | tuple[int, int],
    arg7: int | tuple[int, int],
    arg8: int | tuple[int, int],
    arg9: str,
) -> torch.Tensor: ...
def merges_depthwise(
    arg0: tuple[
        str,
        str,
        bool,
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(9)"],
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(6)"],
        bool,
    ],
) -> bool: ...
def named_gpus() -> list: ...
def pad_factors(
    arg0: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor],
) -> torch.Tensor: ...
def padded_factors(
    arg0: torch.Tensor,
    arg1: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor],
) -> typing.Any: ...
def parallel_threads(arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
def plan_gpu_kernel(
    problem: tuple[
        str,
        str,
        bool,
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(9)"],
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(6)"],
        bool,
    ],
    kernel: str,
    gpu: str,
    built_for: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] = [],
    built_ptx: typing.SupportsInt | typing.SupportsIndex = 0,
    architecture: typing.SupportsInt | typing.SupportsIndex = 0,
) -> dict: ...
def prepare(arg0: torch.Tensor, arg1: torch.Tensor | None, arg2: torch.Tensor, arg3: bool) -> torch.Tensor: ...
def refuse_gpu_kernel(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: str, arg2: str) -> None: ...
def release_memory() -> int: ...
def remember_measurements(
    arg0: collections.abc.Sequence[
        tuple[str, str, collections.abc.Sequence[tuple[str, typing.SupportsFloat | typing.SupportsIndex]]]
    ],
) -> None: ...
def set_cpu_isa(arg0: str) -> None: ...
def set_cpu_teams(arg0: str) -> None: ...
def set_cpu_winograd(arg0: str) -> None: ...
def set_policy(arg0: str) -> None: ...
def team_shares_after_error(arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
def team_threads(arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
@typing.overload
def tucker_conv2d(
    arg0: torch.Tensor,
    arg1: torch.Tensor,
    arg2: torch.Tensor,
    arg3: torch.Tensor,
    arg4: torch.Tensor | None,
    arg5: int | tuple[int, int],
    arg6: int | tuple[int, int],
    arg7: int | tuple[int, int],
    arg8: str,
) -> torch.Tensor: ...
@typing.overload
def tucker_conv2d(*args: typing.Any) -> torch.Tensor: ...
@typing.overload
def tucker_conv2d_prepared(
    arg0: torch.Tensor,
    arg1: torch.Tensor,
    arg2: torch.Tensor,
    arg3: torch.Tensor,
    arg4: torch.Tensor | None,
    arg5: int | tuple[int, int],
    arg6: int | tuple[int, int],
    arg7: int | tuple[int, int],
    arg8: str,
    arg9: torch.Tensor,
) -> torch.Tensor: ...
@typing.overload
def tucker_conv2d_prepared(*args: typing.Any) -> torch.Tensor: ...

chain_feature_names: list = [
    "calls",
    "products",
    "values",
    "core",
    "core_inputs",
    "core_inside",
    "depthwise",
    "far_bytes",
    "weights",
    "native_calls",
    "native_products",
    "native_core",
    "native_columns",
]
factor_product_seconds: float = 4.3e-06
fused_feature_names: list = [
    "calls",
    "products",
    "steps",
    "values",
    "dots",
    "depthwise",
    "bytes",
    "far_bytes",
    "weights",
    "moved",
    "rows",
    "taps",
    "odd_stores",
]
library_call_seconds: float = 1.7e-05

def check_gpu_kernel(arg0: str, arg1: str, arg2: bool, arg3: int, arg4: bool) -> str: ...
def describe_launch(
    arg0: str,
    arg1: collections.abc.Sequence[int],
    arg2: torch.Tensor,
    arg3: torch.Tensor,
    arg4: torch.Tensor | None,
    arg5: torch.Tensor | None,
    arg6: torch.Tensor | None,
    arg7: torch.Tensor,
    arg8: torch.Tensor | None,
    arg9: collections.abc.Sequence[collections.abc.Sequence[int]],
    arg10: str,
    arg11: torch.Tensor | None,
) -> dict: ...
def fail_gpu_launches(arg0: int) -> None: ...
def limit_gpu_ctas(arg0: int) -> None: ...
def is_launch_refusal(arg0: int) -> bool: ...
def launch_gpu_kernel(
    arg0: str,
    arg1: collections.abc.Sequence[int],
    arg2: torch.Tensor,
    arg3: torch.Tensor,
    arg4: torch.Tensor | None,
    arg5: torch.Tensor | None,
    arg6: torch.Tensor | None,
    arg7: torch.Tensor,
    arg8: torch.Tensor | None,
    arg9: collections.abc.Sequence[collections.abc.Sequence[int]],
    arg10: str,
    arg11: torch.Tensor | None,
) -> torch.Tensor: ...
def run_gpu_kernel(
    arg0: str,
    arg1: collections.abc.Sequence[int],
    arg2: torch.Tensor,
    arg3: torch.Tensor,
    arg4: torch.Tensor | None,
    arg5: torch.Tensor | None,
    arg6: torch.Tensor | None,
    arg7: torch.Tensor,
    arg8: torch.Tensor | None,
    arg9: collections.abc.Sequence[collections.abc.Sequence[int]],
    arg10: str,
    arg11: torch.Tensor | None,
) -> torch.Tensor: ...
