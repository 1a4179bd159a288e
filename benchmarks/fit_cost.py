"""`python -m benchmarks.fit_cost RESULTS.json ...`: the cost model's constants from benchmark results.

Reads files written by `benchmarks.run --peers chain forced --json`, fits for each group of cells the nanoseconds that a
feature costs, fused and as a chain, and writes csrc/plan/cost_constants.inc. The fit is non-negative least squares on
relative errors. What it is judged by is the regret: how much longer the paths that the model picks take in all than the
faster path of every cell. Times are fitted path by path, and their small errors decide where both are close: so the
chain's constants are scaled at last by the factor of least regret.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls  # type: ignore[import-untyped]

from benchmarks.bench import geometric_mean

CONSTANTS = Path(__file__).parent.parent / "csrc" / "plan" / "cost_constants.inc"
GROUPS = {
    "kConvFloat32": ("conv", "float32"),
    "kConvBFloat16": ("conv", "bfloat16"),
    "kLinearFloat32": ("linear", "float32"),
    "kLinearBFloat16": ("linear", "bfloat16"),
}
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """A cell: the features and the measured nanoseconds of both paths."""

    name: str
    group: str
    fused_features: Vector
    chain_features: Vector
    fused: float
    chain: float


@dataclass(frozen=True)
class Constants:
    """Nanoseconds for each feature (csrc/plan/cost.h), on either path."""

    fused: Vector
    chain: Vector


def read(path: str | Path) -> list[Observation]:
    """The cells of a CPU's results file that ran both paths.

    Raises:
        ValueError: a GPU's file.
    """
    content = json.loads(Path(path).read_text())
    if "device" in content:
        raise ValueError(f"fit_cost: {path} is of {content['device']['name']}; the constants are a CPU's")
    found = []
    for cell in content["cells"]:
        times = {name: contender["median_us"] * 1e3 for name, contender in cell["contenders"].items()}
        kind = "linear" if cell["op"] == "lowrank_linear" else "conv"
        group = next((name for name, key in GROUPS.items() if key == (kind, cell["dtype"])), None)
        chain = times.get("chain" if kind == "linear" else f"chain {content['layout']}")
        fused = times.get("fused (forced)", times["fused"] if cell["plan"].startswith("fused") else None)
        features = cell["features"]
        if group is None or chain is None or fused is None or len(features) < 2:
            continue
        vectors = {path: np.array(values) for path, values in features.items()}
        name = f"{cell['op']} {cell['shape']} {cell['dtype']}"
        found.append(Observation(name, group, vectors["fused"], vectors["chain"], fused, chain))
    return found


def solve(features: Iterable[Vector], times: Iterable[float]) -> Vector:
    """Non-negative constants with the least squared relative error."""
    times = np.array(list(times))
    rows = np.array(list(features)) / times[:, None]
    scale = np.maximum(rows.max(axis=0), 1e-30)
    found, _ = nnls(rows / scale, np.ones(len(times)))
    return np.asarray(found / scale)


def fit(observations: Sequence[Observation]) -> Constants:
    """Non-negative constants with the least squared relative error of both paths' times, then of least regret."""
    fused = solve((o.fused_features for o in observations), (o.fused for o in observations))
    chain = solve((o.chain_features for o in observations), (o.chain for o in observations))
    scales = np.arange(0.8, 1.2501, 0.01)
    regrets = [regret(observations, Constants(fused, chain * scale)) for scale in scales]
    # In the middle of the scales that are as good as the best: nothing was measured that decides between them.
    best = scales[np.array(regrets) <= min(regrets) + 1e-4]
    return Constants(fused, chain * float(np.median(best)))


def takes_chain(observation: Observation, constants: Constants) -> bool:
    return float(observation.chain_features @ constants.chain) < float(observation.fused_features @ constants.fused)


def regret(observations: Sequence[Observation], constants: Constants) -> float:
    """Geometric mean over the cells of (time of the path picked / time of the faster path), minus 1."""
    ratios = []
    for o in observations:
        picked = o.chain if takes_chain(o, constants) else o.fused
        ratios.append(picked / min(o.chain, o.fused))
    return geometric_mean(ratios) - 1


def parse(text: str) -> dict[str, Constants]:
    """The constants in cost_constants.inc."""
    found = {}
    for name, fused, chain in re.findall(r"Constants (\w+) = \{\{([^}]*)\}, \{([^}]*)\}\};", text):
        found[name] = Constants(*(np.array([float(x) for x in values.split(",")]) for values in (fused, chain)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit_cost", description=__doc__)
    parser.add_argument("results", nargs="+")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args(arguments)
    observations = [o for path in options.results for o in read(path)]
    cpus = sorted({json.loads(Path(path).read_text())["machine"]["cpu"] for path in options.results})
    lines = [
        "// Nanoseconds for each feature of cost.h: {fused}, {chain}. Written by benchmarks/fit_cost.py; measured on",
        f"// {', '.join(cpus)}. Do not edit.",
    ]
    for name in GROUPS:
        group = [o for o in observations if o.group == name]
        constants = fit(group)
        wrong = [o for o in group if takes_chain(o, constants) != (o.chain < o.fused)]
        always = regret(group, Constants(constants.fused * 0, constants.chain + 1))
        print(
            f"{name}: {len(group)} cells, regret {regret(group, constants):.2%} (always fused: {always:.2%}), "
            f"{len(wrong)} decided for the slower path"
        )
        for o in wrong:
            print(f"    {o.name}: fused {o.fused / 1e3:.1f} us, chain {o.chain / 1e3:.1f} us")
        numbers = (
            "{" + ", ".join(f"{value:.4g}" for value in vector) + "}" for vector in (constants.fused, constants.chain)
        )
        lines.append(f"static const Constants {name} = {{{', '.join(numbers)}}};")
    if not options.dry_run:
        CONSTANTS.write_text("\n".join(lines) + "\n")
        print(f"wrote {CONSTANTS}")


if __name__ == "__main__":
    main()
