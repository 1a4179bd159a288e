"""`python -m tests.repo.check_wheel WHEEL FOLDER`: whether a wheel is whole, and works where it was installed.

FOLDER is what `pip install --target` made of it. Every module is imported there and one op runs; the source tree is not
on the path. `make wheel` runs this.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

from tests.support.paths import REPOSITORY

EVERY_MODULE = """
import importlib, importlib.metadata, pathlib, pkgutil, sys
folder = pathlib.Path.cwd()
# An editable install would find the source tree.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import torch, lowrank_ops
for module in pkgutil.walk_packages(lowrank_ops.__path__, "lowrank_ops."):
    found = importlib.import_module(module.name)
    assert pathlib.Path(found.__file__).is_relative_to(folder), found.__file__
    print(module.name)
version = importlib.metadata.version("lowrank_ops")
assert version.split("+")[0] == lowrank_ops.__version__ == lowrank_ops.build_info()["version"], version
output = lowrank_ops.TuckerConv2d(8, 8, 3, 4)(torch.randn(1, 8, 9, 9))
print(version, lowrank_ops.build_info(), output.shape, file=sys.stderr)
"""


def source_files() -> set[str]:
    """What a wheel must hold: every module, and what type checkers read."""
    package = REPOSITORY / "lowrank_ops"
    found = {path for path in package.rglob("*.py") if "__pycache__" not in path.parts}
    return {str(path.relative_to(REPOSITORY)) for path in found | {package / "py.typed", package / "_C.pyi"}}


def complaints(wheel: Path) -> list[str]:
    """What is wrong with a wheel's files and its requirements."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        headers = Parser().parsestr(archive.read(metadata).decode())
    inside = {name for name in names if ".dist-info/" not in name}
    extensions = {name for name in inside if name.startswith("lowrank_ops/_C.") and name.endswith(".so")}
    expected = source_files()
    found = [f"{name} is missing" for name in sorted(expected - inside)]
    found += [f"{name} does not belong in there" for name in sorted(inside - expected - extensions)]
    found += [] if len(extensions) == 1 else [f"extensions: {sorted(extensions)}"]
    version, required = headers["Version"], headers.get_all("Requires-Dist") or []
    torch = [line for line in required if line.replace(" ", "").startswith("torch=")]
    built_for = version.partition("+torch")[2].split(".cu")[0]
    if [line.replace(" ", "") for line in torch] != [f"torch=={built_for}.*"]:
        found.append(f"version {version} is not of the torch that is required: {required}")
    return found


def main(wheel: str, folder: str) -> None:
    wrong = complaints(Path(wheel))
    if wrong:
        sys.exit("\n".join([f"{wheel}:", *wrong]))
    installed = Path(folder).resolve()
    command = [sys.executable, "-c", EVERY_MODULE]
    done = subprocess.run(command, cwd=installed, env={"PYTHONPATH": str(installed)}, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)
    print(f"{wheel}: {len(source_files())} files, {len(done.stdout.splitlines())} modules imported")


if __name__ == "__main__":
    main(*sys.argv[1:])
