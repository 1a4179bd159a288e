"""Reports and explanations: whole, of the terminal's width, in any encoding, printed once."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops
from lowrank_ops import Budget, factorize_
from lowrank_ops.compress.report import LayerReport, Report
from lowrank_ops.model import timing
from lowrank_ops.nn.counts import count_parameters
from lowrank_ops.text.notes import grouped, listed
from lowrank_ops.text.tables import as_text, figure, new_table
from tests.support.paths import REPOSITORY


class Conv1D(nn.Module):
    """A linear layer with its weight as `[inputs, outputs]`, as transformers' GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight + self.bias


class Experts(nn.Module):
    """Several linear layers in one 3-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 32, 64))

    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("...i,eio->...o", input, self.up)


class Zoo(nn.Module):
    """Parameters of every kind: a row for some, a line for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))
        self.embedding = nn.Embedding(50, 32)
        self.first, self.second = Conv1D(32, 32), Conv1D(32, 32)
        self.experts = Experts()
        self.recurrent = nn.LSTM(64, 16, batch_first=True)
        self.up = nn.ConvTranspose1d(16, 32, 2, stride=2)
        self.head = nn.Linear(32, 48)
        self.tied = nn.Linear(32, 50, bias=False)
        self.tied.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.experts(self.second(self.first(self.embedding(tokens)))) * self.scale
        hidden = self.up(self.recurrent(hidden)[0].transpose(1, 2)).transpose(1, 2)
        return self.head(hidden), self.tied(hidden)


TOKENS = torch.arange(12).view(2, 6)


def test_every_parameter_has_a_row_or_a_line() -> None:
    model = Zoo()
    whole = count_parameters(model)
    report = factorize_(model, rank=0.25, example_input=TOKENS, progress=False)
    assert [layer.name for layer in report] == ["up", "head", "tied"]
    assert {other.name: other.type for other in report.others} == {
        "": "Zoo",
        "first": "Conv1D",
        "second": "Conv1D",
        "experts": "Experts",
        "recurrent": "LSTM",
    }
    listed = sum(layer.parameters_before for layer in report) + sum(other.parameters for other in report.others)
    assert listed == whole == report.model_parameters_before
    conv1d = f"{100 * 2 * (32 * 32 + 32) / whole:.1f} % of the parameters"
    assert f"not a layer that can be factorized: Conv1D (first, second), {conv1d}" in str(report)
    assert "not a layer that can be factorized: Zoo (the model itself), " in str(report)


def test_the_share_of_what_is_left() -> None:
    """Also for a transposed convolution, which nothing here replaces."""
    model = Zoo()
    whole = count_parameters(model)
    report = factorize_(model, rank=0.25, example_input=TOKENS, progress=False)
    up = 16 * 32 * 2
    macs = 2 * 6 * up + 2 * 12 * (32 * 48 + 32 * 50)
    (line,) = (note for note in report.notes if "ConvTranspose1d" in note)
    assert f"{100 * (up + 32) / whole:.1f} % of the parameters, {100 * 2 * 6 * up / macs:.1f} % of the MACs" in line
    assert "transposed" in line


def test_embeddings_have_a_line() -> None:
    report = factorize_(nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64)), rank=0.25, progress=False)
    share = 100 * 50 * 32 / (50 * 32 + 32 * 64 + 64)
    assert report.notes == [f"not a layer that can be factorized: Embedding (0), {share:.1f} % of the parameters"]


def test_lines_of_the_same_kind_are_one() -> None:
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, groups=4) for _ in range(6)), nn.Conv2d(16, 16, 3))
    report = factorize_(model, rank=0.25, progress=False)
    (line,) = report.notes
    assert line.startswith("left: 0 ... 5 (6) (Conv2d; ") and "groups must be 1" in line


def test_lines_do_not_grow_with_the_number_of_experts() -> None:
    """Reasons that differ in their numbers or in names are one line."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(32, 48) for _ in range(40))
            self.small = nn.ModuleList(nn.Linear(10 + i, 12) for i in range(9))
            self.tied = nn.ModuleList(nn.Linear(16, 24) for _ in range(10))
            self.also_tied = nn.ModuleList(nn.Linear(16, 24) for _ in range(10))
            for one, other in zip(self.tied, self.also_tied, strict=True):
                other.weight = one.weight
            self.narrow = nn.ModuleList(nn.Linear(4 + i % 3, 32) for i in range(20))

        def forward(self, x: Tensor) -> Tensor:
            parts = zip(self.experts, x.split([*range(1, 31), 200]), strict=False)  # nine experts get nothing
            return torch.cat([expert(rows) for expert, rows in parts])

    data = torch.randn(sum(range(1, 31)) + 200, 32)
    with pytest.warns(UserWarning, match="few calibration data for 30 of 40 layers"):
        report = factorize_(Mixture(), rank=8, calibration=(data,), progress=False)
    left = ["tied.0 ... tied.9 (10)", "also_tied.0 ... also_tied.9 (10)", "small.0 ... small.8 (9)"]
    lines = {note.removeprefix("left: ").partition(" (Linear")[0]: note for note in report.notes}
    assert set(lines) > {*left, "narrow.0 ... narrow.19 (20)"} and len(lines) == 6
    assert "it shares a parameter with also_tied.0 to 9.weight; untie" in lines[left[0]]
    assert "rank 8 has 188 to 252 parameters, the dense layer 132 to 228" in lines[left[2]]
    assert report.notes[-2:] == [
        "experts.0 ... experts.29 (30): 1 to 30 calibration rows for 32 inputs: its factors lean on its weight",
        "experts.31 ... experts.39 (9): the calibration data do not reach it: its factors keep its weight alone",
    ]


def test_texts_are_told_together() -> None:
    told: list[tuple[str | None, str]] = [
        ("3 of 1.5 rows of x.3.w, 'a.1', float32, 8x8", "a"),
        (None, "b"),
        ("other", "c"),
    ]
    told.append(("11 of 0.5 rows of x.12.w, 'a.2', float32, 8x8", "d"))
    told.append(("11 of 0.5 rows of x.12.w, 'a.2', float64, 8x8", "e"))
    assert grouped(told) == [
        ("3 to 11 of 0.5 to 1.5 rows of x.3 to 12.w, 'a.1', float32, 8x8", ["a", "d"]),
        ("other", ["c"]),
        ("11 of 0.5 rows of x.12.w, 'a.2', float64, 8x8", ["e"]),
    ]
    assert listed(["0", "3", "head"]) == "0, 3, head"
    assert listed([*(f"experts.{i}.up" for i in range(64)), "head"]) == "experts.0.up ... experts.63.up (64), head"
    assert listed([*"abcde", *(f"f.{i}" for i in range(9))]) == "a, b, c, d and 10 more"


def test_milliseconds_are_those_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times as fast, also where the replaced layer alone gained more."""
    now = 0.0  # a clock that only the model moves

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, input: Tensor) -> Tensor:
            nonlocal now
            now += 0.024 if type(self.linear) is nn.Linear else 0.004
            now += 0.006  # what else the model does
            return self.linear(input)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    model = Model()
    hooked: list[str] = []
    model.linear.register_forward_hook(lambda *_: hooked.append("forward"))
    report = factorize_(model, rank=0.25, example_input=torch.randn(2, 64), progress=False)
    assert hooked == ["forward"], "runs for the clock are without the hooks of the layers"
    assert report.total("milliseconds_before") == pytest.approx(30)
    assert report.total("milliseconds_after") == pytest.approx(10)
    assert "30.000 > 10.000 (3.00x)" in str(report)


@pytest.mark.parametrize(
    ("model", "told"),
    [((7.0, 3.0), False), ((4.9, 2.4), False), ((4.0, 3.0), True), ((7.0, 1.5), True), ((None, None), False)],
)
def test_times_that_are_no_parts_of_the_total_are_said(model: tuple[float | None, float | None], told: bool) -> None:
    """Layers are timed one by one; on a busy machine they may seem to take longer than the model that they are in."""
    layers = [
        LayerReport("a", "Linear", "LowRankLinear", milliseconds_before=3.0, milliseconds_after=1.5),
        LayerReport("b", "Linear", "LowRankLinear", milliseconds_before=2.0, milliseconds_after=1.0),
        LayerReport("c", "Linear", reason="asked"),
    ]
    report = Report("Net", layers, model_milliseconds_before=model[0], model_milliseconds_after=model[1])
    lines = [note for note in report.notes if note.startswith("the layers' times")]
    assert len(lines) == told
    if told:
        assert "add up to 5.000 > 2.500 (2.00x) ms, more than the model's" in lines[0]
        assert f"{model[0]:.3f} > {model[1]:.3f}" in lines[0]
        assert "each layer timed by itself" in str(report) and "each layer timed by itself" in report._repr_html_()


def test_layers_of_few_channels_stay_dense() -> None:
    """A super-resolution net: 18 dB instead of 30 with its first and last layer at rank 1."""

    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 8, 3), nn.Conv2d(8, 9, 3))

    for rank in (0.5, lowrank_ops.Energy(0.9), lowrank_ops.VBMF(), 2):
        report = factorize_(network(), rank=rank, progress=False)
        assert [layer.name for layer in report.skipped] == ["0", "2", "3"]
        for name, sizes in {"0": "3 in, 32 out", "2": "32 in, 8 out", "3": "8 in, 9 out"}.items():
            assert f"at most 8 channels or features stay dense ({sizes})" in str(report[name].reason)
    for include in (["*", "0"], ["[1-3]", "0"]):
        asked = factorize_(network(), rank=0.5, include=include, progress=False)
        assert [layer.name for layer in asked.replaced] == ["0", "1"]
    patterns = factorize_(network(), rank=0.5, include="[0-3]", progress=False)
    assert [layer.name for layer in patterns.replaced] == ["1"], "a pattern is no name"
    heads = factorize_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), rank=0.25, progress=False)
    assert "64 in, 2 out" in str(heads["1"].reason)


def test_a_budget_may_take_layers_of_few_channels() -> None:
    """It weighs their error against what they cost."""
    model = nn.Sequential(nn.Conv2d(3, 64, 11), nn.Conv2d(64, 2, 1))
    report = factorize_(model, rank=Budget(params=0.5), progress=False)
    assert report["0"].replaced_by == "TuckerConv2d"


def test_nothing_replaced_is_warned_of_with_the_reason() -> None:
    with pytest.warns(UserWarning, match=r"no layer of Sequential was replaced: left: 0 .*groups must be 1, got 2"):
        factorize_(nn.Sequential(nn.Conv2d(16, 16, 3, groups=2)), progress=False)
    with pytest.warns(UserWarning, match=r"was replaced: not a layer that can be factorized: Conv1D \(0\), 100.0 %"):
        factorize_(nn.Sequential(Conv1D(32, 32)), progress=False)
    with pytest.warns(UserWarning, match="it has no parameters"):
        factorize_(nn.Sequential(nn.ReLU()), progress=False)


def test_a_model_that_stays_the_same_is_as_fast_as_before() -> None:
    with pytest.warns(UserWarning, match="no layer"):
        report = factorize_(nn.Sequential(nn.Linear(64, 2)), rank=0.5, example_input=torch.ones(2, 64), progress=False)
    assert report.total("milliseconds_before") == report.total("milliseconds_after")
    assert report.total("milliseconds_before") > 0


def test_notes_of_replaced_layers_are_lines() -> None:
    layers = [LayerReport(name, "Linear", "LowRankLinear", note="seen seldom") for name in ("a", "b")]
    assert str(Report("Net", layers)).endswith("\na, b: seen seldom")


BLOCK = lowrank_ops.TuckerConv2d(64, 64, 3, 16, padding=1)


def texts() -> dict[str, object]:
    folded = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)).eval()
    return {
        "report": factorize_(Zoo(), rank=0.25, example_input=TOKENS, progress=False),
        "cpu": lowrank_ops.explain(BLOCK, (1, 64, 14, 14)),
        "gpu": lowrank_ops.explain(BLOCK, (1, 64, 14, 14), dtype=torch.bfloat16, device="H100"),
        "folds": lowrank_ops.fold_batchnorm_(folded),
    }


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name, found in texts().items():
        text = str(found)
        assert max(map(len, text.splitlines())) <= width, name
        assert "".join(text.split()).isascii(), name
    untimed = str(factorize_(nn.Sequential(nn.Conv2d(16, 16, 3)), rank=0.25, progress=False))
    assert width < 80 or ("Conv2d > " in untimed and "TuckerConv2d" in untimed), "no word is broken where there is room"


def test_figures_have_no_exponent_where_digits_do() -> None:
    assert [figure(value) for value in (0.0123456, 5150.4, 9999.6, 11761.0)] == ["0.01235", "5150", "10,000", "11,761"]
    block = lowrank_ops.TuckerConv2d(64, 64, 3, 16)
    assert "e+" not in str(lowrank_ops.explain(block, (64, 64, 1024, 1024)))


def test_no_table_breaks_a_number_from_its_unit() -> None:
    layer = LayerReport("layer", "Linear", parameters_before=2_345_678, parameters_after=12_345)
    assert "2.35M > 12.35k (190.01x)" in str(Report("Net", [layer]))


@pytest.mark.parametrize("width", [60, 80, 130])
def test_explain_has_no_empty_columns_and_breaks_no_heading(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lone = str(lowrank_ops.explain(BLOCK, (1, 64, 14, 14), device="mps")).splitlines()
    heading = next(line for line in lone if "kernel" in line)
    assert heading.split() == ["kernel", "GFLOP", "MB"]


@pytest.mark.parametrize("width", range(60, 130, 5))
def test_no_heading_of_an_explanation_is_broken(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Also where cells have more than one word and no plan has a reason against it."""
    monkeypatch.setenv("COLUMNS", str(width))
    for device in ("cpu", "A100"):
        text = str(lowrank_ops.explain(BLOCK, (1, 64, 14, 14), device=device))
        headings = next(line for line in text.splitlines() if line.split()[:1] == ["kernel"])
        assert "chain of torch ops" in text and ("predicted" in headings.split() or headings.split()[1:] == ["plan"])


def test_a_wide_terminal_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    table = new_table("wide")
    table.add_column("one")
    table.add_row("word " * 30)
    assert len(as_text(table, "line " * 10).splitlines()) == 5


def test_explain_prints_nothing_and_shows_itself(capsys: pytest.CaptureFixture[str]) -> None:
    found = lowrank_ops.explain(BLOCK, (1, 64, 14, 14))
    assert capsys.readouterr().out == ""
    assert repr(found) == str(found) and "tucker_conv2d: [1, 64, 14, 14]" in repr(found)
    assert repr(found[0]) == str(found[0]) == str(found)
    print(found)
    assert capsys.readouterr().out.count("tucker_conv2d: ") == 1
    lowrank_ops.explain(BLOCK, (1, 64, 14, 14), verbose=True)
    assert capsys.readouterr().out == f"{found}\n"
    assert repr(lowrank_ops.explain(nn.ReLU(), (1, 2))) == "no op of lowrank_ops is called"


def test_notebooks_get_html() -> None:
    for name, found in texts().items():
        html = found._repr_html_()  # type: ignore[attr-defined]
        assert html.startswith("<pre") and html.endswith("</pre>"), name
    report = Report("<Net>", [])
    assert "&lt;Net&gt;" in report._repr_html_() and "<Net>" not in report._repr_html_()
    assert "no op" in lowrank_ops.explain(nn.ReLU(), (1, 2))._repr_html_()


def test_names_in_brackets_are_no_markup() -> None:
    assert str(Report("Net[bold]", [])).startswith("Net[bold]: 0 of 0 layers replaced")


SCRIPT = """
import torch, lowrank_ops
from torch import nn
model = nn.Sequential()
model.add_module("gr\\u00f6\\u00dfe", nn.Conv2d(16, 16, 3))
print(lowrank_ops.factorize_(model, rank=0.25))
print(lowrank_ops.explain(model, (1, 16, 8, 8)))
print(lowrank_ops.prepare_for_inference_(model.eval()))
"""


def test_an_ascii_stdout_is_enough() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode("ascii")
    assert printed.count("gr\\xf6\\xdfe") == 2 and "tucker_conv2d" in printed and "KiB packed" in printed
