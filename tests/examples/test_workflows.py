"""Each example workflow from end to end at tiny sizes."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

import torch
from torch import Tensor, nn

import lowrank_ops
from examples.workflows import course_exercise, data, many_settings, rank_sweep, small_networks, training, vgg19
from examples.workflows.networks import VGG19, AlexNet, LeNet, ResNet50, relative_error
from tests.support.data_set_files import Malicious, write_fashion


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load()


# ----------------------------------------------------------------------------------------------- count_layer_weights


def test_count_layer_weights_agrees_with_the_report() -> None:
    model = LeNet()
    assert lowrank_ops.count_layer_weights(model, "conv2") == 16 * 6 * 25 + 16
    assert lowrank_ops.count_layer_weights(model, "") == 61_706
    report = lowrank_ops.factorize_(
        model, rank=0.5, multiple=1, include=["conv2", "dense1", "dense2", "head"], progress=False
    )
    table = report.to_pandas().set_index("layer")
    assert len(report.replaced) == 4
    for name in ("conv2", "dense1", "dense2", "head", "conv1"):
        assert lowrank_ops.count_layer_weights(model, name) == table["compressed_layer_size"][name]
    assert lowrank_ops.count_layer_weights(model, "dense1") == 60 * (400 + 120) + 120


def test_count_layer_weights_refuses_what_it_cannot_count() -> None:
    with pytest.raises(KeyError, match=r"layer of LeNet, got 'dense3'; it has .*'dense1'"):
        lowrank_ops.count_layer_weights(LeNet(), "dense3")
    with pytest.raises(KeyError, match="got 'nothing like it'; it has 'conv1'"):
        lowrank_ops.count_layer_weights(LeNet(), "nothing like it")
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got str"):
        lowrank_ops.count_layer_weights("LeNet", "conv1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'0' is lazy: run the model once"):
        lowrank_ops.count_layer_weights(nn.Sequential(nn.LazyLinear(3)), "0")


# ------------------------------------------------------------------------------------------------------------ VGG-19


def vgg_widths(width: int) -> list[tuple[int, int]]:
    """(in, out) channels of its convolutions except the first."""
    counts = [width * times for times in (1, 1, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 8, 8, 8, 8)]
    return list(itertools.pairwise(counts))


def test_networks_are_the_published_ones() -> None:
    with torch.device("meta"):
        vgg, resnet, alexnet = VGG19(), ResNet50(), AlexNet()
        assert vgg(torch.empty(1, 3, 224, 224)).shape == resnet(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
        assert alexnet(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert lowrank_ops.count_layer_weights(vgg, "") == 143_667_240
    assert lowrank_ops.count_layer_weights(resnet, "") == 25_557_032
    assert vgg.state_dict()["features.34.weight"].shape == (512, 512, 3, 3)
    assert {"classifier.6.bias"} <= set(vgg.state_dict())
    assert resnet.state_dict()["layer2.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    linears = [layer for layer in alexnet if isinstance(layer, (nn.Linear, lowrank_ops.LowRankLinear))]
    assert [layer.out_features for layer in linears] == [4096, 4096, 1000, 10]
    convs = [layer for layer in alexnet if isinstance(layer, lowrank_ops.TuckerConv2d)]
    assert [(layer.kernel_size, layer.out_channels) for layer in convs] == [
        ((5, 5), 256), ((3, 3), 384), ((3, 3), 384), ((3, 3), 256)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def vgg() -> VGG19:
    torch.manual_seed(0)
    return VGG19(classes=7, width=4, hidden=16).eval()


def test_vgg19_table(vgg: VGG19, digits: data.Dataset) -> None:
    images, _ = digits.test.first(2).fitted(3, 32)[:]
    table = vgg19.run(vgg, images, cp_rank=4, seconds=0.001, progress=False).set_index("network")
    first, layers = 27 * 4 + 4, vgg_widths(4)
    dense = first + sum(9 * S * T + T for S, T in layers)
    tucker = first + sum(S * S // 2 + 9 * S * T // 4 + T * T // 2 + T for S, T in layers)
    cp = first + sum(4 * (S + 3 + 3 + T) + T for S, T in layers)
    assert set(table["parameters before"]) == {dense}
    after = {
        "dense": dense, "Tucker, half ranks": tucker, "CP, rank 4": cp, "TensorLy's Tucker chains": tucker,
        "TensorLy's Tucker chains, fused": tucker, "TensorLy's CP chains": cp, "TensorLy's CP chains, fused": cp,
    }  # fmt: skip
    assert table["after"].to_dict() == after
    assert table["ratio"].to_dict() == {name: dense / count for name, count in after.items()}
    errors = table["output error"]
    assert errors["dense"] == 0 and (errors.drop("dense") > 0).all()
    assert (table["ms"] > 0).all() and list(table.columns)[-1] == "ms"


@pytest.mark.parametrize("kind", ["tucker", "cp"])
def test_the_notebooks_chains_are_the_convolution_where_the_rank_is_enough(kind: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)).double()
    if kind == "tucker":
        chain = vgg19.tucker_chain(conv, [6, 4])
    else:  # of a weight of rank one: alternating least squares finds it in a sweep or two
        vectors = [torch.randn(size, dtype=torch.float64) for size in conv.weight.shape]
        conv.weight.data = torch.einsum("t,s,i,j->tsij", *vectors)
        chain = vgg19.cp_chain(conv, 1)
    image = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        assert (chain(image) - conv(image)).norm() < 1e-9 * conv(image).norm()


@pytest.mark.parametrize("kind", ["tucker", "cp"])
def test_tensorlys_chains_are_taken_over_unchanged(vgg: VGG19, kind: str) -> None:
    """Compares block by block in fp64, each on the input that it gets in the network."""
    model = copy.deepcopy(vgg).double()
    make = (lambda conv: vgg19.tucker_chain(conv, vgg19.half_ranks(conv))) if kind == "tucker" else (
        lambda conv: vgg19.cp_chain(conv, 4)
    )  # fmt: skip
    chained = vgg19.with_chains(model, make, progress=False)
    blocks = {name: layer for name, layer in chained.features.named_children() if isinstance(layer, nn.Sequential)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        block.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out.clone())}))
        for name, block in blocks.items()
    ]
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = chained(images)
    for handle in handles:
        handle.remove()
    fused = copy.deepcopy(chained)
    report = lowrank_ops.fuse_(fused)
    assert len(blocks) == len(report.replaced) == len(report) == 15
    for name in blocks:
        module = fused.features.get_submodule(name)
        assert isinstance(module, lowrank_ops.TuckerConv2d if kind == "tucker" else lowrank_ops.CPConv2d)
        assert module.activation == "relu", "the ReLU after the chain"
        input, output = seen[name]
        absolute = copy.deepcopy(blocks[name])
        for parameter in absolute.parameters():
            parameter.data.abs_()
        with torch.no_grad():
            magnitude, got = absolute(input.abs()), module(input)
        # Both sum the same products in another order: each within 2 u |magnitude| of the exact result, as the chain
        # of library calls is throughout the tests; ReLU brings values closer, never farther apart.
        budget = 2 * torch.finfo(torch.float64).eps * magnitude.norm()
        assert output.relu().norm() > 0
        assert (got - output.relu()).norm() <= budget
    with torch.no_grad():
        assert relative_error(fused, chained, images) < 1e-6 < relative_error(fused, model, images)
        assert torch.equal(chained(images), expected), "the chains were copied"


def test_vgg19_reads_weights_and_no_other_pickle(vgg: VGG19, tmp_path: Path) -> None:
    torch.save(vgg.state_dict(), tmp_path / "weights.pth")
    other = VGG19(classes=7, width=4, hidden=16)
    vgg19.load_weights(other, tmp_path / "weights.pth")
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), vgg.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="size mismatch"):
        vgg19.load_weights(VGG19(classes=7, width=8, hidden=16), tmp_path / "weights.pth")
    torch.save({"features.0.weight": Malicious(tmp_path / "harm")}, tmp_path / "harmful.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        vgg19.load_weights(other, tmp_path / "harmful.pth")
    assert not (tmp_path / "harm").exists()


# --------------------------------------------------------------------------------------------------- course exercise


def test_course_exercise(digits: data.Dataset) -> None:
    with torch.device("meta"):
        original = course_exercise.course_network()
    convs = [layer for layer in original if isinstance(layer, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3
    assert lowrank_ops.count_layer_weights(original, "dense1") == (32 * 4 * 4) * 500 + 500

    dataset = digits.first(320, 160).fitted(3, 16)
    with training.seeded():
        model = course_exercise.course_network(filters=32, hidden=30, size=16)
        ranks = {"conv12": (2, 1), "dense1": 6, "dense2": 5}
        table, reason = course_exercise.run(
            dataset, model, ranks, epochs=4, fine_tune=0, learning_rate=3e-3, batch=16, progress=False
        )
    assert list(table.columns) == [
        "model", "matrix/Tucker rank", "uncompressed_layer_size", "compressed_layer_size",
        "compressed_layer_size/uncompressed_layer_size", "accuracy",
    ]  # fmt: skip
    dense = {"conv12": 9 * 4 * 4 + 4, "dense1": 16 * 30 + 30, "dense2": 30 * 10 + 10}
    small = {"conv12": 4 * 2 + 9 * 2 * 1 + 4 * 1 + 4, "dense1": 6 * (16 + 30) + 30, "dense2": 5 * (30 + 10) + 10}
    expected = [("baseline", "-", sum(dense.values()), sum(dense.values()))]
    for name, layers in list(course_exercise.VARIANTS.items())[1:]:
        shown = ", ".join(str(ranks[layer]) for layer in layers)
        expected.append((name, shown, sum(dense[layer] for layer in layers), sum(small[layer] for layer in layers)))
    expected.append((course_exercise.WITH_RELUS, "(2, 1)", dense["conv12"], small["conv12"]))
    assert [tuple(row[:4]) for row in table.itertuples(index=False)] == expected
    for row in table.itertuples(index=False):
        assert row[4] == row[3] / row[2]
    accuracies = table.set_index("model")["accuracy"]
    # Guessing is right in 0.1 of 160 images, with a standard deviation of 0.024.
    assert accuracies["baseline"] == training.accuracy(model, data.batches(dataset.test, 64)) > 0.3
    assert accuracies["baseline"] > accuracies["last conv and both dense"]
    assert "ReLU between the stages" in reason


def test_the_exercises_own_tucker_function_stays_three_convolutions() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1).double()
    model = nn.Sequential(course_exercise.with_relus(conv, (6, 6)), nn.ReLU())
    image = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    before = model(image)
    report = lowrank_ops.fuse_(model)
    assert not report.replaced and "ReLU between the stages" in str(report["0"].reason)
    assert [type(layer) for layer in model[0]] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert torch.equal(model(image), before)
    # At full rank the three convolutions are the convolution; with the ReLUs they are not.
    plain = nn.Sequential(*(layer for layer in model[0] if isinstance(layer, nn.Conv2d)))
    assert (plain(image) - conv(image)).norm() < 1e-9 * conv(image).norm() < (model[0](image) - conv(image)).norm()


# --------------------------------------------------------------------------------------------------------- rank sweep


def test_rank_sweep(digits: data.Dataset, tmp_path: Path) -> None:
    dataset = digits.first(640, 160).fitted(3, 16)
    dense = (60, 40, 40, 30)
    with training.seeded():
        model = rank_sweep.sweep_network(dense, channels=4)
        table = rank_sweep.run(
            dataset, model, tmp_path / "plots", fractions=(1.0, 0.5, 0.1), epochs=8, learning_rate=5e-3,
            images=2, seconds=0.001, progress=False,
        )  # fmt: skip
    accuracy = table.pivot(index="rank fraction", columns="form", values="accuracy")
    reached = training.accuracy(model, data.batches(dataset.test, 64))
    assert reached > 0.3  # guessing: 0.1
    truncated, factorized = rank_sweep.FORMS
    assert accuracy[truncated][1.0] == accuracy[factorized][1.0] == reached
    assert accuracy[factorized].to_list() == accuracy[truncated].to_list()
    assert accuracy[factorized][0.1] < reached
    sizes = [(128, 60), (60, 40), (40, 40), (40, 30), (30, 10)]
    for fraction in (1.0, 0.5, 0.1):
        rows = table[table["rank fraction"] == fraction].set_index("form")["parameters"]
        assert rows[truncated] == sum(S * T + T for S, T in sizes)
        assert rows[factorized] == sum(max(1, round(fraction * min(S, T))) * (S + T) + T for S, T in sizes)
    for plot in ("accuracy.png", "latency.png"):
        assert (tmp_path / "plots" / plot).read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "plots" / "ranks.csv").read_text().splitlines()) == 1 + 6


def test_a_cut_layer_is_the_best_of_its_rank() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 8).double()
    full = rank_sweep.full_rank(nn.Sequential(linear))["0"]
    values = torch.linalg.svdvals(linear.weight)
    for rank in (1, 4, 7):
        layer = rank_sweep.cut(full, rank / 8)
        assert layer.rank == rank and torch.equal(layer.bias, linear.bias)
        error = (layer.to_dense().weight - linear.weight).norm()
        torch.testing.assert_close(error, values[rank:].norm())  # Eckart and Young


def test_both_forms_of_a_rank_compute_the_same() -> None:
    torch.manual_seed(0)
    model = rank_sweep.sweep_network((12, 9, 9, 11), channels=2).double()
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    exact, full = model(image), rank_sweep.full_rank(model)
    errors = {}
    for fraction in (1.0, 0.5):
        forms = rank_sweep.at_rank(model, full, fraction)
        truncated, factorized = (forms[form](image) for form in rank_sweep.FORMS)
        layers = {
            kind: sum(type(layer) is kind for layer in forms["factorized space"]) for kind in (nn.Linear, nn.ReLU)
        }
        assert layers == {nn.Linear: 0, nn.ReLU: 2}, "the ReLUs of the dense layers belong to the ops"
        assert (truncated - factorized).norm() < 1e-12 * exact.norm()
        errors[fraction] = (truncated - exact).norm() / exact.norm()
    assert errors[1.0] < 1e-12 and errors[0.5] > 1e-3


# ----------------------------------------------------------------------------------------------------- small networks


def test_the_unusual_pieces() -> None:
    image = torch.randn(2, 3, 4, 4) * torch.tensor([1.0, 50.0])[:, None, None, None]
    scaled = small_networks.MinMax()(image)
    assert scaled.amin((1, 2, 3)).tolist() == [0, 0] and scaled.amax((1, 2, 3)).tolist() == [1, 1]
    assert torch.equal(scaled[0].flatten().argsort(), image[0].flatten().argsort())
    assert small_networks.MinMax()(torch.full((1, 2, 2, 2), 7.0)).abs().max() == 0
    values = torch.tensor([-3.0, -0.96, 0.04, 0.06, 0.449, 1.2])
    expected = torch.tensor([-1.0, -1.0, 0.0, 0.1, 0.4, 1.0])
    torch.testing.assert_close(small_networks.RoundAndClip()(values), expected)


@pytest.mark.parametrize("case", small_networks.CASES, ids=lambda case: case.name)
def test_factorizing_leaves_the_pieces_in_place(case: small_networks.Case) -> None:
    torch.manual_seed(0)
    model = small_networks.small_network(case, width=8).double()
    pieces = [type(layer) for layer in model if not isinstance(layer, (nn.Conv2d, nn.Linear))]
    lowrank_ops.factorize_(model, rank=0.5, multiple=1, include=small_networks.layer_names(model), progress=False)
    kinds = (lowrank_ops.TuckerConv2d, lowrank_ops.LowRankLinear)
    assert sum(isinstance(layer, kinds) for layer in model) >= 3
    assert [type(layer) for layer in model if not isinstance(layer, (nn.Conv2d, nn.Linear, *kinds))] == pieces
    dense = nn.Sequential(*(layer.to_dense() if isinstance(layer, kinds) else layer for layer in model))
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    expected = dense(image)
    assert expected.norm() > 0 and (model(image) - expected).norm() < 1e-9 * expected.norm()


def test_small_networks(digits: data.Dataset) -> None:
    with training.seeded():
        table = small_networks.run(digits.first(320, 160).fitted(3, 16), width=8, epochs=4, batch=16, progress=False)
    assert list(table.columns) == small_networks.COLUMNS and len(table) == 4

    def sizes(classes: int) -> tuple[int, int]:
        dense = 9 * (3 * 8 + 8 * 16 + 16 * 32) + 8 + 16 + 32 + 128 * classes + classes
        tucker = (3 * 2 + 9 * 2 * 4 + 4 * 8) + (8 * 4 + 9 * 4 * 8 + 8 * 16) + (16 * 8 + 9 * 8 * 16 + 16 * 32)
        rank = math.floor(classes / 2 + 0.5)
        return dense, tucker + 8 + 16 + 32 + rank * (128 + classes) + classes

    for row in table.itertuples(index=False):
        assert tuple(row[1:3]) == sizes(5 if row[0] == "coarse labels" else 10)
        assert row[3] > 0.4 and row[5] > 0.3, row[0]  # guessing: 0.1, and 0.2 of the coarse labels


# ------------------------------------------------------------------------------------------------------ many settings


def test_initializers_and_decays(digits: data.Dataset) -> None:
    assert len(many_settings.INITIALIZERS) == 10
    dataset = digits.first(64, 32).fitted(3, 32)
    options = {"width": 6, "epochs": 2, "batch": 32, "progress": False}
    table = many_settings.initializers(dataset, decay=0.05, **options)
    assert table["initializer"].to_list()[::2] == list(many_settings.INITIALIZERS)
    assert table["decay"].to_list() == ["weight", "frobenius"] * 10
    assert np.isfinite(table[["first loss", "last loss"]].to_numpy()).all()
    first = table[table["decay"] == "weight"]["first loss"]
    assert first.nunique() == 10, "each initializer starts elsewhere"
    by_decay = table.pivot(index="initializer", columns="decay", values="last loss")
    assert (by_decay["weight"] != by_decay["frobenius"]).all()
    model = AlexNet(width=6)
    whole = sum(parameter.numel() for parameter in model.parameters())
    for kind, of_factors in (("weight", 0.3), ("frobenius", 0.0)):
        factors, others = many_settings.decayed(model, 0.3, kind)
        assert (factors["weight_decay"], others["weight_decay"]) == (of_factors, 0.3)
        assert len(factors["params"]) == 4 * 3 + 3 * 2
        assert sum(parameter.numel() for group in (factors, others) for parameter in group["params"]) == whole
    # Without decay the two columns are the same training.
    without = many_settings.initializers(dataset, inits={"orthogonal": "orthogonal"}, decay=0.0, **options)
    rows = without.drop(columns="decay").to_numpy().tolist()
    assert rows[0] == rows[1]


def test_optimizers(digits: data.Dataset) -> None:
    table = many_settings.optimizers(digits.first(64, 32).fitted(3, 32), width=8, epochs=1, batch=32, progress=False)
    assert table["optimizer"].to_list() == ["RMSprop"] * 3 + ["Adagrad"] * 3
    assert table["network"].to_list() == ["dense", "factorized", "and trained"] * 2
    dense, factorized, trained = table["parameters"][:3]
    assert factorized == trained < 0.7 * dense and table["parameters"][3:].to_list() == [dense, factorized, trained]
    assert dense == lowrank_ops.count_layer_weights(ResNet50(10, width=8), "")


def test_transfer(digits: data.Dataset) -> None:
    source, target = digits.first(320, 128).fitted(1, 28), data.gratings(320, 128)
    table = many_settings.transfer(source, target, epochs=3, batch=16, progress=False).set_index("network")
    dense, tail = 61_706, 84 * 10 + 10 + 6 * 25 + 6
    small = (6 * 3 + 25 * 3 * 8 + 8 * 16 + 16) + (60 * 520 + 120) + (42 * 204 + 84) + tail
    assert table["parameters"].to_list() == [dense, small, small, small]
    reached = table["accuracy on gratings"]
    assert (table["accuracy on digits"][:2] > 0.3).all() and table["accuracy on digits"][2:].isna().all()
    assert reached["dense"] > 0.25 and reached["factorized before training"] > 0.25  # guessing: 0.1
    assert reached["and one more epoch"] > 0.25


# ------------------------------------------------------------------------------------------------------ command lines


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    write_fashion(folder, train=20, test=10)
    return folder


@pytest.mark.parametrize(
    ("workflow", "arguments", "words"),
    [
        (vgg19, ["--cp-rank", "2", "--images", "1"], ["TensorLy's CP chains, fused", "ratio"]),
        (course_exercise, ["--epochs", "1"], ["last conv and both dense", "fuse_ leaves", "compressed_layer_size"]),
        (rank_sweep, ["--epochs", "1"], ["truncated dense weights", "latency.png"]),
        (small_networks, ["--epochs", "1"], ["min-max between", "that case is left out"]),
        (many_settings, ["--epochs", "1"], ["kaiming_normal", "Adagrad", "factorized before training"]),
    ],
    ids=lambda value: getattr(value, "__name__", "").rpartition(".")[2] or None,
)
def test_command_lines(
    workflow, arguments: list[str], words: list[str], fashion: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert workflow.main(["--data", str(fashion), "--small", *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"idx files of {fashion.name}: 20 training and 10 test images, 10 classes" in printed
    for word in words:
        assert word in printed


def test_a_folder_without_data_ends_the_command(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        small_networks.main(["--data", str(tmp_path)])
    assert ended.value.code == 2 and "none of the known data sets" in capsys.readouterr().err
