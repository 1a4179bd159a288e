"""`python -m csrc.python.write_stub`: writes lowrank_ops/_C.pyi, the types of the built extension.

The signatures are those of pybind11-stubgen, which reads them from the loaded module. `make stub` installs it and
formats the file; tests/repo/test_stub.py holds the file against the extension.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
STUB = ROOT / "lowrank_ops/_C.pyi"
HEADER = "# Written by csrc/python/write_stub.py (make stub) from the built extension. Do not edit.\n"
TENSORS = (
    "arg2: torch.Tensor, arg3: torch.Tensor, arg4: torch.Tensor | None, arg5: torch.Tensor | None, "
    "arg6: torch.Tensor | None, arg7: torch.Tensor, arg8: torch.Tensor | None"
)
WINDOWS = "collections.abc.Sequence[collections.abc.Sequence[int]]"  # stride, padding, dilation
CUT = "arg1: collections.abc.Sequence[int]"
CALL = f"arg0: str, {CUT}, {TENSORS}, arg9: {WINDOWS}, arg10: str, arg11: torch.Tensor | None"
# Functions of csrc/cuda/bind_cuda.cpp, which a build without CUDA kernels lacks.
WITH_CUDA = {
    "check_gpu_kernel": "(arg0: str, arg1: str, arg2: bool, arg3: int, arg4: bool) -> str",
    "describe_launch": f"({CALL}) -> dict",
    "fail_gpu_launches": "(arg0: int) -> None",
    "limit_gpu_ctas": "(arg0: int) -> None",
    "is_launch_refusal": "(arg0: int) -> bool",
    "launch_gpu_kernel": f"({CALL}) -> torch.Tensor",
    "run_gpu_kernel": f"({CALL}) -> torch.Tensor",
}


def generated() -> str:
    """The stub as the tool makes it."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["pybind11_stubgen", "lowrank_ops._C", "--exit-code", "-o", folder]
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
        return pathlib.Path(folder, "lowrank_ops/_C.pyi").read_text()


def complete(text: str) -> str:
    """With the functions of a build with CUDA kernels, and a type for what the tool leaves without one."""
    text = re.sub(r"\(\*args\)", "(*args: typing.Any)", text)
    text = re.sub(r"^__all__.*\n", "", text, flags=re.MULTILINE)
    missing = [name for name in WITH_CUDA if f"def {name}(" not in text]
    return HEADER + text + "".join(f"def {name}{WITH_CUDA[name]}: ...\n" for name in missing)


if __name__ == "__main__":
    STUB.write_text(complete(generated()))
