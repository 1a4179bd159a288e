"""`benchmarks/gpu.sh OUTDIR brief` without a GPU: its time, its commands, and what it says."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank_ops.ops.extension import _C
from tests.support.paths import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "gpu.sh"
TEXT = SCRIPT.read_text()
BRIEF = re.search(r"^BRIEF=\((.*)\)", TEXT, re.MULTILINE)[1].split()
# Each writes its own name and arguments into a file, as one line, and does nothing.
RECORDER = '#!/usr/bin/env bash\n{ printf "%q " "$(basename "$0")" "$@"; echo; } >>"$RECORDED"\n'
TOOLS = ("python3", "nvidia-smi", "nvcc", "ncu", "compute-sanitizer")


def run(folder: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), str(folder), *stages],
        env={**os.environ, "CUDA_HOME": "", **environment},
        text=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What the stages of `brief` run, as lists of words."""
    folder = tmp_path_factory.mktemp("gpu_script")
    tools = folder / "tools"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).write_text(RECORDER)
        (tools / name).chmod(0o755)
    recorded = folder / "recorded"
    path = f"{tools}:{os.environ['PATH']}"
    run(folder / "out", "brief", PATH=path, PYTHON=str(tools / "python3"), RECORDED=str(recorded))
    return [shlex.split(line) for line in recorded.read_text().splitlines()]


def modules(commands: list[list[str]], module: str) -> list[list[str]]:
    """The arguments of every `python -m module` of the commands."""
    return [words[i + 2 :] for words in commands for i in range(len(words) - 1) if words[i : i + 2] == ["-m", module]]


def test_brief_takes_at_most_nine_minutes() -> None:
    limits = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", TEXT)}
    assert set(BRIEF) <= set(limits)
    assert sum(limits[stage] for stage in BRIEF) <= 9 * 60


@pytest.mark.parametrize("module", ["benchmarks.gpu.kernels", "benchmarks.run"])
def test_the_benchmarks_take_their_arguments(
    commands: list[list[str]], module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their parsers accept them: the next thing that they say is that there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls = modules(commands, module)
    assert calls
    for arguments in calls:
        assert importlib.import_module(module).main(arguments) == 2
        assert "no CUDA GPU here" in capsys.readouterr().err


def test_the_profiled_kernels_exist(commands: list[list[str]]) -> None:
    (arguments,) = [words for words in modules(commands, "benchmarks.gpu.kernels") if "--profile" in words]
    profiled = arguments[arguments.index("--profile") + 1 :]
    assert profiled and set(profiled) <= {kernel["name"] for kernel in _C.gpu_kernels()}


def test_the_checks_find_tests(commands: list[list[str]]) -> None:
    """Each expression of pytest's -k selects tests that run on a GPU, though here they are skipped."""
    calls = modules(commands, "pytest")
    assert len(calls) == 3  # the tests, memcheck, racecheck
    for arguments in calls:
        files = [word for word in arguments if word.startswith("tests/")]
        words = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files]
        # Without a GPU the other files have no test whose name contains "cuda".
        if all(Path(file).name == "test_cuda_kernels.py" for file in files):
            words += ["-k", arguments[arguments.index("-k") + 1]]
        found = subprocess.run(words, cwd=REPOSITORY, text=True, capture_output=True)
        assert found.returncode == 0 and "::test_" in found.stdout, found.stdout[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_stage_says_so_and_is_recorded(tmp_path: Path) -> None:
    done = run(tmp_path, "blocks", "list", "checks", PYTHON=sys.executable)
    assert done.returncode == 3, done.stdout
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert list(stages) == ["blocks", "list", "checks"]
    for stage in stages.values():
        assert stage["exit"] != 0 and "torch sees no GPU" in stage["last_line"]


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "blocs", PYTHON=sys.executable)
    assert done.returncode == 1 and "unknown stage 'blocs', known are: brief info" in done.stdout
