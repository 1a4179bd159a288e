"""Data sets as tensors (from a folder, or else scikit-learn's digits), batches and mixup.

Nothing is downloaded. Images are kept as uint8 and become float32 in [-1, 1] batch by batch.
"""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from torch.utils.data import Dataset as TorchDataset

from examples.digits import load_digits_split


@dataclass(frozen=True, eq=False)
class Split(TorchDataset):
    """Images `[N, C, H, W]`, uint8, and labels `[N]`, int64; indexed by a list, it gives a batch."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.images[index].float() / 127.5 - 1, self.labels[index]

    def first(self, count: int) -> Split:
        return Split(self.images[:count], self.labels[:count])

    def fitted(self, channels: int, size: int) -> Split:
        """With `channels` channels (grey is repeated, colours are averaged) of `size` x `size` pixels (bilinear)."""
        images = self.images
        if images.shape[1] != channels:
            grey = images.float().mean(1, keepdim=True).round().to(torch.uint8)
            images = grey.repeat(1, channels, 1, 1)
        if images.shape[2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        return Split(images, self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set for classification.

    `coarse` holds the coarse labels of the training and the test images where the data set has some.
    """

    name: str
    classes: int
    train: Split
    test: Split
    coarse: tuple[Tensor, Tensor] | None = None

    def first(self, train: int, test: int) -> Dataset:
        """Only the first images of each split."""
        coarse = None if self.coarse is None else (self.coarse[0][:train], self.coarse[1][:test])
        return replace(self, train=self.train.first(train), test=self.test.first(test), coarse=coarse)

    def fitted(self, channels: int, size: int) -> Dataset:
        """As `Split.fitted`."""
        return replace(self, train=self.train.fitted(channels, size), test=self.test.fitted(channels, size))

    def with_coarse_labels(self) -> Dataset:
        """The same images under their coarse labels.

        Raises:
            ValueError: the data set has none.
        """
        if self.coarse is None:
            raise ValueError(f"{self.name} has no coarse labels; CIFAR-100 has")
        train, test = self.coarse
        classes = int(torch.cat(self.coarse).max()) + 1
        return Dataset(
            f"{self.name}, coarse labels", classes, Split(self.train.images, train), Split(self.test.images, test)
        )


def batches(split: Split, size: int, shuffle: bool = False, seed: int = 0) -> DataLoader:
    """A loader of `[images, labels]`. With `shuffle`, each epoch has another order and no incomplete last batch."""
    size = min(size, len(split))
    order: Sampler = SequentialSampler(split)
    if shuffle:
        order = RandomSampler(split, generator=torch.Generator().manual_seed(seed))
    return DataLoader(split, sampler=BatchSampler(order, size, drop_last=shuffle), batch_size=None)


def mixup(images: Tensor, labels: Tensor, classes: int, alpha: float = 0.2) -> tuple[Tensor, Tensor]:
    """Images mixed with other images of the batch, and class probabilities (Zhang et al., arXiv:1710.09412).

    Each batch has one weight, drawn from Beta(alpha, alpha) by torch's global random state. `F.cross_entropy` takes the
    probabilities `[N, classes]` as its target.
    """
    weight = float(torch.distributions.Beta(alpha, alpha).sample())
    other = torch.randperm(len(images))
    targets = F.one_hot(labels, classes).to(images.dtype)
    return weight * images + (1 - weight) * images[other], weight * targets + (1 - weight) * targets[other]


def digits() -> Dataset:
    """scikit-learn's digits. Pairs of neighbouring digits (0 and 1, 2 and 3, ...) stand in for coarse labels."""
    splits = [Split(((images + 1) * 127.5).round().to(torch.uint8), labels) for images, labels in load_digits_split()]
    return Dataset("digits", 10, splits[0], splits[1], (splits[0].labels // 2, splits[1].labels // 2))


def gratings(train: int = 2000, test: int = 500, size: int = 28, seed: int = 0) -> Dataset:
    """Synthetic grey images of stripes in noise; the class is their direction, one of ten."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(size) / size

    def split(count: int) -> Split:
        labels = torch.randint(10, (count,), generator=generator)
        angle = labels[:, None, None] * (torch.pi / 10)
        waves, phase = (
            2 + 3 * torch.rand(count, 1, 1, generator=generator),
            torch.rand(count, 1, 1, generator=generator),
        )
        along = angle.cos() * position + angle.sin() * position[:, None]
        stripes = torch.sin(2 * torch.pi * (waves * along + phase))
        noise = torch.randn(count, size, size, generator=generator)
        pixels = (127.5 + 70 * stripes + 30 * noise).clamp(0, 255).round().to(torch.uint8)
        return Split(pixels[:, None], labels)

    return Dataset("gratings", 10, split(train), split(test))


def load(folder: str | Path | None = None) -> Dataset:
    """The data set in a folder; scikit-learn's digits if the folder is None.

    Known are CIFAR-10 and CIFAR-100 (python version), STL-10 (binary version, labelled part) and idx files, gzipped or
    not (MNIST, Fashion-MNIST), in the folder itself or in the subfolder that their archives make.

    Raises:
        FileNotFoundError: there is no such folder, or no known data set in it, or only some of a data set's files.
        ValueError: there are several data sets in it, or a file is damaged or of another kind.
    """
    if folder is None:
        return digits()
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data: there is no folder {folder}")
    found = [
        (name, place, reader)
        for name, (marker, places, reader) in _KNOWN.items()
        for place in (folder, *(folder / inner for inner in places))
        if _file(place, marker) is not None
    ]
    if not found:
        known = "; ".join(f"{name} ({marker})" for name, (marker, _, _) in _KNOWN.items())
        raise FileNotFoundError(f"--data: {folder} holds none of the known data sets and their files: {known}")
    if len(found) > 1:
        names = ", ".join(f"{name} in {place}" for name, place, _ in found)
        raise ValueError(f"--data: {folder} holds several data sets ({names}); give the folder of one")
    _, place, reader = found[0]
    return reader(place)


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and numpy arrays, and refuses all else, because a pickle can run any
    code."""

    _RECONSTRUCT = np.empty(0).__reduce__()[0]  # its module's name depends on numpy's version
    _ADMITTED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only numpy arrays and plain types are read")
        return self._ADMITTED[module, name]


def _unpickled(path: Path) -> dict[str, Any]:
    """A CIFAR batch: a dict that Python 2 pickled, its keys as text."""
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"--data: {path} is no CIFAR batch: {error}") from error


def _cifar_split(paths: Sequence[Path], key: str) -> tuple[Split, list[dict[str, Any]]]:
    contents = [_unpickled(path) for path in paths]
    for path, content in zip(paths, contents, strict=True):
        pixels: Any = content.get("data")
        labels = content.get(key)
        right = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (3072,)
        if not right or not isinstance(labels, list) or len(labels) != len(pixels):
            raise ValueError(f"--data: {path} must hold uint8 'data' [N, 3072] and as many {key!r}")
    images = torch.from_numpy(np.concatenate([content["data"] for content in contents])).reshape(-1, 3, 32, 32)
    return Split(images, _gathered(contents, key)), contents


def _gathered(contents: Sequence[dict[str, Any]], key: str) -> Tensor:
    return torch.tensor([label for content in contents for label in content[key]])


def _cifar10(folder: Path) -> Dataset:
    train, _ = _cifar_split([_needed(folder, f"data_batch_{number}") for number in range(1, 6)], "labels")
    test, _ = _cifar_split([_needed(folder, "test_batch")], "labels")
    return Dataset("CIFAR-10", 10, train, test)


def _cifar100(folder: Path) -> Dataset:
    (train, train_contents), (test, test_contents) = (
        _cifar_split([_needed(folder, file)], "fine_labels") for file in ("train", "test")
    )
    coarse = (_gathered(train_contents, "coarse_labels"), _gathered(test_contents, "coarse_labels"))
    return Dataset("CIFAR-100", 100, train, test, coarse)


def _stl10(folder: Path) -> Dataset:
    def split(part: str) -> Split:
        pixels, labels = (
            np.frombuffer(_needed(folder, f"{part}_{kind}.bin").read_bytes(), np.uint8) for kind in ("X", "y")
        )
        if len(pixels) != len(labels) * 3 * 96 * 96:
            raise ValueError(f"--data: {folder}/{part}_X.bin must hold 3x96x96 bytes for each label of {part}_y.bin")
        images = torch.from_numpy(pixels.reshape(-1, 3, 96, 96).swapaxes(2, 3).copy())  # stored column by column
        return Split(images, torch.from_numpy(labels.astype(np.int64)) - 1)  # labelled 1 to 10

    return Dataset("STL-10", 10, split("train"), split("test"))


def _idx(folder: Path) -> Dataset:
    def split(part: str) -> Split:
        images = _idx_array(_needed(folder, f"{part}-images-idx3-ubyte"), 3)
        labels = _idx_array(_needed(folder, f"{part}-labels-idx1-ubyte"), 1)
        if len(images) != len(labels):
            raise ValueError(f"--data: {folder} has {len(images)} {part} images and {len(labels)} labels")
        return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)))

    train, test = split("train"), split("t10k")
    return Dataset(f"idx files of {folder.name}", int(train.labels.max()) + 1, train, test)


def _idx_array(path: Path, axes: int) -> np.ndarray:
    """An idx file of unsigned bytes: 0, 0, 8, the number of axes, each size as a big-endian int32, the values."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise ValueError(f"--data: {path} cannot be read: {error}") from error
    header = 4 + 4 * axes
    sizes = np.frombuffer(content[4:header], ">i4") if len(content) >= header else np.zeros(axes, np.int32)
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) != header + np.prod(sizes, dtype=np.int64):
        raise ValueError(f"--data: {path} is damaged, or no idx file of unsigned bytes with {axes} axes")
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy()


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _needed(folder: Path, name: str) -> Path:
    path = _file(folder, name)
    if path is None:
        raise FileNotFoundError(f"--data: {folder} holds only a part of a data set: {name} is missing")
    return path


# name -> the file by which it is recognised, the folders that its archive makes, its reader
_KNOWN: dict[str, tuple[str, tuple[str, ...], Callable[[Path], Dataset]]] = {
    "CIFAR-10": ("data_batch_1", ("cifar-10-batches-py",), _cifar10),
    "CIFAR-100": ("train", ("cifar-100-python",), _cifar100),
    "STL-10": ("train_X.bin", ("stl10_binary",), _stl10),
    "idx": ("train-images-idx3-ubyte", ("FashionMNIST/raw", "MNIST/raw"), _idx),
}
