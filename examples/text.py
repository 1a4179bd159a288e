"""Rendered text for the recogniser and the detector, decoding, and the character error rate."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ALPHABET = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €"
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)  # of english_g2: class 1 is the first character, class 0 the CTC blank

_VOCABULARY = """
the of and to in is that for it was on are with as at be this have from or one had by but not what all were
we when your can said there use an each which she do how their if will up other about out many then them
these so some her would make like him into time has look two more write go see number no way could people my
than first water been call who oil its now find long down day did get come made may part kernel matrix
factor tensor rank network image channel weight memory cache thread vector speed measure Tucker Berlin
London Friday January April Monday invoice total street number address quickly jumping zebra fox lazy dog
box wizard quartz judge vow
"""
_WORDS = _VOCABULARY.split()


def lines_of_text(characters: int, seed: int = 0, longest: int = 28) -> list[str]:
    """Lines of random words and numbers: at least `characters` in total, at most `longest` per line."""
    generator = random.Random(seed)
    lines: list[str] = []
    line = ""
    while sum(map(len, lines)) < characters:
        word = generator.choice(_WORDS)
        if generator.random() < 0.15:
            word = str(generator.randrange(10 ** generator.randint(1, 5)))
        if generator.random() < 0.1:
            word = word.capitalize()
        if line and len(line) + 1 + len(word) > longest:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
    return lines


def render_lines(lines: Sequence[str], noise: float = 25.0, seed: int = 0, width: int = 600) -> Tensor:
    """Dark text on a light ground: `[N, 1, 64, width]` in [-1, 1].

    Each line is cropped to its text, as a detector would do, and stretched to `width`, because the recogniser sees
    characters in noisy blank ground beside the text.

    Args:
        noise: standard deviation of gaussian noise, in grey levels of 255.
    """
    font = ImageFont.load_default(size=36)
    images = np.empty((len(lines), 64, width), dtype=np.float32)
    for index, line in enumerate(lines):
        image = Image.new("L", (int(font.getlength(line)) + 16, 64), 255)
        ImageDraw.Draw(image).text((8, 32), line, fill=0, font=font, anchor="lm")
        images[index] = np.asarray(image.resize((width, 64), Image.Resampling.BICUBIC), dtype=np.float32)
    images += np.random.default_rng(seed).normal(0, noise, images.shape).astype(np.float32)
    return torch.from_numpy(images.clip(0, 255) / 127.5 - 1)[:, None]


def decode(logits: Tensor) -> list[str]:
    """Greedy CTC decoding of `[N, steps, classes]`: the best class per step, repeats joined, blanks dropped."""
    texts = []
    for best in logits.argmax(2).tolist():
        kept = [now for now, previous in zip(best, [0, *best[:-1]], strict=True) if now not in (0, previous)]
        texts.append("".join(ALPHABET[index - 1] for index in kept))
    return texts


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements from one to the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def error_rate(read: Sequence[str], truth: Sequence[str]) -> float:
    """Character error rate: edit distance over the number of true characters.

    Raises:
        ValueError: `read` and `truth` have different lengths, or there are no characters.
    """
    if len(read) != len(truth) or not any(truth):
        raise ValueError(f"error_rate: needs one reading per line of text, got {len(read)} for {len(truth)}")
    return sum(map(edit_distance, read, truth)) / sum(map(len, truth))


def render_page(height: int = 480, width: int = 640, seed: int = 0) -> Tensor:
    """A page of text, normalized like ImageNet for the detector: `[1, 3, height, width]`."""
    image = Image.new("RGB", (width, height), (250, 248, 240))
    draw = ImageDraw.Draw(image)
    top = 20
    for index, line in enumerate(lines_of_text(2000, seed=seed, longest=40)):
        size = (16, 20, 26, 34)[index % 4]
        font = ImageFont.load_default(size=size)
        draw.text((20 + 10 * (index % 3), top), line, fill=(20, 20, 60), font=font)
        top += int(size * 1.6)
        if top > height - 40:
            break
    return normalize_page(np.asarray(image, dtype=np.float32))


def normalize_page(pixels: np.ndarray) -> Tensor:
    """Converts `[H, W, 3]` in 0..255 to `[1, 3, H, W]`, normalized by ImageNet's mean and standard deviation."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy((pixels / 255 - mean) / deviation).float().permute(2, 0, 1)[None].contiguous()
