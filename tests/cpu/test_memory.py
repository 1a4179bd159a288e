"""Scratch memory that the CPU kernels keep between calls: seen, bounded, given back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

import lowrank_ops
from tests.support.problems import OPS, Call, Problem

MOST_PER_THREAD = 16 << 20

pytestmark = pytest.mark.usefixtures("fused_policy", "_nothing_kept")


@pytest.fixture
def _nothing_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    lowrank_ops.release_memory()
    yield
    torch.set_num_threads(threads)


def large(op: str, channels: int = 512) -> Call:
    """Weights of a megabyte and more, packed at each call."""
    return Problem(op, n=100, s=channels, t=channels, r1=channels, r2=64, h=4, w=4).make()


@pytest.mark.parametrize("op", OPS)
def test_memory_is_kept_and_released(op: str) -> None:
    call = large(op)
    assert lowrank_ops.kept_memory() == 0
    output = call.run()
    kept = lowrank_ops.kept_memory()
    assert kept > 64 << 10
    assert torch.equal(call.run(), output) and lowrank_ops.kept_memory() == kept, "used again, no more is allocated"
    assert lowrank_ops.release_memory() == kept
    assert lowrank_ops.kept_memory() == lowrank_ops.release_memory() == 0
    assert torch.equal(call.run(), output)


def test_each_thread_keeps_at_most_its_share() -> None:
    torch.set_num_threads(2)
    for channels in range(256, 1600, 192):
        large("lowrank_linear", channels).run()
        large("cp_conv2d", channels).run()
        assert 0 < lowrank_ops.kept_memory() <= 2 * MOST_PER_THREAD


def test_other_threads_memory_is_released_too() -> None:
    call = large("lowrank_linear")
    torch.set_num_threads(1)
    ran, seen = threading.Event(), threading.Event()

    def work() -> None:
        torch.set_num_threads(1)
        call.run()
        ran.set()
        seen.wait(60)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert ran.wait(60)
        kept = lowrank_ops.kept_memory()
        assert kept > 0 and lowrank_ops.release_memory() == kept
    finally:
        seen.set()
        worker.join()


def test_a_thread_that_ends_keeps_nothing() -> None:
    call = large("lowrank_linear")
    torch.set_num_threads(1)
    kept: list[int] = []

    def work() -> None:
        torch.set_num_threads(1)
        call.run()
        kept.append(lowrank_ops.kept_memory())

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert kept[0] > 0
    deadline = time.monotonic() + 30
    while lowrank_ops.kept_memory() > 0 and time.monotonic() < deadline:
        time.sleep(0.01)  # `join` returns a little before the system's thread has ended
    assert lowrank_ops.kept_memory() == 0


def test_releasing_while_ops_run_changes_no_result() -> None:
    calls = [large(op) for op in OPS]
    expected = [call.run() for call in calls]
    wrong: list[str] = []

    def work() -> None:
        for _ in range(10):
            for call, output in zip(calls, expected, strict=True):
                if not torch.equal(call.run(), output):
                    wrong.append(call.problem.op)

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        lowrank_ops.release_memory()
        worker.join(0.001)
    assert wrong == []
