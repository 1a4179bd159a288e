"""Whole networks: folding, the architectures, a run on a small one, memory in a process of its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_ops
from benchmarks.core import engines
from benchmarks.networks import models
from benchmarks.networks import run as networks
from examples.networks import DigitsNetwork


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small() -> models.Network:
    torch.manual_seed(0)
    model = DigitsNetwork().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return models.network(model, torch.randn(1, 1, 8, 8), "digits", rank=0.5, linear=False)


def test_folding_leaves_the_function_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(models.Bottleneck(16, 8, 2), models.Bottleneck(32, 8, 1)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    input = torch.randn(2, 16, 9, 9)
    folded = models.fold_batch_norm(copy.deepcopy(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.inference_mode():
        torch.testing.assert_close(folded(input), model(input), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "parameters"), [(models.vgg16, 138_357_544), (models.resnet50, 25_557_032)])
def test_architectures_have_the_published_sizes(make, parameters, monkeypatch) -> None:
    monkeypatch.setattr(models, "_random", lambda model: model)
    with torch.device("meta"):
        model = make()
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert model.eval()(torch.empty(1, 3, 224, 224)).shape == (1, 1000)


def test_a_run_on_a_small_network(monkeypatch, tmp_path, capsys) -> None:
    weighed = []

    def peak(folder: Path, contender: str, dtype: str, threads: int) -> int:
        weighed.append((contender, dtype, threads))
        return 123_000_000

    monkeypatch.setattr(networks, "NETWORKS", {"small": small})
    monkeypatch.setattr(networks, "peak_memory", peak)
    file = tmp_path / "a.json"
    assert networks.main(["--networks", "small", "--seconds", "0.01", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert {"machine", "versions", "threads", "time", "networks"} == set(written)
    printed = capsys.readouterr().out
    for entry, dtype in zip(written["networks"], ("float32", "bfloat16"), strict=True):
        assert (
            entry["dtype"] == dtype
            and entry["wrong"] == {}
            and entry["description"] == "digits; rank=0.5, linear=False"
        )
        assert list(entry["contenders"]) == networks.chosen(dtype) and len(entry["contenders"]) >= 9
        for name, figures in entry["contenders"].items():
            assert 0 < figures["p10_us"] <= figures["median_us"] <= figures["p90_us"] and name in printed
            assert figures["peak_bytes"] == 123_000_000 and (name, dtype, 1) in weighed
            assert 0 < figures["relative_error"] < (1e-5 if dtype == "float32" else 0.1)


def test_a_wrong_contender_is_left_out(monkeypatch, tmp_path) -> None:
    network = small()
    networks.save(network, tmp_path)
    for module in network.factorized.modules():
        if isinstance(module, lowrank_ops.TuckerConv2d):
            module.core.mul_(1.01)
    torch.save(network.factorized, tmp_path / "fused.pt")
    monkeypatch.setattr(networks, "peak_memory", lambda *arguments: 1)
    names = ["fused channels_last", "chain nchw", "dense nchw"]
    found, wrong = networks.measure(tmp_path, "float32", 0.001, names)
    assert set(wrong) == {"fused channels_last"} and "relative error" in wrong["fused channels_last"]
    assert list(found) == ["chain nchw", "dense nchw"]
    assert [row[4] for row in networks.rows("small", "float32", found)] == ["-", "-"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of resident memory")
def test_memory_is_that_of_the_contender(tmp_path) -> None:
    """A layer of 64 MB, whose output has 32 MB and is not kept."""
    layer = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.Flatten())
    torch.save(layer, tmp_path / "dense.pt")
    torch.save(torch.randn(2048, 4096), tmp_path / "input.pt")
    peak = networks.peak_memory(tmp_path, "dense nchw", "float32", 1)
    at_least = 4 * (4096 * 4096 + 2 * 2048 * 4096)
    assert at_least <= peak < 2 * at_least


def test_missing_engines_are_left_out(monkeypatch) -> None:
    monkeypatch.setattr(engines, "NEEDED", {"onnxruntime": ("no_such_package",), "openvino": ("torch",)})
    plain = [
        "fused channels_last",
        "prepared channels_last",
        "compile fused",
        "chain nchw",
        "chain channels_last",
        "compile chain",
        "dense nchw",
        "dense channels_last",
        "compile dense",
    ]
    assert networks.chosen("float32") == plain
    monkeypatch.setattr(engines, "NEEDED", {"onnxruntime": ("torch",), "openvino": ("torch",)})
    assert networks.chosen("float32") == list(networks.CONTENDERS)
    assert networks.chosen("bfloat16") == [*plain, "openvino chain", "openvino dense"]
