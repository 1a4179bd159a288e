"""Times of cells on a GPU, by the way that they ran: what the fit of the GPU's cost model and its tests read.

benchmarks/results/h200.csv holds them for one H200. A row is one way to run one cell in one run; the column `set` names
the run, and the times are medians in microseconds. Results files of `benchmarks.run --device cuda --json` and of
`benchmarks.gpu.kernels --json` hold the same and more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.core.cell_rows import Row, cell_columns, cell_of, read_rows, write_rows
from benchmarks.core.layers import Cell, cell_from_json
from benchmarks.gpu.cuts import Cut
from benchmarks.gpu.kernels import BLOCKS

H200 = Path(__file__).parents[1] / "results/h200.csv"


@dataclass(frozen=True)
class Way:
    """A contender: its kind ("" where the file does not say), and its microseconds."""

    name: str
    kind: str
    us: float
    """On the GPU alone."""
    call_us: float | None
    """Time of a call on an idle GPU; None: not timed."""


@dataclass(frozen=True)
class GpuTimes:
    """A cell, where it ran, and all ways that were timed."""

    set: str
    """The run that the times are of."""
    gpu: str
    layout: str
    dtype: str
    cell: Cell
    ways: tuple[Way, ...]

    def way(self, name: str) -> Way:
        return next(way for way in self.ways if way.name == name)

    def as_rows(self) -> Iterator[Row]:
        where = {"set": self.set, "gpu": self.gpu, "layout": self.layout, "dtype": self.dtype}
        for way in self.ways:
            call = "" if way.call_us is None else f"{way.call_us:.4f}"
            yield {**where, **cell_columns(self.cell), "way": way.name, "kind": way.kind, "us": f"{way.us:.4f}",
                   "call_us": call}  # fmt: skip


def read(path: str | Path) -> list[GpuTimes]:
    """The cells of a CSV file, or of a results file of either kind; a CPU's file has no GPU's name: ""."""
    path = Path(path)
    return _from_rows(read_rows(path)) if path.suffix == ".csv" else _from_json(path)


def read_set(path: str | Path) -> list[GpuTimes]:
    """A file as `read` does, or where there is none of that path a set of h200.csv, by its name.

    Raises:
        FileNotFoundError: there is neither.
    """
    if Path(path).exists():
        return read(path)
    sets = by_set(read(H200))
    if str(path) not in sets:
        raise FileNotFoundError(f"{path}: must be a file, or a set of {H200.name}: {', '.join(sets)}")
    return sets[str(path)]


def by_set(times: Iterable[GpuTimes]) -> dict[str, list[GpuTimes]]:
    found: dict[str, list[GpuTimes]] = {}
    for one in times:
        found.setdefault(one.set, []).append(one)
    return found


def write(path: str | Path, times: Iterable[GpuTimes]) -> None:
    write_rows(path, [row for one in times for row in one.as_rows()])


def _from_rows(rows: Iterable[Row]) -> list[GpuTimes]:
    found: dict[tuple[str, str, str, str, Cell], list[Way]] = {}
    for row in rows:
        call = float(row["call_us"]) if row["call_us"] else None
        key = row["set"], row["gpu"], row["layout"], row["dtype"], cell_of(row)
        found.setdefault(key, []).append(Way(row["way"], row["kind"], float(row["us"]), call))
    return [GpuTimes(*key, tuple(ways)) for key, ways in found.items()]


def _from_json(path: Path) -> list[GpuTimes]:
    content = json.loads(path.read_text())
    gpu, layout = content.get("device", {}).get("name", ""), content.get("layout", "channels_last")
    found = []
    for entry in content.get("cells", ()):
        ways = tuple(_way(name, one) for name, one in entry["contenders"].items())
        found.append(GpuTimes(path.stem, gpu, layout, entry["dtype"], cell_from_json(entry), ways))
    blocks = {str(cell): cell for cell in BLOCKS.values()}
    for entry in content.get("entries", ()):
        cuts = {_cut_name(cut): cut for cut in entry["cuts"]}
        ways = tuple(_way(name, one) for name, one in {**cuts, **entry["peers"]}.items())
        found.append(GpuTimes(path.stem, gpu, layout, entry["dtype"], blocks[entry["cell"]], ways))
    return found


def _cut_name(cut: dict[str, Any]) -> str:
    """Files of the time before there were clusters do not name them."""
    tile, cluster = tuple(cut["tile"]), cut.get("cluster", 1)
    return Cut(cut["kernel"], tile, cut["stages"], cut["splits"], cluster=cluster).name


def _way(name: str, one: dict[str, Any]) -> Way:
    call = one["call"]["median_us"] if "call" in one else one.get("call_us")
    return Way(name, one.get("kind", ""), one["median_us"], call)
