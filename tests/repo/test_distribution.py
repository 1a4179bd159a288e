"""What a wheel and a source distribution hold, and what they say of themselves, as far as that is known unbuilt."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from setuptools import find_packages

import lowrank_ops
from tests.repo import check_wheel
from tests.support.paths import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
TORCH = ".".join(torch.__version__.split(".")[:2])


def tracked(*patterns: str) -> set[str]:
    done = subprocess.run(["git", "ls-files", "--", *patterns], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("this is no git checkout")
    return {name for name in done.stdout.splitlines() if (REPOSITORY / name).is_file()}


def setup(folder: Path, *arguments: str) -> str:
    """Runs setup.py of a folder, without a look for CUDA."""
    environment = {**os.environ, "LOWRANK_OPS_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def test_every_folder_of_the_package_is_found() -> None:
    """By setuptools, as pyproject.toml sets it up; and nothing beside the package."""
    found = find_packages(str(REPOSITORY), **PROJECT["tool"]["setuptools"]["packages"]["find"])
    folders = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "lowrank_ops").rglob("*.py")}
    assert set(found) == {".".join(folder.parts) for folder in folders}


def test_files_for_type_checkers_are_named() -> None:
    assert set(PROJECT["tool"]["setuptools"]["package-data"]["lowrank_ops"]) == {"py.typed", "_C.pyi"}
    assert all((REPOSITORY / "lowrank_ops" / name).exists() for name in ("py.typed", "_C.pyi"))


def test_the_build_asks_for_the_torch_that_the_project_promises() -> None:
    oldest = next(line for line in PROJECT["build-system"]["requires"] if line.startswith("torch"))
    assert f'OLDEST_TORCH = "{oldest.removeprefix("torch>=")}"' in (REPOSITORY / "setup.py").read_text()


def test_the_version_names_the_torch_that_it_is_built_for() -> None:
    assert setup(REPOSITORY, "--version").split()[-1] == f"{lowrank_ops.__version__}+torch{TORCH}"
    assert "+" not in lowrank_ops.__version__ and lowrank_ops.build_info()["version"] == lowrank_ops.__version__


def test_the_installed_metadata_is_of_this_version() -> None:
    """A wheel's and an editable install's: the public part, and the requirement that belongs to the local part."""
    try:
        installed = importlib.metadata.distribution("lowrank_ops")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lowrank_ops is not installed: this is the source tree")
    if "+torch" not in installed.version:
        pytest.skip(f"an install by an older setup.py: {installed.version}")
    public, built_for = installed.version.split("+")
    assert public == lowrank_ops.__version__
    minor = built_for.removeprefix("torch").split(".cu")[0]
    assert f"torch=={minor}.*" in {line.replace(" ", "") for line in installed.requires or ()}


def test_a_source_distribution_can_be_set_up(tmp_path: Path) -> None:
    """It holds what setup.py imports and compiles, is for any torch from the oldest on, and becomes a build for this
    one where it is unpacked."""
    setup(REPOSITORY, "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"lowrank_ops-{lowrank_ops.__version__}.tar.gz"
    with tarfile.open(archive) as content:
        content.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    inside = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    needed = tracked("csrc", "lowrank_ops", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    assert needed - inside == set()
    told = (unpacked / "PKG-INFO").read_text()
    assert "Requires-Dist: torch>=2.11\n" in told and f"\nVersion: {lowrank_ops.__version__}\n" in told
    assert setup(unpacked, "--version").split()[-1] == f"{lowrank_ops.__version__}+torch{TORCH}"


def wheel(path: Path, leave_out: str = "", add: str = "", requires: str = "torch==2.13.*") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in check_wheel.source_files() - {leave_out} | {"lowrank_ops/_C.cpython-311.so"} | {add} - {""}:
            archive.writestr(name, "")
        text = (
            f"Metadata-Version: 2.4\nVersion: 0.1.0+torch2.13.cu130\nRequires-Dist: numpy\nRequires-Dist: {requires}\n"
        )
        archive.writestr("lowrank_ops-0.1.0.dist-info/METADATA", text)
    return path


def test_a_broken_wheel_is_found(tmp_path: Path) -> None:
    assert check_wheel.complaints(wheel(tmp_path / "a.whl")) == []
    assert check_wheel.complaints(wheel(tmp_path / "b.whl", leave_out="lowrank_ops/py.typed")) == [
        "lowrank_ops/py.typed is missing"
    ]
    assert check_wheel.complaints(wheel(tmp_path / "c.whl", add="csrc/compile.py")) == [
        "csrc/compile.py does not belong in there"
    ]
    (wrong,) = check_wheel.complaints(wheel(tmp_path / "d.whl", requires="torch==2.1.*"))
    assert "is not of the torch that is required" in wrong
