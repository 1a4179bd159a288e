"""Files that are written completely or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to; at the end that file replaces `path`, after an error it is deleted.

    The temporary file lies in a new folder beside `path`. So a reader of `path` never sees half a file, and processes
    or threads that write to `path` at the same time do not disturb each other: the last to finish wins.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder, path.name)
        yield written
        written.replace(path)
