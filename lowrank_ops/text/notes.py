"""Short lines about many layers: names, or texts, that differ only in their numbers are merged into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

_SHOWN = 4  # groups of names that `listed` writes out
# A text in quotes, or a number that stands alone or is a part of a qualified name (not the 32 of "float32").
_VARIES = re.compile(r"'[^']*'|(?<!\w)\d+(?:\.\d+)?(?!\w)")


def listed(names: Sequence[str]) -> str:
    """Names as a list: "0, 3, head", "experts.0.up ... experts.63.up (64), head", "a, b, c, d and 3 more"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    parts = [
        (len(group), f"{group[0]} ... {group[-1]} ({len(group)})") if len(group) > _SHOWN else (1, name)
        for group in groups.values()
        for name in (group if len(group) <= _SHOWN else group[:1])
    ]
    shown = ", ".join(part for _, part in parts[:_SHOWN])
    more = sum(count for count, _ in parts[_SHOWN:])
    return f"{shown} and {more} more" if more else shown


def grouped(told: Iterable[tuple[str | None, T]]) -> list[tuple[str, list[T]]]:
    """Groups items by their text: (text, items) pairs in order of first occurrence.

    Texts that differ only in numbers or quoted parts share one group, whose text has the least and the greatest of each
    number ("3 to 17 calibration rows") and the first item's quoted parts. Items with the text None are left out.
    """
    groups: dict[str, list[tuple[str, T]]] = {}
    for text, item in told:
        if text is not None:
            groups.setdefault(_VARIES.sub("#", text), []).append((text, item))
    return [(_merged([text for text, _ in group]), [item for _, item in group]) for group in groups.values()]


def _merged(texts: Sequence[str]) -> str:
    slots = iter(zip(*(_VARIES.findall(text) for text in texts), strict=True))

    def ranged(match: re.Match[str]) -> str:
        values: tuple[str, ...] = next(slots)
        if match[0].startswith("'"):
            return match[0]
        least, most = min(values, key=float), max(values, key=float)
        return least if least == most else f"{least} to {most}"

    return _VARIES.sub(ranged, texts[0])
