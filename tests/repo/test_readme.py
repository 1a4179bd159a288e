"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.paths import REPOSITORY


class MyTrainedNetwork(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"MyTrainedNetwork": MyTrainedNetwork, "images": torch.randn(64, 3, 24, 24)}
    names["x"] = names["images"][:1]
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    assert names["y"].shape == (1, 10) and (tmp_path / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert "1 of 3 layers replaced" in printed and "tucker_conv2d: " in printed
