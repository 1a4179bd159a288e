"""`python -m benchmarks.networks.run`: whole networks: dense, a chain of layers, fused, and in inference engines.

Latency: medians; all contenders of a network and dtype are interleaved in one run, their outputs checked before against
the same network in fp64. Peak memory: each contender runs in a process of its own; the peak of resident memory while it
is called, minus the resident memory once the libraries are loaded: weights (in all forms that the contender keeps),
activations, workspaces. "prepared" is the fused network after `prepare_for_inference_`. "compile" is torch.compile with
frozen weights; its fused network is prepared, too. OpenVINO and ONNX Runtime get the chain as one ONNX graph, in which
both fuse what they can.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ops
from benchmarks.core import bench, engines
from benchmarks.core.bench import Column, Table
from benchmarks.core.engines import ENGINES, OnnxRuntimeRun, OpenVinoRun
from benchmarks.core.outcome import DTYPES
from benchmarks.core.resident import reset_peak, resident
from benchmarks.networks.models import NETWORKS, Network
from examples.demo import unfused

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
CONTENDERS = (
    "fused channels_last", "prepared channels_last", "compile fused", "chain nchw", "chain channels_last",
    "compile chain", "dense nchw", "dense channels_last", "compile dense",
    "onnxruntime chain", "openvino chain", "openvino dense",
)  # fmt: skip
COLUMNS = [
    Column("network", 10, left=True),
    Column("dtype", 8, left=True),
    Column("contender", 20, left=True),
    Column("ms", 9),
    Column("x fused", 7),
    Column("peak MB", 8),
    Column("error", 8),
]
LEGEND = "x fused: its time / time of the fused network (above 1: fused is faster). error: relative, against fp64."
Run = Callable[[], Tensor]


def save(network: Network, folder: Path) -> None:
    """Writes the files that `load` reads: the three modules, the input and, for the engines, ONNX graphs."""
    chain = unfused(network.factorized)
    for name, model in (("dense", network.dense), ("chain", chain), ("fused", network.factorized)):
        torch.save(model, folder / f"{name}.pt")
    torch.save(network.input, folder / "input.pt")
    if not engines.missing("onnxruntime"):
        for name, model in (("dense", network.dense), ("chain", chain)):
            plain = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            with warnings.catch_warnings():
                # This exporter needs no further package and keeps an LSTM as one node, but it is deprecated.
                warnings.simplefilter("ignore")
                file = str(folder / f"{name}.onnx")
                torch.onnx.export(plain, (network.input,), file, dynamo=False, opset_version=engines.ONNX_OPSET)


def load(folder: Path, contender: str, dtype: torch.dtype, threads: int) -> Run:
    """Loads a contender from its files, ready to be called under inference_mode."""
    kind, how = contender.split()
    input: Tensor = torch.load(folder / "input.pt", weights_only=True)
    if kind == "onnxruntime":
        return OnnxRuntimeRun(str(folder / f"{how}.onnx"), input, threads)
    if kind == "openvino":
        return OpenVinoRun(str(folder / f"{how}.onnx"), input, threads, dtype)
    file = {"prepared": "fused", "compile": how}.get(kind, kind)
    memory_format = FORMATS["channels_last" if kind == "compile" else how]
    model: nn.Module = torch.load(folder / f"{file}.pt", weights_only=False)  # our own file
    model = model.to(dtype=dtype)
    model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
    if kind == "prepared" or contender == "compile fused":
        lowrank_ops.prepare_for_inference_(model)
    run = compiled(model) if kind == "compile" else model
    return functools.partial(run, input.to(dtype).contiguous(memory_format=memory_format))


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    """torch.compile for one shape, with weights as constants that inductor may lay out anew, as the engines do."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    return torch.compile(model, dynamic=False)


def chosen(dtype: str) -> list[str]:
    """The installed contenders of a dtype. Both engines read the graph that the package onnx writes."""
    left_out = {e for e in ENGINES if engines.missing(e) or engines.unsupported(e, DTYPES[dtype])}
    if engines.missing("onnxruntime"):
        left_out.add("openvino")
    return [name for name in CONTENDERS if name.split()[0] not in left_out]


def exact(folder: Path, kind: str) -> Tensor:
    """The output of a saved network ("dense" or "chain") in fp64."""
    with torch.inference_mode():
        return load(folder, f"{kind} nchw", torch.float64, torch.get_num_threads())()


def allowed_error(library: float, dtype: torch.dtype) -> float:
    """The allowed relative error of a contender: twice that of PyTorch's layers in the dtype, plus some roundings."""
    return 2 * library + 16 * torch.finfo(dtype).eps


def relative(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected).norm() / expected.norm())


def measure(folder: Path, dtype: str, seconds: float, names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict]:
    """Checks the contenders, measures time and memory. Returns their results by name, and why others were left out."""
    threads = torch.get_num_threads()
    torch._dynamo.reset()  # otherwise dynamo stops compiling a function (nn.Sequential.forward) after some networks
    expected = {kind: exact(folder, kind) for kind in ("dense", "chain")}
    runs: dict[str, Run] = {}
    found: dict[str, dict[str, Any]] = {}
    wrong: dict[str, str] = {}
    errors: dict[str, float] = {}
    with torch.inference_mode():
        for name in names:
            runs[name] = load(folder, name, DTYPES[dtype], threads)
            errors[name] = relative(runs[name](), expected["dense" if "dense" in name else "chain"])
        for name in names:
            library = errors["dense nchw" if "dense" in name else "chain nchw"]
            limit = allowed_error(library, DTYPES[dtype])
            if not errors[name] <= limit:
                wrong[name] = f"relative error {errors[name]:.2e}, allowed {limit:.2e}"
        right = {name: run for name, run in runs.items() if name not in wrong}
        timings = bench.time_interleaved(right, seconds=seconds, before=lambda name: _settle(threads))
    for name, timing in timings.items():
        found[name] = {
            **timing.as_json(),
            "relative_error": errors[name],
            "precision": getattr(runs[name], "precision", ""),
        }
    runs.clear()
    right.clear()
    for name in found:
        found[name]["peak_bytes"] = peak_memory(folder, name, dtype, threads)
    return found, wrong


def _settle(threads: int) -> None:
    if threads > 1:
        bench.settle()


def peak_memory(folder: Path, contender: str, dtype: str, threads: int) -> int:
    """A contender's peak memory in bytes, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.networks.run", "--weigh", str(folder), contender, dtype, str(threads)]
    root = Path(__file__).parents[2]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return int(told.stdout.split()[-1])


def weigh(folder: str, contender: str, dtype: str, threads: str) -> int:
    """Runs in the process of `peak_memory`: the peak of resident bytes above those of the libraries.

    Works on Linux alone, which reports the peak and can reset it: done after loading, whose copies do not count.
    """
    torch.set_num_threads(int(threads))
    kind = contender.split()[0]
    if kind in ENGINES:
        __import__(kind)
    if kind == "compile":
        with torch.inference_mode():
            compiled(nn.Linear(8, 8).requires_grad_(False))(torch.zeros(1, 8))
    before = resident("VmRSS")
    with torch.inference_mode():
        run = load(Path(folder), contender, DTYPES[dtype], int(threads))
        run()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak()
        for _ in range(3):
            run()
    return max(resident("VmHWM") - before, 0)


def rows(network: str, dtype: str, found: dict[str, dict[str, Any]]) -> list[list[str]]:
    fused = found.get("fused channels_last", {}).get("median_us")
    return [
        [
            network, dtype, name, f"{figures['median_us'] / 1e3:.2f}",
            "-" if fused is None else f"{figures['median_us'] / fused:.2f}",
            f"{figures['peak_bytes'] / 1e6:.0f}", f"{figures['relative_error']:.1e}",
        ]
        for name, figures in found.items()
    ]  # fmt: skip


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks.run", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="measured per contender (default: 3)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--weigh", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.weigh:
        print(weigh(*options.weigh))
        return 0
    torch.set_num_threads(options.threads)
    machine, versions = bench.machine(), bench.versions()
    print(f"{machine['cpu']}, " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"threads: {options.threads}, batch 1\n{LEGEND}")
    for engine in ENGINES:
        if engines.missing(engine):
            print(f"{engine} is left out: {engines.missing(engine)}")
    content: dict[str, Any] = {
        "machine": machine,
        "versions": versions,
        "threads": options.threads,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "networks": [],
    }
    table = Table(COLUMNS, lambda line: print(line, flush=True))
    table.header()
    failed = False
    for name in options.networks:
        try:
            network = NETWORKS[name]()
        except FileNotFoundError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            save(network, Path(folder))
            description, network = network.description, None  # type: ignore[assignment]
            for dtype in options.dtype:
                found, wrong = measure(Path(folder), dtype, options.seconds, chosen(dtype))
                failed |= any(left_out.startswith(("fused", "prepared")) for left_out in wrong)
                for row in rows(name, dtype, found):
                    table.row(row)
                for left_out, why in wrong.items():
                    print(f"left out, output wrong: {left_out}: {why}", flush=True)
                entry = {"network": name, "description": description, "dtype": dtype}
                content["networks"].append({**entry, "contenders": found, "wrong": wrong})
                if options.json:
                    bench.write_json(options.json, json.loads(json.dumps(content)))
    return int(failed)


if __name__ == "__main__":
    if "--weigh" not in sys.argv:  # that process must give freed memory back
        bench.set_memory("kept")
    sys.exit(main())
