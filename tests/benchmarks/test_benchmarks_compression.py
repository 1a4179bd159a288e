"""The compression study on a small network: what its rows say, and the files that it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank_ops
from benchmarks.compression import run as compression
from benchmarks.compression import subjects
from benchmarks.compression.run import Row, Study, interval, macs_of
from benchmarks.compression.subjects import Subject, read_idx


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 64, 16),
    ).eval().requires_grad_(False)  # fmt: skip


def _subject() -> Subject:
    dense = _network()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(40, 3, 8, 8, generator=generator)
    judged = inputs[32:]
    with torch.inference_mode():
        expected = dense(judged)

    def score(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            error: Tensor = (model(judged) - expected).norm(dim=1) / expected.norm(dim=1)
        return error.double().numpy(), np.ones(len(judged))

    return Subject(
        "small", dense, [inputs[:16]], [inputs[:32]], judged[:1], "error", score, 2.0, "8 images",
        distillation={"steps": 20},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_study_judges_every_way_at_the_cut_that_it_names() -> None:
    study = Study(_subject(), seconds=0.001)
    study.at_equal_multiplications(minutes=10)
    plain, spent, calibrated, both, distilled = study.rows
    for row in study.rows:
        assert row.dense == 0 and row.low <= row.metric <= row.high and row.speedup > 0 and row.minutes >= 0
        assert row.macs > 1.9
    assert spent.macs >= 2.0 and both.macs == pytest.approx(distilled.macs)
    assert calibrated.macs == pytest.approx(plain.macs)
    assert calibrated.metric < plain.metric
    assert distilled.minutes > both.minutes


def test_calibration_that_takes_all_the_time_leaves_none_for_distillation(capsys: pytest.CaptureFixture[str]) -> None:
    study = Study(_subject(), seconds=0.001)
    study.at_equal_multiplications(minutes=1e-6)
    assert len(study.rows) == 4 and "left none for distillation" in capsys.readouterr().out


def test_budgets_are_held_against_what_they_are_to_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(_subject(), seconds=0.001)
    asked: list[float] = []
    original = lowrank_ops.factorize_

    def spy(model: nn.Module, *arguments: object, **options: object) -> lowrank_ops.Report:
        rank = options.get("rank")
        if isinstance(rank, lowrank_ops.Budget):
            asked.append(rank.value)
            options = {**options, "rank": lowrank_ops.Budget(params=0.6), "method": "tucker"}
        return original(model, *arguments, **options)  # type: ignore[arg-type]

    together: list[list[str]] = []

    def speedups(self: Study, models: Mapping[str, nn.Module]) -> dict[str, float]:
        together.append(list(models))
        return {name: 0.9 if name == "ratio 0.4" else 2.0 for name in models}

    monkeypatch.setattr(lowrank_ops, "factorize_", spy)
    monkeypatch.setattr(Study, "_speedups", speedups)
    study.at_equal_latency((0.4,))
    assert asked == [1 / 2.0]  # nothing is asked to be as fast as what is no faster than the dense network
    assert [row.method for row in study.rows] == ["VBMF", "budget, as fast as VBMF", "ratio 0.4"]
    assert ["VBMF", "budget, as fast as VBMF"] in together  # timed in one run


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = interval(draw.normal(0.3, 1.0, 60), np.ones(60), draws=400)
        hits += low <= 0.3 <= high
    # 95 % of 200 with a standard deviation of 3; the bootstrap of 60 samples covers a little less
    assert 175 <= hits <= 200


def test_multiplications_are_counted_by_hand() -> None:
    model = _network()
    assert macs_of(model, torch.zeros(1, 3, 8, 8)) == 64 * (3 + 32) * 32 * 9 + 32 * 64 * 16


def test_the_command_writes_rows_and_a_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compression, "load", lambda name, data: _subject())
    row = Row("small", "latency", "ratio 0.5", 0.2, 0.1, 0.0, 0.2, 2.0, 2.0, 1.5, 0.1)
    monkeypatch.setattr(
        Study, "at_equal_latency", lambda self, ratios: self.rows.append(replace(row, network=self.subject.name))
    )
    written, drawn = tmp_path / "rows.json", tmp_path / "plot.png"
    compression.main(["small", "--question", "latency", "--threads", "1", "--json", str(written), "--plot", str(drawn)])
    content = json.loads(written.read_text())
    assert content["rows"][0]["method"] == "ratio 0.5" and content["samples"] == {"small": "error on 8 images"}
    assert drawn.read_bytes()[:4] == b"\x89PNG"
    # Another network's rows join those that are there; one's own are measured anew.
    monkeypatch.setattr(compression, "load", lambda name, data: replace(_subject(), name=name))
    for name in ("other", "other"):
        compression.main([name, "--question", "latency", "--threads", "1", "--json", str(written)])
    content = json.loads(written.read_text())
    assert [row["network"] for row in content["rows"]] == ["small", "other"] == list(content["samples"])
    compression.main(["other", "--question", "cut", "--threads", "1", "--json", str(written)])
    questions = [(row["network"], row["question"]) for row in json.loads(written.read_text())["rows"]]
    assert questions == [("small", "latency"), ("other", "latency"), *[("other", "cut")] * 5]
    with pytest.raises(ValueError, match=r"with 1 thread\(s\); give another file"):
        compression.main(["small", "--threads", "2", "--json", str(written)])


def test_idx_files(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    head = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "train-images-idx3-ubyte").write_bytes(head + values.tobytes())
    assert np.array_equal(read_idx(tmp_path, "train-images-idx3-ubyte"), values)
    with pytest.raises(FileNotFoundError, match="give --data FOLDER"):
        read_idx(tmp_path, "t10k-labels")
    with pytest.raises(ValueError, match="got 'vgg'"):
        subjects.load("vgg", None)
