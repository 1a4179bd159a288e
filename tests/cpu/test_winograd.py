"""Tucker's 3x3 core by Winograd's transform on the CPU, wherever it can be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

import lowrank_ops
from lowrank_ops.ops.extension import _C
from tests.support.budgets import assert_output, assert_same_bits_for_any_threads
from tests.support.problems import ACTIVATIONS, ISAS, Problem

# fp16 and fp64 take the direct core; the errors of 4x4 outputs are too large for bf16.
WAYS = [(torch.float32, "2x2"), (torch.float32, "4x4"), (torch.bfloat16, "2x2")]
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SIZES = [(1, 1), (2, 2), (3, 5), (4, 4), (7, 7), (8, 6), (13, 30), (14, 14), (5, 131), (6, 224)]

ways = pytest.mark.parametrize(("dtype", "outputs"), WAYS, ids=lambda value: str(value).removeprefix("torch."))


@pytest.fixture
def winograd(fused_policy: None) -> Iterator[Callable[[str], None]]:
    """Chooses the outputs of a patch wherever they can be used."""
    yield _C.set_cpu_winograd
    _C.set_cpu_winograd("auto")


def problem(**sizes: object) -> Problem:
    return Problem("tucker_conv2d", **{"kernel": (3, 3), "padding": (1, 1), **sizes})


def kernel_of(call_problem: Problem) -> str:
    call = call_problem.make()
    found = lowrank_ops.explain(lowrank_ops.tucker_conv2d, dict(call.tensors), verbose=False, **call_problem.options())
    return found[0].chosen["kernel"]


def has_transforms(dtype: torch.dtype) -> bool:
    """Whether this CPU computes in the dtype: else it takes the direct core (winograd_fits in csrc/plan/cpu)."""
    found = lowrank_ops.explain(lowrank_ops.lowrank_linear, [(2, 8), (4, 8), (6, 4)], verbose=False)
    return dtype == torch.float32 or ", avx512bf16 kernels, " in found[0].device


@ways
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_image_sizes(
    winograd: Callable[[str], None],
    size: tuple[int, int],
    layout: torch.memory_format,
    dtype: torch.dtype,
    outputs: str,
) -> None:
    """Odd and even, smaller than a patch, in several column tiles."""
    winograd(outputs)
    for padding in ((1, 1), (2, 0), (0, 2)):
        one = problem(
            h=size[0] + 2, w=size[1] + 2, padding=padding, s=16, r1=16, r2=16, t=8, dtype=dtype, layout=layout
        )
        assert kernel_of(one).endswith("_winograd_" + outputs) == has_transforms(dtype)
        call = one.make()
        assert_output(call, call.run())


@ways
@pytest.mark.parametrize("ranks", [(1, 1), (3, 5), (8, 8), (16, 64), (17, 49), (64, 65), (33, 130), (128, 32)], ids=str)
def test_ranks(winograd: Callable[[str], None], ranks: tuple[int, int], dtype: torch.dtype, outputs: str) -> None:
    """Factors as trained ones are, so that sums lie where activations bend: relu6 of sums of a thousand is nearly all 0
    or 6, and its error that of the few values in between."""
    winograd(outputs)
    r1, r2 = ranks
    for activation in ACTIVATIONS:
        call = problem(h=9, w=10, s=24, r1=r1, r2=r2, t=17, activation=activation, dtype=dtype).make()
        for name, fan_in in (("in_factor", 24), ("core", 9 * r1), ("out_factor", r2)):
            call.tensors[name] /= fan_in**0.5
        assert_output(call, call.run())


@pytest.mark.parametrize("isa", ISAS)
@ways
def test_every_instruction_set(winograd: Callable[[str], None], isa: str, dtype: torch.dtype, outputs: str) -> None:
    winograd(outputs)
    try:
        _C.set_cpu_isa(isa)
    except ValueError as error:
        pytest.skip(f"not on this CPU: {error}")
    try:
        for seed in range(3):
            call = problem(h=8 + seed, w=11, s=20, r1=15 + seed, r2=33, t=20, dtype=dtype, seed=seed).make()
            assert_output(call, call.run())
    finally:
        _C.set_cpu_isa("")


@ways
@pytest.mark.parametrize("size", [(7, 7), (9, 58), (30, 31)], ids=str)
def test_bitwise_equal_for_any_number_of_threads(
    winograd: Callable[[str], None], size: tuple[int, int], dtype: torch.dtype, outputs: str
) -> None:
    winograd(outputs)
    call = problem(n=1, h=size[0], w=size[1], s=32, r1=32, r2=48, t=32, dtype=dtype).make()
    assert_same_bits_for_any_threads(call.run, (1, 2, 3, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [3, 4, 5, 7, 10, 64])
@pytest.mark.parametrize("ranks", [(5, 3), (8, 8), (16, 32), (32, 65), (33, 17)], ids=str)
def test_lines(winograd: Callable[[str], None], ranks: tuple[int, int], taps: int, dtype: torch.dtype) -> None:
    """Kernels of any length along the width: groups of three taps, the last one cut or whole."""
    winograd("line")
    for width, padding, layout in [(1, taps // 2, 0), (taps, 0, 1), (61, taps // 2, 1), (150, 2, 0)]:
        if width + 2 * padding < taps:
            continue
        one = problem(
            n=2, h=3, w=width, kernel=(1, taps), padding=(1, padding), stride=(2, 1), dtype=dtype,
            layout=LAYOUTS[layout], s=20, r1=ranks[0], r2=ranks[1], t=12, activation="silu", seed=taps,
        )  # fmt: skip
        column = width == 1 and taps == 2 * padding + 1  # in and out: read as a row
        lines = not column and min(ranks) >= 8 and has_transforms(dtype)
        assert kernel_of(one).endswith("_winograd_line") == lines
        call = one.make()
        assert_output(call, call.run())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lines_in_every_instruction_set(winograd: Callable[[str], None], isa: str, dtype: torch.dtype) -> None:
    winograd("line")
    try:
        _C.set_cpu_isa(isa)
    except ValueError as error:
        pytest.skip(f"not on this CPU: {error}")
    try:
        for ranks in ((15, 33), (32, 48)):
            call = problem(h=1, w=70, kernel=(1, 11), padding=(0, 5), s=20, r1=ranks[0], r2=ranks[1], t=20, dtype=dtype)
            assert_output(made := call.make(), made.run())
    finally:
        _C.set_cpu_isa("")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("height", [1, 6])
def test_lines_are_bitwise_equal_for_any_number_of_threads(
    winograd: Callable[[str], None], height: int, dtype: torch.dtype
) -> None:
    winograd("line")
    call = problem(
        n=1, h=height, w=400 // height, kernel=(1, 20), padding=(0, 9), s=96, r1=96, r2=112, t=96, dtype=dtype
    ).make()
    assert_same_bits_for_any_threads(call.run, (1, 2, 3, 5))


def test_auto_takes_lines(fused_policy: None) -> None:
    one = problem(n=1, h=1, w=64, kernel=(1, 64), padding=(0, 32), s=128, r1=32, r2=32, t=128)
    assert kernel_of(one).endswith("_winograd_line")
    for change in (dict(stride=(1, 2)), dict(dilation=(1, 2)), dict(kernel=(1, 2)), dict(kernel=(2, 20), h=2)):
        assert "winograd" not in kernel_of(replace(one, **change)), change


@pytest.mark.parametrize("outputs", ["2x2", "4x4"])
def test_only_where_it_can_be_used(winograd: Callable[[str], None], outputs: str) -> None:
    winograd(outputs)
    fits = problem(h=20, w=20, s=32, r1=32, r2=32)
    assert kernel_of(fits).endswith("_winograd_" + outputs)
    changes: list[dict[str, object]] = [
        dict(stride=(2, 1)), dict(dilation=(1, 2), padding=(1, 2)), dict(kernel=(3, 5)), dict(kernel=(1, 1)),
        dict(dtype=torch.float64), dict(dtype=torch.float16),
    ]  # fmt: skip
    if outputs == "4x4":  # errors beyond the budget
        changes += [dict(r1=7), dict(r2=7), dict(dtype=torch.bfloat16)]
    for change in changes:
        other = replace(fits, **change)
        assert "winograd" not in kernel_of(other), change
        call = other.make()
        assert_output(call, call.run())


@pytest.mark.parametrize("outputs", ["2x2", "4x4"])
@pytest.mark.parametrize("ranks", [(8, 8), (16, 8), (16, 32)], ids=str)
def test_errors_where_nothing_cancels(winograd: Callable[[str], None], ranks: tuple[int, int], outputs: str) -> None:
    """Values of one sign and images that hardly change, where a direct sum has its smallest error for the budget: the
    transforms subtract such values from each other."""
    winograd(outputs)
    for seed in range(4):
        call = problem(n=2, h=16, w=16, s=8, r1=ranks[0], r2=ranks[1], t=8, seed=seed).make()
        call.tensors.pop("bias", None)
        for name, tensor in call.tensors.items():
            call.tensors[name] = tensor.abs() + (10 if seed % 2 and name == "input" else 0)
        assert_output(call, call.run())


def test_auto_takes_it_for_large_images_and_not_for_a_few_pixels(fused_policy: None) -> None:
    large = problem(n=1, h=56, w=56, s=256, r1=64, r2=64, t=256)
    assert kernel_of(large).endswith("_winograd_4x4")
    assert kernel_of(replace(large, r1=6, r2=64)).endswith("_winograd_2x2")
    assert "4x4" not in kernel_of(replace(large, r1=2048, r2=2048))  # 36 places of the weight are 600 MB
    assert "winograd" not in kernel_of(replace(large, h=2, w=2))
    _C.set_cpu_winograd("never")
    try:
        assert "winograd" not in kernel_of(large)
    finally:
        _C.set_cpu_winograd("auto")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_ranks_take_fewer_rows_of_patches(fused_policy: None, dtype: torch.dtype) -> None:
    """Rather than none: their places fit half of L2 in lower tiles."""
    large = problem(n=1, h=14, w=14, s=16, r1=256, r2=256, t=16, dtype=dtype, layout=torch.channels_last)
    small = replace(large, r1=64, r2=64)
    if "_winograd" not in kernel_of(replace(small, h=56, w=56)):
        pytest.skip(f"not on this CPU in {dtype}")
    plans = []
    for one in (large, small):
        call = one.make()
        (found,) = lowrank_ops.explain(lowrank_ops.tucker_conv2d, dict(call.tensors), padding=1, verbose=False)
        plans.append(found.chosen)
        assert_output(call, call.run())
    assert all("_winograd" in plan["kernel"] and plan["scratch_bytes"] <= 1 << 19 for plan in plans)
    assert plans[0]["tile_rows"] < plans[1]["tile_rows"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("rank", "size"), [(128, 28), (192, 28), (256, 28), (320, 56), (512, 28)])
def test_the_choice_does_not_depend_on_the_threads(
    fused_policy: None, rank: int, size: int, layout: torch.memory_format
) -> None:
    """A team shares the places: what is too large for one thread has to be too large for two."""
    for dtype in DTYPES:
        one = problem(n=1, h=size, w=size, s=64, r1=rank, r2=rank, t=64, dtype=dtype, layout=layout)
        threads, kernels = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3, 4, 8, 16):
                torch.set_num_threads(count)
                kernels.append(kernel_of(one))
        finally:
            torch.set_num_threads(threads)
        assert len(set(kernels)) == 1, kernels


@pytest.mark.parametrize("outputs", ["2x2", "4x4"])
def test_how_far_a_nan_reaches(winograd: Callable[[str], None], outputs: str) -> None:
    """With 2x2 outputs as far as the 3x3 windows that contain it. With 4x4 to all outputs of the patches that read it,
    but from a patch's first or last row or column to its first or last outputs only."""
    winograd(outputs)
    call = problem(n=1, h=12, w=12, s=16, r1=16, r2=16, t=4).make()
    call.tensors["input"][0, 3, 4, 2] = float("nan")
    expected = torch.zeros(12, 12, dtype=torch.bool)
    if outputs == "2x2":
        expected[3:6, 1:4] = True
    else:
        expected[3:8, 0:4] = True
    assert torch.equal(call.run()[0].isnan().all(0), expected)


def test_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of auto, never, 2x2, 4x4, line .* got 'sometimes'"):
        _C.set_cpu_winograd("sometimes")
