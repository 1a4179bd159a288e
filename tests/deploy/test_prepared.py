"""Weights packed once: `prepare_for_inference_`, `unprepare_`, and the ops that take packed weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops
from lowrank_ops import (
    CPConv1d,
    CPConv2d,
    LowRankLinear,
    TuckerConv1d,
    TuckerConv2d,
    prepare_for_inference_,
    unprepare_,
)
from lowrank_ops.ops.extension import _C
from lowrank_ops.runtime.torch_internals import no_values
from tests.support import changes
from tests.support.budgets import assert_output
from tests.support.calls import WINDOW, schema_options
from tests.support.changes import Change
from tests.support.problems import DTYPES, ISAS, OPS, Call, Problem

FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "TuckerConv2d": lambda: TuckerConv2d(20, 24, 3, (17, 9), padding=1, activation="relu"),
    "TuckerConv2d, stride": lambda: TuckerConv2d(20, 24, 3, 8, stride=2),
    "TuckerConv1d": lambda: TuckerConv1d(20, 24, 3, 8, padding="same"),
    "CPConv2d": lambda: CPConv2d(20, 24, 3, 19, padding=1, padding_mode="circular"),
    "CPConv1d": lambda: CPConv1d(20, 24, 3, 8),
    "LowRankLinear": lambda: LowRankLinear(20, 24, 8),
}


@pytest.fixture(params=FACTORIES)
def module(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """Modules with only one way to run Tucker's core, prepared or not, so that bits can be compared."""
    _C.set_cpu_winograd("2x2")
    yield FACTORIES[request.param]().eval()
    _C.set_cpu_winograd("auto")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def input_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = {"Conv2d": (2, 20, 7, 9), "Conv1d": (2, 20, 9), "Linear": (12, 20)}
    return torch.randn(next(size for kind, size in shape.items() if type(module).__name__.endswith(kind)), dtype=dtype)


def packed_for(call: Call) -> Tensor:
    tensors, problem = call.tensors, call.problem
    unit_window = problem.stride == problem.dilation == (1, 1)
    return _C.prepare(tensors["in_factor"], tensors.get("core"), tensors["out_factor"], unit_window)


def run_prepared(call: Call, packed: Tensor) -> Tensor:
    arguments = list(call.tensors.values())
    if not call.problem.bias:
        arguments.append(None)
    op = getattr(torch.ops.lowrank_ops, f"{call.problem.op}_prepared")
    return op(*arguments, *schema_options(call), packed)


def poison(packed: Tensor, header: int = 384) -> Tensor:
    """The packed weights with the same record but NaN for every weight: an output of NaN shows that they were used."""
    damaged = packed.clone()
    damaged[header:] = 0xFF
    return damaged


def assert_used(call: Call, packed: Tensor) -> None:
    assert run_prepared(call, poison(packed)).isnan().any()


PROBLEMS = {
    "3x3": dict(kernel=(3, 3), padding=(1, 1), n=2, h=9, w=13, s=33, r1=17, r2=66, t=70),
    "vectors": dict(kernel=(3, 3), padding=(1, 1), n=2, h=8, w=8, s=64, r1=32, r2=64, t=64),
    "line": dict(kernel=(1, 7), padding=(0, 3), n=2, h=5, w=40, s=33, r1=17, r2=66, t=70),
    "window": dict(kernel=(3, 2), s=5, r1=3, r2=2, t=4, **WINDOW),
    "one": dict(kernel=(1, 1), s=1, r1=1, r2=1, t=1, n=1, h=17, w=1),
    "rows": dict(kernel=(3, 3), n=40, h=3, w=3, s=1100, r1=520, r2=2, t=70),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("sizes", PROBLEMS)
@pytest.mark.parametrize("op", OPS)
def test_bitwise_the_ordinary_op(
    fused_policy: None,
    threads: Callable[[int], None],
    op: str,
    sizes: str,
    layout: torch.memory_format,
    dtype: torch.dtype,
) -> None:
    """With Winograd's core wherever possible and nowhere, on one thread and on three."""
    call = Problem(op, dtype=dtype, layout=layout, activation="silu", **PROBLEMS[sizes]).make()
    packed = packed_for(call)
    # Factors of ranks of one are read as they lie, but in pairs.
    in_pairs = dtype == torch.bfloat16 and _C.cpu_isa() not in ("generic", "avx2", "avx512")
    try:
        for choice in ("2x2", "4x4", "line", "never"):
            _C.set_cpu_winograd(choice)
            for count in (1, 3):
                threads(count)
                assert torch.equal(run_prepared(call, packed), call.run())
                if sizes != "one" or op == "lowrank_linear" or in_pairs:
                    assert_used(call, packed)
                else:
                    assert torch.equal(run_prepared(call, poison(packed)), call.run())
    finally:
        _C.set_cpu_winograd("auto")


@pytest.mark.parametrize(("dtype", "size", "rank"), [(torch.float32, 6, 64), (torch.bfloat16, 7, 512)], ids=str)
def test_winograd_pays_sooner_where_its_weights_are_there(
    fused_policy: None, dtype: torch.dtype, size: int, rank: int
) -> None:
    call = Problem(
        "tucker_conv2d", n=1, h=size, w=size, s=64, r1=rank, r2=rank, t=64, kernel=(3, 3), padding=(1, 1), dtype=dtype
    ).make()
    sizes = [1, 64, size, size, 64, rank, rank, 3, 3]
    name = str(dtype).removeprefix("torch.")
    plain, prepared = (
        _C.explain("tucker_conv2d", name, False, sizes, [1, 1, 1, 1, 1, 1], "none", "cpu", ready)["chosen"]["kernel"]
        for ready in (False, True)
    )
    assert "winograd" not in plain
    if _C.explain("tucker_conv2d", name, False, [9, *sizes[1:]], [1] * 6, "none", "cpu")["chosen"]["kernel"] != plain:
        assert "_winograd" in prepared  # the CPU has Winograd kernels: they run nine images
    assert_output(call, run_prepared(call, packed_for(call)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [50, 64, 150])
@pytest.mark.parametrize("rows", [1, 4, 8, 40, 300])
def test_linear_threads_change_no_bit(fused_policy: None, rows: int, rank: int, dtype: torch.dtype) -> None:
    """With fewer panels than threads, panels are cut or rows are divided among the threads."""
    call = Problem("lowrank_linear", n=rows, s=4100, r1=rank, t=130, dtype=dtype).make()
    packed, threads = packed_for(call), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        output = run_prepared(call, packed)
        assert_output(call, output)
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(output, run_prepared(call, packed)), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ISAS)
def test_slices_of_a_panel_in_every_instruction_set(fused_policy: None, isa: str) -> None:
    call = Problem("lowrank_linear", n=5, s=4100, r1=64, t=70).make()
    threads = torch.get_num_threads()
    try:
        _C.set_cpu_isa(isa)
    except ValueError as error:
        pytest.skip(f"not on this CPU: {error}")
    try:
        packed = packed_for(call)
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_output(call, run_prepared(call, packed))
    finally:
        _C.set_cpu_isa("")
        torch.set_num_threads(threads)


def test_measured_apart_from_the_ordinary_op() -> None:
    call = Problem("lowrank_linear", n=20, s=40, r1=8, t=70).make()
    packed = packed_for(call)
    _C.forget_measurements()
    with lowrank_ops.set_policy("measure"):
        call.run()
        (problem,) = [problem for problem, *_ in _C.measurements()]
        run_prepared(call, packed)
    found = {problem for problem, *_ in _C.measurements()}
    _C.forget_measurements()
    assert problem in found and len(found) == 2 and "prepared weights" not in problem
    assert "prepared weights" in next(iter(found - {problem}))


def test_the_planner_knows_that_packing_costs_nothing() -> None:
    sizes = [64, 256, 1, 1, 256, 64, 64, 1, 1]
    plain, prepared = (
        _C.explain("lowrank_linear", "float32", False, sizes, [1, 1, 0, 0, 1, 1], "none", "cpu", ready)
        for ready in (False, True)
    )
    seconds = [
        min(plan["predicted_seconds"] for plan in (found["chosen"], *found["others"]) if plan["path"] == "fused")
        for found in (plain, prepared)
    ]
    assert seconds[1] < seconds[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_of_another_instruction_set(fused_policy: None, isa: str, op: str) -> None:
    """Kernels use weights packed for their own instruction set, and pack again what was packed for another one."""
    call = Problem(op, n=20, s=40, r1=33, r2=35, t=70, kernel=(3, 3), padding=(1, 1)).make()
    before = packed_for(call)
    try:
        _C.set_cpu_isa(isa)
    except ValueError as error:
        pytest.skip(f"not on this CPU: {error}")
    try:
        for packed in (before, packed_for(call)):
            assert torch.equal(run_prepared(call, packed), call.run())
        assert_used(call, packed)
    finally:
        _C.set_cpu_isa("")


@pytest.mark.parametrize("op", OPS)
def test_policies(op: str) -> None:
    call = Problem(op, n=20, s=40, r1=8, r2=8, t=70).make()
    packed = packed_for(call)
    for policy in ("chain", "fused"):
        with lowrank_ops.set_policy(policy):
            assert torch.equal(run_prepared(call, packed), call.run())


@pytest.mark.parametrize("op", OPS)
def test_factors_that_were_not_packed(fused_policy: None, op: str) -> None:
    """Other factors, changed ones, other views of the same memory: the call packs them again."""
    call = Problem(op, n=20, s=40, r1=40, r2=40, t=40, kernel=(3, 3)).make()
    packed = poison(packed_for(call))
    names = [name for name in call.tensors if name in ("in_factor", "core", "out_factor")]
    assert run_prepared(call, packed).isnan().any()
    for name in names:
        for other in (call.tensors[name].clone(), call.tensors[name].transpose(0, 1)):
            changed = Call(call.problem, {**call.tensors, name: other})
            assert torch.equal(run_prepared(changed, packed), changed.run()), name
    with torch.inference_mode():
        inference = Call(call.problem, {name: tensor.clone() for name, tensor in call.tensors.items()})
        assert torch.equal(run_prepared(inference, packed), inference.run())
    call.tensors[names[-1]].mul_(2)
    assert torch.equal(run_prepared(call, packed), call.run())
    for nonsense in (torch.zeros(3, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8), torch.zeros(4096)):
        assert torch.equal(run_prepared(call, nonsense), call.run())


@pytest.mark.parametrize("op", OPS)
def test_a_part_of_what_was_packed_is_not_read(fused_policy: None, op: str) -> None:
    """A truncated record is not used: the kernels would read beyond its end."""
    call = Problem(op, n=20, s=40, r1=40, r2=40, t=40, kernel=(3, 3)).make()
    packed = packed_for(call)
    assert_used(call, packed)
    assert torch.equal(run_prepared(call, poison(packed)[: packed.numel() // 2]), call.run())


def factor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("factors", "error", "words"),
    [
        ((factor(4, 8, 1), None, factor(6, 4)), ValueError, r"in_factor must be \[R1, S\], got shape \[4, 8, 1\]"),
        ((factor(4, 8), factor(4, 4, 3, 3, 3), factor(6, 4)), ValueError, r"core must be \[R2, R1, KH, KW\], got"),
        ((factor(4, 8), factor(*[1] * 40), factor(6, 4)), ValueError, r"core must be \[R2, R1, KH, KW\], got"),
        ((factor(4, 8), factor(4, 4, 3), factor(6, 4)), ValueError, r"core must be \[R2, R1, KH, KW\], got"),
        ((factor(4, 8), None, factor(4)), ValueError, r"out_factor must be \[T, R2\], got shape \[4\]"),
        ((factor(4, 8), factor(4, 5, 3, 3), factor(6, 4)), ValueError, "core must have size 4 on axis 1"),
        ((factor(4, 8), factor(5, 4, 3, 3), factor(6, 4)), ValueError, "out_factor must have size 5 on axis 1"),
        ((factor(4, 8), None, factor(6, 3)), ValueError, "out_factor must have size 4 on axis 1"),
        ((factor(4, 0), None, factor(6, 4)), ValueError, "in_factor must have no axis of size 0"),
        ((factor(4, 8, dtype=torch.int8), None, factor(6, 4)), TypeError, "in_factor must be float32, .*, got Char"),
        ((factor(4, 8), None, factor(6, 4, dtype=torch.float16)), TypeError, "out_factor must have in_factor's dtype"),
        ((factor(4, 8, device="meta"), None, factor(6, 4)), ValueError, "in_factor must be a dense tensor on the CPU"),
        ((factor(4, 8).to_sparse(), None, factor(6, 4)), ValueError, "in_factor must be a dense tensor on the CPU"),
    ],
)
def test_what_cannot_be_packed_is_refused(factors: tuple, error: type[Exception], words: str) -> None:
    """The record of what was packed has room for four axes, and panels are read without further checks."""
    with pytest.raises(error, match=f"prepare: {words}"):
        _C.prepare(*factors, False)
    with torch.inference_mode():
        tensors = factor(4, 8), None, factor(6, 4)
    with pytest.raises(ValueError, match="prepare: in_factor must be no inference tensor"):
        _C.prepare(*tensors, False)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, requires_grad: bool) -> None:
    call = Problem(op, activation="silu", **({} if op == "lowrank_linear" else WINDOW)).make()
    packed = packed_for(call)
    arguments = [tensor.requires_grad_(requires_grad) for tensor in call.tensors.values()]
    overload = getattr(torch.ops.lowrank_ops, f"{op}_prepared").default
    torch.library.opcheck(overload, (*arguments, *schema_options(call), packed))


@pytest.mark.parametrize("op", OPS)
def test_gradients_tangents_autocast_and_vmap_are_the_ordinary_ops(op: str) -> None:
    call = Problem(op, n=20, kernel=(3, 3), dtype=torch.float64).make()
    packed = poison(packed_for(call))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.tensors.items()}
    output = run_prepared(Call(call.problem, leaves), packed)
    grad_output = torch.randn_like(output)
    for name in leaves:  # each alone: for the input's alone another way runs
        (gradient,) = call.gradients(grad_output, [name]).values()
        assert torch.equal(torch.autograd.grad(output, leaves[name], grad_output, retain_graph=True)[0], gradient)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(call.tensors["input"], torch.ones_like(call.tensors["input"]))
        duals = Call(call.problem, {**call.tensors, "input": dual})
        found, wanted = (torch.autograd.forward_ad.unpack_dual(y) for y in (run_prepared(duals, packed), duals.run()))
        assert torch.equal(found.primal, wanted.primal) and torch.equal(found.tangent, wanted.tangent)
    low = replace(call.problem, dtype=torch.float32).make()
    with torch.autocast("cpu", torch.bfloat16):
        output = run_prepared(low, poison(packed_for(low)))
        assert output.dtype == torch.bfloat16 and torch.equal(output, low.run())
    inputs = torch.stack([call.tensors["input"], call.tensors["input"] * 2])
    packed = packed_for(call)
    mapped = torch.vmap(lambda x: run_prepared(Call(call.problem, {**call.tensors, "input": x}), packed))(inputs)
    for x, y in zip(inputs, mapped, strict=True):
        torch.testing.assert_close(y, Call(call.problem, {**call.tensors, "input": x}).run())


# Modules ------------------------------------------------------------------------------------------------------


def damage(module: nn.Module) -> None:
    """After this, a call that uses the packed weights gives NaN."""
    module._packing = module._packing._replace(panels=poison(module._packing.panels))


def calls_prepared(module: nn.Module, x: Tensor) -> bool:
    """Whether a call uses the packed weights."""
    packing = module._packing
    if packing is None:
        return False
    damage(module)
    try:
        return bool(module(x).isnan().any())
    finally:
        module._packing = packing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules(fused_policy: None, module: nn.Module, dtype: torch.dtype) -> None:
    module = module.to(dtype)
    x = input_of(module, dtype)
    with torch.no_grad():
        plain = module(x)
    (entry,) = preparation = prepare_for_inference_(module)
    assert entry.reason is None and entry.name == "" and entry.type == type(module).__name__
    assert entry.bytes == preparation.bytes == module._packing.panels.nbytes
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(module(x), plain)
            assert calls_prepared(module, x)
    assert unprepare_(module) is module
    with torch.no_grad():
        assert torch.equal(module(x), plain) and not calls_prepared(module, x)


def test_lines_are_packed_whatever_the_window_does_along_the_height() -> None:
    options: list[dict[str, tuple[int, int]]] = [{}, {"stride": (2, 1)}, {"dilation": (3, 1)}, {"stride": (1, 2)}]
    sizes = []
    for change in options:
        module = TuckerConv2d(20, 24, (1, 9), 16, padding=(1, 4), **change).eval()
        sizes.append(prepare_for_inference_(module).bytes)
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[3] < sizes[0]  # fp32: every instruction set has lines


def test_gradients_of_a_prepared_module(module: nn.Module) -> None:
    x = input_of(module)
    wanted = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    prepare_for_inference_(module)
    found = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


CHANGES: dict[str, Change] = {
    **changes.CHANGES,
    "core": lambda module: getattr(module, "core", module.in_factor).mul_(2),
}


def test_prepared_in_inference_mode(module: nn.Module) -> None:
    """What is packed there serves calls outside, those with gradients too."""
    with torch.inference_mode():
        (layer,) = prepare_for_inference_(module)
    assert layer.reason is None and not any(factor.is_inference() for factor in module._packing.factors.values())
    module(input_of(module)).sum().backward()
    (module.weight * 1).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_factors_of_another_rank_are_noticed() -> None:
    module, other = CPConv1d(20, 24, 3, 8).eval(), CPConv1d(20, 24, 3, 6).eval()
    prepare_for_inference_(module)
    module.rank = other.rank
    for name, parameter in other.named_parameters():
        setattr(module, name, parameter)
    x = input_of(module)
    torch.testing.assert_close(module(x), other(x))


def test_adopted_factors_drop_what_was_packed(module: nn.Module) -> None:
    prepare_for_inference_(module)
    module._adopt(module.factors(), None, module, frozen=None)
    assert module._packing is None


def test_tensors_of_other_types_are_refused() -> None:
    """FSDP2's shards are such tensors; here, some without values."""
    with no_values():
        module = LowRankLinear(20, 24, 8).eval()
        (layer,) = prepare_for_inference_(module)
    assert layer.reason == (
        "its factors are of type FakeTensor, and only plain tensors are packed (FSDP2's shards: unshard() first)"
    )


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(fused_policy: None, module: nn.Module, change: str) -> None:
    """After a change the module computes the same as a copy that was never prepared."""
    prepare_for_inference_(module)
    with torch.no_grad():
        CHANGES[change](module)
        x = input_of(module, module.in_factor.dtype)
        assert not calls_prepared(module, x)
        fresh = copy.deepcopy(module)
        assert fresh._packing is None and torch.equal(module(x), fresh(x))


@pytest.mark.parametrize("change", ["load_state_dict", "dtype", "train"])
def test_what_cannot_be_used_again_is_dropped(module: nn.Module, change: str) -> None:
    prepare_for_inference_(module)
    CHANGES[change](module)
    assert module._packing is None


def test_the_memory_of_replaced_factors_is_not_given_away(module: nn.Module) -> None:
    """Otherwise other values could be stored there with the same version."""
    prepare_for_inference_(module)
    place = module.in_factor.data_ptr()
    sizes = module.in_factor.shape
    module.in_factor = None
    assert place not in {torch.empty(sizes).data_ptr() for _ in range(20)}


def test_copies_and_files_carry_nothing(module: nn.Module) -> None:
    bare = len(pickle.dumps(module))
    names = list(module.state_dict())
    prepare_for_inference_(module)
    assert list(module.state_dict()) == names and len(pickle.dumps(module)) == bare
    assert copy.deepcopy(module)._packing is None and copy.copy(module)._packing is None
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded._packing is None and module._packing is not None


def test_compiled(fused_policy: None, module: nn.Module) -> None:
    """A compiled module uses packed weights, except for a 1-D core, which it sees through a view."""
    x = input_of(module)
    torch._dynamo.reset()
    with torch.no_grad():
        plain = module(x)
        prepare_for_inference_(module)
        compiled = torch.compile(module, fullgraph=True)
        assert torch.equal(compiled(x), plain)
        damage(module)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert bool(compiled(x).isnan().any()) == (not isinstance(module, TuckerConv1d))
        unprepare_(module)
        assert torch.equal(compiled(x), plain)


def test_gradients_of_a_compiled_module(module: nn.Module) -> None:
    x = input_of(module)
    prepare_for_inference_(module)
    damage(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True)
    wanted, found = (
        torch.autograd.grad(way(x).square().sum(), list(module.parameters())) for way in (module, compiled)
    )
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("change", CHANGES)
def test_a_compiled_module_notices_changes(fused_policy: None, module: nn.Module, change: str) -> None:
    for name, parameter in list(module.named_parameters()):  # version 0, as a view made by compiled code has
        setattr(module, name, nn.Parameter(parameter.detach().clone()))
    prepare_for_inference_(module)
    damage(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        compiled(input_of(module))
        CHANGES[change](module)
        x = input_of(module, module.in_factor.dtype)
        fresh = copy.deepcopy(module)
        assert torch.equal(compiled(x), fresh(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(module: nn.Module, strict: bool) -> None:
    """Programs that may leave the process contain the ordinary op."""
    x = input_of(module)
    prepare_for_inference_(module)
    torch._dynamo.reset()
    with torch.no_grad():
        plain = module(x)
        exported = torch.export.export(module, (x,), strict=strict)
        traced = torch.jit.trace(module, x)
    assert not exported.constants and "_prepared" not in exported.graph_module.code
    assert torch.equal(exported.module()(x), plain)
    assert "_prepared" not in str(traced.inlined_graph) and torch.equal(traced(x), plain)


def test_symbolic_trace() -> None:
    model = nn.Sequential(LowRankLinear(20, 24, 8)).eval()
    prepare_for_inference_(model)

    class Inside(torch.fx.Tracer):
        def is_leaf_module(self, *args: object) -> bool:
            return False

    graph = Inside().trace(model)  # the packed weights are in no graph: a block is a leaf of any tracer
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


def test_explain_says_it(module: nn.Module) -> None:
    x = input_of(module)
    with lowrank_ops.set_policy("fused"):
        (before,) = lowrank_ops.explain(module, x, verbose=False)
        prepare_for_inference_(module)
        (after,) = lowrank_ops.explain(module, x, verbose=False)
    assert "prepare_for_inference_" in str(after) and "prepare_for_inference_" not in str(before)
    assert after.op == before.op and after.path == before.path == "fused"


def test_a_model(fused_policy: None) -> None:
    shared = LowRankLinear(8, 8, 4)
    training, inference, computed = (LowRankLinear(8, 8, 4) for _ in range(3))
    with torch.inference_mode():
        inference.in_factor = nn.Parameter(torch.ones(4, 8))
    nn.utils.parametrizations.orthogonal(computed, "in_factor")
    meta = LowRankLinear(8, 8, 4, device="meta")
    model = nn.Sequential(
        nn.Linear(8, 8), shared, shared, nn.ModuleDict({"inner": training}), inference, computed, meta
    )
    model.eval()
    training.train()
    found = prepare_for_inference_(model)
    assert [entry.name for entry in found] == ["1", "3.inner", "4", "5", "6"]
    reasons = [entry.reason for entry in found]
    assert reasons[0] is None and found[0].bytes == found.bytes > 0
    for reason, words in zip(reasons[1:], ("training mode", "inference tensors", "computed", "on meta"), strict=True):
        assert words in reason
    assert "1 (LowRankLinear): " in str(found) and "KiB packed" in str(found) and "not prepared" in str(found)
    assert [layer._packing is None for layer in (shared, training, inference)] == [False, True, True]


def test_nothing_to_prepare_and_no_module() -> None:
    assert len(prepare_for_inference_(nn.Linear(2, 2))) == 0
    assert "no factorized modules" in str(prepare_for_inference_(nn.Linear(2, 2)))
    for function in (prepare_for_inference_, unprepare_):
        with pytest.raises(TypeError, match=rf"{function.__name__}: model must be an nn.Module, got Tensor"):
            function(torch.ones(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(7, 3, 5), (130, 33, 70), (4099, 65, 20), (1031, 300, 1033)], ids=str)
def test_few_rows(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Up to eight rows of a prepared linear layer read its panels, whole or streamed, where those serve."""
    s, rank, t = sizes
    for rows in range(1, 9):
        call = Problem("lowrank_linear", n=1, h=rows, s=s, r1=rank, t=t, dtype=dtype, activation="silu").make()
        with lowrank_ops.set_policy("fused"):
            assert_output(call, run_prepared(call, packed_for(call)))
