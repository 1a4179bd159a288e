"""The layers that the benchmark runs: the fixed `quick` list (50 cells), spread over the `full` grid.

GPUs have their own quick list (42 cells), with more of the large batches that it takes to fill them.

The networks: VGG-16 (Simonyan and Zisserman, arXiv:1409.1556), the 3x3 layers of ResNet-18 and ResNet-50 (He
et al., arXiv:1512.03385) at 224x224, the text recogniser english_g2 at 64x600 and the text detector CRAFT
(Baek et al., arXiv:1904.01941) at 480x640, whose trained weights the demo uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

Pair = tuple[int, int]


@dataclass(frozen=True)
class Cell:
    """One problem: an op, a layer's shape and the ranks.

    A linear layer is a 1x1 convolution whose `batch` is the number of rows and whose image is one pixel.
    """

    op: str
    """tucker_conv2d, cp_conv2d or lowrank_linear."""
    layer: str
    S: int
    T: int
    rank: Pair | int
    """(R1, R2) for Tucker, R otherwise."""
    size: Pair = (1, 1)
    """(H, W) of the input."""
    batch: int = 1
    kernel: Pair = (3, 3)
    stride: int = 1
    padding: int = 1
    """Padding of each axis that has more than one tap."""
    dilation: int = 1

    @property
    def is_linear(self) -> bool:
        return self.op == "lowrank_linear"

    @property
    def output_size(self) -> Pair:
        """(OH, OW)."""
        if self.is_linear:
            return 1, 1
        (height, width), (KH, KW), (PH, PW) = self.size, self.kernel, self.paddings
        return self._output_length(height, KH, PH), self._output_length(width, KW, PW)

    def _output_length(self, length: int, taps: int, padding: int) -> int:
        return (length + 2 * padding - self.dilation * (taps - 1) - 1) // self.stride + 1

    @property
    def paddings(self) -> Pair:
        """Pixels of padding on either side, per axis."""
        return self.padding if self.kernel[0] > 1 else 0, self.padding if self.kernel[1] > 1 else 0

    @property
    def dense_weights(self) -> int:
        return self.T * self.S * (1 if self.is_linear else self.kernel[0] * self.kernel[1])

    @property
    def weights(self) -> int:
        """Number of values in the factors."""
        KH, KW = self.kernel
        if isinstance(self.rank, tuple):
            R1, R2 = self.rank
            return R1 * self.S + R2 * R1 * KH * KW + self.T * R2
        taps = 0 if self.is_linear else KH + KW
        return self.rank * (self.S + taps + self.T)

    @property
    def dense_flops(self) -> int:
        """Floating-point operations of the dense layer: two per multiply-add, zero padding counted as data."""
        OH, OW = self.output_size
        return 2 * self.batch * OH * OW * self.dense_weights

    @property
    def flops(self) -> int:
        """The same of the factorized block (CP: the two depthwise stages one after the other)."""
        (H, W), (OH, OW), (KH, KW) = self.size, self.output_size, self.kernel
        if isinstance(self.rank, tuple):
            R1, R2 = self.rank
            values = H * W * R1 * self.S + OH * OW * (R2 * R1 * KH * KW + self.T * R2)
        elif self.is_linear:
            values = self.rank * (self.S + self.T)
        else:
            values = self.rank * (H * W * self.S + OH * W * KH + OH * OW * (KW + self.T))
        return 2 * self.batch * values

    def bytes(self, element_size: int) -> int:
        """Bytes that have to move: input, factors, bias and output, each once."""
        (H, W), (OH, OW) = self.size, self.output_size
        return element_size * (self.batch * (H * W * self.S + OH * OW * self.T) + self.weights + self.T)

    @property
    def shape(self) -> str:
        if self.is_linear:
            return f"{self.batch}x{self.S}-{self.T}"
        (H, W), (KH, KW) = self.size, self.kernel
        text = f"{self.batch}x{self.S}-{self.T} {H}x{W} k{KH}x{KW}"
        text += f" s{self.stride}" if self.stride > 1 else ""
        return text + (f" d{self.dilation}" if self.dilation > 1 else "")

    @property
    def ranks(self) -> str:
        return f"{self.rank[0]},{self.rank[1]}" if isinstance(self.rank, tuple) else str(self.rank)

    def __str__(self) -> str:
        return f"{self.op} {self.layer} {self.shape} R{self.ranks}"


def cell_from_json(content: Mapping[str, Any]) -> Cell:
    """A cell from JSON, in which its tuples have become lists."""
    values: dict[str, Any] = {}
    for name in (field.name for field in fields(Cell)):
        values[name] = tuple(content[name]) if isinstance(content[name], list) else content[name]
    return Cell(**values)


@dataclass(frozen=True)
class Layer:
    """A convolution of a network; `cell` makes a benchmark cell of it with given ranks."""

    name: str
    S: int
    T: int
    size: Pair
    kernel: Pair = (3, 3)
    stride: int = 1
    padding: int = 1
    dilation: int = 1

    def cell(self, method: str, divisor: int, batch: int = 1) -> Cell:
        """Tucker at ranks (S / divisor, T / divisor), or CP at rank S / divisor."""
        rank = (self.S // divisor, self.T // divisor) if method == "tucker" else self.S // divisor
        return Cell(
            f"{method}_conv2d", self.name, self.S, self.T, rank, self.size, batch, self.kernel, self.stride,
            self.padding, self.dilation,
        )  # fmt: skip


VGG16 = [
    Layer("vgg16 conv1_2", 64, 64, (224, 224)),
    Layer("vgg16 conv2_1", 64, 128, (112, 112)),
    Layer("vgg16 conv2_2", 128, 128, (112, 112)),
    Layer("vgg16 conv3_1", 128, 256, (56, 56)),
    Layer("vgg16 conv3_2", 256, 256, (56, 56)),
    Layer("vgg16 conv4_1", 256, 512, (28, 28)),
    Layer("vgg16 conv4_2", 512, 512, (28, 28)),
    Layer("vgg16 conv5_1", 512, 512, (14, 14)),
]
RESNET = [
    Layer("resnet layer1", 64, 64, (56, 56)),
    Layer("resnet layer2", 128, 128, (28, 28)),
    Layer("resnet layer3", 256, 256, (14, 14)),
    Layer("resnet layer4", 512, 512, (7, 7)),
    Layer("resnet18 layer2.0", 64, 128, (56, 56), stride=2),
    Layer("resnet18 layer3.0", 128, 256, (28, 28), stride=2),
    Layer("resnet18 layer4.0", 256, 512, (14, 14), stride=2),
    Layer("resnet50 layer2.0", 128, 128, (56, 56), stride=2),
    Layer("resnet50 layer3.0", 256, 256, (28, 28), stride=2),
    Layer("resnet50 layer4.0", 512, 512, (14, 14), stride=2),
]
ENGLISH_G2 = [
    Layer("english_g2 conv2", 32, 64, (32, 300)),
    Layer("english_g2 conv3", 64, 128, (16, 150)),
    Layer("english_g2 conv4", 128, 128, (16, 150)),
    Layer("english_g2 conv5", 128, 256, (8, 150)),
    Layer("english_g2 conv6", 256, 256, (8, 150)),
    Layer("english_g2 conv7", 256, 256, (4, 150), kernel=(2, 2), padding=0),
]
CRAFT = [
    Layer("craft conv1_2", 64, 64, (480, 640)),
    Layer("craft conv2_1", 64, 128, (240, 320)),
    Layer("craft conv2_2", 128, 128, (240, 320)),
    Layer("craft conv3_1", 128, 256, (120, 160)),
    Layer("craft conv3_2", 256, 256, (120, 160)),
    Layer("craft conv4_1", 256, 512, (60, 80)),
    Layer("craft conv4_2", 512, 512, (60, 80)),
    Layer("craft conv5_1", 512, 512, (30, 40)),
    Layer("craft conv6", 512, 1024, (30, 40), padding=6, dilation=6),
    Layer("craft upconv1", 512, 256, (30, 40)),
    Layer("craft upconv2", 256, 128, (60, 80)),
    Layer("craft upconv3", 128, 64, (120, 160)),
    Layer("craft upconv4", 64, 32, (240, 320)),
    Layer("craft head1", 32, 32, (240, 320)),
    Layer("craft head3", 32, 16, (240, 320)),
]
# Long one-dimensional kernels, as images of one row: windows nearly as long as the signal.
CONV1D = [
    Layer("conv1d 128", 128, 128, (1, 64), kernel=(1, 64), padding=32),
    Layer("conv1d 1024", 1024, 128, (1, 128), kernel=(1, 64), padding=32),
]
LAYERS = {layer.name: layer for layer in VGG16 + RESNET + ENGLISH_G2 + CRAFT + CONV1D}

# Linear layers: name -> (S, T, ranks, rows). 1x1 convolutions of the networks are among them, with one row per pixel.
LINEAR = {
    "mlp": (4096, 4096, (16, 64, 256), (1, 16, 64, 256)),
    "vgg16 fc6": (25088, 4096, (16, 64, 256), (1, 8, 64, 256)),
    # 512-10 saves nothing from rank 10 on, so its ranks stay below that.
    "resnet18 fc": (512, 10, (4, 8), (1, 16, 64, 256)),
    "craft conv7 1x1": (1024, 1024, (128, 256), (1200,)),
    "craft upconv1 1x1": (1536, 512, (64, 128), (1200,)),
    "craft upconv4 1x1": (192, 64, (16, 32), (76800,)),
}


def linear(name: str, rank: int, rows: int) -> Cell:
    S, T, _, _ = LINEAR[name]
    return Cell("lowrank_linear", name, S, T, rank, batch=rows, kernel=(1, 1), padding=0)


# (layer, divisor of the channels, batch)
_QUICK_TUCKER = [
    ("resnet layer1", 4, 1), ("resnet layer2", 4, 1), ("resnet layer3", 4, 1), ("resnet layer4", 4, 1),
    ("vgg16 conv3_2", 4, 1), ("vgg16 conv1_2", 2, 1),
    ("vgg16 conv2_1", 4, 1), ("vgg16 conv2_2", 2, 1), ("vgg16 conv4_1", 4, 1), ("vgg16 conv4_2", 8, 1),
    ("vgg16 conv5_1", 2, 1),
    ("resnet layer1", 2, 8), ("resnet layer2", 8, 8), ("resnet layer3", 4, 8), ("resnet layer4", 2, 8),
    ("resnet layer3", 8, 32), ("resnet layer4", 4, 32),
    ("resnet18 layer2.0", 4, 1), ("resnet50 layer3.0", 4, 8),
    ("english_g2 conv3", 2, 1), ("english_g2 conv5", 4, 1), ("english_g2 conv7", 2, 1),
    ("craft conv2_2", 4, 1), ("craft conv6", 4, 1), ("craft head3", 2, 1),
    ("craft conv1_2", 4, 1), ("conv1d 128", 4, 1), ("conv1d 1024", 4, 8),
]  # fmt: skip
_QUICK_CP = [
    ("resnet layer1", 1, 1), ("resnet layer3", 1, 1), ("resnet layer4", 1, 1), ("vgg16 conv3_2", 1, 1),
    ("vgg16 conv2_2", 2, 1), ("vgg16 conv4_2", 2, 1),
    ("resnet layer2", 4, 1), ("resnet layer3", 4, 8), ("resnet50 layer2.0", 1, 1), ("resnet layer1", 1, 32),
    ("english_g2 conv6", 2, 1), ("craft conv4_1", 2, 1), ("craft upconv4", 4, 1),
    ("conv1d 128", 1, 1), ("craft conv1_2", 2, 1),
]  # fmt: skip
_QUICK_LINEAR = [
    ("mlp", 64, 1), ("mlp", 256, 64), ("mlp", 16, 256), ("vgg16 fc6", 256, 8), ("vgg16 fc6", 16, 1),
    ("resnet18 fc", 8, 256),
    ("craft upconv1 1x1", 128, 1200),
]  # fmt: skip


_QUICK_GPU_TUCKER = [
    ("vgg16 conv1_2", 2, 1), ("vgg16 conv2_1", 4, 8), ("vgg16 conv2_2", 2, 8), ("vgg16 conv3_2", 4, 1),
    ("vgg16 conv3_2", 4, 8), ("vgg16 conv3_2", 2, 32), ("vgg16 conv4_1", 4, 8), ("vgg16 conv4_2", 8, 32),
    ("vgg16 conv5_1", 2, 8),
    ("resnet layer1", 4, 1), ("resnet layer1", 2, 32), ("resnet layer2", 8, 32), ("resnet layer3", 4, 1),
    ("resnet layer3", 4, 8), ("resnet layer4", 4, 1), ("resnet layer4", 2, 32),
    ("resnet18 layer2.0", 4, 8), ("resnet50 layer3.0", 4, 32),
    ("english_g2 conv3", 2, 1), ("english_g2 conv5", 4, 8), ("english_g2 conv7", 2, 1),
    ("craft conv2_2", 4, 1), ("craft conv6", 4, 1), ("craft head3", 2, 1),
]  # fmt: skip
_QUICK_GPU_CP = [
    ("resnet layer1", 1, 1), ("resnet layer1", 1, 32), ("resnet layer2", 4, 32), ("resnet layer3", 1, 1),
    ("resnet layer3", 2, 32), ("resnet layer4", 1, 1), ("resnet50 layer2.0", 1, 8),
    ("vgg16 conv2_2", 2, 1), ("vgg16 conv3_2", 1, 8), ("vgg16 conv4_2", 2, 32),
    ("english_g2 conv6", 2, 1), ("craft conv4_1", 2, 1), ("craft upconv4", 4, 1),
]  # fmt: skip
_QUICK_GPU_LINEAR = [
    ("mlp", 64, 1), ("mlp", 256, 64), ("mlp", 256, 4096), ("vgg16 fc6", 256, 8), ("craft upconv4 1x1", 16, 76800),
]  # fmt: skip
GPU_ROWS = 4096  # further rows of the linear layers "mlp" and "vgg16 fc6", besides those in LINEAR

QuickConvs = list[tuple[str, int, int]]


def quick() -> list[Cell]:
    """The fixed list that every speed target on CPUs refers to."""
    return _quick(_QUICK_TUCKER, _QUICK_CP, _QUICK_LINEAR)


def quick_gpu() -> list[Cell]:
    """The fixed list that every speed target on GPUs refers to."""
    return _quick(_QUICK_GPU_TUCKER, _QUICK_GPU_CP, _QUICK_GPU_LINEAR)


def _quick(tucker: QuickConvs, cp: QuickConvs, linears: QuickConvs) -> list[Cell]:
    return [
        *(LAYERS[name].cell("tucker", divisor, batch) for name, divisor, batch in tucker),
        *(LAYERS[name].cell("cp", divisor, batch) for name, divisor, batch in cp),
        *(linear(name, rank, rows) for name, rank, rows in linears),
    ]


def full() -> list[Cell]:
    """Every layer, as Tucker with ranks S/8, S/4, S/2 and as CP with rank S/4, S/2, S, at batch 1, 8, 32 (CRAFT: 1),
    and the linear layers."""
    return list(_full())


def full_gpu() -> list[Cell]:
    """`full`, and the large linear layers with as many rows as fill a GPU."""
    return [*_full(), *(linear(name, rank, GPU_ROWS) for name in ("mlp", "vgg16 fc6") for rank in LINEAR[name][2])]


def _full() -> Iterator[Cell]:
    for method, divisors in (("tucker", (8, 4, 2)), ("cp", (4, 2, 1))):
        for layer in LAYERS.values():
            for batch in (1,) if layer.name.startswith("craft") else (1, 8, 32):
                for divisor in divisors:
                    yield layer.cell(method, divisor, batch)
    for name, (_, _, ranks, rows) in LINEAR.items():
        for rank in ranks:
            for count in rows:
                yield linear(name, rank, count)
