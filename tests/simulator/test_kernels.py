"""The CUDA kernels on the simulator: every kernel of the planner's table, in every dtype that it takes, on shapes at
the edges of its tiles, against the fp64 reference."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tests.support.simulator import building

if building.missing():
    pytest.skip(building.missing(), allow_module_level=True)

from tests.support.problems import ACTIVATIONS, Problem
from tests.support.simulator import harness
from tests.support.simulator.cases import (
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
from tests.support.simulator.harness import Cut, Kernel, Settings, shape_of

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


COMMON = {
    "tucker_conv2d": {"whole tiles", "common factors", "several images", "passes of the halo", "lean edges"},
    "cp_conv2d": {"whole tiles", "common factors", "several images", "passes of the halo", "lean edges"},
    "lowrank_linear": {"whole tiles", "lean edges"},
}


@pytest.mark.parametrize(("kernel", "dtype"), [pair for pair in KERNELS if pair[0].family == "sm80"], ids=identify)
def test_which_cases_are_common(kernel: Kernel, dtype: torch.dtype) -> None:
    """Common cases (common_case.h) run the lean kernel, the others the general one."""
    linear = kernel.op == "lowrank_linear"
    make, names = (linear_case, LINEAR_CASES) if linear else (convolution_case, CONVOLUTION_CASES)
    found = {name for name in names if harness.is_common_case(*make(name, kernel, dtype).launch())}
    assert found == COMMON[kernel.op]
    files = {entry["file"].split("/")[-1] for entry in make("whole tiles", kernel, dtype).run().report["conflicts"]}
    assert {"stream_lean.cuh", "epilogue_lean.cuh"} <= files and not {"stream.cuh", "copy.cuh"} & files
    files = {entry["file"].split("/")[-1] for entry in make("narrow copies", kernel, dtype).run().report["conflicts"]}
    assert "copy.cuh" in files and not {"stream_lean.cuh", "epilogue_lean.cuh"} & files


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kernel", "dtype"), [pair for pair in LINEAR if pair[0].config == 1], ids=identify)
def test_activations(kernel: Kernel, dtype: torch.dtype, activation: str) -> None:
    for s, r1, t in ((9, 5, 12), (16, 8, 24)):  # the general kernel and the lean one
        call = Problem(kernel.op, n=1, h=20, s=s, r1=r1, t=t, activation=activation, dtype=dtype).make()
        found = Case(kernel, Cut(1, 1, 32), call)
        found.assert_right(found.run(QUICK))


@pytest.mark.parametrize("seed", range(60))
def test_random_problems(seed: int) -> None:
    """Random windows, tiles that fit, numbers of slots and splits; lanes run in shuffled order."""
    draw = random.Random(seed)
    kernel, dtype = draw.choice(CONVOLUTIONS)
    pixels = harness.shape_of(kernel).pixels
    pair = lambda low, high: (draw.randint(low, high), draw.randint(low, high))  # noqa: E731
    tile_h, tile_w = pair(1, 8)
    cut = Cut(draw.randint(1, pixels // (tile_h * tile_w)), tile_h, tile_w, draw.randint(2, 4), draw.randint(1, 2))
    kernel_size, stride, dilation = pair(1, 4), pair(1, 3), pair(1, 3)
    out = draw.randint(1, 2 * tile_h), draw.randint(1, 2 * tile_w)
    # At most so much padding that some input is left.
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
    """The launcher returns cudaErrorInvalidValue, and nothing is written."""
    refused = 0
    for kernel in harness.kernels():
        for dtype in set(harness.DTYPES) - set(dtypes_of(kernel)):
            make = linear_case if kernel.op == "lowrank_linear" else convolution_case
            result = make("narrow copies", kernel, dtype).run(QUICK)
            assert result.code == 1 and result.report["launches"] == 0 and result.output.isnan().all()
            refused += 1
    assert refused == 3 * 6 + 1
    number = harness.shape_of(Kernel("tucker_conv2d", "sm80", 99))
    assert number.threads == 0


def test_too_much_shared_memory_is_an_error() -> None:
    kernel, dtype = CONVOLUTIONS[0]
    result = convolution_case("whole tiles", kernel, dtype).run(Settings(shared_limit=10_000))
    assert result.code == 1 and result.report["ctas"] == 0


# Blocks of common networks: 14x14 and 7x7 at small batches, odd sizes, strides.
PLANNED = {
    "14x14": dict(n=1, h=14, w=14, s=64, t=96, r1=24, r2=32, kernel=(3, 3), padding=(1, 1)),
    "7x7": dict(n=2, h=7, w=7, s=96, t=64, r1=48, r2=40, kernel=(3, 3), padding=(1, 1)),
    "stride": dict(n=1, h=23, w=19, s=20, t=36, r1=12, r2=20, kernel=(5, 3), padding=(2, 1), stride=(2, 2)),
    "dilation": dict(n=1, h=17, w=29, s=16, t=16, r1=16, r2=16, kernel=(3, 3), padding=(6, 6), dilation=(6, 6)),
}


@pytest.mark.parametrize("layout", (torch.contiguous_format, CHANNELS_LAST), ids=str)
@pytest.mark.parametrize("gpu", ("A100", "RTX 3090"))
@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("op", ("tucker_conv2d", "cp_conv2d"))
def test_what_the_planner_chooses(op: str, name: str, gpu: str, layout: torch.memory_format) -> None:
    """Every kernel in one of its dtypes with the planner's cut for that GPU, and with that GPU's shared memory."""
    # test_persistent.py plans the persistent kernel, which does not take these.
    kernels = [kernel for kernel in harness.kernels() if kernel.op == op and not shape_of(kernel).persistent]
    for number, kernel in enumerate(kernels):
        dtype = dtypes_of(kernel)[number % 3]
        case = Case(kernel, Cut(), Problem(op, dtype=dtype, layout=layout, **PLANNED[name]).make())
        _, _, *arguments = case.launch()
        cut, shared_limit = harness.planned(kernel, *arguments, gpu)
        found = replace(case, cut=cut)
        found.assert_right(found.run(Settings(count=False, shared_limit=shared_limit)))


def test_under_sanitizers() -> None:
    """Sanitizers check arrays, shifts, overflows and the simulator's own memory: every kernel in one dtype on one case,
    with the cases in turn."""
    launches, cases = [], []
    for number, (kernel, dtype) in enumerate(KERNELS):
        if kernel.op == "lowrank_linear":
            case = linear_case(LINEAR_CASES[number % len(LINEAR_CASES)], kernel, dtype)
        else:
            case = convolution_case(CONVOLUTION_CASES[number % len(CONVOLUTION_CASES)], kernel, dtype)
        cases.append(case)
        launches.append(case.launch())
    for case, result in zip(cases, harness.sanitized(launches), strict=True):
        case.assert_right(result)


def test_the_sanitizers_see_more_than_the_simulator() -> None:
    """They notice a bias that is shorter than the simulator was told."""
    kernel, cut, tensors, options, output = linear_case("whole tiles", *LINEAR[0]).launch()
    bias = tensors["bias"]
    short = {**tensors, "bias": bias[:-8].clone()}
    with pytest.raises(RuntimeError, match="heap-buffer-overflow"):
        harness.sanitized([(kernel, cut, short, options, output)], claimed_bias_bytes=harness.span_bytes(bias))
