"""The package's folders: their order, and what an installed package holds."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank_ops
from tests.support.paths import REPOSITORY

PACKAGE = REPOSITORY / "lowrank_ops"
# From the ground up: a folder imports from those before it, and from itself.
FLOORS = (
    ("runtime", "text"),
    ("ops", "model", "linalg"),
    ("decompose",),
    ("nn",),
    ("calibrate", "fold", "train", "deploy", "budget"),
    ("compress",),
)
HEIGHT = {folder: height for height, folders in enumerate(FLOORS) for folder in folders}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imported(path: Path) -> Iterator[str]:
    """Files of the package that a file imports, wherever in it: "nn/modules"; types alone do not count."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lowrank_ops":
            parts = node.module.split(".")[1:]
            if len(parts) == 1 and (PACKAGE / parts[0]).is_dir():
                yield from (f"{parts[0]}/{name.name}" for name in node.names)
            elif parts:
                yield "/".join(parts)
        elif isinstance(node, ast.Import):
            yield from (
                name.name.split(".", 1)[1].replace(".", "/")
                for name in node.names
                if name.name.startswith("lowrank_ops.")
            )


def test_every_folder_has_a_floor_and_says_what_it_is_and_may_import() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders == set(HEIGHT)
    for folder in folders:
        told = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()))
        assert told, folder
        lower = [other for other in HEIGHT if HEIGHT[other] < HEIGHT[folder]]
        assert told.endswith(f"\n\nMay import: {', '.join(lower)}." if lower else " Imports no other folder."), folder


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_come_from_lower_folders(path: Path) -> None:
    own = path.parent.name
    for name in imported(path):
        other = name.split("/")[0]
        lower = other == own or HEIGHT[other] < HEIGHT[own]
        assert lower, f"lowrank_ops/{own} must not import {name}: its folder is not below {own}"


def test_no_files_import_each_other_in_a_circle() -> None:
    known = {str(path.relative_to(PACKAGE).with_suffix("")): set(imported(path)) for path in FILES}
    left = {name: others & known.keys() for name, others in known.items() if not name.endswith("__init__")}
    while left:
        free = [name for name, others in left.items() if not others & left.keys()]
        assert free, f"these import each other: {sorted(left)}"
        for name in free:
            del left[name]


def test_every_module_can_be_imported_alone() -> None:
    names = [module.name for module in pkgutil.walk_packages(lowrank_ops.__path__, "lowrank_ops.")]
    assert len(names) > len(FILES)
    for name in names:
        importlib.import_module(name)
