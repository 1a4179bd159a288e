"""Modules that `prepare_for_inference_` has prepared on a GPU: values, when the copies are used, graphs, compiled code.

What needs no GPU is in tests/deploy/test_padded_factors.py (layout, record), tests/simulator/test_padded.py (kernels)
and tests/plan/test_gpu_prepared.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops
from lowrank_ops import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d, prepare_for_inference_
from lowrank_ops.ops.extension import _C
from tests.support.budgets import assert_output
from tests.support.calls import factors_of, schema_options
from tests.support.problems import OPS, Call, Problem

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(lowrank_ops.build_info()["cuda"] is None, reason="lowrank_ops was built without CUDA kernels"),
]

NARROW = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def _no_forced_kernel() -> Iterator[None]:
    yield
    _C.force_gpu_kernel("")
    _C.forget_measurements()


def call_for(op: str, dtype: torch.dtype = torch.bfloat16) -> Call:
    sizes = dict(n=4, s=64, t=64, r1=37, r2=21, h=20, w=20, kernel=(3, 3), padding=(1, 1))
    return Problem(op, device="cuda", dtype=dtype, layout=torch.channels_last, **sizes).make()


def packed_for(call: Call) -> Tensor:
    return _C.pad_factors(factors_of(call.tensors))


def run_prepared(call: Call, packed: Tensor) -> Tensor:
    arguments = [*call.tensors.values(), *([] if call.problem.bias else [None])]
    return getattr(torch.ops.lowrank_ops, f"{call.problem.op}_prepared")(*arguments, *schema_options(call), packed)


# ---- The ops


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("policy", ["fused", "chain", "auto"])
@pytest.mark.parametrize("op", OPS)
def test_values(op: str, policy: str, dtype: torch.dtype) -> None:
    call = call_for(op, dtype)
    with lowrank_ops.set_policy(policy):
        assert_output(call, run_prepared(call, packed_for(call)))


KERNELS = [line["name"] for line in _C.gpu_kernels() if line["family"] != "simt"]


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_of_tensor_cores_takes_every_rank(name: str) -> None:
    op = next(op for op in OPS if name.startswith(op))
    call = call_for(op)
    described = (op, "bfloat16", True, [4, 64, 20, 20, 64, 40, 40 if op != "tucker_conv2d" else 24, 3, 3])
    reason = _C.plan_gpu_kernel((*described, [1, 1, 1, 1, 1, 1], False), name, "H100")["reason"]
    if reason or ("sm90a" in name and torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip(reason or "Hopper's kernel")
    _C.force_gpu_kernel(name)
    packed = packed_for(call)
    run_prepared(call, packed)  # checks the kernel
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = run_prepared(call, packed)
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::convolution", "aten::linear", "aten::copy_", "aten::clone"}
    assert_output(call, output)


@pytest.mark.parametrize("policy", ["fused", "chain"])
@pytest.mark.parametrize("op", OPS)
def test_the_copies_are_read_while_they_fit(op: str, policy: str) -> None:
    """NaN in the copies shows who reads them: the kernels, and CP's chain, which reads the product."""
    call = call_for(op)
    packed = packed_for(call)
    packed.fill_(0xFF)
    with lowrank_ops.set_policy(policy):
        reads = policy == "fused" or op == "cp_conv2d"
        assert bool(run_prepared(call, packed).isnan().any()) == reads
        assert_output(call, run_prepared(call, packed.clone()))  # a copy has no record
        with torch.autocast("cuda", torch.float16):
            assert not run_prepared(call, packed).isnan().any()
        with torch.no_grad():
            call.tensors["out_factor"].mul_(2)
        assert_output(call, run_prepared(call, packed))


def test_gradients_are_the_ordinary_ones(fused_policy: None) -> None:
    call = call_for("tucker_conv2d", torch.float32)
    packed = packed_for(call)
    packed.fill_(0xFF)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.tensors.items()}
    output = run_prepared(Call(call.problem, leaves), packed)
    output.sum().backward()
    assert not output.isnan().any() and not any(leaf.grad.isnan().any() for leaf in leaves.values())


@pytest.mark.parametrize("op", OPS)
def test_measured_apart_from_the_ordinary_op(op: str) -> None:
    call = call_for(op)
    packed = packed_for(call)
    _C.forget_measurements()
    with lowrank_ops.set_policy("measure"):
        call.run()
        assert_output(call, run_prepared(call, packed))
    keys = [key for key, *_ in _C.measurements()]
    assert len(keys) == 2 and sum(key.endswith(" prepared weights") for key in keys) == 1


# ---- Modules

FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "TuckerConv2d": lambda: TuckerConv2d(64, 64, 3, (37, 21), padding=1, activation="relu"),
    "TuckerConv1d": lambda: TuckerConv1d(64, 64, 3, 21),
    "CPConv2d": lambda: CPConv2d(64, 64, 3, 37, padding=1),
    "CPConv1d": lambda: CPConv1d(64, 64, 3, 21),
    "LowRankLinear": lambda: LowRankLinear(64, 64, 21),
}


@pytest.fixture(params=FACTORIES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    return FACTORIES[request.param]().eval().cuda().to(torch.bfloat16)


def input_of(module: nn.Module) -> Tensor:
    shape = {"Conv2d": (2, 64, 16, 16), "Conv1d": (2, 64, 32), "Linear": (40, 64)}
    size = next(size for kind, size in shape.items() if type(module).__name__.endswith(kind))
    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def damage(module: nn.Module) -> None:
    """After this, a call that uses the copies gives NaN."""
    module._packing.panels.fill_(0xFF)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Of bfloat16 computed in two ways."""
    assert (found.float() - wanted.float()).norm() < 0.02 * wanted.float().norm()


def test_modules(module: nn.Module, fused_policy: None) -> None:
    x = input_of(module)
    with torch.no_grad():
        plain = module(x)
        (entry,) = prepare_for_inference_(module)
        assert entry.reason is None and entry.bytes == module._packing.panels.nbytes > 0
        assert_close(module(x), plain)
        with torch.inference_mode():
            assert_close(module(x), plain)
        damage(module)
        assert module(x).isnan().any()
        lowrank_ops.unprepare_(module)
        assert torch.equal(module(x), plain)


def test_a_call_waits_for_nothing(module: nn.Module, fused_policy: None) -> None:
    x = input_of(module)
    with torch.no_grad():
        prepare_for_inference_(module)
        module(x)  # checks the kernel
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(200_000_000)
            module(x)
            assert not torch.cuda.current_stream().query()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(module: nn.Module, fused_policy: None) -> None:
    x = input_of(module)
    with torch.no_grad():
        wanted = module(x)
        prepare_for_inference_(module)
        module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = module(x)
        output.fill_(torch.nan)
        graph.replay()
        assert_close(output, wanted)
        damage(module)  # the graph reads the copies
        graph.replay()
        assert output.isnan().any()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(module: nn.Module, mode: str, fused_policy: None) -> None:
    """Also as a CUDA graph of torch.compile, which reads the copies where they lie. A 1-D core is seen through a view
    there, and its module uses the factors themselves."""
    x = input_of(module)
    torch._dynamo.reset()
    with torch.no_grad():
        plain = module(x)
        prepare_for_inference_(module)
        compiled = torch.compile(module, fullgraph=True, mode=mode)
        for _ in range(3):
            assert_close(compiled(x).clone(), plain)
        damage(module)
        assert bool(compiled(x).isnan().any()) == (not isinstance(module, TuckerConv1d))
        lowrank_ops.unprepare_(module)
        for _ in range(3):
            assert_close(compiled(x).clone(), plain)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda module: module.out_factor.mul_(2),
    "load_state_dict": lambda module: module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()}),
    "to the CPU and back": lambda module: module.cpu().cuda(),
    "train": lambda module: module.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(module: nn.Module, change: str, fused_policy: None) -> None:
    prepare_for_inference_(module)
    damage(module)
    with torch.no_grad():
        CHANGES[change](module)
        assert not module(input_of(module)).isnan().any()


def test_explain_plans_the_prepared_call() -> None:
    block = TuckerConv2d(64, 64, 3, (37, 21), padding=1).eval().cuda().to(torch.bfloat16)
    prepare_for_inference_(block)
    (found,) = lowrank_ops.explain(block, (8, 64, 28, 28), device="cuda", memory_format=torch.channels_last)
    fused = [plan for plan in (found.chosen, *found.others) if plan["path"] == "fused"]
    assert fused and all("prepare_for_inference_" in plan["notes"][0] for plan in fused)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_other_gpu(fused_policy: None) -> None:
    block = TuckerConv2d(64, 64, 3, (37, 21), padding=1).eval().to("cuda:1")
    x = torch.randn(2, 64, 16, 16, device="cuda:1")
    with torch.no_grad():
        plain = block(x)
        prepare_for_inference_(block)
        assert block._packing.panels.device == x.device
        torch.testing.assert_close(block(x), plain)
