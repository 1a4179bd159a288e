"""No function takes more than a page, so that each can be read at once."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import CSRC, REPOSITORY

LONGEST = 60
FOLDERS = ("lowrank_ops", "benchmarks", "examples", "csrc", "tests")
PYTHON = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))
CPP = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
NO_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*', re.DOTALL | re.MULTILINE)
# Blocks that hold functions.
SCOPE = re.compile(r"\b(namespace|struct|class|enum|union|extern)\b[^()]*$")


def python_functions(text: str) -> list[tuple[str, int]]:
    """Names and lengths in lines, from the signature's end on and without the docstring."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            found.append((node.name, lines))
    return found


def cpp_functions(text: str) -> list[tuple[str, int]]:
    """Names and lengths in lines, between the braces, of functions at the margin and in structs and classes."""
    text = NO_CODE.sub(lambda found: "\n" * found[0].count("\n"), text)
    found, blocks, head = [], [], 0  # blocks: (function's name or None, line of the brace), outermost first
    for at in re.finditer(r"[;{}]", text):
        before, head = text[head : at.start()], at.end()
        line = text.count("\n", 0, at.start())
        if at[0] == "{":
            inside = any(name for name, _ in blocks)
            name = re.search(r"([\w~:]+|operator\S+)\s*\(", before)
            scope = SCOPE.search(before) or inside or name is None
            blocks.append((None if scope else name[1], line))
        elif at[0] == "}" and blocks:
            name, start = blocks.pop()
            if name:
                found.append((name, line - start - 1))
    return found


def test_lengths_are_counted() -> None:
    source = 'def f(\n    a,\n):\n    """Says\n    much."""\n    b = a\n\n    return b\n'
    assert python_functions(source) == [("f", 3)]
    cpp = """
namespace a {
struct B {
  int f() const {  // {
    return 1;
  }
};
template <class T>
int g(int x,
      int y) {
  if (x) {
    y;
  }
}
}
"""
    assert cpp_functions(cpp) == [("f", 1), ("g", 3)]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_python(path: Path) -> None:
    long = [(name, lines) for name, lines in python_functions(path.read_text()) if lines > LONGEST]
    assert not long


@pytest.mark.parametrize("path", CPP, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_cpp(path: Path) -> None:
    long = [(name, lines) for name, lines in cpp_functions(path.read_text()) if lines > LONGEST]
    assert not long
