"""Well-known networks in plain PyTorch; their argument `width` makes them narrow.

At their default width, VGG-19 and ResNet-50 have torchvision's layout and parameter names, so that its weight files
load with `strict=True`.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lowrank_ops
from lowrank_ops.nn.init import Init

_VGG19 = (1, 1, 0, 2, 2, 0, 4, 4, 4, 4, 0, 8, 8, 8, 8, 0, 8, 8, 8, 8, 0)  # times the width; 0: max pooling


class VGG19(nn.Module):
    """VGG-19 (Simonyan & Zisserman, arXiv:1409.1556): 16 convolutions, 3 linear layers, 143.7 M parameters.

    Random weights are drawn as torchvision draws them. Input `[N, 3, H, W]`, H and W at least 32, output
    `[N, classes]`.
    """

    def __init__(self, classes: int = 1000, width: int = 64, hidden: int = 4096) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for times in _VGG19:
            if times == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, times * width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = times * width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 49, hidden), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(hidden, classes),
        )  # fmt: skip
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(image)).flatten(1))


class ResNet50(nn.Module):
    """ResNet-50 (He et al., arXiv:1512.03385; the stride on the 3x3 convolutions): 25.6 M parameters.

    Input `[N, 3, H, W]`, H and W at least 32, output `[N, classes]`.
    """

    def __init__(self, classes: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for stage, blocks in enumerate((3, 4, 6, 3)):
            middle = width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            layers = []
            for stride in strides:
                layers.append(_Bottleneck(channels, middle, stride))
                channels = 4 * middle
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            hidden = self.get_submodule(stage)(hidden)
        return self.fc(self.avgpool(hidden).flatten(1))


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut around them."""

    def __init__(self, channels: int, middle: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, 4 * middle, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * middle)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != 4 * middle:
            shortcut = nn.Conv2d(channels, 4 * middle, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * middle))

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.relu(self.bn1(self.conv1(input)))
        hidden = self.relu(self.bn2(self.conv2(hidden)))
        shortcut = input if self.downsample is None else self.downsample(input)
        return self.relu(self.bn3(self.conv3(hidden)) + shortcut)


class AlexNet(nn.Sequential):
    """AlexNet's layers for small images, with BatchNorm: 11x11 stride 4, 5x5, three 3x3, dense 4096-4096-1000-classes.

    All layers except the first and the last are factorized from the start, to be trained from scratch. Input
    `[N, 3, H, W]`, H and W at least 32, output `[N, classes]`.

    Args:
        rank: of the factorized layers, an int or a fraction.
        init: the initializer of their factors, as in `TuckerConv2d`. The two dense layers have PyTorch's default.
        width: channels of the first layer; all other channels and features scale with it. AlexNet's is 96.
    """

    def __init__(self, classes: int = 10, rank: int | float = 0.25, init: Init = "default", width: int = 96) -> None:
        channels = [round(width * count / 96) for count in (96, 256, 384, 384, 256)]
        features = [channels[-1] * 4, *(round(width * count / 96) for count in (4096, 4096, 1000))]

        def after(count: int) -> list[nn.Module]:
            return [nn.BatchNorm2d(count), nn.ReLU()]

        def conv(index: int, size: int) -> list[nn.Module]:
            S, T = channels[index - 1], channels[index]
            block = lowrank_ops.TuckerConv2d(S, T, size, rank, padding=size // 2, bias=False, init=init)
            return [block, *after(T)]

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, stride=2, padding=1)

        dense: list[nn.Module] = []
        for S, T in itertools.pairwise(features):
            dense += [lowrank_ops.LowRankLinear(S, T, rank, activation="relu", init=init)]
        super().__init__(
            nn.Conv2d(3, channels[0], 11, stride=4, padding=5, bias=False), *after(channels[0]), pool(),
            *conv(1, 5), pool(), *conv(2, 3), *conv(3, 3), *conv(4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            *dense, nn.Linear(features[-1], classes),
        )  # fmt: skip


class LeNet(nn.Sequential):
    """LeNet-5's layers (LeCun et al., Proc. IEEE 86 (1998)) with ReLU and max pooling.

    Input `[N, 1, 28, 28]`, output `[N, classes]`; the layers are named, the last one `head`.
    """

    def __init__(self, classes: int = 10) -> None:
        layers: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(1, 6, 5, padding=2), "relu1": nn.ReLU(), "pool1": nn.MaxPool2d(2),
            "conv2": nn.Conv2d(6, 16, 5), "relu2": nn.ReLU(), "pool2": nn.MaxPool2d(2), "flatten": nn.Flatten(),
            "dense1": nn.Linear(400, 120), "relu3": nn.ReLU(), "dense2": nn.Linear(120, 84), "relu4": nn.ReLU(),
            "head": nn.Linear(84, classes),
        }  # fmt: skip
        super().__init__(OrderedDict(layers))


def replace_layer(model: nn.Module, name: str, make: Callable[..., nn.Module]) -> None:
    """Puts `make(layer)` where the layer of that qualified name is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))


@torch.inference_mode()
def relative_error(model: nn.Module, dense: nn.Module, images: Tensor) -> float:
    """`||y - y_dense|| / ||y_dense||` of the outputs for some images."""
    expected = dense(images)
    return float((model(images) - expected).norm() / expected.norm())
