"""Factorized modules under torch's tools: torch.fx, torch.jit, FlopCounterMode, and tools that compute a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import lowrank_ops
from lowrank_ops import (
    CPConv1d,
    CPConv2d,
    LowRankLinear,
    TuckerConv1d,
    TuckerConv2d,
    factorize_,
    prepare_for_inference_,
    to_chain,
)
from lowrank_ops.nn.base import FactorizedModule

IMAGE = torch.randn(2, 5, 12, 11, generator=torch.Generator().manual_seed(0))
WINDOW: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}

# With ranks and channels that all differ: no product is another's by chance.
BLOCKS = [
    (TuckerConv2d(5, 6, (3, 2), (3, 4), **WINDOW, activation="silu"), IMAGE),
    (TuckerConv2d(5, 6, 3, (3, 4), padding="same", bias=False), IMAGE),
    (CPConv2d(5, 6, (3, 2), 4, **WINDOW, activation="hardswish"), IMAGE),
    (TuckerConv1d(5, 6, 3, (3, 4), stride=2, padding=1), IMAGE[:, :, 0]),
    (CPConv1d(5, 6, 3, 4, padding=2), IMAGE[:, :, 0]),
    (LowRankLinear(11, 6, 4, activation="relu"), IMAGE),
]
each_block = pytest.mark.parametrize(
    ("block", "input"), BLOCKS, ids=lambda value: repr(value)[:60] if isinstance(value, nn.Module) else ""
)


class Network(nn.Module):
    """Blocks at several depths, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = TuckerConv2d(5, 8, 3, 4, padding=1)
        self.body = nn.Sequential(nn.ReLU(), CPConv2d(8, 8, 3, 4, padding=1))
        self.head = LowRankLinear(8, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.body(self.stem(x)))
        return self.head(x.mean((2, 3)))


# safetensors


@each_block
def test_save_file_takes_the_state_dict(block: FactorizedModule, input: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(block, type(block).from_sequential(block.to_sequential())).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = copy.deepcopy(model)
    for module in other:
        module.reset_parameters()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for before, after in zip(model, other, strict=True):
        assert torch.equal(after(input), before(input))


def test_save_file_takes_a_factorized_models_state_dict(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(5, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 56, 8))
    report = factorize_(model, rank=0.25, linear=0.25, include=["0", "2", "4"], multiple=1, progress=False)
    assert len(report.replaced) == 3
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == model.get_parameter(name).data_ptr()  # no copy: what is written to it counts
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


# torch.fx


def test_symbolic_trace_takes_blocks_as_leaves() -> None:
    model = Network().eval()
    traced = fx.symbolic_trace(model)
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["stem", "body.0", "body.1", "body.0", "body.1", "head"]
    for batch in (IMAGE, IMAGE[:1]):
        assert torch.equal(traced(batch), model(batch))
    assert torch.equal(fx.Transformer(traced).transform()(IMAGE), model(IMAGE))
    prepare_for_inference_(model)
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(model)(IMAGE), model(IMAGE))


def test_feature_extractors_name_and_reach_blocks() -> None:
    """As torchvision's create_feature_extractor: nodes are named after the called module, and the graph is cut at
    one."""

    class NodePaths(fx.Tracer):
        def __init__(self) -> None:
            super().__init__()
            self.current = ""
            self.names: dict[str, fx.Node] = {}

        def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            before, self.current = self.current, self.path_of_module(m)
            try:
                return super().call_module(m, forward, args, kwargs)
            finally:
                self.current = before

        def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
            proxy = super().create_proxy(kind, *args, **kwargs)
            self.names.setdefault(self.current if kind == "call_module" else f"{self.current}.{kind}", proxy.node)
            return proxy

    model = Network().eval()
    tracer = NodePaths()
    graph = tracer.trace(model)
    assert {"stem", "body.0", "body.1", "head"} <= set(tracer.names)
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = (tracer.names["stem"],)
    features = fx.GraphModule(model, graph)
    features.graph.eliminate_dead_code()
    features.recompile()
    assert torch.equal(features(IMAGE), model.stem(IMAGE))


@each_block
def test_a_block_alone_has_no_model_to_be_a_leaf_of(block: FactorizedModule, input: Tensor) -> None:
    with pytest.raises(RuntimeError, match=rf"{type(block).__name__}: torch.fx .* nn.Sequential\(module\)"):
        fx.symbolic_trace(block)
    assert torch.equal(fx.symbolic_trace(nn.Sequential(block))(input), block(input))


# torch.jit


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")
@each_block
def test_script_says_what_to_use_instead(block: FactorizedModule, input: Tensor) -> None:
    model = nn.Sequential(block).eval()
    for refused in (block, model):
        with pytest.raises(RuntimeError, match=rf"{type(block).__name__}: torch.jit.script .*\.to_chain\(model\)"):
            torch.jit.script(refused)
    scripted = torch.jit.script(to_chain(model))
    torch.testing.assert_close(scripted(input), model(input))


# FlopCounterMode


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@each_block
@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
def test_flops_are_the_chains(block: FactorizedModule, input: Tensor, prepared: bool) -> None:
    model = nn.Sequential(block).eval()
    if prepared:
        prepare_for_inference_(model)
    with torch.no_grad(), lowrank_ops.set_policy("fused"):
        counted = flops(lambda: model(input))
        assert counted == flops(lambda: to_chain(model)(input)) + height_tap(block, input) > 0
    lowrank_ops.unprepare_(model)


@each_block
def test_flops_of_backward(block: FactorizedModule, input: Tensor) -> None:
    """Both gradients of each product, as torch counts them, and the earlier products that are computed again."""
    stages = [
        flops(lambda layer=layer, x=x: layer(x))
        for layer, x in zip(block.to_sequential(), stage_inputs(block, input), strict=True)
        if not list(layer.children()) and list(layer.parameters())
    ]
    if height_tap(block, input):
        stages.insert(1, height_tap(block, input))
    forward = sum(stages)
    again = forward if block.activation != "none" else forward - stages[-1]
    expected = forward + again + 2 * forward - height_tap(block, input)  # that is no parameter
    x = input.clone().requires_grad_()
    assert flops(lambda: block(x).sum().backward()) == expected
    assert flops(lambda: block(input).sum().backward()) == expected - stages[0]


def height_tap(block: FactorizedModule, input: Tensor) -> int:
    """The product with the one-tap height factor of a 1-D CP block, which its chain does not have."""
    return 2 * block.rank * input.shape[0] * input.shape[2] if isinstance(block, CPConv1d) else 0


def stage_inputs(block: FactorizedModule, input: Tensor) -> list[Tensor]:
    inputs = [input]
    for layer in block.to_sequential():
        inputs.append(layer(inputs[-1]))
    return inputs[:-1]


def test_flops_by_module() -> None:
    model = Network().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(IMAGE)
    found = counter.get_flop_counts()
    assert sum(found["Network.stem"].values()) == 2 * 2 * 12 * 11 * (5 * 4 + 9 * 4 * 4 + 4 * 8)
    assert sum(found["Network.head"].values()) == 2 * 2 * (8 * 2 + 2 * 3)


# Computed weights

TOOLS: dict[str, Callable[[nn.Module], object]] = {
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),  # type: ignore[no-untyped-call]
    "pruned twice": lambda layer: (
        prune.l1_unstructured(layer, "weight", 0.5),  # type: ignore[no-untyped-call]
        prune.random_unstructured(layer, "weight", 0.5),  # type: ignore[no-untyped-call]
        prune.random_unstructured(layer, "bias", 0.5),  # type: ignore[no-untyped-call]
    ),
    "bias": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the old ones
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 6), lambda: nn.Conv2d(8, 6, 3)], ids=["Linear", "Conv2d"])
def test_the_hint_names_the_calls_that_help(make: Callable[[], Any], tool: str) -> None:
    layer = make()
    model = nn.Sequential(layer)
    TOOLS[tool](layer)
    if tool != "bias":
        model(torch.randn(2, 8, 8, 8))
    (row,) = factorize_(model, rank=2, linear=2, progress=False)
    assert row.reason is not None
    problem, _, calls = row.reason.partition("make it permanent first: ")
    assert "computed at each call" in problem
    for call in calls.split("), "):
        eval(f"{call.removesuffix(')')})", {"torch": torch, "layer": layer})
    with torch.no_grad():
        expected = layer.weight.clone()
    kind, rank = (LowRankLinear.from_linear, 6) if isinstance(layer, nn.Linear) else (TuckerConv2d.from_conv2d, (8, 6))
    torch.testing.assert_close(kind(layer, rank).to_dense().weight, expected, rtol=0, atol=1e-5)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_hint_for_a_stage_of_a_chain_and_for_a_factor() -> None:
    chain = TuckerConv2d(8, 6, 3, 4).to_sequential()
    nn.utils.weight_norm(chain[1])
    with pytest.raises(
        lowrank_ops.NotOneOp, match=r"stage 2 of 3: .* torch.nn.utils.remove_weight_norm\(layer, 'weight'\)"
    ):
        TuckerConv2d.from_sequential(chain)
    block = LowRankLinear(8, 6, 4).eval()
    prune.l1_unstructured(block, "in_factor", 0.5)  # type: ignore[no-untyped-call]
    (prepared,) = prepare_for_inference_(block)
    assert prepared.reason is not None and "torch.nn.utils.prune.remove(layer, 'in_factor')" in prepared.reason
