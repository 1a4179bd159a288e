"""torch's private names stand in one file of the package, so that a new version of torch has one place to break."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

PACKAGE = REPOSITORY / "lowrank_ops"
HOME = PACKAGE / "runtime" / "torch_internals.py"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != HOME)
MODULE_NAME = re.compile(r"torch(\.\w+)+")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def chain(node: ast.expr) -> list[str]:
    """`a.b.c` as ["a", "b", "c"]; empty if it does not start with a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def private_names(text: str) -> list[str]:
    """The private names of torch that a source text uses: imports, attributes of what it imported from torch, and
    names of modules in strings (`sys.modules["torch._dynamo"]`). Attributes of objects, such as `module._modules`, are
    not looked at: torch_internals.py lists those."""
    tree = ast.parse(text)
    bound: dict[str, str] = {}  # name in the file -> torch's name
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "torch":
                    found.append(name.name)
                    bound[name.asname or "torch"] = name.name if name.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch" and not node.level:
            for name in node.names:
                found.append(f"{node.module}.{name.name}")
                bound[name.asname or name.name] = f"{node.module}.{name.name}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            found.append(node.value)
    for node in ast.walk(tree):
        names = chain(node) if isinstance(node, ast.Attribute) else []
        if names and names[0] in bound:
            found.append(".".join([bound[names[0]], *names[1:]]))
    return sorted({name for name in found if any(map(is_private, name.split(".")))})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import torch\ntorch._C._has_storage(x)", ["torch._C", "torch._C._has_storage"]),
        ("import torch._dynamo", ["torch._dynamo"]),
        (
            "import torch._inductor.config as config\nconfig.cpp",
            ["torch._inductor.config", "torch._inductor.config.cpp"],
        ),
        ("from torch.nn.modules.conv import _ConvNd", ["torch.nn.modules.conv._ConvNd"]),
        ("def f():\n    from torch.utils import _pytree as tree\n", ["torch.utils._pytree"]),
        ("from torch import Tensor as T\nT._make_subclass(T, x)", ["torch.Tensor._make_subclass"]),
        ("import sys\nsys.modules['torch._dynamo']", ["torch._dynamo"]),
        ("import torch as t\nt._check(True)", ["torch._check"]),
        ("import torch\ntorch.__version__\nmodule._modules\nself._torch.x\n'see torch._C'", []),
        ("from torch.nn.utils import parametrize\nparametrize.is_parametrized(x)", []),
        ("from lowrank_ops import _C\n_C.prepare(x)", []),
    ],
)
def test_private_names_are_found(text: str, names: list[str]) -> None:
    assert private_names(text) == names


def test_the_one_file_has_them() -> None:
    assert private_names(HOME.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_uses_private_names_of_torch(path: Path) -> None:
    found = private_names(path.read_text())
    assert not found, f"{found}: give them a public name in lowrank_ops/runtime/torch_internals.py, and import that"
