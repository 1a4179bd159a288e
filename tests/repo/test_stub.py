"""lowrank_ops/_C.pyi says what the built extension has: names, and the parameters of every function."""

from __future__ import annotations

import ast
import re

import pytest

from csrc.python.write_stub import STUB, WITH_CUDA
from lowrank_ops.ops.extension import _C

Parameters = tuple[tuple[str, ...], ...]
"""Per overload the parameters' names, with their defaults."""
SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)(\(.*\) -> .*)$", re.MULTILINE)


def parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    named = [one.arg if default is None else f"{one.arg}={ast.unparse(default)}"
             for one, default in zip(plain, defaults, strict=True)]  # fmt: skip
    return (*named, *(f"*{one.arg}" for one in (arguments.vararg, *arguments.kwonlyargs) if one is not None))


def in_the_stub(text: str) -> dict[str, Parameters]:
    """What a stub declares; a value has no overloads."""
    found: dict[str, Parameters] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = (*found.get(node.name, ()), parameters(node))
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = ()
    return found


def in_the_extension() -> dict[str, Parameters]:
    """What the module has, by the signatures in its functions' docstrings."""
    found: dict[str, Parameters] = {}
    for name in dir(_C):
        value = getattr(_C, name)
        if name.startswith("__"):
            continue
        text = (value.__doc__ or "") if callable(value) else ""
        lines = [signature for of, signature in SIGNATURE.findall(text) if of == name]
        overloads = (ast.parse(f"def {name}{line}: ...").body[0] for line in lines)
        found[name] = tuple(parameters(one) for one in overloads if isinstance(one, ast.FunctionDef))
    return found


def differences(text: str) -> list[str]:
    """The names that a stub and the extension do not say the same of."""
    declared, actual = in_the_stub(text), in_the_extension()
    absent = WITH_CUDA.keys() - actual.keys()  # from a build without CUDA kernels
    names = (declared.keys() | actual.keys()) - absent
    return sorted(name for name in names if declared.get(name) != actual.get(name))


def test_the_stub_is_of_this_extension() -> None:
    assert differences(STUB.read_text()) == [], "make stub"


def test_every_function_has_its_signature_in_its_docstring() -> None:
    functions = {name: found for name, found in in_the_extension().items() if callable(getattr(_C, name))}
    assert functions and all(functions.values())
    assert in_the_extension()["explain"][0][-1] == "prepared=False" and len(in_the_extension()["tucker_conv2d"]) == 2


def test_functions_of_builds_with_cuda_are_declared() -> None:
    assert WITH_CUDA.keys() <= in_the_stub(STUB.read_text()).keys()


@pytest.mark.parametrize(
    ("now", "then", "name"),
    [
        ("def cpu_isa()", "def cpu_isb()", "cpu_isa"),
        ("def cpu_isa()", "def cpu_isa(arg0: int)", "cpu_isa"),
        ("device: str,\n    prepared: bool = False", "device: str,\n    prepared: bool = True", "explain"),
        ("library_call_seconds: float", "library_call: float", "library_call"),
    ],
)
def test_a_wrong_stub_is_found(now: str, then: str, name: str) -> None:
    text = STUB.read_text()
    assert text.count(now) == 1
    assert name in differences(text.replace(now, then))
