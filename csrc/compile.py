"""Compiles one source file, unless its object is up to date: for the kernels, which torch's build knows nothing of.

A record beside each object (.json) says what it was made from: the command, the compiler's version and the content of
every file that the compiler read, by its own dependency file (.d). The object is made again when any of it has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import time
from collections.abc import Sequence


def jobs() -> int:
    """MAX_JOBS, or one per core."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def key(command: Sequence[str], version: str, files: Sequence[str]) -> str:
    """A digest of the command, the compiler's version and the content of the files."""
    digest = hashlib.sha256(json.dumps([list(command), version]).encode())
    for name in sorted(files):
        path = pathlib.Path(name)
        digest.update(f"\0{name}\0".encode() + (path.read_bytes() if path.exists() else b""))
    return digest.hexdigest()


def compile_source(command: Sequence[str], version: str, source: pathlib.Path, made: pathlib.Path) -> float:
    """Runs a compiler's command for one source file.

    Args:
        command: The compiler and its flags, without source, output and dependency file.
        version: The compiler's version.
        source: What is compiled.
        made: The object. Its messages go to a file beside it (.messages).

    Returns:
        Seconds that it took; 0: the object was up to date.

    Raises:
        RuntimeError: The compiler failed; its messages.
    """
    made.parent.mkdir(parents=True, exist_ok=True)
    depends, record = made.with_suffix(".d"), made.with_suffix(".json")
    command = [*command, "-MMD", "-MF", str(depends), "-c", str(source), "-o", str(made)]
    if made.exists() and record.exists():
        known = json.loads(record.read_text())
        if known["key"] == key(command, version, known["files"]):
            return 0.0
    record.unlink(missing_ok=True)
    begun, start = time.time(), time.monotonic()
    done = subprocess.run(command, text=True, capture_output=True)
    seconds = time.monotonic() - start
    if done.returncode != 0:
        told = f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        raise RuntimeError(f"lowrank_ops: {command[0]} failed on {source}\n{told}")
    made.with_suffix(".messages").write_text(done.stderr)
    files = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    if max(pathlib.Path(name).stat().st_mtime for name in files) < begun:  # else one changed meanwhile: no record
        record.write_text(json.dumps({"key": key(command, version, files), "files": files, "seconds": seconds}))
    return seconds
