"""`python -m benchmarks.studies.errors`: rounding errors of Tucker blocks, their core direct and by Winograd.

Errors are relative to the fp64 result, in the Frobenius norm, beside those of the chain; medians over seeds. Factors
are normal; inputs are normal, normal after a ReLU, or all values are positive: then nothing cancels and the budget of
float32 is tightest (`tests/support/budgets.py` has the budgets).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import lowrank_ops
from lowrank_ops import reference
from lowrank_ops.ops.extension import _C

SEEDS = 9
VALUES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {  # distribution of the input, of the factors
    "normal": (torch.randn, torch.randn),
    "relu": (lambda *shape: torch.randn(*shape).relu(), torch.randn),
    "positive": (torch.rand, torch.rand),
}
WINDOWS = {(3, 3): ("never", "2x2", "4x4"), (1, 64): ("never", "line")}


def errors(dtype: torch.dtype, values: str, kernel: tuple[int, int], rank: int, seed: int) -> dict[str, float]:
    """The relative errors of the chain and of each way to run the core, and `u |A|`, the unit of the fp32 budget."""
    torch.manual_seed(seed)
    of_input, of_factors = VALUES[values]
    channels, size = 2 * rank, (24, 24) if kernel == (3, 3) else (1, 96)
    input = of_input(2, channels, *size).to(dtype)
    made = of_factors(rank, channels), of_factors(rank, rank, *kernel), of_factors(channels, rank)
    first, core, last = (factor.to(dtype) for factor in made)
    padding = (kernel[0] // 2, kernel[1] // 2)

    def chain(change: Callable[[Tensor], Tensor]) -> Tensor:
        return reference.tucker_conv2d(change(input), change(first), change(core), change(last), padding=padding)

    exact, magnitude = chain(Tensor.double), chain(lambda tensor: tensor.double().abs())

    def relative(output: Tensor) -> float:
        return ((output.double() - exact).norm() / exact.norm()).item()

    found = {"u |A|": (torch.finfo(dtype).eps / 2 * magnitude.norm() / exact.norm()).item()}
    found["chain"] = relative(chain(lambda tensor: tensor))
    for way in WINDOWS[kernel]:
        _C.set_cpu_winograd(way)
        output = lowrank_ops.tucker_conv2d(input, first, core, last, padding=padding)
        found["direct" if way == "never" else way] = relative(output)
    _C.set_cpu_winograd("auto")
    return found


def main() -> None:
    lowrank_ops.set_policy("fused")
    for kernel in WINDOWS:
        for dtype in (torch.float32, torch.bfloat16):
            for values in VALUES:
                for rank in (8, 32, 128):
                    found = [errors(dtype, values, kernel, rank, seed) for seed in range(SEEDS)]
                    medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
                    if dtype == torch.bfloat16:
                        del medians["u |A|"]
                        medians.pop("4x4", None)  # exists in fp32 only: bf16 runs the direct core instead
                    print(
                        f"{kernel[0]}x{kernel[1]}, {str(dtype).removeprefix('torch.')}, {values}, rank {rank}: "
                        + ", ".join(f"{name} {value:.2g}" for name, value in medians.items())
                    )


if __name__ == "__main__":
    main()
