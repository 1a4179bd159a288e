"""The simulator notices broken kernels: each barrier of each kernel is left out in turn, an index is shifted, zeros of
the halo are not written, copies are not waited for. Each must end in an error or in a result beyond its budget."""

from __future__ import annotations

import pytest
import torch

from tests.support.simulator import building

if building.missing():
    pytest.skip(building.missing(), allow_module_level=True)

from tests.support.simulator import harness
from tests.support.simulator.cases import (
    CHANNELS_LAST,
    KERNELS,
    Case,
    convolution,
    linear_case,
    name_of,
    tile_of,
)
from tests.support.simulator.harness import Cut, Kernel, Settings, shape_of

BARRIERS = {
    "tucker_conv2d": {"kTables", "kChunk", "kHiddenRead", "kStagingWritten", "kStagingRead"},
    "cp_conv2d": {"kTables", "kChunk", "kHiddenWritten", "kDepthwise", "kStagingWritten", "kStagingRead"},
    "lowrank_linear": {"kTables", "kChunk", "kStagingWritten", "kStagingRead"},
}
TENSORS = {
    "tucker_conv2d": ("input", "in_factor", "core", "out_factor", "bias"),
    "cp_conv2d": ("input", "in_factor", "height_factor", "width_factor", "out_factor", "bias"),
    "lowrank_linear": ("input", "in_factor", "out_factor", "bias"),
}
# The order in which tests/support/simulator/module.cpp registers them.
_BUFFERS = ("input", "output", "in_factor", "core", "height_factor", "width_factor", "out_factor", "bias")


def identify(value: object) -> str | None:
    return name_of(value) if isinstance(value, torch.dtype) else None if isinstance(value, str) else str(value)


def problem(kernel: Kernel, dtype: torch.dtype) -> Case:
    """One CTA whose halo reaches beyond the image, with several chunks in every stage."""
    linear = kernel.op == "lowrank_linear"
    case = linear_case("whole tiles", kernel, dtype) if linear else _convolution(kernel, dtype)
    case.call.tensors["bias"] *= 1000  # otherwise a wrong bias would drown in the rounding of bf16
    return case


def _convolution(kernel: Kernel, dtype: torch.dtype) -> Case:
    (th, tw), columns, vector = tile_of(kernel), shape_of(kernel).columns, 16 // dtype.itemsize
    return convolution(
        kernel,
        dtype,
        (th, tw),
        Cut(1, th, tw),
        n=1,
        s=12 * vector,
        r1=columns,
        r2=columns,
        t=columns,
        kernel=(2, 3),
        padding=(1, 1),
        layout=CHANNELS_LAST,
    )


def assert_noticed(case: Case, settings: Settings) -> None:
    result = case.run(settings)
    if result.error:
        assert result.code != 0
        return
    with pytest.raises(AssertionError, match=r"error .*, budget"):
        case.assert_right(result)


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS, ids=identify)
def test_every_barrier_is_needed(kernel: Kernel, dtype: torch.dtype) -> None:
    case, numbers = problem(kernel, dtype), harness.barriers()
    right = case.run(Settings(count=False))
    case.assert_right(right)
    used = {name for name, number in numbers.items() if str(number) in right.report["barriers"]}
    persistent = {"kHiddenWritten", "kSecondWritten"} if shape_of(kernel).persistent else set()
    assert used == BARRIERS[kernel.op] | persistent
    for name in sorted(used):
        result = case.run(Settings(count=False, skip_barrier=numbers[name]))
        assert "race" in result.error or "under way" in result.error or "uninitialized" in result.error, name


def test_every_barrier_has_a_kernel() -> None:
    assert set.union(*BARRIERS.values()) | {"kSecondWritten"} == set(harness.barriers())


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS, ids=identify)
def test_shifted_loads_are_noticed(kernel: Kernel, dtype: torch.dtype) -> None:
    case = problem(kernel, dtype)
    present = [name for name in _BUFFERS if name == "output" or name in case.call.tensors]
    for name in TENSORS[kernel.op]:
        assert_noticed(case, Settings(count=False, shift_buffer=present.index(name)))


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS, ids=identify)
def test_copies_not_waited_for_are_noticed(kernel: Kernel, dtype: torch.dtype) -> None:
    assert "under way" in problem(kernel, dtype).run(Settings(count=False, ignore_waits=True)).error


@pytest.mark.parametrize(("kernel", "dtype"), [pair for pair in KERNELS if pair[0].family == "sm80"], ids=identify)
def test_shifted_matrices_are_noticed(kernel: Kernel, dtype: torch.dtype) -> None:
    assert_noticed(problem(kernel, dtype), Settings(count=False, shift_load_matrices=16))


@pytest.mark.parametrize(
    ("kernel", "dtype"), [pair for pair in KERNELS if pair[0].op != "lowrank_linear"], ids=identify
)
def test_missing_zeros_of_the_halo_are_noticed(kernel: Kernel, dtype: torch.dtype) -> None:
    """Instead of zeros there is NaN in the first chunk's slot, and another chunk's values later."""
    assert_noticed(problem(kernel, dtype), Settings(count=False, skip_zero_fill=True))
