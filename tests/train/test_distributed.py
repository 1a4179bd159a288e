"""Two processes (gloo, on the CPU, started by torchrun) against one: gradients, and what distill_ gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_ops
from tests.support import distributed_worker as worker

Results = list[dict[str, Any]]
SECONDS = 120


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process found. A hang ends in an error after SECONDS, and no process survives it."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={worker.PROCESSES}"]
    root = Path(lowrank_ops.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, worker.__file__, str(folder)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        try:
            printed, _ = run.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            pytest.fail(f"the processes hang; they printed: {run.communicate()[0]}")
    assert run.returncode == 0, printed
    return [torch.load(folder / f"{rank}.pt") for rank in range(worker.PROCESSES)]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return sum(float((first[name].double() - second[name].double()).square().sum()) for name in first) ** 0.5


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(processes: Results, wrapper: str) -> None:
    """All values are integers over powers of two that fp64 holds exactly, so nothing may differ."""
    expected = worker.exact_gradients(worker.exact_model(), *worker.exact_batch())
    for name, gradient in expected.items():
        assert gradient.any() and gradient.abs().max() < 2**40 and torch.equal(gradient * 8, (gradient * 8).round()), (
            name
        )
    for found in processes:
        assert_same(found[f"{wrapper} gradients"], expected)


def test_sharded_weights_are_never_stale(processes: Results) -> None:
    """FSDP2 gives the same parameters new values that no version counter shows; the op packs them anew."""
    for found in processes:
        (before, before_copy), (after, after_copy) = found["outputs"]
        assert torch.equal(before, before_copy) and torch.equal(after, after_copy) and not torch.equal(before, after)


@pytest.mark.parametrize("wrapper", ["plain", "ddp", "fsdp"])
def test_distill_gives_the_student_of_one_process(processes: Results, wrapper: str) -> None:
    """Batches of two sizes, split unequally, over the same steps in fp64.

    What differs is the order of sums. Rounding errors are proportional to the unit roundoff as long as they are
    small: one process in fp32 is off from fp64 by as many fp32 roundings as two orders of sums are apart in fp64
    roundings, up to how they happen to add up; a factor of 8 is allowed for that. The loss's normalization alone,
    done by process, would put them 1e-3 apart.
    """
    student, teacher = worker.networks()
    start = worker.state(student)
    losses = worker.learn(student, teacher, worker.batches())
    low, low_teacher = worker.networks(torch.float32)
    worker.learn(low, low_teacher, worker.batches(torch.float32))
    expected, low_end = worker.state(student), worker.state(low)
    roundoffs = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    bound = 8 * distance(expected, low_end) * roundoffs
    assert distance(expected, start) > 1e-2 and bound < 1e-11
    for found in processes:
        found_losses, found_state = found[f"{wrapper} student"]
        assert found_state.keys() == expected.keys()
        assert distance(found_state, expected) <= bound
        assert found_losses == pytest.approx(losses, rel=1e-9) and len(set(losses)) == worker.STEPS
    assert_same(processes[0][f"{wrapper} student"][1], processes[1][f"{wrapper} student"][1])


def test_plain_students_start_from_the_first_process(processes: Results) -> None:
    for found in processes:
        assert found["unequal start"][0] == found["plain student"][0]
        assert_same(found["unequal start"][1], found["plain student"][1])


def test_plain_students_begin_anew_from_the_first_process(processes: Results) -> None:
    for found in processes:
        assert max(found["restart"]) > 3 * found["restart"][0]  # it has run away
        assert found["unequal restart"] == found["restart"]


@pytest.mark.parametrize("wrapper", ["plain", "ddp"])
def test_batchnorm_statistics_agree(processes: Results, wrapper: str) -> None:
    first, second = (found[f"{wrapper} statistics"] for found in processes)
    assert_same(first, second)
    assert not torch.equal(first["1.running_mean"], worker.networks()[0][1].running_mean)


def test_processes_agree_on_the_time(processes: Results) -> None:
    """One of them waits 30 ms for each batch, of which 0.3 s have 10; both make the same steps."""
    first, second = (found["steps in a time"] for found in processes)
    assert first == second and 1 <= first <= 10


def test_a_diverging_process_stops_all(processes: Results) -> None:
    before = worker.state(worker.networks()[0])
    for found in processes:
        assert found["diverged"].startswith("RuntimeError: distill_: the loss is")
        assert_same(found["restored"], before)


def test_refusals_for_sharded_modules(processes: Results) -> None:
    """Initializers draw whole factors; and FSDP2 itself refuses a channels_last core, as the docstrings say."""
    for found in processes:
        assert "needs whole factors, got sharded ones (DTensor)" in found["sharded init"]
        assert "non-contiguous" in found["channels_last core"]
