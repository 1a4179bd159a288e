"""The timings of the policy "measure": `save_measurements`, `load_measurements`, `forget_measurements`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lowrank_ops.ops.extension import _C
from lowrank_ops.runtime.files import written_whole

FORMAT = 1  # of the file; raised when older versions of the package can no longer read it


def save_measurements(path: str | os.PathLike[str]) -> int:
    """Writes the measurements of the policy "measure" to a JSON file, for `load_measurements`.

    These are the last 4,096 problems that this process has measured, and those that `load_measurements` has read.

    Args:
        path: the file; an existing one is replaced. Several processes may write to it at once: the last to finish wins.

    Returns:
        The number of problems in the file.

    Raises:
        OSError: the file cannot be written.
    """
    entries = [
        {"problem": problem, "fastest": fastest, "seconds": dict(seconds)}
        for problem, fastest, seconds in _C.measurements()
    ]
    with written_whole(Path(path)) as written:
        written.write_text(json.dumps({"format": FORMAT, "measurements": entries}, indent=1) + "\n")
    return len(entries)


def load_measurements(path: str | os.PathLike[str]) -> int:
    """Reads a file of `save_measurements`: under the policy "measure", its problems are not timed again.

    An entry is valid for the device that it was measured on (on a CPU, also for the number of threads and the
    instruction set), and is ignored elsewhere. A problem whose entry names a kernel that this version lacks is measured
    again. Entries replace measurements that this process has made for the same problem.

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
    """Forgets all that this process has measured or loaded for the policy "measure", and frees that memory.

    Under "measure" the next call of each shape then measures again, which helps if the machine was busy the first time.
    At most 4,096 problems are remembered (about 2 MB for a CPU, 5 MB for GPUs), the oldest are forgotten first. Files
    are not changed.

    Returns:
        The number of problems that were forgotten.
    """
    forgotten: int = _C.forget_measurements()
    return forgotten


def _entries(content: Any) -> list[tuple[str, str, list[tuple[str, float]]]]:
    """The file's entries in the form that the extension takes: (problem, fastest kernel, [(kernel, seconds)])."""
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
