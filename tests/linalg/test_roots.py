"""Roots of second moments against their definition, and how often they are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_ops import Budget, factorize_
from lowrank_ops.linalg import roots, triangle
from lowrank_ops.linalg.roots import Root
from tests.support.triangles import lower, triangle_of


def _moment(size: int, seed: int = 0, directions: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(directions or 2 * size, size, generator=generator, dtype=torch.float64)
    return rows.T @ rows


@pytest.mark.parametrize("directions", [20, 3], ids=["full", "rows fewer than columns"])
def test_a_root_squares_to_the_damped_moment(directions: int) -> None:
    moment = _moment(10, directions=directions)
    root = Root.of_(triangle_of(moment))
    squared = root.apply(torch.eye(10, dtype=torch.float64)).T @ root.apply(torch.eye(10, dtype=torch.float64))
    damping = squared - moment
    level = float(damping.diagonal().mean())
    torch.testing.assert_close(damping, level * torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12 * level / 1e-4)
    largest = float(torch.linalg.eigvalsh(moment)[-1])
    assert 0.9 * roots.DAMPING * largest <= level <= 1.000001 * roots.DAMPING * largest


@pytest.mark.parametrize(
    "moment", [_moment(8), _moment(8).diagonal(), torch.zeros(8, 8)], ids=["full", "diagonal", "0"]
)
def test_undo_is_the_inverse(moment: Tensor) -> None:
    root = Root.of_(triangle_of(moment) if moment.dim() == 2 else moment.clone())
    matrix = _moment(8, 1)[:, :3]
    torch.testing.assert_close(root.undo(root.apply(matrix)), matrix, rtol=1e-9, atol=1e-9)


def test_a_diagonal_is_the_root_of_a_diagonal_matrix() -> None:
    diagonal = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    whole, short = Root.of_(triangle_of(torch.diag(diagonal))), Root.of_(diagonal.clone())
    assert isinstance(short.factor, Tensor)
    torch.testing.assert_close(lower(whole.factor), torch.diag(short.factor))


def test_sums_of_low_precision_with_eigenvalues_below_zero_have_a_root() -> None:
    moment = torch.diag(torch.tensor([1.0, 0.5, -0.01], dtype=torch.float64))
    root = Root.of_(triangle_of(moment))
    assert bool(torch.isfinite(lower(root.factor)).all())


@pytest.mark.parametrize("block", [1, 3, 4, 10], ids=str)
def test_blocks_of_a_root_are_the_whole_root(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "BLOCK", block)
    root, matrix = Root.of_(triangle_of(_moment(10))), _moment(10, 1)[:, :3]
    factor = lower(root.factor)
    torch.testing.assert_close(root.apply(matrix), factor.T @ matrix, rtol=1e-12, atol=1e-12)
    inverse = torch.linalg.inv(factor.T)
    torch.testing.assert_close(root.times(matrix), factor @ matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(root.undo(matrix), inverse @ matrix, rtol=1e-9, atol=1e-12)


class _Largest(TorchDispatchMode):
    """Records the size of the largest fp64 tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.dtype == torch.float64:
            self.entries = max(self.entries, output.numel())
        return output


@pytest.mark.parametrize("block", [1, 3, 4, 10], ids=str)
def test_a_root_is_the_same_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Root.of_(triangle_of(_moment(10))).factor
    monkeypatch.setattr(triangle, "BLOCK", block)
    moment = triangle_of(_moment(10))
    places = [panel.data_ptr() for panel in moment.panels]
    found = Root.of_(moment).factor
    assert found is moment and places == [panel.data_ptr() for panel in moment.panels]
    torch.testing.assert_close(lower(found), lower(whole), rtol=1e-10, atol=1e-12)


def test_a_moment_in_fp32_has_a_root_of_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "BLOCK", 16)
    moment = _moment(64)
    factor = lower(Root.of_(triangle_of(moment.float())).factor)
    assert factor.dtype == torch.float32
    squared, largest = factor.double() @ factor.double().T, float(torch.linalg.eigvalsh(moment)[-1])
    squared.diagonal().sub_(roots.DAMPING * largest)
    error = float(torch.linalg.matrix_norm(squared - moment, 2)) / largest
    # 64 columns in fp32, each entry with up to 64 roundings; the largest eigenvalue is estimated from below
    assert error <= 64 * torch.finfo(torch.float32).eps + 0.1 * roots.DAMPING


@pytest.mark.parametrize("name", ["of_", "apply", "undo", "times"])
def test_no_fp64_copy_of_a_whole_root_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "BLOCK", 8)
    moment = triangle_of(_moment(64).float())
    root = Root.of_(triangle_of(_moment(64).float()))
    with _Largest() as largest:
        Root.of_(moment) if name == "of_" else getattr(root, name)(torch.ones(64, 2, dtype=torch.float64))
    assert 8 * 8 <= largest.entries <= 64 * 8


@pytest.mark.parametrize("rank", [0.25, Budget(params=0.5)], ids=["rank", "budget"])
def test_each_moment_is_factored_once_and_wide_sides_get_no_eigenvectors(
    rank: float | Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holds also where a ReLU follows, for which a layer is solved many times in turn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 20), nn.ReLU(), nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 12))
    factored: list[int] = []
    largest: list[int] = []
    of = Root.of_.__func__  # type: ignore[attr-defined]
    eigh = torch.linalg.eigh
    monkeypatch.setattr(Root, "of_", classmethod(lambda cls, moment: factored.append(len(moment)) or of(cls, moment)))
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda matrix, **options: largest.append(len(matrix)) or eigh(matrix, **options)
    )
    report = factorize_(model, rank=rank, calibration=torch.randn(512, 300), progress=False)
    assert report.replaced
    assert len(factored) <= 2 * 3
    assert max(largest) <= 20
