"""The CUDA kernels on the simulator (tests/simt): every kernel of the planner's table, in every dtype that it takes,
on shapes at the edges of its tiles, against the fp64 reference."""

from __future__ import annotations

import random

import pytest
import torch
from simt import building

if building.missing():
    pytest.skip(building.missing(), allow_module_level=True)

from conftest import ACTIVATIONS, Problem
from simt import harness
from simt.cases import (
    CHANNELS_LAST,
    CONVOLUTION_CASES,
    CONVOLUTIONS,
    KERNELS,
    LINEAR,
    LINEAR_CASES,
    Case,
    convolution,
    convolution_case,
    dtypes_of,
    linear_case,
    name_of,
)
from simt.harness import Cut, Kernel, Settings

QUICK = Settings(count=False)


def identify(value: object) -> str | None:
    return name_of(value) if isinstance(value, torch.dtype) else None if isinstance(value, str) else str(value)


@pytest.mark.parametrize("case", CONVOLUTION_CASES)
@pytest.mark.parametrize(("kernel", "dtype"), CONVOLUTIONS, ids=identify)
def test_convolutions(kernel: Kernel, dtype: torch.dtype, case: str) -> None:
    found = convolution_case(case, kernel, dtype)
    found.assert_right(found.run(QUICK))


@pytest.mark.parametrize("case", LINEAR_CASES)
@pytest.mark.parametrize(("kernel", "dtype"), LINEAR, ids=identify)
def test_linear(kernel: Kernel, dtype: torch.dtype, case: str) -> None:
    found = linear_case(case, kernel, dtype)
    found.assert_right(found.run(QUICK))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kernel", "dtype"), [pair for pair in LINEAR if pair[0].config == 1], ids=identify)
def test_activations(kernel: Kernel, dtype: torch.dtype, activation: str) -> None:
    call = Problem(kernel.op, n=1, h=20, s=9, r1=5, t=12, activation=activation, dtype=dtype).make()
    found = Case(kernel, Cut(1, 1, 32), call)
    found.assert_right(found.run(QUICK))


@pytest.mark.parametrize("seed", range(60))
def test_random_problems(seed: int) -> None:
    """Any window, any tile that fits, any number of stages and splits; lanes in shuffled order."""
    draw = random.Random(seed)
    kernel, dtype = draw.choice(CONVOLUTIONS)
    pixels = harness.shape_of(kernel).pixels
    pair = lambda low, high: (draw.randint(low, high), draw.randint(low, high))  # noqa: E731
    tile_h, tile_w = pair(1, 8)
    cut = Cut(draw.randint(1, pixels // (tile_h * tile_w)), tile_h, tile_w, draw.randint(2, 4), draw.randint(1, 2))
    kernel_size, stride, dilation = pair(1, 4), pair(1, 3), pair(1, 3)
    out = draw.randint(1, 2 * tile_h), draw.randint(1, 2 * tile_w)
    # No more padding than leaves an input.
    padding = tuple(
        draw.randint(0, min(4, ((size - 1) * step + apart * (taps - 1)) // 2))
        for size, step, apart, taps in zip(out, stride, dilation, kernel_size, strict=True)
    )
    ranks = dict(s=draw.randint(1, 70), r1=draw.randint(1, 40), r2=draw.randint(1, 40), t=draw.randint(1, 90))
    found = convolution(
        kernel,
        dtype,
        out,
        cut,
        n=draw.randint(1, 3),
        **ranks,
        kernel=kernel_size,
        stride=stride,
        dilation=dilation,
        padding=padding,
        layout=draw.choice([torch.contiguous_format, CHANNELS_LAST]),
        activation=draw.choice(ACTIVATIONS),
        seed=seed,
    )
    found.assert_right(found.run(Settings(order=2, seed=seed, count=False)))


@pytest.mark.parametrize("order", (1, 2))
@pytest.mark.parametrize(("kernel", "dtype"), [pair for pair in KERNELS if pair[0].config == 1], ids=identify)
def test_the_order_of_threads_does_not_matter(kernel: Kernel, dtype: torch.dtype, order: int) -> None:
    make = linear_case if kernel.op == "lowrank_linear" else convolution_case
    found = make("one above", kernel, dtype)
    ascending, other = found.run(QUICK), found.run(Settings(order=order, seed=7, count=False))
    assert (ascending.error, other.error) == ("", "")
    assert torch.equal(ascending.output, other.output)


def test_what_a_kernel_does_not_take_is_an_error() -> None:
    """cudaErrorInvalidValue, and nothing written."""
    refused = 0
    for kernel in harness.kernels():
        for dtype in set(harness.DTYPES) - set(dtypes_of(kernel)):
            make = linear_case if kernel.op == "lowrank_linear" else convolution_case
            result = make("narrow copies", kernel, dtype).run(QUICK)
            assert result.code == 1 and result.report["launches"] == 0 and result.output.isnan().all()
            refused += 1
    assert refused == 3 * 6
    number = harness.shape_of(Kernel("tucker_conv2d", "sm80", 99))
    assert number.threads == 0


def test_too_much_shared_memory_is_an_error() -> None:
    kernel, dtype = CONVOLUTIONS[0]
    result = convolution_case("whole tiles", kernel, dtype).run(Settings(shared_limit=10_000))
    assert result.code == 1 and result.report["ctas"] == 0
