"""A plain training loop, accuracy and latency, for all workflows."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.core.bench import time_interleaved


def train(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    *,
    augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    progress: bool = True,
) -> list[float]:
    """Minimizes the cross entropy of `model`, which is left in eval mode.

    Args:
        loader: gives images and labels.
        optimizer: any, over the parameters of `model`.
        augment: turns a batch's images and labels into the images and targets to train on (mixup).
        penalty: added to the loss, for example `lambda model: lowrank_ops.frobenius_decay(model, 1e-4)`.
        progress: shows a progress bar on stderr.

    Returns:
        The mean cross entropy of each epoch, without the penalty.
    """
    losses = []
    model.train()
    with tqdm(
        total=epochs * len(loader), desc="train", unit="batch", file=sys.stderr, disable=not progress, leave=False
    ) as bar:
        for _ in range(epochs):
            total = 0.0
            for images, labels in loader:
                targets = labels
                if augment is not None:
                    images, targets = augment(images, labels)
                optimizer.zero_grad()
                entropy = F.cross_entropy(model(images), targets)
                (entropy if penalty is None else entropy + penalty(model)).backward()
                optimizer.step()
                total += float(entropy.detach())
                bar.update()
            losses.append(total / len(loader))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


@torch.inference_mode()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """The fraction of images whose largest logit is the label's; `model` is left in eval mode."""
    model.eval()
    right = count = 0
    for images, labels in loader:
        right += int((model(images).argmax(1) == labels).sum())
        count += len(labels)
    return right / count


@torch.inference_mode()
def milliseconds(models: Mapping[str, nn.Module], input: Tensor, seconds: float = 0.2) -> dict[str, float]:
    """Median time of a forward pass of each model on `input`, measured in turns."""
    runs = {name: functools.partial(model.eval(), input) for name, model in models.items()}
    return {name: timing.median * 1e3 for name, timing in time_interleaved(runs, seconds=seconds).items()}


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seeds the global random state inside the block, and restores it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
