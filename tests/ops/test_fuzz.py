"""Random problems: every op, dtype and layout, any geometry. Deterministic; a failing example is printed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support.budgets import assert_gradients, assert_output
from tests.support.calls import SMOOTH, output_gradient
from tests.support.problems import ACTIVATIONS, DTYPES, LAYOUTS, OPS, Problem

FORWARD_EXAMPLES = 700  # per op and policy
BACKWARD_EXAMPLES = 300

run = settings(
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,
    ],
)


def channels() -> st.SearchStrategy[int]:
    """Channel counts: mostly small, sometimes near the widths of vectors and matrix tiles."""
    return st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 64, 65]))


@st.composite
def problems(draw: st.DrawFn, op: str, activations: tuple[str, ...] = ACTIVATIONS) -> Problem:
    def pair(least: int, most: int) -> tuple[int, int]:
        return draw(st.integers(least, most)), draw(st.integers(least, most))

    kernel, stride, padding, dilation = pair(1, 5), pair(1, 4), pair(0, 5), pair(1, 3)
    # At least the kernel's reach minus the padding, so that the output has a pixel.
    reach = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    h, w = (max(1, least) + extra for least, extra in zip(reach, pair(0, 11), strict=True))
    return Problem(
        op,
        n=draw(st.integers(1, 3)),
        s=draw(channels()),
        h=h,
        w=w,
        t=draw(channels()),
        r1=draw(channels()),
        r2=draw(channels()),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=draw(st.sampled_from(activations)),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("op", OPS)
def test_forward(op: str, policy: str) -> None:
    @settings(run, max_examples=FORWARD_EXAMPLES)
    @given(problems(op))
    def check(problem: Problem) -> None:
        call = problem.make()
        # The kernel may reach only padding, and an activation may set everything to zero.
        assume(call.exact().any())
        assert_output(call, call.run())

    check()


@pytest.mark.parametrize("op", OPS)
def test_gradients(op: str) -> None:
    @settings(run, max_examples=BACKWARD_EXAMPLES)
    @given(problems(op, SMOOTH))
    def check(problem: Problem) -> None:
        call = problem.make()
        grad_output = output_gradient(call)
        exact = call.reference_gradients(grad_output, torch.float64)
        assume(all(gradient.any() for gradient in exact.values()))
        assert_gradients(call, grad_output)

    check()
