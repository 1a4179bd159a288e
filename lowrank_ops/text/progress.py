"""Progress bars of long functions, on stderr, that leave nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
    what: str, shown: bool, items: Iterable[Any] | None = None, unit: str = "batch", total: int | None = None
) -> tqdm:
    """A bar over `items`, or one that the caller advances by `update` to `total`; `shown` is False for none at all."""
    return tqdm(items, desc=what, unit=unit, total=total, file=sys.stderr, disable=not shown, leave=False)
