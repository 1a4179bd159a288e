"""The whole networks of `benchmarks.networks.run`: dense, and factorized with our modules.

CRAFT and english_g2 have their trained weights and the ranks of the demo (examples/tasks.py). VGG-16 (Simonyan and
Zisserman, arXiv:1409.1556) and ResNet-50 (He et al., arXiv:1512.03385) have random weights: only their times count
here. For all contenders BatchNorm is first folded into the convolutions, as the inference engines would do themselves.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lowrank_ops
from examples.networks import load_detector, load_recogniser

VGG16_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: max pooling
RESNET50_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
RANDOM_RATIO = 0.25  # ranks of the networks with random weights, as a share of the channels
VGG16_LINEAR_RANK = 256


@dataclass(frozen=True)
class Network:
    """A dense network, the same network factorized with our modules, and an input in NCHW; all in fp32."""

    dense: nn.Module
    factorized: nn.Module
    input: Tensor
    description: str


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Folds, in place, each BatchNorm that follows a convolution in an nn.Sequential; returns the model."""
    for sequential in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        keys = list(sequential._modules)
        for key, after in itertools.pairwise(keys):
            convolution, norm = sequential._modules.get(key), sequential._modules[after]
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                sequential._modules[key] = fuse_conv_bn_eval(convolution, norm)
                del sequential._modules[after]
    return model


def vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG16_WIDTHS:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    layers += [nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 4096)]
    return _random(nn.Sequential(*layers, nn.ReLU(inplace=True), nn.Linear(4096, 1000)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, and the shortcut around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_bn(channels, width, 1), nn.ReLU(inplace=True),
            *_conv_bn(width, width, 3, stride), nn.ReLU(inplace=True),
            *_conv_bn(width, 4 * width, 1),
        )  # fmt: skip
        plain = stride == 1 and channels == 4 * width
        self.around = nn.Identity() if plain else nn.Sequential(*_conv_bn(channels, 4 * width, 1, stride))

    def forward(self, input: Tensor) -> Tensor:
        output = self.body(input)
        output += self.around(input)  # in place, as in torchvision
        return output.relu_()


def resnet50() -> nn.Sequential:
    layers = [*_conv_bn(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    channels = 64
    for width, blocks in RESNET50_STAGES:
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, 2 if block == 0 and width > 64 else 1))
            channels = 4 * width
    return _random(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)))


def _conv_bn(S: int, T: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(S, T, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(T)]


def _random(model: nn.Sequential) -> nn.Sequential:
    """He's initialization: the activations keep their size through a deep network; seed 0."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model.eval()


def network(dense: nn.Module, input: Tensor, what: str, **options: Any) -> Network:
    """Folds BatchNorm, factorizes with `options` of `factorize_`, and merges activations into our modules."""
    dense = fold_batch_norm(dense).eval().requires_grad_(False)
    factorized = copy.deepcopy(dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    lowrank_ops.factorize_(factorized, progress=False, **options)
    lowrank_ops.fuse_(factorized)
    told = ", ".join(f"{name}={value}" for name, value in options.items())
    return Network(dense, factorized.requires_grad_(False), input, f"{what}; {told}")


def _craft() -> Network:
    options = {"rank": lowrank_ops.Energy(0.8), "exclude": ["basenet.slice1", "upconv4", "conv_cls"]}
    return network(load_detector(), _image(3, 480, 640), "CRAFT 480x640, trained weights", **options)


def _english_g2() -> Network:
    input = _image(1, 64, 600).clamp(-1, 1)
    return network(load_recogniser(), input, "english_g2 64x600, trained weights", rank=0.35, linear=False)


def _vgg16() -> Network:
    found = network(vgg16(), _image(3, 224, 224), "VGG-16, random weights", rank=RANDOM_RATIO, linear=False)
    # An SVD of 25088x4096 would take minutes, and the weights are random anyway.
    for name, layer in list(found.factorized.named_children()):
        if isinstance(layer, nn.Linear):
            low = lowrank_ops.LowRankLinear(layer.in_features, layer.out_features, VGG16_LINEAR_RANK)
            setattr(found.factorized, name, low.eval().requires_grad_(False))
    lowrank_ops.fuse_(found.factorized)
    return found


def _resnet50() -> Network:
    return network(resnet50(), _image(3, 224, 224), "ResNet-50, random weights", rank=RANDOM_RATIO, linear=False)


def _image(*sizes: int) -> Tensor:
    return torch.randn(1, *sizes, generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, Callable[[], Network]] = {
    "craft": _craft, "english_g2": _english_g2, "vgg16": _vgg16, "resnet50": _resnet50,
}  # fmt: skip
