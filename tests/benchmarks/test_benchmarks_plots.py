"""The plots: what is drawn, from which files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import plots
from tests.support.benchmark_cells import LIMITS, SMALL_ON_CPU, result

pytest.importorskip("matplotlib", reason="matplotlib draws the plots")


def write(path: Path, threads: int = 1, cpu: str = "A") -> Path:
    results = [
        result(SMALL_ON_CPU[0], fused=10, chain=8, openvino=20, dense=40),
        result(SMALL_ON_CPU[-1], fused=10, chain=40, dense=20),
        result(SMALL_ON_CPU[1], "float32", fused=10),
    ]
    content = {
        "machine": {"cpu": cpu}, "versions": {"torch": "2"}, "threads": threads,
        "limits": {"bfloat16": LIMITS.as_json(), "float32": LIMITS.as_json()},
        "cells": [made.as_json() for made in results],
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def test_what_is_drawn(tmp_path) -> None:
    groups, title = plots.read([write(tmp_path / "a.json"), write(tmp_path / "b.json", 2)])
    assert list(groups) == [f"{d}, {n} thread(s)" for n in (1, 2) for d in ("bfloat16", "float32")]
    assert title == "A, torch 2"
    found = plots.speeds(groups["bfloat16, 1 thread(s)"])
    first, last = sorted((SMALL_ON_CPU[0], SMALL_ON_CPU[-1]), key=lambda cell: cell.flops)
    assert list(found) == ["chain", "openvino", "dense"]
    assert [(flops, op) for flops, _, op in found["chain"]] == [(cell.flops, cell.op) for cell in (first, last)]
    assert dict(zip([SMALL_ON_CPU[0].flops, SMALL_ON_CPU[-1].flops], (0.8, 4.0), strict=True)) == pytest.approx(
        {flops: ratio for flops, ratio, _ in found["chain"]}
    )
    assert plots.speeds(groups["float32, 1 thread(s)"]) == {}
    tucker, linear = groups["bfloat16, 1 thread(s)"]
    assert (tucker.least, tucker.fused, tucker.peer) == pytest.approx((LIMITS.bound(SMALL_ON_CPU[0], 2) * 1e6, 10, 8))
    assert tucker.op == "tucker_conv2d"
    assert linear.peer == pytest.approx(40) and linear.op == "lowrank_linear"
    assert groups["float32, 1 thread(s)"][0].peer is None


def test_what_is_drawn_survives_in_a_csv_file(tmp_path) -> None:
    files = [str(write(tmp_path / "a.json")), str(write(tmp_path / "b.json", 2))]
    assert plots.main([*files, "--csv", str(tmp_path / "c.csv")]) == 0
    (first, title), (again, title_again) = plots.read(files), plots.read([tmp_path / "c.csv"])
    assert title == title_again and list(first) == list(again)
    for panel, points in first.items():
        for made, kept in zip(points, again[panel], strict=True):
            assert made._replace(over={}, least=0, peer=0) == kept._replace(over={}, least=0, peer=0)
            assert (made.least, made.over) == (pytest.approx(kept.least, rel=1e-4), pytest.approx(kept.over, rel=1e-4))
            assert (made.peer is None) == (kept.peer is None)
            assert made.peer is None or made.peer == pytest.approx(kept.peer, rel=1e-4)


def test_both_plots_are_written(tmp_path, capsys) -> None:
    files = [str(write(tmp_path / "a.json")), str(write(tmp_path / "b.json", 2))]
    assert plots.main(files) == 0 and plots.main([*files, "--output", str(tmp_path / "out")]) == 0
    for folder in (tmp_path, tmp_path / "out"):
        for kind in ("speed", "roofline"):
            content = (folder / f"a_{kind}.png").read_bytes()
            assert content.startswith(b"\x89PNG") and len(content) > 10_000
    assert str(tmp_path / "out" / "a_speed.png") in capsys.readouterr().out


def test_files_that_do_not_fit_are_refused(tmp_path, capsys) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"machine": {"cpu": "A"}, "versions": {"torch": "2"}, "threads": 1, "cells": []}))
    assert plots.main([str(old)]) == 2 and "measure again" in capsys.readouterr().err
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json", cpu="B")
    assert plots.main([str(a), str(b)]) == 2 and "is of B, torch 2" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))
