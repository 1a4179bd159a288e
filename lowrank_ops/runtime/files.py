"""Files that are there as a whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to, and puts that file in the place of `path` at the end; after an error it is dropped.

    It lies in a folder of its own beside `path`: a reader never sees half a file, and no other process or thread that
    writes to `path` writes to the same one. The last to finish wins.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder, path.name)
        yield written
        written.replace(path)
