"""Tables of cells as CSV files: a row per measurement, with the cell's fields in columns of their own."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.core.layers import Cell

FIELDS = tuple(field.name for field in fields(Cell))
Row = dict[str, str]


def cell_columns(cell: Cell) -> Row:
    """The cell's fields as text; a pair of numbers as 3x5."""
    values: dict[str, Any] = {name: getattr(cell, name) for name in FIELDS}
    return {name: "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
            for name, value in values.items()}  # fmt: skip


def cell_of(row: Mapping[str, str]) -> Cell:
    """The inverse of `cell_columns`; further columns are ignored."""
    values: dict[str, Any] = {name: _value(row[name]) for name in FIELDS if name not in ("op", "layer")}
    return Cell(op=row["op"], layer=row["layer"], **values)


def _value(text: str) -> int | tuple[int, ...]:
    numbers = tuple(int(number) for number in text.split("x"))
    return numbers if len(numbers) > 1 else numbers[0]


def read_rows(path: str | Path) -> list[Row]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: str | Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Writes rows that all have the columns of the first one."""
    rows = list(rows)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
