"""The state in which tests run: deterministic torch, poisoned memory, policies, instruction sets."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("tests.support")

import lowrank_ops  # noqa: E402
from lowrank_ops.ops.extension import _C  # noqa: E402
from tests.support.problems import ISAS, POLICIES  # noqa: E402

# cuBLAS is deterministic only with a workspace of its own, and asked for it before its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if torch.cuda.is_available():  # fp32 means fp32; tests of tf32 say so
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills every `empty` tensor with NaN, so that an output that a kernel leaves unwritten is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are not folded, whatever the width of the terminal that the tests run in."""
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture(params=POLICIES, scope="module")
def policy(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests under each policy."""
    with lowrank_ops.set_policy(request.param):
        yield request.param


@pytest.fixture
def fused_policy() -> Iterator[None]:
    with lowrank_ops.set_policy("fused"):
        yield


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine's CPU, and the GEMM through oneDNN; fused."""
    try:
        _C.set_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(f"not on this CPU: {error}")
    try:
        with lowrank_ops.set_policy("fused"):
            yield request.param
    finally:
        _C.set_cpu_isa("")
