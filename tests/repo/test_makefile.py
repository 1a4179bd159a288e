"""The Makefile and .ci/run name files and modules that exist."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import REPOSITORY

FILES = ("Makefile", ".ci/run", "benchmarks/gpu.sh")
FILE = re.compile(r"\b(?:tests|docs|csrc|benchmarks|examples|lowrank_ops)/[\w/.]+\.(?:py|md|h|cpp|cu|sh|pyi|png)\b")
MODULE = re.compile(r"-m ((?:tests|csrc|benchmarks|examples|docs)\.[\w.]*\w)")


def missing(text: str) -> list[str]:
    """Files and modules that a text names and that are not there."""
    modules = (name.replace(".", "/") + ".py" for name in MODULE.findall(text))
    named = {*(found[0] for found in FILE.finditer(text)), *modules}
    return sorted(name for name in named if not (REPOSITORY / name).is_file())


@pytest.mark.parametrize("name", FILES)
def test_what_is_named_exists(name: str) -> None:
    assert missing((REPOSITORY / name).read_text()) == []


def test_missing_ones_are_found() -> None:
    text = (
        "pytest tests/ops/test_ops.py tests/test_ops.py && python -m benchmarks.run && python -m benchmarks.nothing.run"
    )
    assert missing(text) == ["benchmarks/nothing/run.py", "tests/test_ops.py"]


def test_the_build_with_cuda_is_the_one_that_check_cuda_tests() -> None:
    """`python -m pytest` in the source tree would import the extension without CUDA kernels, and skip their tests."""
    recipe = re.search(r"^check-cuda:.*\n((?:\t.*\n)+)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    runs = [line.strip() for line in recipe[1].splitlines() if "pytest" in line or "import lowrank_ops" in line]
    assert len(runs) == 2 and all(line.startswith("$(WITH_CUDA) ") for line in runs)
