"""What the policy "measure" has found: `save_measurements`, `load_measurements`, `forget_measurements`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lowrank_ops.ops.extension import _C
from lowrank_ops.runtime.files import written_whole

FORMAT = 1  # of the file; goes up when older versions could not read it


def save_measurements(path: str | os.PathLike[str]) -> int:
    """Writes all that this process has measured under the policy "measure" to a JSON file, for `load_measurements`.

    That are the last 4,096 problems, and what `load_measurements` has read.

    Args:
        path: the file; what it held before is replaced. Several processes may write to it at once: it is then the
            one that finished last's.

    Returns:
        The number of problems in the file.
    """
    entries = [
        {"problem": problem, "fastest": fastest, "seconds": dict(seconds)}
        for problem, fastest, seconds in _C.measurements()
    ]
    with written_whole(Path(path)) as written:
        written.write_text(json.dumps({"format": FORMAT, "measurements": entries}, indent=1) + "\n")
    return len(entries)


def load_measurements(path: str | os.PathLike[str]) -> int:
    """Reads a file of `save_measurements`: under "measure", problems in it are not timed again.

    An entry holds for the device (on a CPU also the number of threads and the instruction set) that it was measured on
    and is ignored elsewhere; one that names a kernel that this version does not have is measured anew. Entries replace
    what this process has measured for the same problem.

    Args:
        path: the file.

    Returns:
        The number of problems read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it was not written by `save_measurements`, or by a newer version.
    """
    try:
        entries = _entries(json.loads(Path(path).read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"load_measurements: path must be a file written by save_measurements, got {os.fspath(path)!r} ({error!r})"
        ) from error
    _C.remember_measurements(entries)
    return len(entries)


def forget_measurements() -> int:
    """Forgets all that this process has measured or loaded for the policy "measure", and frees its memory.

    Under "measure" the next call of each shape measures anew: for instance because the machine was busy before. Without
    this, calls remember at most 4,096 problems (about 2 MB for a CPU, 5 MB for GPUs) and forget the oldest first. Files
    are left as they are.

    Returns:
        The number of problems that were forgotten.
    """
    forgotten: int = _C.forget_measurements()
    return forgotten


def _entries(content: Any) -> list[tuple[str, str, list[tuple[str, float]]]]:
    """The file's entries as _C takes them."""
    if content["format"] > FORMAT:
        raise ValueError(
            f"load_measurements: the file must have format {FORMAT} or older, got {content['format']}: "
            "it was written by a newer lowrank_ops"
        )
    return [
        (
            str(entry["problem"]),
            str(entry["fastest"]),
            [(str(name), float(seconds)) for name, seconds in entry["seconds"].items()],
        )
        for entry in content["measurements"]
    ]
