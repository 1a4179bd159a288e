"""Timing core, machine description, table and JSON of the benchmarks.

How a time is measured: all contenders of a cell take turns in one run. A turn begins with one call that is not timed
(it brings the contender's own weights back into the caches; left out where a call is longer than a turn). Then calls
are timed for some milliseconds. The order rotates from round to round. With several threads a turn begins when the
threads of the contender before have come to rest (`settle`). The result is the median of all timed calls.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Long enough for many calls of a small op, short enough that slow changes of the clock rate affect all alike.
TURN_SECONDS = 0.01


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and the 10th and 90th percentile over `calls` timed calls."""

    median: float
    p10: float
    p90: float
    calls: int

    def as_json(self) -> dict[str, Any]:
        """In microseconds."""
        return {"median_us": self.median * 1e6, "p10_us": self.p10 * 1e6, "p90_us": self.p90 * 1e6,
                "calls": self.calls}  # fmt: skip

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Timing:
        median, p10, p90 = (content[key] * 1e-6 for key in ("median_us", "p10_us", "p90_us"))
        return cls(median, p10, p90, content["calls"])


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.25,
    warmup: float = 0.05,
    min_calls: int = 3,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Times functions in turns, so that a change of the machine's speed affects all of them.

    Args:
        functions: what to call, by name.
        seconds: time measured per function (more where `min_calls` take longer).
        warmup: each function is called for this long first, and at least once.
        min_calls: the least number of timed calls per function.
        before: called with the function's name before each turn, outside of the timed part.

    Raises:
        ValueError: `functions` is empty, or `seconds`, `warmup` or `min_calls` is below its range.
    """
    if not functions or seconds <= 0 or warmup < 0 or min_calls < 1:
        raise ValueError(
            "time_interleaved: needs functions, seconds > 0, warmup >= 0 and min_calls >= 1, got "
            f"{len(functions)} functions, seconds={seconds}, warmup={warmup}, min_calls={min_calls}"
        )
    duration = {}
    for name, function in functions.items():
        before(name)
        duration[name] = _call_for(function, warmup)[-1]
    # Where some functions are slow, the fast ones get longer turns: otherwise the slow ones would be called too often.
    turn = max(TURN_SECONDS, max(duration.values()) / 4)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    while any(len(taken) < min_calls or sum(taken) < seconds for taken in samples.values()):
        for name in order:
            before(name)
            if duration[name] < turn:
                functions[name]()
            samples[name] += _call_for(functions[name], turn)
        order = order[1:] + order[:1]
    return {name: summarize(taken) for name, taken in samples.items()}


def _call_for(function: Callable[[], object], seconds: float) -> list[float]:
    """Calls the function until `seconds` have passed, at least once. Returns the seconds of each call."""
    taken: list[float] = []
    now = start = time.perf_counter()
    while not taken or now - start < seconds:
        before_call = time.perf_counter()
        function()
        now = time.perf_counter()
        taken.append(now - before_call)
    return taken


def settle(limit: float = 0.2) -> bool:
    """Waits until no other thread of this process computes, at most `limit` seconds. False: some still did then.

    Threads of a pool go on spinning after their work (libgomp's for some 8 ms, ONNX Runtime's for 30), on the cores
    that the next contender's threads need.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < limit:
        before, began = time.process_time(), time.perf_counter()
        time.sleep(0.001)
        if time.process_time() - before < 0.2 * (time.perf_counter() - began):
            return True
    return False


def summarize(samples: Sequence[float]) -> Timing:
    """Median and percentiles of the seconds per call."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


MEMORY = {
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)},
    "fresh": {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"},
}


def set_memory(memory: str) -> None:
    """Restarts this process with glibc's settings for freed memory, on Linux.

    Args:
        memory: "kept": outputs lie where those of the call before lay. "fresh": every tensor of 64 KB and more lies on
            pages that the system maps as they are touched, as after allocations of other sizes. glibc does that with
            outputs above 32 MB, and with smaller ones depending on other allocations. It costs page faults in every
            call (18 ms for 40 MB on the machine of the committed results), also for a chain's hidden tensors.
    """
    settings = MEMORY[memory]
    if sys.platform == "linux" and any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **settings})


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean; NaN if there are no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def machine() -> dict[str, Any]:
    """The machine that the results depend on: CPU model, cores, caches, instruction sets."""
    cpuinfo = _read("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "isa": [flag for flag in flags if flag.startswith(("avx2", "avx512", "amx", "avx_vnni"))],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "lowrank_ops_cpu_isa": os.environ.get("LOWRANK_OPS_CPU_ISA", ""),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "mkl_cbwr": os.environ.get("MKL_CBWR", ""),
        "system": platform.platform(),
    }


def _caches() -> dict[str, str]:
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _read(index / "type").strip()
        if kind != "Instruction":
            caches[f"L{_read(index / 'level').strip()}"] = _read(index / "size").strip()
    return caches


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def versions() -> dict[str, str]:
    import lowrank_ops

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: found for name in ("onnxruntime", "openvino") if (found := _installed(name))},
        "lowrank_ops": lowrank_ops.__version__,
        "git_sha": git_sha(),
    }


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def git_sha(folder: Path = Path(__file__).parent) -> str:
    """The commit of this file's checkout, `-dirty` with local changes; without a checkout, the build's.

    Changes of benchmarks/results do not count: a run that writes its results there is still of the commit.
    """
    import lowrank_ops

    try:
        commit = _git(folder, "rev-parse", "--short", "HEAD")
        changed = _git(
            folder, "status", "--porcelain", "--untracked-files=no", "--", ":(top)", f":(top,exclude){RESULTS}"
        )
    except (OSError, subprocess.CalledProcessError):
        return str(lowrank_ops.build_info()["git_sha"])
    return f"{commit}-dirty" if changed else commit


RESULTS = "benchmarks/results"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@dataclass(frozen=True)
class Column:
    title: str
    width: int
    left: bool = False


class Table:
    """Rows of fixed width, printed as they come, so that a long run shows its results so far."""

    def __init__(self, columns: Sequence[Column], write: Callable[[str], None] = print) -> None:
        self.columns = columns
        self.write = write

    def header(self) -> None:
        self.write(self._line([column.title for column in self.columns]))
        self.write(" | ".join("-" * column.width for column in self.columns))

    def row(self, values: Sequence[str]) -> None:
        self.write(self._line(values))

    def _line(self, values: Sequence[str]) -> str:
        if len(values) != len(self.columns):
            raise ValueError(f"Table.row: needs {len(self.columns)} values, got {len(values)}")
        cells = (
            value.ljust(column.width) if column.left else value.rjust(column.width)
            for value, column in zip(values, self.columns, strict=True)
        )
        return " | ".join(cells).rstrip()


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all: a run that is killed leaves the file as it was written before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)
