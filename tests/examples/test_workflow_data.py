"""The example workflows' data sets, read from folders, their batches, mixup, and the training loop."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

import torch
from torch import Tensor, nn

from examples.digits import load_digits_split
from examples.workflows import data, training
from tests.support.data_set_files import RANDOM, Malicious, write_cifar, write_fashion


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load()


def test_cifar10(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    written = [write_cifar(folder / f"data_batch_{n}", {"labels": [n, n + 1]}) for n in range(1, 6)]
    held_out = write_cifar(folder / "test_batch", {"labels": [9, 0, 3]})
    for place in (tmp_path, folder):
        found = data.load(place)
        assert (found.name, found.classes, found.coarse) == ("CIFAR-10", 10, None)
        assert found.train.labels.tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
        assert torch.equal(found.train.images.flatten(1), torch.from_numpy(np.concatenate(written)))
        assert found.test.images.shape == (3, 3, 32, 32) and found.test.labels.tolist() == [9, 0, 3]
        # A row of the file is the red plane, the green one, the blue one, each row by row.
        assert found.test.images[1, 2, 4, 5] == held_out[1, 2 * 1024 + 4 * 32 + 5]
    (folder / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="only a part of a data set: data_batch_4 is missing"):
        data.load(tmp_path)


def test_cifar100_has_coarse_labels(tmp_path: Path) -> None:
    write_cifar(tmp_path / "train", {"fine_labels": [99, 5, 7], "coarse_labels": [19, 0, 3]})
    write_cifar(tmp_path / "test", {"fine_labels": [1, 2], "coarse_labels": [4, 4]})
    found = data.load(tmp_path)
    assert (found.name, found.classes) == ("CIFAR-100", 100) and found.train.labels.tolist() == [99, 5, 7]
    coarse = found.first(2, 2).with_coarse_labels()
    assert coarse.classes == 20 and coarse.train.labels.tolist() == [19, 0] and coarse.test.labels.tolist() == [4, 4]
    assert torch.equal(coarse.train.images, found.train.images[:2])
    with pytest.raises(ValueError, match="gratings has no coarse labels"):
        data.gratings(4, 4).with_coarse_labels()


def test_pickles_that_would_run_code_are_refused(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    (tmp_path / "train").write_bytes(pickle.dumps({"data": Malicious(harm), "fine_labels": []}))
    with pytest.raises(ValueError, match=r"train is no CIFAR batch: it asks for posix.mkdir, and only numpy arrays"):
        data.load(tmp_path)
    assert not harm.exists()
    pickle.loads((tmp_path / "train").read_bytes())
    assert harm.exists(), "the pickle would have done nothing anyway"


@pytest.mark.parametrize("kind", ["truncated", "no data", "too few labels", "no dict", "empty"])
def test_damaged_cifar_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "train"
    write_cifar(path, {"fine_labels": [1, 2], "coarse_labels": [0, 0]})
    pixels = np.zeros((2, 3072), np.uint8)
    contents = {
        "truncated": path.read_bytes()[:-3000],
        "no data": pickle.dumps({"fine_labels": [1]}),
        "too few labels": pickle.dumps({"data": pixels, "fine_labels": [1]}, protocol=4),
        "no dict": pickle.dumps([1, 2]),
        "empty": b"",
    }
    path.write_bytes(contents[kind])
    with pytest.raises(ValueError, match=rf"{path} (is no CIFAR batch|must hold uint8 'data' \[N, 3072\])"):
        data.load(tmp_path)


def test_stl10(tmp_path: Path) -> None:
    images = RANDOM.integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    for part in ("train", "test"):
        (tmp_path / f"{part}_X.bin").write_bytes(images.swapaxes(2, 3).tobytes())  # column by column
        (tmp_path / f"{part}_y.bin").write_bytes(bytes([10, 1]))
    found = data.load(tmp_path)
    assert found.name == "STL-10" and found.train.labels.tolist() == [9, 0]
    assert torch.equal(found.train.images, torch.from_numpy(images))
    (tmp_path / "test_y.bin").write_bytes(bytes([10]))
    with pytest.raises(ValueError, match=r"test_X\.bin must hold 3x96x96 bytes for each label"):
        data.load(tmp_path)


@pytest.mark.parametrize(("inner", "suffix"), [("", ""), ("FashionMNIST/raw", ".gz")])
def test_idx_files(tmp_path: Path, inner: str, suffix: str) -> None:
    arrays = write_fashion(tmp_path / inner, suffix=suffix)
    found = data.load(tmp_path)
    assert torch.equal(found.train.images[:, 0], torch.from_numpy(arrays["train-images-idx3-ubyte"]))
    assert found.test.labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist() and found.classes == 6
    broken = tmp_path / inner / f"t10k-images-idx3-ubyte{suffix}"
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.* (is damaged|cannot be read)"):
        data.load(tmp_path)


def test_folders_without_a_data_set_or_with_several(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        data.load(tmp_path / "missing")
    (tmp_path / "train").mkdir()  # a folder of images, say: no CIFAR-100
    with pytest.raises(FileNotFoundError, match=r"none of the known data sets.*CIFAR-10 \(data_batch_1\).*STL-10"):
        data.load(tmp_path)
    write_fashion(tmp_path)
    write_cifar(tmp_path / "cifar-100-python" / "train", {"fine_labels": [1]})
    with pytest.raises(ValueError, match=r"several data sets \(CIFAR-100 in .*, idx in .*give the folder of one"):
        data.load(tmp_path)


def test_digits_keep_their_sixteen_grey_levels(digits: data.Dataset) -> None:
    images, labels = digits.train[:]
    assert images.shape == (1438, 1, 8, 8) and len(digits.test) == 359
    exact = load_digits_split()[0][0]
    assert (images - exact).abs().max() <= 0.5 / 127.5 + 1e-6  # half a step of uint8, and float32's rounding
    assert torch.equal(((images + 1) * 8).round(), (exact + 1) * 8)
    assert labels.unique().tolist() == list(range(10))
    assert digits.with_coarse_labels().classes == 5


def test_fitted_repeats_grey_and_averages_colours() -> None:
    grey = data.Split(torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
    assert torch.equal(grey.fitted(3, 8).images, grey.images.expand(2, 3, 8, 8))
    colours = torch.stack([torch.full((1, 8, 8), value, dtype=torch.uint8) for value in (10, 20, 60)], dim=1)
    assert (data.Split(colours, torch.zeros(1, dtype=torch.long)).fitted(1, 4).images == 30).all()
    assert grey.fitted(3, 20).images.shape == (2, 3, 20, 20)


def test_batches_shuffle_anew_and_cover_everything(digits: data.Dataset) -> None:
    split = data.Split(digits.train.images[:20], torch.arange(20))
    loader = data.batches(split, 6)
    assert [labels.tolist() for _, labels in loader] == [
        list(range(start, min(start + 6, 20))) for start in (0, 6, 12, 18)
    ]
    shuffled = data.batches(split, 6, shuffle=True)
    first, second = (torch.cat([labels for _, labels in shuffled]) for _ in range(2))
    assert len(shuffled) == 3 and len(first.unique()) == len(second.unique()) == 18 and not torch.equal(first, second)
    assert len(data.batches(split, 64, shuffle=True)) == 1  # not dropped: there would be nothing left


def test_mixup_mixes_images_and_labels_alike() -> None:
    labels = torch.arange(6)
    images = nn.functional.one_hot(labels, 6).float()[:, :, None, None]
    mixed, targets = data.mixup(images, labels, 6, alpha=5.0)
    assert torch.equal(mixed.flatten(1), targets)
    assert torch.allclose(targets.sum(1), torch.ones(6)) and (targets > 0).sum() > 6


def test_training_learns_and_leaves_the_penalty_out_of_the_losses(digits: data.Dataset) -> None:
    small = digits.first(256, 128)

    def trained(penalty: Callable[[nn.Module], Tensor] | None) -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        loader = data.batches(small.train, 32, shuffle=True)
        return training.train(model, loader, optimizer, 4, penalty=penalty, progress=False), model

    losses, model = trained(None)
    assert len(losses) == 4 and losses[-1] < losses[0] / 2
    assert training.accuracy(model, data.batches(small.test, 50)) > 0.7
    constant, _ = trained(lambda model: torch.tensor(100.0))
    assert constant == losses
    decayed, shrunk = trained(lambda model: 0.1 * sum(p.square().sum() for p in model.parameters()))
    assert decayed != losses and shrunk[1].weight.norm() < model[1].weight.norm()
    mixed = training.train(
        model, data.batches(small.train, 32), torch.optim.SGD(model.parameters(), 0.0), 1, progress=False,
        augment=lambda images, labels: (images, nn.functional.one_hot(labels, 10).float()),
    )  # fmt: skip
    with torch.no_grad():
        images, labels = small.train[:]
        assert mixed[0] == pytest.approx(float(nn.functional.cross_entropy(model(images), labels)), rel=1e-5)
