"""`python -m examples.workflows.vgg19`: the TensorLy notebook on VGG-19, with each block as one op.

Every convolution except the first becomes a Tucker-2 block at half ranks, or a CP block of a given rank. The notebook
writes Tucker ranks as `[out_channels // 2, in_channels // 2]`, output first like the weight's axes; here a pair is
`(R1, R2)`, input first. The table shows parameters before and after and their ratio, the error of the output on some
images, and the time of a forward pass. Its last rows are the nn.Sequential chains that the notebook itself builds with
TensorLy, and the same chains fused by `fuse_`.

Weights are random unless `--weights FILE` names a state_dict in torchvision's layout (vgg19-dcbb9e9d.pth). Random
weights are the hardest to approximate: at half ranks nearly all of the output is lost. Trained weights are closer to
low rank.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_ops
from examples.workflows import command
from examples.workflows.networks import VGG19, relative_error, replace_layer
from examples.workflows.training import milliseconds, seeded
from lowrank_ops.nn.counts import count_parameters

FIRST = "features.0"
MEAN, DEVIATION = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # of ImageNet


def tucker_chain(conv: nn.Conv2d, ranks: Sequence[int]) -> nn.Sequential:
    """A convolution as the notebook replaces it: 1x1, KxK, 1x1 with TensorLy's factors; `ranks` output first."""
    with tensorly.backend_context("pytorch"):
        (core, (last, first)), _ = partial_tucker(conv.weight.detach(), rank=list(ranks), modes=[0, 1], init="svd")
    window: Any = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    chain = nn.Sequential(
        nn.Conv2d(first.shape[0], first.shape[1], 1, bias=False),
        nn.Conv2d(core.shape[1], core.shape[0], bias=False, **window),
        nn.Conv2d(last.shape[1], last.shape[0], 1, bias=conv.bias is not None),
    )
    weights = (first.T[:, :, None, None], core, last[:, :, None, None])
    return _filled(chain, weights, conv.bias)


def cp_chain(conv: nn.Conv2d, rank: int) -> nn.Sequential:
    """A convolution as the notebook replaces it: 1x1, Kx1 and 1xK depthwise, 1x1 with TensorLy's factors.

    It starts from random factors: `init="svd"` needs a full SVD of the unfolding along the kernel's axes, which takes
    terabytes for 512 channels.
    """
    with tensorly.backend_context("pytorch"):
        _, (last, first, vertical, horizontal) = parafac(
            conv.weight.detach(), rank=rank, init="random", n_iter_max=20, random_state=0
        )
    (KH, KW), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    ph, pw = conv.padding  # type: ignore[str-unpack]
    chain = nn.Sequential(
        nn.Conv2d(first.shape[0], rank, 1, bias=False),
        nn.Conv2d(rank, rank, (KH, 1), (sh, 1), (ph, 0), (dh, 1), groups=rank, bias=False),  # type: ignore[arg-type]
        nn.Conv2d(rank, rank, (1, KW), (1, sw), (0, pw), (1, dw), groups=rank, bias=False),  # type: ignore[arg-type]
        nn.Conv2d(rank, last.shape[0], 1, bias=conv.bias is not None),
    )
    weights = (
        first.T[:, :, None, None],
        vertical.T[:, None, :, None],
        horizontal.T[:, None, None, :],
        last[:, :, None, None],
    )
    return _filled(chain, weights, conv.bias)


def but_the_first(model: VGG19) -> list[str]:
    """The names of all convolutions except the first."""
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and name != FIRST]


def with_chains(model: VGG19, make: Callable[[nn.Conv2d], nn.Sequential], progress: bool = True) -> VGG19:
    """A copy of the network with a chain in place of every convolution except the first."""
    chained = copied(model)
    for name in tqdm(
        but_the_first(model), desc="TensorLy", unit="layer", file=sys.stderr, disable=not progress, leave=False
    ):
        replace_layer(chained, name, make)
    return chained


def copied(model: VGG19) -> VGG19:
    """A copy that shares the linear layers: 124 of 144 million parameters, which nothing here changes."""
    return copy.deepcopy(model, {id(model.classifier): model.classifier})


def half_ranks(conv: nn.Conv2d) -> list[int]:
    """The notebook's Tucker ranks, output first."""
    return [conv.out_channels // 2, conv.in_channels // 2]


def networks(model: VGG19, cp_rank: int, progress: bool = True) -> dict[str, nn.Module]:
    """The network and its factorized variants, by name."""
    found: dict[str, nn.Module] = {"dense": model}

    def factorized(name: str, method: str, rank: int | float) -> None:
        found[name] = copied(model)
        # A fraction of 0.5 means (in // 2, out // 2); multiple=1 keeps it from being rounded up.
        lowrank_ops.factorize_(
            found[name], method, rank, multiple=1, include=but_the_first(model), progress=progress  # type: ignore[arg-type]
        )  # fmt: skip

    def chained(name: str, make: Callable[[nn.Conv2d], nn.Sequential]) -> None:
        found[name] = chain = with_chains(model, make, progress)
        fused = copied(chain)
        lowrank_ops.fuse_(fused)
        found[f"{name}, fused"] = fused

    factorized("Tucker, half ranks", "tucker", 0.5)
    factorized(f"CP, rank {cp_rank}", "cp", cp_rank)
    chained("TensorLy's Tucker chains", lambda conv: tucker_chain(conv, half_ranks(conv)))
    chained("TensorLy's CP chains", lambda conv: cp_chain(conv, cp_rank))
    return found


def run(
    model: VGG19, images: Tensor, cp_rank: int = 64, seconds: float = 0.2, progress: bool = True
) -> pandas.DataFrame:
    """The notebook on a network and some images `[N, 3, H, W]`.

    Returns:
        One row per network of `networks`: parameters of the convolutions before and after, their ratio, the ratio for
        the whole network, the output's relative error against dense, milliseconds per forward pass.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    found = networks(model.eval(), cp_rank, progress)
    for network in found.values():
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before, whole = count_parameters(model.features), count_parameters(model)
    times = milliseconds(found, images, seconds)
    rows = []
    for name, network in found.items():
        after = count_parameters(network.get_submodule("features"))
        error = relative_error(network, model, images)
        rows.append([name, before, after, before / after, whole / count_parameters(network), error, times[name]])
    columns = ["network", "parameters before", "after", "ratio", "whole network's ratio", "output error", "ms"]
    return pandas.DataFrame(rows, columns=columns)


def load_weights(model: VGG19, path: str | Path) -> None:
    """Loads the state_dict in a file; other pickles are refused.

    Raises:
        RuntimeError: names or shapes do not fit.
    """
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--weights", metavar="FILE", help="a state_dict in torchvision's layout; random without")
    parser.add_argument("--cp-rank", type=int, help="rank of the CP blocks (default 64, with --small 8)")
    parser.add_argument("--images", type=int, default=2, help="how many images to run (default 2)")
    options = parser.parse_args(arguments)
    if options.weights and options.small:
        parser.error("--small has another layout than the weights")
    dataset = command.dataset(parser, options)
    with seeded():
        model = VGG19(width=4, hidden=64) if options.small else VGG19()
    if options.weights:
        load_weights(model, options.weights)
    images, _ = dataset.test.first(options.images).fitted(3, 32 if options.small else 224)[:]
    images = (images / 2 + 0.5 - MEAN) / DEVIATION
    table = run(model, images, options.cp_rank or (8 if options.small else 64))
    command.show(table, f"VGG-19, convolutions but the first, {len(images)} images of {dataset.name}")
    return 0


def _filled(chain: nn.Sequential, weights: Sequence[Tensor], bias: Tensor | None) -> nn.Sequential:
    state = {f"{index}.weight": weight for index, weight in enumerate(weights)}
    if bias is not None:
        state[f"{len(weights) - 1}.bias"] = bias.detach()
    chain.to(weights[0].dtype).load_state_dict(state)
    return chain


if __name__ == "__main__":
    sys.exit(main())
