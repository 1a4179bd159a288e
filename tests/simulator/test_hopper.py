"""The sm90a kernels on the emulator of Hopper (tests/support/simulator/emulator.h): their values are right, and broken
kernels are noticed."""

from __future__ import annotations

import pytest
import torch

from tests.support.simulator import harness
from tests.support.simulator.cases import Case
from tests.support.simulator.harness import Kernel, Result
from tests.support.simulator.hopper_cases import CASES, CP, HALVES, LINEAR, TUCKER, WIDE, hopper_case

KERNELS = (TUCKER, CP, WIDE, LINEAR)


def run(case: Case) -> Result:
    result = case.run()
    result.report["error"] = harness.hopper_fault()
    return result


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("kernel", "name"), CASES, ids=str)
def test_values(kernel: Kernel, name: str, dtype: torch.dtype) -> None:
    case = hopper_case(kernel, name, dtype)
    case.assert_right(run(case))


def test_slots_are_as_many_as_fit() -> None:
    slots = {kernel: hopper_case(kernel, "much of everything", torch.bfloat16).cut.stages for kernel in KERNELS}
    assert slots == {TUCKER: 3, CP: 3, WIDE: 4, LINEAR: 4}


MUCH, STRIDE, PAIRS = "much of everything", "stride, much of everything", "pairs, much of everything"
# Of clusters: barrier 1 of the cluster is the first, barrier 2 the last.
CLUSTERS = ("skip_cluster_barrier 1", "skip_cluster_barrier 2", "skip_init_fence", "single_count", "skip_remote_arrive",
            "wrong_mask", "half_expect")  # fmt: skip
ENDLESS = {"short_expect", "half_expect", "single_count", "skip_remote_arrive", "wrong_mask"}  # waits, perhaps
MUTATIONS = [
    *((kernel, MUCH, name) for kernel in KERNELS for name in ("early_release", "short_expect")),
    *((kernel, MUCH, name) for kernel in (TUCKER, WIDE, LINEAR) for name in ("skip_fence_proxy", "skip_store_wait")),
    *((kernel, MUCH, f"skip_group_barrier {number}") for kernel in (TUCKER, WIDE, LINEAR) for number in range(1, 7)),
    *((kernel, STRIDE, name) for kernel in (TUCKER, WIDE) for name in ("early_release", "skip_fence_proxy")),
    *((CP, STRIDE, name) for name in ("early_release", "short_expect", "skip_both_barrier")),
    *((kernel, STRIDE, f"skip_group_barrier {number}") for kernel in (TUCKER, WIDE) for number in (1, 2)),
    (CP, MUCH, "skip_both_barrier"),
    *((kernel, PAIRS, name) for kernel in (CP, LINEAR) for name in (*CLUSTERS, "early_release", "short_expect")),
]


@pytest.mark.parametrize(("kernel", "name", "mutation"), MUTATIONS, ids=str)
def test_a_broken_kernel_is_noticed(kernel: Kernel, name: str, mutation: str) -> None:
    """Either the emulator reports a fault, or the result is wrong."""
    case = hopper_case(kernel, name, torch.bfloat16)
    way, _, number = mutation.partition(" ")
    harness.hopper_mutate(**{way: int(number or 1)}, short_patience=int(way in ENDLESS))
    try:
        result = run(case)
    finally:
        harness.hopper_mutate()
    assert mutation != "skip_fence_proxy" or "without fence.proxy.async" in result.error
    assert mutation != "skip_cluster_barrier 2" or "is used after it has ended" in result.error
    assert mutation != "skip_init_fence" or "before the barrier of the cluster" in result.error
    if not result.error:
        with pytest.raises(AssertionError):
            case.assert_right(result)
