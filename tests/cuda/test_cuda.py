"""The ops on CUDA tensors: values of every kernel, streams, graphs, devices, sizes, memory, messages of failed calls.

Values, gradients and errors that do not depend on the device are in test_ops.py, test_autograd.py and test_errors.py,
which run on the GPU too where there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops
from lowrank_ops.ops.extension import _C
from tests.support.budgets import assert_gradients, assert_output, assert_within_budget
from tests.support.calls import VIEWS, output_gradient
from tests.support.problems import CONVS, DTYPES, GEOMETRIES, LAYOUTS, OPS, Call, Problem
from tests.support.simulator.cases import assert_within_tf32_budget

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(lowrank_ops.build_info()["cuda"] is None, reason="lowrank_ops was built without CUDA kernels"),
]

KERNELS = [line["name"] for line in _C.gpu_kernels()]
TF32 = "tf32"  # float32 where torch's settings allow rounding it to tf32

# Besides the geometries of test_ops.py: those that only a GPU's tiles could get wrong.
GPU_GEOMETRIES = {
    **GEOMETRIES,
    "tile edges": dict(n=3, s=72, t=200, r1=33, r2=130, h=17, w=33, kernel=(3, 3), padding=(1, 1)),
    "images share a tile": dict(n=37, s=64, t=64, r1=32, r2=32, h=7, w=7, kernel=(3, 3), padding=(1, 1)),
    "one small image": dict(n=1, s=256, t=512, r1=64, r2=64, h=7, w=7, kernel=(3, 3), padding=(1, 1)),
    "dilation lattice": dict(n=1, s=32, t=32, r1=16, r2=16, h=29, w=31, kernel=(3, 3), padding=(6, 6), dilation=(6, 6)),
    "stride 2": dict(n=2, s=64, t=128, r1=32, r2=32, h=28, w=28, kernel=(3, 3), padding=(1, 1), stride=(2, 2)),
    "ranks above a pass": dict(n=1, s=24, t=40, r1=150, r2=140, h=9, w=10, kernel=(3, 3), padding=(1, 1)),
    "channels of half vectors": dict(n=2, s=20, t=12, r1=12, r2=20, h=9, w=10, kernel=(3, 3), padding=(1, 1)),
}
LINEAR_SIZES = [(5, 4, 3), (1, 1, 1), (64, 48, 16), (130, 67, 31), (512, 1000, 96), (72, 200, 150)]


def kernels_of(op: str) -> list[tuple[str, torch.dtype | str]]:
    """Every kernel of an op with each dtype that it takes, according to the planner's word about an H100."""
    sizes, window = [2, 64, 12, 12, 64, 32, 32, 3, 3], [1, 1, 1, 1, 1, 1]
    if op == "lowrank_linear":
        sizes, window = [24, 64, 1, 1, 64, 32, 32, 1, 1], [1, 1, 0, 0, 1, 1]
    found = []
    for name in KERNELS:
        for dtype in (*DTYPES, TF32):
            tf32 = dtype == TF32
            described = (op, "float32" if tf32 else str(dtype).removeprefix("torch."), True, sizes, window, tf32)
            fitting = name.startswith(op) and not _C.plan_gpu_kernel(described, name, "H100")["reason"]
            if fitting and not (tf32 and "simt" in name):  # simt kernels treat it as float32
                found.append((name, dtype))
    return found


CONVOLUTIONS = [(op, name, dtype) for op in CONVS for name, dtype in kernels_of(op)]
LINEARS = kernels_of("lowrank_linear")


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=True)
def _no_forced_kernel() -> Iterator[None]:
    yield
    _C.force_gpu_kernel("")
    _C.forget_measurements()


def library_calls(call: Call) -> tuple[Tensor, int]:
    """The output, and the number of library convolutions and matrix products of the call: none when a fused kernel ran.

    The call before is not counted: a kernel's first use in a process checks it against the library's convolutions.
    """
    call.run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = call.run()
    names = {"aten::convolution", "aten::linear"}
    return output, sum(event.count for event in profile.key_averages() if event.key in names)


def assert_runs(name: str, call: Call) -> None:
    """Asserts that this kernel runs, without a warning, and is right."""
    _C.force_gpu_kernel(name)
    with warnings.catch_warnings(), lowrank_ops.set_policy("auto"):
        warnings.filterwarnings("error", message="lowrank_ops")
        output, calls = library_calls(call)
    if calls:
        op = getattr(lowrank_ops, call.problem.op)
        (found,) = lowrank_ops.explain(op, list(call.tensors.values()), verbose=False, **call.problem.options())
        reason = dict(found.rejections).get(name, "")
        # The sm90a kernels and the persistent one take only some problems, and fewer where tensors are slices
        # (explain() speaks of dense ones). That they run where they should is tested in test_cuda_kernels.py.
        expected = " of shared memory, this GPU gives" in reason or "takes copies of 16 bytes alone" in reason
        assert "sm90a" in name or expected, f"the chain ran: {reason}"
        pytest.skip(reason)
    if call.problem.dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        assert_within_tf32_budget(call, output, call.exact())
    else:
        assert_output(call, output)


def dtype_of(dtype: torch.dtype | str, request: pytest.FixtureRequest) -> torch.dtype:
    if dtype == TF32:
        request.getfixturevalue("tf32")
        return torch.float32
    assert isinstance(dtype, torch.dtype)
    return dtype


# ---- Values


@pytest.mark.parametrize("geometry", GPU_GEOMETRIES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("op", "name", "dtype"), CONVOLUTIONS, ids=str)
def test_convolutions(
    op: str,
    name: str,
    dtype: torch.dtype | str,
    layout: torch.memory_format,
    geometry: str,
    request: pytest.FixtureRequest,
) -> None:
    options = dict(device="cuda", dtype=dtype_of(dtype, request), layout=layout, activation="silu")
    assert_runs(name, Problem(op, **options, **GPU_GEOMETRIES[geometry]).make())


@pytest.mark.parametrize("sizes", LINEAR_SIZES)
@pytest.mark.parametrize(("name", "dtype"), LINEARS, ids=str)
def test_linear(
    name: str, dtype: torch.dtype | str, sizes: tuple[int, int, int], request: pytest.FixtureRequest
) -> None:
    s, t, r = sizes
    options = dict(device="cuda", dtype=dtype_of(dtype, request), s=s, t=t, r1=r, n=3, h=67)
    assert_runs(name, Problem("lowrank_linear", **options).make())


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("op", "name", "dtype"), CONVOLUTIONS, ids=str)
def test_views(op: str, name: str, dtype: torch.dtype | str, view: str, request: pytest.FixtureRequest) -> None:
    options = dict(device="cuda", dtype=dtype_of(dtype, request), n=2, s=24, t=40, r1=16, r2=24, h=9, w=10)
    call = Problem(op, **options, kernel=(3, 3), padding=(1, 1)).make()
    call.tensors = {name: VIEWS[view](tensor) for name, tensor in call.tensors.items()}
    assert_runs(name, call)


@pytest.mark.parametrize("view", ["sliced", "transposed", "odd offset", "every second"])
@pytest.mark.parametrize(("name", "dtype"), LINEARS, ids=str)
def test_views_of_linear(name: str, dtype: torch.dtype | str, view: str, request: pytest.FixtureRequest) -> None:
    call = Problem("lowrank_linear", device="cuda", dtype=dtype_of(dtype, request), n=3, h=20, s=24, t=40, r1=16).make()
    call.tensors = {name: VIEWS[view](tensor) for name, tensor in call.tensors.items()}
    assert_runs(name, call)


def test_a_batch_that_is_one_image_expanded() -> None:
    call = Problem("tucker_conv2d", device="cuda", n=1, s=16, t=16, r1=8, r2=8, h=9, w=9).make()
    call.tensors["input"] = call.tensors["input"].expand(5, -1, -1, -1)
    for name in (name for name in KERNELS if name.startswith("tucker_conv2d_simt")):
        assert_runs(name, call)


@pytest.mark.parametrize("op", OPS)
def test_ieee_float32_is_not_rounded_to_tf32(op: str) -> None:
    """Both the planner's word and the error of the result show it."""
    call = Problem(op, device="cuda", n=4, s=64, t=64, r1=32, r2=32, h=14, w=14).make()
    with lowrank_ops.set_policy("fused"):
        (found,) = lowrank_ops.explain(
            getattr(lowrank_ops, op), list(call.tensors.values()), verbose=False, **call.problem.options()
        )
        output, calls = library_calls(call)
    assert calls == 0 and "simt" in found.chosen["kernel"]
    assert_output(call, output)


@pytest.mark.parametrize("op", OPS)
def test_runs_are_equal_bit_by_bit(op: str) -> None:
    problem = Problem(op, device="cuda", dtype=torch.bfloat16, n=16, s=128, t=256, r1=64, r2=64, h=28, w=28)
    call = replace(problem, kernel=(3, 3), padding=(1, 1), layout=torch.channels_last).make()
    with lowrank_ops.set_policy("fused"):
        first = call.run()
        assert all(torch.equal(call.run(), first) for _ in range(200))


@pytest.mark.parametrize(("images", "stays"), [(8, True), (7, False)])
def test_the_chain_of_a_large_nchw_image_stays_in_nchw(images: int, stays: bool) -> None:
    """From 1.5 million output values on. Below, the image is copied to suit a core in channels_last."""
    options = dict(s=16, t=64, r1=24, r2=24, h=56, w=56, kernel=(3, 3), padding=(1, 1))
    call = Problem("tucker_conv2d", device="cuda", dtype=torch.bfloat16, n=images, **options).make()
    call.tensors["core"] = call.tensors["core"].contiguous(memory_format=torch.channels_last)
    with lowrank_ops.set_policy("chain"):
        call.run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            output = call.run()
    copied = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    assert any(len(shape) == 4 and shape[0] == images for shape in copied) == (not stays)
    assert_output(call, output)


# ---- Streams, graphs, devices


def large_call(op: str, **options: object) -> Call:
    return Problem(op, **{**dict(device="cuda", n=4, s=64, t=64, r1=32, r2=32, h=28, w=28), **options}).make()


@pytest.mark.parametrize("op", OPS)
def test_current_stream(op: str, fused_policy: None) -> None:
    """The op waits for a producer on the current stream, and for no work on the default stream."""
    call = large_call(op)
    call.run()  # now the kernel is checked and the plan made
    expected = call.tensors["input"].clone()
    call.tensors["input"].zero_()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second on the default stream
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        call.tensors["input"].copy_(expected)
        output = call.run()
    side.synchronize()
    assert not torch.cuda.default_stream().query(), "the default stream was waited for"
    torch.cuda.synchronize()
    assert_output(call, output)


@pytest.mark.parametrize("policy", ["auto", "fused", "chain", "measure"])
@pytest.mark.parametrize("op", OPS)
def test_cuda_graph(op: str, policy: str) -> None:
    call = large_call(op, dtype=torch.bfloat16)
    with lowrank_ops.set_policy(policy):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call.run()
    for seed in (1, 2):
        torch.manual_seed(seed)
        for tensor in call.tensors.values():
            tensor.normal_()
        output.fill_(torch.nan)
        graph.replay()
        assert_output(call, output)


def test_a_graph_of_a_problem_whose_chain_runs_in_graphs_only() -> None:
    """Called from Python such a problem runs fused. Its library convolutions must run before a graph captures them, as
    with cudnn.benchmark their first run searches for algorithms, which ends a capture."""
    problem = Problem("cp_conv2d", device="cuda", dtype=torch.bfloat16, layout=torch.channels_last, n=1, t=256)
    call = replace(problem, s=256, r1=256, h=14, w=14, kernel=(3, 3), padding=(1, 1)).make()
    former = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with lowrank_ops.set_policy("auto"):
            call.run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = call.run()
    finally:
        torch.backends.cudnn.benchmark = former
    output.fill_(torch.nan)
    graph.replay()
    assert_output(call, output)


FIRST_CALL_IN_A_GRAPH = """
import torch, lowrank_ops
lowrank_ops.set_policy({policy!r})
sizes = [(64, 96), (32, 96), (48, 32), (48,)]
x, a, b, bias = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes)
torch.nn.functional.linear(x, a)  # cuBLAS must have started before the capture
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = lowrank_ops.lowrank_linear(x, a, b, bias)
graph.replay()
expected = (x.double() @ a.double().T) @ b.double().T + bias.double()
error = ((y.double() - expected).norm() / expected.norm()).item()
assert error < 0.02, error
assert lowrank_ops.ops.extension._C.measurements() == []
print("right")
"""


def run_script(text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", text],
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize("policy", ["auto", "fused", "measure"])
def test_a_first_call_inside_a_graph(policy: str) -> None:
    """A capture allows neither checks nor timing: the chain runs, and the capture does not fail."""
    assert run_script(FIRST_CALL_IN_A_GRAPH.format(policy=policy)) == "right"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("op", OPS)
def test_the_other_gpu(op: str, fused_policy: None) -> None:
    call = large_call(op, device="cuda:1")
    assert torch.cuda.current_device() == 0
    output = call.run()
    assert output.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert_output(call, output)


@pytest.mark.parametrize("op", OPS)
def test_mixed_devices(op: str) -> None:
    problem = Problem(op, device="cuda")
    for name in problem.make().tensors:
        call = problem.make()
        call.tensors[name] = call.tensors[name].cpu()
        where = "cpu" if name == "input" else name
        with pytest.raises((ValueError, RuntimeError), match=rf"{where}.*device|device.*{where}"):
            call.run()


IMPORT = """
import ctypes, lowrank_ops
lowrank_ops.build_info(), lowrank_ops.explain(lowrank_ops.lowrank_linear, [(2, 8), (4, 8), (6, 4)], verbose=False)
context = ctypes.c_void_p()
code = ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context))
assert code == 3 or context.value is None, (code, context)  # 3: CUDA was not even started
print("no context")
"""


def test_import_creates_no_context() -> None:
    assert run_script(IMPORT) == "no context"


BROKEN = """
import torch, lowrank_ops
x, a, b = (torch.randn(size, device="cuda") for size in [(64, 96), (32, 96), (48, 32)])
lowrank_ops.set_policy("fused")
lowrank_ops.lowrank_linear(x, a, b)
try:
    torch.zeros(4, device="cuda")[torch.tensor([7], device="cuda")].cpu()  # a failed assertion in a kernel of torch
except RuntimeError:
    pass
try:
    lowrank_ops.lowrank_linear(x, a, b)
except RuntimeError as error:
    print(error)
"""


def test_an_error_of_earlier_work_is_told() -> None:
    said = run_script(BROKEN)
    for part in ("lowrank_linear", "cudaError", "[64, 96]", "lowrank_linear_simt", "CUDA_LAUNCH_BLOCKING=1"):
        assert part in said, part


# ---- Sizes


def test_empty_batch_launches_nothing() -> None:
    for op in OPS:
        call = Problem(op, device="cuda", n=0).make()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            output = call.run()
            torch.cuda.synchronize()
        assert output.numel() == 0 and output.shape == call.exact().shape
        assert not [event for event in profile.events() if "block_kernel" in event.name or "sm90a_kernel" in event.name]


def needs(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free:.0f} are free")


@pytest.mark.parametrize("family", ["sm80", "simt"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", CONVS)
def test_more_than_2_to_the_31_elements(op: str, layout: torch.memory_format, family: str) -> None:
    """The last images, whose offsets do not fit into 32 bits, are right."""
    needs(14)
    n, s, h, w = 2**31 // (64 * 128 * 128) + 5, 64, 128, 128
    problem = Problem(op, device="cuda", dtype=torch.bfloat16, layout=layout, n=2, s=s, t=s, r1=16, r2=16, h=h, w=w)
    call = replace(problem, kernel=(3, 3), padding=(1, 1)).make()
    last = call.tensors["input"]
    whole = torch.zeros((n, s, h, w), device="cuda", dtype=torch.bfloat16).to(memory_format=layout)
    whole[-2:] = last
    (name,) = [name for name in KERNELS if name.startswith(f"{op}_{family}_128x64")]
    _C.force_gpu_kernel(name)
    output, calls = library_calls(Call(call.problem, {**call.tensors, "input": whole}))
    assert calls == 0 and output.numel() > 2**31
    assert_within_budget(output[-2:], call.exact(), call.magnitude(), call.reference(torch.bfloat16))


def test_linear_of_more_than_2_to_the_31_elements() -> None:
    needs(14)
    call = Problem("lowrank_linear", device="cuda", dtype=torch.bfloat16, n=1, h=300, s=512, t=512, r1=32).make()
    whole = torch.zeros((2**31 // 512 + 300, 512), device="cuda", dtype=torch.bfloat16)
    whole[-300:] = call.tensors["input"][0]
    with lowrank_ops.set_policy("fused"):
        output, calls = library_calls(Call(call.problem, {**call.tensors, "input": whole}))
    assert calls == 0 and output.numel() > 2**31
    assert_within_budget(output[-300:][None], call.exact(), call.magnitude(), call.reference(torch.bfloat16))


# ---- Gradients


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_gradients(op: str, dtype: torch.dtype, layout: torch.memory_format, fused_policy: None) -> None:
    call = large_call(op, dtype=dtype, layout=layout, n=2, kernel=(3, 3), padding=(1, 1), activation="gelu")
    assert_gradients(call, output_gradient(call))


@pytest.mark.parametrize("op", OPS)
def test_memory_of_a_training_step(op: str, fused_policy: None) -> None:
    """Only input and factors are kept for backward. A step also needs the gradients and one chunk of
    csrc/ops/backward.cpp."""
    call = large_call(op, n=64, s=128, t=128, r1=128, r2=128, h=56, w=56, kernel=(3, 3), padding=(1, 1))
    if op == "lowrank_linear":
        call = large_call(op, n=64, h=56 * 56, s=128, t=128, r1=128)
    chunk = 256 << 20
    leaves = [tensor.requires_grad_() for tensor in call.tensors.values()]
    inputs = sum(leaf.nbytes for leaf in leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = call.run()
    assert torch.cuda.memory_allocated() - before <= output.nbytes + (1 << 20)
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(output, leaves, torch.ones_like(output))
    extra = torch.cuda.max_memory_allocated() - before - 2 * output.nbytes - inputs
    assert extra <= 3 * chunk, f"{extra / 2**20:.0f} MiB"  # two more chunks are allowed for the library's convolutions


# ---- torch


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, layout: torch.memory_format, requires_grad: bool, fused_policy: None) -> None:
    call = Problem(op, device="cuda", layout=layout, activation="silu").make()
    options = call.problem.options()
    activation = options.pop("activation")
    arguments = [tensor.requires_grad_(requires_grad) for tensor in call.tensors.values()]
    overload = getattr(torch.ops.lowrank_ops, op).default
    torch.library.opcheck(overload, (*arguments, *(list(value) for value in options.values()), activation))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_autocast(op: str, dtype: torch.dtype, fused_policy: None) -> None:
    call = large_call(op)
    with torch.autocast("cuda", dtype=dtype):
        output = call.run()
    low = Call(replace(call.problem, dtype=dtype), {name: tensor.to(dtype) for name, tensor in call.tensors.items()})
    assert_output(low, output)


def model() -> nn.Module:
    return nn.Sequential(
        lowrank_ops.TuckerConv2d(16, 32, 3, (8, 12), padding=1),
        nn.ReLU(),
        lowrank_ops.CPConv2d(32, 24, 3, 16, padding=1, stride=2),
        nn.Flatten(),
        lowrank_ops.LowRankLinear(24 * 7 * 7, 10, 8),
    ).cuda()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode: str, fused_policy: None) -> None:
    """fullgraph forbids graph breaks; reduce-overhead runs the ops inside CUDA graphs."""
    torch.use_deterministic_algorithms(False)
    net, x = model(), torch.randn(4, 16, 14, 14, device="cuda")
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    with torch.no_grad():
        expected = net(x)
        for _ in range(3):
            assert torch.equal(compiled(x).clone(), expected)


def test_measure_times_once_and_remembers() -> None:
    call = large_call("tucker_conv2d", dtype=torch.bfloat16, layout=torch.channels_last)
    with lowrank_ops.set_policy("measure"):
        first = call.run()
        assert_output(call, first)
        ((key, fastest, seconds),) = _C.measurements()
        assert torch.cuda.get_device_name() in key and "tucker_conv2d" in key
        times = dict(seconds)
        assert len(times) >= 2 and all(0 < value < 0.1 for value in times.values())
        assert times[fastest] == min(times.values())
        assert torch.equal(call.run(), first)
        assert _C.measurements() == [(key, fastest, seconds)]


def test_a_refused_kernel_gives_way_to_another() -> None:
    """After a failed check the kernel is refused and the next best runs. Refusals last as long as the process, so this
    runs in another one."""
    said = run_script(
        """
import torch, lowrank_ops
from lowrank_ops.ops.extension import _C
lowrank_ops.set_policy("fused")
x, a, b = (torch.randn(size, device="cuda") for size in [(64, 96), (32, 96), (48, 32)])
def chosen():
    return lowrank_ops.explain(lowrank_ops.lowrank_linear, [x, a, b], verbose=False)[0]
expected = lowrank_ops.lowrank_linear(x, a, b)
first = chosen().chosen["kernel"]
_C.refuse_gpu_kernel(0, first, "wrong on this GPU")
found = chosen()
assert found.chosen["kernel"] != first and (first, "wrong on this GPU") in found.rejections
assert torch.allclose(lowrank_ops.lowrank_linear(x, a, b), expected, atol=1e-4)
for line in _C.gpu_kernels():
    _C.refuse_gpu_kernel(0, line["name"], "wrong on this GPU")
assert chosen().path == "chain"
assert torch.allclose(lowrank_ops.lowrank_linear(x, a, b), expected, atol=1e-4)
print("done")
"""
    )
    assert said == "done"


def test_a_refused_launch_runs_the_chain() -> None:
    """Under "auto" with a warning, and the kernel is left out from then on; under "fused" it is an error."""
    said = run_script(
        """
import warnings
import torch, lowrank_ops
from lowrank_ops.ops.extension import _C
layer = lowrank_ops.TuckerConv2d(64, 64, 3, 16, padding=1, device="cuda", dtype=torch.bfloat16)
x = torch.randn(8, 64, 28, 28, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
def chosen():
    return lowrank_ops.explain(layer, x, verbose=False)[0]
with torch.no_grad():
    expected = layer(x)
    first = chosen()
    assert first.path == "fused", first
    _C.fail_gpu_launches(1)  # cudaErrorInvalidValue
    with lowrank_ops.set_policy("fused"):
        try:
            layer(x)
            raise SystemExit("no error")
        except RuntimeError as error:
            assert "could not be launched" in str(error) and "cudaErrorInvalidValue" in str(error), error
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = layer(x)
    assert any(first.chosen["kernel"] in str(one.message) and "left out" in str(one.message) for one in told), told
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert "its launch failed" in dict(chosen().rejections)[first.chosen["kernel"]]
print("done")
"""
    )
    assert said == "done"


def test_explain_knows_what_was_measured() -> None:
    for op in OPS:
        call = large_call(op, dtype=torch.bfloat16, layout=torch.channels_last)
        with lowrank_ops.set_policy("measure"):
            call.run()
            (found,) = lowrank_ops.explain(
                getattr(lowrank_ops, op), list(call.tensors.values()), verbose=False, **call.problem.options()
            )
        ((_, fastest, _),) = _C.measurements()
        assert found.chosen["kernel"] == fastest
        assert "measured to be slower" in dict(found.rejections).values()
        _C.forget_measurements()
