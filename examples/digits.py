"""scikit-learn's 1,797 handwritten digits of 8x8 pixels, which ship inside the package."""

from __future__ import annotations

import torch
from torch import Tensor


def load_digits_split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Four fifths of the digits for training and a held-out fifth; the split is always the same.

    Returns:
        `(images, labels)` of each part: images `[N, 1, 8, 8]`, float32 in [-1, 1], and labels `[N]`, int64.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
    return (images[training], labels[training]), (images[held_out], labels[held_out])
