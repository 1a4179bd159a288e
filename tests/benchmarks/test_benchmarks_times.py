"""Tables of measured cells: what a GPU's results file and h200.csv say of the same run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.core.cell_rows import cell_columns, cell_of
from benchmarks.core.layers import full, full_gpu
from benchmarks.core.random_cells import random_cells
from benchmarks.gpu.kernels import BLOCKS
from benchmarks.studies import gpu_times


def test_cells_survive_as_columns() -> None:
    for cell in [*full(), *full_gpu(), *random_cells(100)]:
        assert cell_of(cell_columns(cell)) == cell


def test_a_gpus_results_as_a_table(tmp_path: Path) -> None:
    cell = BLOCKS["tucker"]
    contenders = {
        "fused": {"kind": "fused", "median_us": 12.5, "call": {"median_us": 30.25}},
        "chain graph": {"kind": "peer", "median_us": 0.1234},
    }
    run, blocks, table = (tmp_path / name for name in ("run.json", "blocks.json", "table.csv"))
    entry = {**dataclasses.asdict(cell), "dtype": "tf32", "contenders": contenders}
    run.write_text(json.dumps({"device": {"name": "a GPU"}, "layout": "nchw", "cells": [entry]}))
    cut = {"kernel": "tucker_conv2d_sm80_64x64", "tile": [1, 8, 8], "stages": 3, "splits": 1}
    peers = {"fused": {"median_us": 3.0, "call_us": 4.0}}
    block = {
        "cell": str(cell),
        "dtype": "bfloat16",
        "cuts": [{**cut, "median_us": 2.0, "call_us": 5.0}],
        "peers": peers,
    }
    blocks.write_text(json.dumps({"device": {"name": "a GPU"}, "entries": [block]}))

    measured = gpu_times.read(run) + gpu_times.read(blocks)
    first, second = measured
    assert (first.set, first.gpu, first.layout, first.dtype, first.cell) == ("run", "a GPU", "nchw", "tf32", cell)
    assert first.ways == (
        gpu_times.Way("fused", "fused", 12.5, 30.25),
        gpu_times.Way("chain graph", "peer", 0.1234, None),
    )
    assert (second.set, second.layout) == ("blocks", "channels_last")
    assert [way.name for way in second.ways] == ["tucker_conv2d_sm80_64x64 1x8x8/3/1", "fused"]
    assert second.ways[0].call_us == 5.0
    gpu_times.write(table, measured)
    assert gpu_times.read(table) == measured


def test_sets_are_found_by_name() -> None:
    assert {one.set for one in gpu_times.read_set("sm90a_bf16")} == {"sm90a_bf16"}
    with pytest.raises(FileNotFoundError, match=r"nowhere: must be a file, or a set of h200\.csv: second_bf16, "):
        gpu_times.read_set("nowhere")
