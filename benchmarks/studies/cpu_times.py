"""Times of cells that ran both paths on a CPU: what the fit of the CPU's cost model and its tests read.

benchmarks/results/planner_fitted.csv holds the cells that the constants are fitted to, planner_held_out.csv those that
no constant is fitted to. A row is one cell of one run; the column `set` names the run, and the times are medians in
microseconds. A results file of `benchmarks.run --peers chain forced --json` holds the same and more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.core.cell_rows import Row, cell_columns, cell_of, read_rows, write_rows
from benchmarks.core.layers import Cell, cell_from_json

RESULTS = Path(__file__).parents[1] / "results"
FITTED = RESULTS / "planner_fitted.csv"
HELD_OUT = RESULTS / "planner_held_out.csv"
DTYPES = ("float32", "bfloat16")
TIMES = ("fused", "chain", "library", "peer")
CACHES = ("L2", "L3")


@dataclass(frozen=True)
class CpuTimes:
    """A cell, where it ran, and the microseconds of its paths."""

    set: str
    """The run that the times are of."""
    cpu: str
    isa: str
    """Class of instruction sets: generic, avx2, avx512 or avx512bf16."""
    caches: dict[str, str]
    """Sizes as "1024K", by level."""
    layout: str
    dtype: str
    cell: Cell
    fused: float
    """Time of the fused path."""
    chain: float
    """Time of the op's own chain; where that was not timed, of the library's chain in the fused op's layout."""
    library: float
    """Time of the library's chain in the fused op's layout."""
    peer: float
    """Time of the library's chain in its faster layout."""

    @property
    def machine(self) -> dict[str, Any]:
        """The machine, as far as the planner's counts depend on it, in the words of a results file."""
        return {"lowrank_ops_cpu_isa": self.isa, "caches": self.caches}

    def as_row(self) -> Row:
        caches = {level: self.caches.get(level, "") for level in CACHES}
        times = {f"{name}_us": repr(getattr(self, name)) for name in TIMES}
        where = {"set": self.set, "cpu": self.cpu, "isa": self.isa, **caches, "layout": self.layout}
        return {**where, "dtype": self.dtype, **cell_columns(self.cell), **times}

    @classmethod
    def from_row(cls, row: Row) -> CpuTimes:
        caches = {level: row[level] for level in CACHES if row[level]}
        times = [float(row[f"{name}_us"]) for name in TIMES]
        return cls(row["set"], row["cpu"], row["isa"], caches, row["layout"], row["dtype"], cell_of(row), *times)


def isa_class(machine: dict[str, Any], dtype: str) -> str:
    """generic, avx2, avx512 or avx512bf16: the kernels that ran in a file of this machine."""
    kernels = str(machine.get("lowrank_ops_cpu_isa") or _widest(machine))
    if kernels in ("generic", "avx2"):
        return kernels
    return "avx512bf16" if dtype == "bfloat16" and kernels in ("avx512bf16", "amx") else "avx512"


def _widest(machine: dict[str, Any]) -> str:
    """The kernels of a run that did not name them: those of the CPU, capped as torch was."""
    flags = machine["isa"]
    if machine["torch_cpu_capability"] == "DEFAULT":
        return "generic"
    if machine["torch_cpu_capability"] == "AVX2" or "avx512f" not in flags:
        return "avx2"
    return "avx512bf16" if "avx512_bf16" in flags else "avx512"


def read(path: str | Path) -> list[CpuTimes]:
    """The cells of a CSV file, or those of a CPU's results file that ran both paths.

    Raises:
        ValueError: a GPU's file.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return [CpuTimes.from_row(row) for row in read_rows(path)]
    content = json.loads(path.read_text())
    if "device" in content:
        raise ValueError(f"fit_cost: {path} is of {content['device']['name']}; the constants are a CPU's")
    return [times for entry in content["cells"] if (times := _from_json(path.stem, content, entry)) is not None]


def _from_json(name: str, content: dict[str, Any], entry: dict[str, Any]) -> CpuTimes | None:
    """One cell of a results file, where both paths and the library's chain were timed."""
    times = {name: contender["median_us"] for name, contender in entry["contenders"].items()}
    cell, layout, dtype, machine = cell_from_json(entry), content["layout"], entry["dtype"], content["machine"]
    chains = {name: time for name, time in times.items() if name.startswith("chain") and "forced" not in name}
    library = chains.get("chain" if cell.is_linear else f"chain {layout}")
    chain = times.get("chain (forced)", library)
    fused = times.get("fused (forced)", times["fused"] if entry["plan"].startswith("fused") else None)
    if dtype not in DTYPES or library is None or chain is None or fused is None:
        return None
    caches = {level: machine["caches"][level] for level in CACHES if level in machine["caches"]}
    isa, peer = isa_class(machine, dtype), min(chains.values())
    return CpuTimes(name, machine["cpu"], isa, caches, layout, dtype, cell, fused, chain, library, peer)


def write(path: str | Path, times: Iterable[CpuTimes]) -> None:
    write_rows(path, [one.as_row() for one in times])


def add(path: str | Path, results: Iterable[str | Path]) -> None:
    """Puts the cells of results files into a CSV file, each as the set of the file's name, in place of a former one."""
    sets = by_set(read(path) if Path(path).exists() else [])
    for result in results:
        sets[Path(result).stem] = read(result)
    write(path, [one for found in sets.values() for one in found])


def by_set(times: Iterable[CpuTimes]) -> dict[str, list[CpuTimes]]:
    found: dict[str, list[CpuTimes]] = {}
    for one in times:
        found.setdefault(one.set, []).append(one)
    return found
