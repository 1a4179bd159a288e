"""The demo: text rendering and scoring, the networks, and the digits fallback from end to end."""

from __future__ import annotations

import pytest

pytest.importorskip("PIL")
pytest.importorskip("sklearn")
pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

import torch

import lowrank_ops
from examples import demo, networks, tasks, text


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("", "ab", 2),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("same", "same", 0),
    ],
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert text.edit_distance(first, second) == text.edit_distance(second, first) == distance


def test_error_rate_is_over_all_characters() -> None:
    assert text.error_rate(["abcd", "xz"], ["abcd", "xyz"]) == pytest.approx(1 / 7)
    with pytest.raises(ValueError, match="got 1 for 2"):
        text.error_rate(["a"], ["a", "b"])


def test_decoding_joins_repeats_and_drops_blanks() -> None:
    a, b = text.ALPHABET.index("a") + 1, text.ALPHABET.index("b") + 1
    steps = torch.tensor([[0, a, a, 0, a, b, b, 0], [b, 0, 0, 0, 0, 0, 0, a]])
    assert text.decode(torch.nn.functional.one_hot(steps, 97).float()) == ["aab", "ba"]


def test_rendered_lines_are_of_the_alphabet_and_reproducible() -> None:
    lines = text.lines_of_text(300, seed=1)
    assert sum(map(len, lines)) >= 300 and all(0 < len(line) <= 28 for line in lines)
    assert set("".join(lines)) <= set(text.ALPHABET)
    images = text.render_lines(lines[:3])
    assert images.shape == (3, 1, 64, 600) and images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, text.render_lines(lines[:3]))
    clean = text.render_lines(lines[:3], noise=0)
    assert (clean < -0.5).flatten(1).any(1).all(), "no ink"


def test_networks_have_the_shapes_that_they_document() -> None:
    with torch.device("meta"):
        recogniser, detector = networks.Recogniser(), networks.Detector()
        assert recogniser(torch.empty(2, 1, 64, 200)).shape == (2, 49, 97)
        assert detector(torch.empty(1, 3, 64, 96)).shape == (1, 2, 32, 48)
    assert sum(p.numel() for p in recogniser.parameters()) == 3_781_345
    assert round(sum(p.numel() for p in detector.parameters()) / 1e6, 1) == 20.8


def test_without_the_weights_the_demo_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "WEIGHTS_PACKAGE", "no_such_package_of_weights")
    monkeypatch.setattr(tasks, "digits_task", lambda: "the digits")
    for name in ("text", "craft"):
        task, note = tasks.load(name)
        assert task == "the digits"
        assert networks.WEIGHTS_REQUIREMENT in note and "digits" in note
    with pytest.raises(ValueError, match="text, craft, digits, got 'faces'"):
        tasks.load("faces")


@pytest.fixture(scope="module")
def digits() -> tasks.Task:
    return tasks.digits_task(epochs=3)


def test_digits_from_end_to_end(digits: tasks.Task, tmp_path, capsys) -> None:
    metrics = demo.run(digits, tmp_path, seconds=0.005)
    assert metrics["dense, fp32"] < 0.1  # guessing has an error rate of 0.9
    printed = capsys.readouterr().out
    for word in (
        *metrics,
        "TuckerConv2d",
        "thread(s)",
        "dense",
        "chain",
        "fused",
        "fp32: fused is",
        "bf16: fused is",
    ):
        assert word in printed
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    layers = (tmp_path / "layers.csv").read_text().splitlines()
    assert "compressed_layer_size/uncompressed_layer_size" in layers[0]
    assert len(layers) == 1 + 6  # five convolutions and the classifier
    latency = (tmp_path / "latency.csv").read_text().splitlines()
    assert len(latency) == 1 + 2 * 5  # dense and chain in two layouts and fused, in two dtypes
    assert {line.split(",")[0] for line in latency[1:]} == {"dense", "chain", "fused"}
    for file in ("layers.md", "latency.md"):
        assert digits.title in (tmp_path / file).read_text()


def test_the_unfused_model_is_a_chain_of_the_same_factors(digits: tasks.Task) -> None:
    model = demo.copy.deepcopy(digits.model)
    report = lowrank_ops.factorize_(model, rank=0.5, linear=False, progress=False)
    chain = demo.unfused(model)
    kinds = (lowrank_ops.TuckerConv2d, lowrank_ops.CPConv2d, lowrank_ops.LowRankLinear)
    assert len(report.replaced) == sum(isinstance(module, kinds) for module in model.modules()) > 0
    assert not any(isinstance(module, kinds) for module in chain.modules())
    images = digits.example_input.double()
    expected, got = model.double()(images), chain.double()(images)
    dense = demo.copy.deepcopy(digits.model).double()(images)
    assert expected.norm() > 0
    # The same sums up to their order, and not simply the dense network again.
    assert (got - expected).norm() < 1e-9 * expected.norm() < (dense - expected).norm()
