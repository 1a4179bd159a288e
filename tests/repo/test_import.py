"""What `import lowrank_ops` says when its extension is missing or belongs to another torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import lowrank_ops

PACKAGE = Path(lowrank_ops.__file__).parent


# An editable install finds the extension of the source tree wherever the package lies.
WITHOUT_EDITABLE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import lowrank_ops
"""


def failing_import(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EDITABLE],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        text=True,
        capture_output=True,
    )
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def copy_of_the_package(folder: Path) -> Path:
    return Path(shutil.copytree(PACKAGE, folder / "lowrank_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__")))


def test_missing_extension(tmp_path: Path) -> None:
    copy_of_the_package(tmp_path)
    message = failing_import(tmp_path)
    assert message.startswith("ImportError: lowrank_ops: the compiled extension lowrank_ops._C could not be loaded")
    assert "`pip install --no-build-isolation --force-reinstall --no-deps .` from the source folder" in message


def test_extension_built_for_another_torch(tmp_path: Path) -> None:
    package = copy_of_the_package(tmp_path)
    (package / "_C.py").write_text("def build_info():\n    return {'torch': '1.13.1+cpu', 'version': '0'}\n")
    message = failing_import(tmp_path)
    assert "was built for torch 1.13.1+cpu, but torch" in message and "pip install --no-build-isolation" in message


def test_build_info() -> None:
    info = lowrank_ops.build_info()
    assert {"version", "git_sha", "torch", "compiler", "cuda"} <= set(info)
    assert info["version"] == lowrank_ops.__version__
