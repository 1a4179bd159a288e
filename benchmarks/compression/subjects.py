"""The trained networks that `benchmarks.compression.run` compresses, with data to fit and other data to judge by."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops
from examples import text
from examples.networks import load_detector, load_recogniser


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network, BatchNorm folded.

    Attributes:
        calibration: batches of inputs, never scored.
        training: more batches of inputs, for distillation.
        example_input: the input on which latency is measured.
        metric: the name of the metric.
        score: `(errors, weights)` per sample of the judged data; the metric is sum(errors) / sum(weights).
        cut: how many times fewer multiplications the compressed network must have.
        samples: the judged data, in words.
        ratios: shares of the channels that are tried at equal latency.
        distillation: options of `distill_` where its defaults are not the best.
    """

    name: str
    dense: nn.Module
    calibration: list[Tensor]
    training: list[Tensor]
    example_input: Tensor
    metric: str
    score: Callable[[nn.Module], tuple[np.ndarray, np.ndarray]]
    cut: float
    samples: str
    ratios: tuple[float, ...] = (0.25, 0.35, 0.5, 0.65)
    distillation: Mapping[str, float] = field(default_factory=dict)


def load(name: str, data: Path | None) -> Subject:
    """One of "text", "craft" and "fashion".

    Raises:
        FileNotFoundError: the weights package, or Fashion-MNIST's files, are missing.
        ValueError: another name.
    """
    if name == "text":
        return text_subject()
    if name == "craft":
        return craft_subject()
    if name == "fashion":
        return fashion_subject(data)
    raise ValueError(f"the networks are text, craft and fashion, got {name!r}")


def _folded(model: nn.Module) -> nn.Module:
    lowrank_ops.fold_batchnorm_(model)
    return model.eval().requires_grad_(False)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def text_subject(characters: int = 10_000, noise: float = 25.0, hard_noise: float = 150.0) -> Subject:
    """english_g2 on rendered lines of text; half of them have so much noise that the dense network errs, too."""
    dense = _folded(load_recogniser())
    lines = text.lines_of_text(characters, seed=1)
    half = len(lines) // 2
    images = torch.cat(
        [text.render_lines(lines[:half], noise, seed=1), text.render_lines(lines[half:], hard_noise, seed=2)]
    )
    lengths = np.array(list(map(len, lines)), dtype=float)

    @torch.inference_mode()
    def score(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        read = [decoded for part in images.split(16) for decoded in text.decode(model(_channels_last(part)))]
        return np.array(list(map(text.edit_distance, read, lines)), dtype=float), lengths

    def fresh(count: int, seed: int) -> list[Tensor]:
        lines = text.lines_of_text(count * 28, seed=seed)[:count]
        levels = (noise, hard_noise)
        parts = [text.render_lines(lines[index::2], levels[index], seed=seed + index) for index in (0, 1)]
        mixed = torch.stack([part for pair in zip(*parts, strict=False) for part in pair])
        return list(mixed.split(8))

    return Subject(
        "text",
        dense,
        fresh(64, 100),
        fresh(320, 200),
        _channels_last(images[:1]),
        "character error rate",
        score,
        4.5,
        f"{lengths.sum():.0f} characters in {len(lines)} rendered lines, noise {noise:.0f} and {hard_noise:.0f} of 255",
        ratios=(0.15, 0.2, 0.25, 0.35),
    )


def craft_subject(height: int = 256, width: int = 384, pages: int = 4) -> Subject:
    """CRAFT on rendered pages: the relative error of the heat map against the dense network's."""
    dense = _folded(load_detector())
    judged = [_channels_last(text.render_page(height, width, seed=seed)) for seed in range(1, 1 + pages)]
    with torch.inference_mode():
        expected = [dense(page) for page in judged]

    @torch.inference_mode()
    def score(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        errors = [float((model(page) - map_).norm() / map_.norm()) for page, map_ in zip(judged, expected, strict=True)]
        return np.array(errors), np.ones(pages)

    return Subject(
        "craft",
        dense,
        [text.render_page(height, width, seed=seed) for seed in range(100, 104)],
        [text.render_page(height, width, seed=seed) for seed in range(200, 232)],
        judged[0],
        "relative error of the heat map",
        score,
        1.9,
        f"{pages} rendered pages of {height}x{width}",
        ratios=(0.35, 0.5),
    )


def fashion_subject(data: Path | None, epochs: int = 6) -> Subject:
    """A CNN that is trained here on Fashion-MNIST, judged by its error rate on the 10,000 test images."""
    images, labels = (read_idx(data, f"train-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    test_images, test_labels = (read_idx(data, f"t10k-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    inputs, targets = _normalized(images), torch.from_numpy(labels.astype(np.int64))
    test_inputs, truth = _normalized(test_images), torch.from_numpy(test_labels.astype(np.int64))
    dense = _folded(_trained(inputs, targets, epochs))

    @torch.inference_mode()
    def score(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        wrong = [
            model(part).argmax(1) != target
            for part, target in zip(test_inputs.split(500), truth.split(500), strict=True)
        ]
        return torch.cat(wrong).double().numpy(), np.ones(len(truth))

    return Subject(
        "fashion",
        dense,
        list(inputs[:2048].split(128)),
        list(inputs[2048:18432].split(128)),
        _channels_last(test_inputs[:32]),
        "error rate",
        score,
        8.9,
        f"{len(truth)} test images of Fashion-MNIST",
        distillation={"learning_rate": 1e-2, "temperature": 2.0},
    )


def read_idx(folder: Path | None, name: str) -> np.ndarray:
    """An array of Fashion-MNIST's idx files, packed or not. Raises FileNotFoundError if the folder does not hold it."""
    for file in [] if folder is None else sorted(folder.rglob(f"{name}*")):
        packed = file.read_bytes()
        raw = gzip.decompress(packed) if file.suffix == ".gz" else packed
        axes = raw[3]
        shape = np.frombuffer(raw, ">i4", axes, 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
    raise FileNotFoundError(
        f"{name} of Fashion-MNIST is not in {folder}: give --data FOLDER with the idx files, for example those of "
        "Debian's package (apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb FOLDER)"
    )


def _normalized(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.astype(np.float32))[:, None] / 127.5 - 1


def _trained(images: Tensor, labels: Tensor, epochs: int, batch: int = 128) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)

        def block(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

        model = nn.Sequential(
            *block(1, 32, 5, 2), *block(32, 64, 5, 1), nn.MaxPool2d(2), *block(64, 128, 3, 1), *block(128, 128, 3, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        steps = epochs * (len(images) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for chosen in order[: len(order) // batch * batch].split(batch):
                optimizer.zero_grad()
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
    return model
