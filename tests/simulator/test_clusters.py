"""Clusters of CTAs on the emulator of Hopper: copies and arrivals reach the other CTA, and misuse is reported."""

from __future__ import annotations

import enum
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.simulator import building, harness
from tests.support.simulator.harness import Kernel
from tests.support.simulator.hopper_cases import CP, LINEAR, hopper_case

pytestmark = pytest.mark.skipif(bool(building.missing()), reason=building.missing() or "g++ is there")


class Mistake(enum.IntEnum):
    """As in tests/support/simulator/hopper_selftest.cpp."""

    NONE = 0
    OWN_MASK = 1
    LARGE_MASK = 2
    EMPTY_MASK = 3
    NO_INIT_FENCE = 4
    NO_FIRST_BARRIER = 5
    LARGE_RANK = 6
    NO_LAST_BARRIER = 7
    ONE_AT_LAST_BARRIER = 8
    HALF_EXPECTED = 9
    ORDINARY_ACCESS = 10


def exchanged(mistake: Mistake) -> tuple[Tensor, Tensor, str]:
    """The matrix, what lies in shared memory of both CTAs, and the fault."""
    data, output = torch.arange(64 * 64, dtype=torch.int16), torch.zeros(2, 64 * 64, dtype=torch.int16)
    harness.hopper_mutate(short_patience=int(mistake != Mistake.NONE))
    try:
        return data, output, harness.hopper_selftest(data, output, mistake)
    finally:
        harness.hopper_mutate()


def test_copies_reach_both_ctas() -> None:
    """In the 128-byte swizzle: 16 bytes of row r lie at their place xor r % 8. Each half is read once."""
    data, output, fault = exchanged(Mistake.NONE)
    assert fault == ""
    rows = torch.arange(64)[:, None]
    places = (torch.arange(8)[None] ^ rows % 8) + 8 * rows
    expected = torch.empty(512, 8, dtype=torch.int16)
    expected[places.flatten()] = data.view(512, 8)
    assert torch.equal(output, expected.flatten().expand(2, -1))
    assert harness.hopper_loaded(data) == data.nbytes


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (Mistake.OWN_MASK, "a wait without end for parity 0 of mbarrier 0"),
        (Mistake.OWN_MASK, "CTA 1 of the cluster: 32 threads at mbarrier 0 (0 arrivals and 4096 bytes are missing)"),
        (Mistake.LARGE_MASK, "there is no CTA 2 of a cluster of 2"),
        (Mistake.EMPTY_MASK, "a load into no CTA"),
        (Mistake.NO_INIT_FENCE, "is used before the barrier of the cluster"),
        (Mistake.NO_FIRST_BARRIER, "is used before the barrier of the cluster"),
        (Mistake.LARGE_RANK, "there is no CTA 2 of a cluster of 2"),
        (Mistake.NO_LAST_BARRIER, "CTA 0 of a cluster of 2 is used after it has ended"),
        (Mistake.ONE_AT_LAST_BARRIER, "32 threads at the barrier of the cluster"),
        # Depending on which is first, the other half's copy or the end of the CTA.
        (Mistake.HALF_EXPECTED, "mbarrier 0 has -4096 bytes to wait for at the end|is used after it has ended"),
        (Mistake.ORDINARY_ACCESS, "outside of the CTA's shared memory"),
    ],
)
def test_mistakes_are_reported(mistake: Mistake, message: str) -> None:
    fault = exchanged(mistake)[2]
    assert any(one in fault for one in message.split("|")), fault


def test_the_next_launch_is_not_affected() -> None:
    exchanged(Mistake.LARGE_MASK)
    test_copies_reach_both_ctas()


@pytest.mark.parametrize(("kernel", "name"), [(LINEAR, "pairs, much of everything"), (CP, "pairs")], ids=str)
def test_a_pair_reads_half_of_the_factors_bytes(kernel: Kernel, name: str) -> None:
    """And as much of the input as CTAs without clusters."""
    pairs = hopper_case(kernel, name, torch.bfloat16)
    alone = replace(pairs, cut=replace(pairs.cut, cluster=1))
    loaded = []
    for case in (alone, pairs):
        result = case.run()
        assert harness.hopper_fault() == ""
        case.assert_right(result)
        loaded.append([harness.hopper_loaded(case.call.tensors[name]) for name in ("input", "in_factor", "out_factor")])
    (alone_input, *alone_factors), (pairs_input, *pairs_factors) = loaded
    assert pairs_input == alone_input > 0
    assert [2 * count for count in pairs_factors] == alone_factors
